"""Notebook 08: troubles with machines, builds and environments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import choice, number, plain, whole, within
from helpers.machine.doctor import OLDEST_DRIVER

if TYPE_CHECKING:
    from helpers.model.config import ModelConfig

BUDGET, SEQ_LEN = 100e6, 256
WEIGHTS_GB, FREE_GB = 14.0, 2.0
PLACES = ("the folder that Python starts in", "the environment's site-packages", "the standard library")


@exercise(
    "08.1",
    "Exit status 139",
    "a whole number: the signal",
    "A shell adds one fixed number to a signal's number. `Killed` was 137, and its signal is 9.",
    "Subtract 128.",
)
def signal_of(answer: Any) -> str:
    expect(whole(answer) != 139, "That is the status itself.")
    expect(whole(answer) == 11, "That is not the signal.")
    return "11 is SIGSEGV: native code touched memory that is not its own. Memory did not run out."


@exercise(
    "08.2",
    "Whose package is it?",
    f"one of: {'; '.join(PLACES)}",
    "Section 6 asks Python where it finds a package. What came first?",
    "A clone of a library's repository hides the library that is installed.",
)
def first_place(answer: Any) -> str:
    expect(choice(answer, PLACES) == PLACES[0], "Another one comes before it.")
    return "sys.path begins with the folder of the script, or with the one that an interactive Python starts in."


@exercise(
    "08.3",
    "The largest batch",
    f"a whole number: the most sequences of {SEQ_LEN} tokens whose fp32 KV cache takes at most {BUDGET / 1e6:.0f} MB",
    "How much does one sequence take? Section 1 has the formula, and config computes it.",
    "Divide, and drop what is after the point: a sequence fits whole or not at all.",
    points=2,
)
def largest_batch(answer: Any, config: ModelConfig) -> str:
    one = config.kv_cache_bytes(1, SEQ_LEN, 4)
    batch = int(BUDGET // one)
    half = int(BUDGET // config.kv_cache_bytes(1, SEQ_LEN, 2))
    expect(number(answer) != half, "That many fit with 2 bytes a value. fp32 has 4.")
    expect(number(answer) <= batch, "So many do not fit.")
    expect(whole(answer) == batch, "More fit.")
    return f"One sequence takes {one / 1e6:.2f} MB, so {batch} fit."


@exercise(
    "08.4",
    "In how many parts?",
    "a whole number: the fewest equal parts",
    "While a part is converted, both are in memory: the part in fp32, and its half in fp16.",
    "A part takes 1.5 times its own size. How large may it be, so that this fits?",
    "Round up: a part more is a smaller part.",
    points=2,
)
def parts(answer: Any) -> str:
    fewest = math.ceil(1.5 * WEIGHTS_GB / FREE_GB)
    without = math.ceil(WEIGHTS_GB / FREE_GB)
    mistakes = {"The converted part is in memory too.": without, "Round up: then it fits.": fewest - 1}
    value = whole(within(answer, (fewest - 0.4, fewest + 0.4), mistakes))
    return f"{value} parts: each takes {1.5 * WEIGHTS_GB / fewest:.2f} GB while it is converted."


@exercise(
    "08.5",
    "Does this driver run it?",
    "a function that returns True if a driver runs programs that are built for a CUDA version, else False",
    "Two numbers decide: the driver's branch, before its first point, and the CUDA's major version.",
    "oldest[major] is the first branch that will do. As text, '99' is larger than '525': compare numbers.",
    "int(driver.split('.')[0]) >= oldest[int(cuda.split('.')[0])]",
    points=3,
)
def runs(answer: Any) -> str:
    cases = {
        ("580.65.06", "13.0"): True, ("570.124.06", "13.0"): False, ("535.104.05", "12.8"): True,
        ("525", "12.1"): True, ("470.42.01", "12.1"): False, ("470.42.01", "11.8"): True, ("1000.1", "13.1"): True,
        ("99.9", "11.0"): False,
    }  # fmt: skip
    for (driver, cuda), right in cases.items():
        result = plain(call(answer, driver, cuda, dict(OLDEST_DRIVER)))
        expect(result in (True, False), f"It returns {result!r:.80}, and not True or False.")
        expect(result == right, f"For driver {driver} and CUDA {cuda} it says {result}.")
    return "The doctor compares the same two numbers."


@exercise(
    "08.6",
    "How many threads?",
    "a function that returns the smallest number of threads that is at most 5 % slower than the fastest",
    "First the least of all times. Then: which numbers come near it?",
    "Of those whose time is at most 1.05 times the least, the smallest number.",
    points=3,
)
def threads(answer: Any) -> str:
    for times in (
        {1: 2.03, 2: 2.01, 16: 3.04}, {1: 8.0, 2: 4.1, 4: 2.2, 8: 2.19}, {16: 1.0, 8: 1.04, 4: 1.06}, {4: 1.0},
        {8: 3.0, 1: 9.0, 2: 5.0},
    ):  # fmt: skip
        right = min(count for count, seconds in times.items() if seconds <= 1.05 * min(times.values()))
        result = number(call(answer, dict(times)))
        expect(result == right, f"For {times} it says {result:g}. Right is {right}.")
    return "A core that is left free serves whoever else works. The `aot` build chooses in this way."
