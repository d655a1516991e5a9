"""Notebook 08: troubles with machines, builds and environments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import expect, judge, same_as
from helpers.course.values import alone, choice, number, whole, within
from helpers.machine.doctor import OLDEST_DRIVER

if TYPE_CHECKING:
    from helpers.model.config import ModelConfig

BUDGET, SEQ_LEN = 100e6, 256
WEIGHTS_GB, FREE_GB = 14.0, 2.0
PLACES = ("the folder that Python starts in", "the environment's site-packages", "the standard library")


@judge("08.1")
def signal_of(answer: Any) -> None:
    expect(whole(answer) != 139, "That is the status itself.")
    expect(whole(answer) != -11, "So Python's subprocess writes it. The signal's own number has no sign.")
    expect(whole(answer) == 11, "That is not the signal.")


@judge("08.2")
def first_place(answer: Any) -> None:
    expect(choice(answer, PLACES) == PLACES[0], "Another one comes before it.")


@judge("08.3")
def largest_batch(answer: Any, config: ModelConfig) -> str:
    one = config.kv_cache_bytes(1, SEQ_LEN, 4)
    batch = int(BUDGET // one)
    half = int(BUDGET // config.kv_cache_bytes(1, SEQ_LEN, 2))
    expect(number(answer) != half, "That many fit with 2 bytes a value. fp32 has 4.")
    expect(number(answer) != 2**20 * 100 // one, "A MB is 10^6 bytes here, not 2^20.")
    expect(number(answer) <= batch, "So many do not fit.")
    expect(whole(answer) == batch, "More fit.")
    return f"One sequence takes {one / 1e6:.2f} MB, so {batch} fit."


@judge("08.4")
def parts(answer: Any) -> str:
    least = 1.5 * WEIGHTS_GB / FREE_GB
    fewest = math.ceil(least)
    mistakes = {
        "The converted part is in memory too.": math.ceil(WEIGHTS_GB / FREE_GB),
        "Round up: then it fits.": fewest - 1,
        "There are no half parts. Round up: then it fits.": least,
    }
    value = whole(within(answer, (fewest - 0.4, fewest + 0.4), mistakes))
    return f"{value} parts: each takes {1.5 * WEIGHTS_GB / fewest:.2f} GB while it is converted."


@judge("08.5")
def runs(answer: Any) -> None:
    def right(driver: str, cuda: str, oldest: dict[int, int]) -> bool:
        return int(driver.split(".")[0]) >= oldest[int(cuda.split(".")[0])]

    drivers = ("580.65.06", "13.0"), ("570.124.06", "13.0"), ("535.104.05", "12.8"), ("525", "12.1")
    older = ("470.42.01", "12.1"), ("470.42.01", "11.8"), ("1000.1", "13.1"), ("99.9", "11.0")
    same_as(answer, right, [(*case, dict(OLDEST_DRIVER)) for case in (*drivers, *older)], alone)


@judge("08.6")
def threads(answer: Any) -> None:
    def right(times: dict[int, float]) -> int:
        return min(count for count, seconds in times.items() if seconds <= 1.05 * min(times.values()))

    few = {1: 2.03, 2: 2.01, 16: 3.04}, {1: 3.0, 4: 1.0, 16: 3.1}, {16: 1.0, 8: 1.04, 4: 1.06}, {4: 1.0}
    more = {1: 8.0, 2: 4.1, 4: 2.2, 8: 2.19}, {8: 3.0, 1: 9.0, 2: 5.0}, {1: 0.0028, 2: 0.0015}, {1: 40.0, 2: 39.0}
    same_as(answer, right, [(times,) for times in (*few, *more)], whole)
