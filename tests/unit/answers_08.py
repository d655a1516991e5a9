"""Answers to the exercises of notebook 08: right ones of every kind, and the mistakes that learners make."""

from fractions import Fraction

import numpy as np
import torch

from helpers.model.checkpoint import find_checkpoint

CONFIG = find_checkpoint("stories").config


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {"config": CONFIG}


def branch(driver):
    return int(driver.partition(".")[0])


def fewest(times):
    least = min(times.values())
    return min(count for count in times if times[count] <= 1.05 * least)


RIGHT = {
    "08.1": [11, 11.0, "11", np.int8(11), Fraction(11), torch.tensor(11)],
    "08.2": ["the folder that Python starts in", "The folder, that python starts in"],
    "08.3": [63, 63.0, "63", torch.tensor([63]), np.float32(63)],
    "08.4": [11, 11.0, "11", np.int64(11)],
    "08.5": [
        lambda d, c, o: branch(d) >= o[int(c.split(".")[0])],
        lambda d, c, o: np.bool_(branch(d) >= o[int(float(c))]),
        lambda d, c, o: int(branch(d) >= o[int(float(c))]),
        lambda d, c, o: torch.tensor([branch(d) >= o[int(float(c))]]),
    ],
    "08.6": [fewest, lambda t: str(fewest(t)), lambda t: [fewest(t)], lambda t: np.int64(fewest(t))],
}
WRONG = {
    "08.1": [139, 9, 137, -11, 11.5, "SIGSEGV"],
    "08.2": ["the environment's site-packages", "the standard library", "sys.path", 0],
    "08.3": [64, 62, 66, 127, 63.6, 1.57, 100e6],
    "08.4": [7, 10, 12, 10.5, 21, 14],
    "08.5": [
        lambda d, c, o: True,
        lambda d, c, o: False,
        lambda d, c, o: d >= str(o[int(float(c))]),  # as texts
        lambda d, c, o: branch(d) > o[int(float(c))],
        lambda d, c, o: branch(d) >= 580,
        lambda d, c, o: "yes" if branch(d) >= o[int(float(c))] else "no",
        True,
    ],
    "08.6": [
        lambda t: min(t, key=t.get),  # the fastest
        lambda t: max(t),
        lambda t: min(t),
        lambda t: next(count for count in t if t[count] <= 1.05 * min(t.values())),  # in the order of the table
        lambda t: min(t.values()),
        lambda t: min(count for count in t if t[count] - min(t.values()) <= 0.05),  # seconds, and no share
        lambda t: len(t),
        lambda t: min(count for count in t if t[count] <= 1.05 * t[max(t)]),  # of the most threads
        2,
    ],
}
