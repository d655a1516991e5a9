"""Times that something may be said about: contenders take turns, other work on the machine is watched, and the words of
a comparison are chosen by what was measured.

    times = take_turns({"engine": lambda: ..., "pytorch": lambda: ...})    # each call returns its seconds
    print(compare(times, "engine", "pytorch", faster="...", equal="...", slower="..."))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helpers.bench.claims import ratio, times
from helpers.bench.records import STEADY
from helpers.errors import InputError, shown
from helpers.machine import hardware
from helpers.machine.load import BUSY, OtherWork

Samples = Mapping[str, Sequence[float]]
ALIKE = 1.05  # a smaller difference is called none: it need not have the cause that the text explains


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int = 7) -> dict[str, list[float]]:
    """The seconds that each call returns, one of each in every round; a first round warms up and does not count.

    Where other work disturbed the rounds, it says so.
    """
    for name, call in contenders.items():
        if not isinstance(took := call(), (int, float)):
            raise InputError(
                f"What is timed as {name!r} returns {shown(took)}, and no seconds.",
                fix="Let it return how long it took: lambda: seconds(call).",
            )
    other_work = OtherWork()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(call())
    busy, cores = other_work.cores(), hardware.free_cores()
    if busy > BUSY * cores:
        print(f"Busy: other work kept {busy:.1f} of {cores} cores. Close it, and run this cell again.")
    return samples


def seconds(call: Callable[..., Any], *arguments: Any, repeats: int = 1) -> float:
    """How long one call takes; with repeats, in the mean of so many: what takes microseconds needs thousands."""
    start = time.perf_counter()
    for _ in range(repeats):
        call(*arguments)
    return (time.perf_counter() - start) / repeats


def compare(samples: Samples, name: str, other: str, *, faster: str = "", equal: str = "", slower: str = "") -> str:
    """A sentence that says how `name` does beside `other`, and the explanation that goes with it.

    The ratio is an interval, round by round. It is "faster" or "slower" only where the whole of it is on that side, and
    "equal" only where it is narrow: where it is not, nothing is explained.
    """
    for each in (name, other):
        if isinstance(samples.get(each), (int, float)):
            fix = "Give what take_turns measured, all samples of each, and no medians."
            raise InputError(f"{shown(samples[each])} is one number, and no row of times of {each!r}.", fix=fix)
        if not samples.get(each) or min(samples[each]) <= 0:
            raise InputError(
                f"There are no times of {each!r} to compare.",
                cause="It was not measured; or its answers have one token, and so a time per token of 0.",
                fix="Let take_turns measure both, with answers of two tokens or more.",
            )
    speed = ratio(samples[other], samples[name])
    if speed[0] > ALIKE:
        return f"{name} is {times(speed)} as fast as {other}. {faster}".rstrip()
    if speed[1] < 1 / ALIKE:
        return f"{name} takes {times((1 / speed[1], 1 / speed[0]))} as long as {other}. {slower}".rstrip()
    figure = f"(ratio {speed[0]:.2f} to {speed[1]:.2f})"
    if max(speed[1], 1 / speed[0]) > STEADY:
        return f"These runs differ too much to tell {name} and {other} apart {figure}. Run this cell again."
    return f"There is no difference between {name} and {other} beyond that of the runs {figure}. {equal}".rstrip()
