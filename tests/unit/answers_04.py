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
# TPOT in ms
EAGER, ENGINE, INT8 = (RECORD.row(name).median("tpot_s") * 1e3 for name in ("pytorch fp32", "aot fp32", "aot int8"))
FIRST, BUILD = RECORD.row("aot fp32").median("ttft_s") * 1e3, RECORD.row("aot fp32").build_s
# As the table prints them: what a learner reads.
eager, engine, int8, first = (round(ms, 2) for ms in (EAGER, ENGINE, INT8, FIRST))
SHORT = 8e3 / (FIRST + 7 * ENGINE)
PAID = BUILD * 1e3 / (EAGER - ENGINE)
PROMISE = 2.5 * ENGINE / 1e3  # s
KEPT = [row for row in RECORD.rows if row.status == "ok" and row.median("tpot_s") <= PROMISE]
BEST = max(KEPT, key=RECORD.throughput)
NAME, SIZE = BEST.name, BEST.batch_size
FOR_TWO = BuildRecipe(decode_batch_sizes=(2,), max_batch_size=4)


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {
        "record": RECORD,
        "sweep": RECORD,
        "promise_s": PROMISE,
        "workload": RECORD.workload,
        "with_impostor": with_impostor,
    }


FAKE = next(row.name for row in with_impostor(RECORD).measured(1) if not row.agrees)

RIGHT = {
    "04.1": [
        ENGINE / INT8,
        engine / int8,
        round(ENGINE / INT8, 1),
        f"{ENGINE / INT8:.2f}",
        np.float32(ENGINE / INT8),
        Fraction(engine) / Fraction(int8),
        torch.tensor([engine / int8]),
    ],
    "04.2": [SHORT, 8e3 / (first + 7 * engine), round(SHORT), f"{SHORT:,.0f}", np.float64(SHORT), torch.tensor(SHORT)],
    "04.4": [
        PAID,
        round(PAID),
        math.ceil(PAID),
        round(BUILD) * 1e3 / (eager - engine),
        f"{PAID:,.0f}",
        Decimal(round(PAID)),
        np.int64(PAID),
    ],
    "04.5": [
        (NAME, SIZE),
        [NAME.replace(" ", ":"), float(SIZE)],
        f"{NAME}, {SIZE}",
        [f"{NAME}, {SIZE}"],
        (NAME.upper(), str(SIZE)),
        BEST,
    ],
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
    "04.1": [
        INT8 / ENGINE,
        ENGINE - INT8,
        INT8,
        EAGER / ENGINE,
        *(factor * ENGINE / INT8 for factor in (0.8, 1.2, 100)),
        math.nan,
        "faster",
    ],
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
        *((row.name, row.batch_size) for row in RECORD.rows if row is not BEST),
        (NAME, 3),
        NAME,
        (NAME,),
        4,
        ("vllm", 4),
    ],
    "04.6": [
        BuildRecipe(max_batch_size=4),
        FOR_TWO.replace(max_batch_size=2, decode_batch_sizes=[]),
        BuildRecipe(max_batch_size=4, decode_batch_sizes=[3]),
        FOR_TWO.replace(max_batch_size=64),
        BuildRecipe(max_batch_size=4, backend="pytorch"),
        [2],
        {"decode_batch_sizes": [2]},
    ],
    "04.7": ["pytorch fp32", "nobody", "", 2],
}
