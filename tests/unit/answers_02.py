"""Answers to the exercises of notebook 02: right ones of every kind, and the mistakes that learners make."""

import math
from fractions import Fraction

import numpy as np
import torch


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {
        "hits": ["same", "named device", "int8"],
        "weight_bytes": 20_000_000,
        "bandwidth": 40e9,
        "megabytes": {"fp32": 47.0, "bf16": 26.0, "int8": 18.0, "int4": 12.0},
        "loss": {"fp32": 0.486, "bf16": 0.486, "int8": 0.4861, "int4": 0.55},
    }


RIGHT = {
    "02.1": [{"same", "named device", "int8"}, ["int8", "same", "named device"], ("same", "named device", "int8")],
    "02.2": [0.5, 20_000_000 / 40e9 * 1000, "0.5", Fraction(1, 2), torch.tensor(0.5), np.float32(0.5)],
    "02.3": ["int8", "INT8", ["int8"]],
    "02.4": [
        lambda layers, heads, size, length, batch: 8 * layers * heads * size * length * batch,
        lambda *numbers: float(8 * math.prod(numbers)),
        lambda *numbers: torch.zeros(2, *numbers, device="meta").nbytes,
    ],
    "02.5": [lambda rows, columns: rows * (columns + 4), lambda rows, columns: float(rows * columns + 4 * rows)],
}
WRONG = {
    "02.1": [{"same", "int8"}, {"same", "named device", "int8", "longer"}, {"int4"}, "same", {"other"}, []],
    "02.2": [0.0005, 2000, 0.52, 0.48, 500, math.nan, "fast"],
    "02.3": ["int4", "bf16", "fp32", "fp8", ["int8", "int4"]],
    "02.4": [
        lambda layers, heads, size, length, batch: 4 * layers * heads * size * length * batch,
        lambda layers, heads, size, length, batch: 2 * layers * heads * size * length * batch,
        lambda layers, heads, size, length, batch: 8 * layers * heads * size * length,
        lambda layers, heads, size, length, batch: 8 * layers * heads * size * (length + 1) * batch,
        lambda *numbers: None,
        7,
    ],
    "02.5": [
        lambda rows, columns: rows * columns,
        lambda rows, columns: columns * (rows + 4),
        lambda rows, columns: rows * columns + 4,
        lambda rows, columns: 4 * rows * columns,
        lambda rows, columns: None,
    ],
}
