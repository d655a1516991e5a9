"""Notebook 02: build an engine."""

from __future__ import annotations

from typing import Any

from helpers.course.exercises.frame import expect, judge, same_as
from helpers.course.values import choice, choices, printed, span, whole, within

CANDIDATES = ("same", "named device", "longer", "int8", "int4")


@judge("02.1")
def cache_hits(answer: Any, hits: list[str]) -> None:
    names = choices(answer, CANDIDATES)
    expect(not set(hits) - names, "There is one more: compare each with what you built.")
    expect(not names - set(hits), "One of them differs in a field that the engine depends on.")


@judge("02.2")
def least_time(answer: Any, weight_bytes: int, bandwidth: float) -> str:
    within(answer, span(lambda gb: weight_bytes / (gb * 1e9) * 1e3, printed(bandwidth / 1e9, 1)))
    return f"{weight_bytes / bandwidth * 1e3:.2f} ms from memory. A quicker engine has its weights in the cache."


@judge("02.3")
def smallest(answer: Any, megabytes: dict[str, float], loss: dict[str, float]) -> None:
    name = choice(answer, list(megabytes))
    good = [one for one in megabytes if loss[one] <= 1.01 * loss["fp32"]]
    expect(name in good, f"The loss of {name} is more than 1 % above fp32's.")
    best = min(good, key=lambda one: megabytes[one])
    expect(name == best, f"{name} has {megabytes[name]:.1f} MB, and another one that is good enough has less.")


@judge("02.4")
def cache_size(answer: Any) -> None:
    def right(layers: int, heads: int, size: int, length: int, batch: int) -> int:
        return 2 * layers * heads * size * length * batch * 4

    mistakes = {
        "That is half: keys and values are kept, and a number has 4 bytes.": lambda *shape: right(*shape) / 2,
        "Those are numbers; each takes 4 bytes.": lambda *shape: right(*shape) / 4,
        "Those are bits.": lambda *shape: right(*shape) * 8,
    }
    same_as(answer, right, [(6, 2, 64, 256, 1), (30, 3, 64, 2048, 4), (1, 1, 1, 1, 1)], whole, mistakes)


@judge("02.5")
def int8_size(answer: Any) -> None:
    mistakes = {
        "The scales are missing: without them the numbers mean nothing.": lambda rows, columns: rows * columns,
        "There is a scale for each row, not for each column.": lambda rows, columns: rows * columns + 4 * columns,
        "Each row has a scale, not only the matrix.": lambda rows, columns: rows * columns + 4,
    }
    shapes = [(256, 128), (1024, 256), (3, 5)]
    same_as(answer, lambda rows, columns: rows * columns + 4 * rows, shapes, whole, mistakes)
