"""Answers to the exercises of notebook 04: right ones of every kind, and the mistakes that learners make."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from helpers import BuildRecipe
from helpers.bench import records
from helpers.course.exercises.compare import with_impostor

RECORD = records.read(records.REFERENCES / "cpu-stories.json")
# TPOT in ms: 2.18, 0.42 and 0.25
EAGER, ENGINE, INT8 = (RECORD.row(name).median("tpot_s") * 1e3 for name in ("pytorch fp32", "aot fp32", "aot int8"))
FIRST, BUILD = RECORD.row("aot fp32").median("ttft_s") * 1e3, RECORD.row("aot fp32").build_s  # 3.60 ms and 50 s
SHORT = 8e3 / (FIRST + 7 * ENGINE)
PAID = BUILD * 1e3 / (EAGER - ENGINE)
FOR_TWO = BuildRecipe(decode_batch_sizes=(2,), max_batch_size=4)


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {
        "record": RECORD,
        "sweep": RECORD,
        "promise_s": 2.5 * ENGINE / 1e3,
        "workload": RECORD.workload,
        "with_impostor": with_impostor,
    }


FAKE = next(row.name for row in with_impostor(RECORD).measured(1) if not row.agrees)

RIGHT = {
    "04.1": [
        ENGINE / INT8,
        0.42 / 0.25,
        1.7,
        "1.67",
        np.float32(ENGINE / INT8),
        Fraction(42, 25),
        torch.tensor([1.67]),
    ],
    "04.2": [SHORT, 8 / (3.60e-3 + 7 * 0.42e-3), round(SHORT), f"{SHORT:,.0f}", np.float64(SHORT), torch.tensor(SHORT)],
    "04.4": [
        PAID,
        round(PAID),
        math.ceil(PAID),
        50 / (2.18e-3 - 0.42e-3),
        f"{PAID:,.0f}",
        Decimal(round(PAID)),
        np.int64(PAID),
    ],
    "04.5": [("aot int8", 4), ["aot:int8", 4.0], "aot int8, 4", ("AOT INT8", "4"), np.array(["aot int8", "4"])],
    "04.6": [
        FOR_TWO,
        FOR_TWO.replace(max_batch_size=8, decode_batch_sizes=[2, 4]),
        RECORD.workload.recipe("aot", "fp32").replace(decode_batch_sizes=[2]),
    ],
    "04.7": [FAKE, FAKE.upper(), FAKE.replace(" ", ":")],
}
RIGHT["04.3"] = [min(RECORD.measured(1), key=lambda row: row.limit_s / row.median("tpot_s"))]
RIGHT["04.3"] += [RIGHT["04.3"][0].name, RIGHT["04.3"][0].name.upper(), RIGHT["04.3"][0].name.replace(" ", ":")]
WRONG = {
    "04.1": [INT8 / ENGINE, ENGINE - INT8, INT8, EAGER / ENGINE, 2, 1.5, 167, math.nan, "faster"],
    "04.2": [
        8e3 / (FIRST + 8 * ENGINE),  # both off by one
        7e3 / (FIRST + 7 * ENGINE),
        1e3 / ENGINE,
        SHORT / 1e3,
        8e3 / (FIRST + ENGINE),
        RECORD.throughput(RECORD.row("aot fp32")),
        math.nan,
        "2000 tokens",
    ],
    "04.3": ["aot fp32", "nobody", "", 3, None.__class__],
    "04.4": [PAID / 1e3, BUILD * 1e3 / EAGER, BUILD * 1e3 / ENGINE, PAID / 64, "never", 0, math.inf, math.nan],
    "04.5": [
        ("aot fp32", 4),
        ("aot int8", 1),
        ("aot int8", 2),
        ("pytorch fp32", 4),
        "aot int8",
        ("aot int8",),
        4,
        ("vllm", 4),
    ],
    "04.6": [
        BuildRecipe(max_batch_size=4),
        FOR_TWO.replace(max_batch_size=2, decode_batch_sizes=[]),
        BuildRecipe(max_batch_size=4, decode_batch_sizes=[3]),
        BuildRecipe(max_batch_size=4, backend="pytorch"),
        [2],
        {"decode_batch_sizes": [2]},
    ],
    "04.7": ["pytorch fp32", "nobody", "", 2],
}
