"""Notebook 02: build an engine."""

from __future__ import annotations

from typing import Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import choice, choices, printed, span, whole, within

CANDIDATES = ("same", "named device", "longer", "int8", "int4")


@exercise(
    "02.1",
    "Which of them is built already?",
    f"a set of names out of: {', '.join(CANDIDATES)}",
    "Which fields of a candidate differ from a recipe that was built above?",
    "One candidate differs only in how it says what the machine resolves by itself.",
)
def cache_hits(answer: Any, hits: list[str]) -> str:
    names = choices(answer, CANDIDATES)
    expect(not set(hits) - names, "There is one more: compare each with what you built.")
    expect(not names - set(hits), "One of them differs in a field that the engine depends on.")
    return "device='auto' is resolved before recipes are compared, so naming the device changes nothing."


@exercise(
    "02.2",
    "The least time of a step",
    "milliseconds: how long reading the weights once takes at least",
    "Bytes, divided by bytes in a second.",
    "What comes out are seconds; asked for are milliseconds.",
)
def least_time(answer: Any, weight_bytes: int, bandwidth: float) -> str:
    least = weight_bytes / bandwidth * 1e3
    mistakes = {"Those are seconds.": least / 1e3, "That is the other way round.": bandwidth / weight_bytes}
    within(answer, span(lambda gb: weight_bytes / (gb * 1e9) * 1e3, printed(bandwidth / 1e9, 1)), mistakes)
    return f"{least:.2f} ms: whatever an engine does, it cannot read faster than memory gives."


@exercise(
    "02.3",
    "The smallest that is good enough",
    "one precision: the smallest engine whose loss is at most 1 % above fp32's",
    "First leave out those whose loss is too high; then compare sizes.",
    "The table above has both columns.",
)
def smallest(answer: Any, megabytes: dict[str, float], loss: dict[str, float]) -> str:
    name = choice(answer, list(megabytes))
    good = [one for one in megabytes if loss[one] <= 1.01 * loss["fp32"]]
    expect(name in good, f"The loss of {name} is more than 1 % above fp32's.")
    best = min(good, key=lambda one: megabytes[one])
    expect(name == best, f"{name} has {megabytes[name]:.1f} MB, and another one that is good enough has less.")
    return "Among those whose loss is close enough, size alone decides."


@exercise(
    "02.4",
    "How large is the KV cache?",
    "a function of layers, KV heads, head size, max_seq_len and batch that returns the bytes of a float32 KV cache",
    "Each layer keeps two things for each token: a key and a value.",
    "A key has as many numbers as there are KV heads times the head size, and a number has 4 bytes.",
    points=2,
)
def cache_size(answer: Any) -> str:
    for layers, heads, size, length, batch in ((6, 2, 64, 256, 1), (30, 3, 64, 2048, 4), (1, 1, 1, 1, 1)):
        right = 2 * layers * heads * size * length * batch * 4
        result = whole(call(answer, layers, heads, size, length, batch))
        expect(2 * result != right, "It has room for the keys or the values, and both are kept.")
        expect(4 * result != right, "Those are numbers; each takes 4 bytes.")
        expect(
            result == right,
            f"For {layers} layers, {heads} heads of {size}, {length} tokens, batch {batch}: {result:,}.",
        )
    return "It is reserved when the engine is loaded, for max_batch_size sequences of max_seq_len tokens."


@exercise(
    "02.5",
    "How large is an int8 matrix?",
    "a function of rows and columns that returns the bytes of int8 weights with one float32 scale for each row",
    "A weight takes one byte. What takes the rest?",
    "Each row has a scale of 4 bytes.",
    points=2,
)
def int8_size(answer: Any) -> str:
    for rows, columns in ((256, 128), (1024, 256), (3, 5)):
        result = whole(call(answer, rows, columns))
        expect(result != rows * columns, "The scales are missing: without them the numbers mean nothing.")
        expect(result != rows * columns + 4 * columns, "There is a scale for each row, not for each column.")
        expect(result == rows * columns + 4 * rows, f"For {rows} by {columns} it gives {result:,}.")
    return "A little more than a quarter of fp32's."
