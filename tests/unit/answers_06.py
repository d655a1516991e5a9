"""Answers to the exercises of notebook 06: right ones of every kind, and the mistakes that learners make."""

import contextlib
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch

from helpers import BuildRecipe
from helpers.bench import quality
from helpers.bench.records import Workload
from helpers.bench.run import bytes_per_step
from helpers.course.exercises.own_model import FIRST_WRONG, suspect
from helpers.model.checkpoint import find_checkpoint

F = torch.nn.functional
CONFIG = find_checkpoint("stories").config
RESULTS = [
    quality.Precision("aot fp32", 100, 3e-3, 2.0, 0.0, 0.0, 1.0, 0.0),
    quality.Precision("aot int8", 50, 2e-3, 2.01, 0.01, 0.02, 0.97, 0.002),
    quality.Precision("aot int4", 30, 1e-3, 2.2, 0.2, 0.05, 0.8, 0.05),
]
LOGITS = 3 * torch.randn(110, 50, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(110) % 50
LENGTHS = [60, 50]  # of two passages
EXACT = quality.Scores(TARGETS, LOGITS.log_softmax(-1))
ROUNDED = quality.Scores(TARGETS, LOGITS.bfloat16().float().log_softmax(-1))
SIZE = 4 * 2 * 6 * 2 * 64  # bytes x (key and value) x layers x KV heads x head_dim
INT8 = bytes_per_step(Workload(), "int8", 1)


def names(engine):
    """What the notebook holds where its exercises begin. A build takes too long here: its scores are given."""
    return {
        "config": CONFIG,
        "workload": Workload(),
        "bytes_per_step": bytes_per_step,
        "int8_bytes": INT8,
        "results": RESULTS,
        "scores": {"aot fp32": EXACT},
        "recipe": BuildRecipe(),
        "build": lambda recipe: recipe,
        "load": contextlib.nullcontext,
        "quality": SimpleNamespace(score=lambda recipe, text: ROUNDED if recipe.precision == "bf16" else EXACT),
        "text": "",
        "strange": suspect(EXACT, LENGTHS),
        "lengths": LENGTHS,
    }


def kl(reference, logits):
    theirs, mine = reference.log_softmax(-1), logits.log_softmax(-1)
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


def shorten(messages, count, room):
    while count(messages) > room:
        messages = messages[:1] + messages[2:]
    return messages


def shorten_by_suffix(messages, count, room):
    """Another right way: the longest end that fits."""
    for start in range(1, len(messages)):
        if count(kept := [messages[0], *messages[start:]]) <= room:
            return tuple(kept)
    return messages


def shorten_in_place(messages, count, room):
    while count(messages) > room:
        del messages[1]
    return messages


def shorten_by_pairs(messages, count, room):
    while count(messages) > room:
        messages = messages[:1] + messages[3:]
    return messages


def shorten_by_adding_up(messages, count, room):
    """A message alone counts more than in a conversation."""
    kept, used = [], count(messages[:1])
    for message in reversed(messages[1:]):
        if used + count([message]) > room:
            break
        kept.insert(0, message)
        used += count([message])
    return [messages[0], *kept]


def shorten_with_holes(messages, count, room):
    """What does not fit is left out, and an older message that does is kept."""
    kept = []
    for message in reversed(messages[1:]):
        if count([messages[0], message, *kept]) <= room:
            kept.insert(0, message)
    return [messages[0], *kept]


LEAST = INT8 / 60e9 * 1e3
RIGHT = {
    "06.1": [SIZE, float(SIZE), np.int64(SIZE), torch.tensor(SIZE), Fraction(SIZE), str(SIZE), f"{SIZE:,}"],
    "06.2": [LEAST, round(INT8 / 1e6) / 60, round(LEAST, 3), np.float32(LEAST), Fraction(INT8, 60_000_000), str(LEAST)],
    "06.3": ["aot int8", "int8", "INT8", "AOT int8", "aot:int8", RESULTS[1], np.str_("aot int8"), ["int8"]],
    "06.4": [
        kl,
        lambda r, x: F.kl_div(x.log_softmax(-1), r.log_softmax(-1), log_target=True, reduction="batchmean"),
        lambda r, x: F.kl_div(x.log_softmax(-1), r.softmax(-1), reduction="batchmean").item(),
        lambda r, x: (F.cross_entropy(x, r.softmax(-1)) - F.cross_entropy(r, r.softmax(-1))).numpy(),
        lambda r, x: Fraction(float(kl(r, x))),
        lambda r, x: [kl(r, x)],
    ],
    "06.5": [shorten, shorten_by_suffix, shorten_in_place],
    "06.7": [FIRST_WRONG, float(FIRST_WRONG), str(FIRST_WRONG), np.int64(FIRST_WRONG), torch.tensor([FIRST_WRONG])],
    "06.6": [ROUNDED, quality.Scores(TARGETS, LOGITS.half().float().log_softmax(-1))],
}
WRONG = {
    "06.1": [SIZE + 1, SIZE - 1, SIZE // 2, SIZE * 2, SIZE * 8, SIZE // 4, SIZE / 1e3, SIZE + 0.4, math.nan],
    "06.2": [LEAST / 1e3, 1e3 / LEAST, 8 * LEAST, INT8 / 60, LEAST * 4, math.nan, "soon"],
    "06.3": ["fp32", "aot fp32", "pytorch int8", RESULTS[2], "int4", "int", "", 8],
    "06.4": [
        lambda r, x: kl(x, r),  # from the other side
        lambda r, x: kl(r, x) * len(x) + kl(r, x) * (len(x) == 1),  # the sum over the tokens
        lambda r, x: kl(r, x) / math.log(2),  # bits
        lambda r, x: kl(r, x) / x.shape[-1],  # kl_div's own mean
        lambda r, x: -kl(r, x),
        lambda r, x: (r.softmax(-1) - x.softmax(-1)).abs().sum(-1).mean(),
        lambda r, x: kl(r[:, :-1], x[:, :-1]),
        lambda r, x: 0,
        lambda r, x: r,
        lambda r, x: math.nan,
        lambda r, x: print(kl(r, x)),
        kl(LOGITS, LOGITS + 1),
    ],
    "06.5": [
        shorten_by_pairs,
        shorten_by_adding_up,
        shorten_with_holes,
        lambda messages, count, room: messages,
        lambda messages, count, room: messages[:1] + messages[-1:],
        lambda messages, count, room: shorten(messages, count, room - 1),  # one token off
        lambda messages, count, room: shorten(messages[1:], count, room),  # the system message went first
        lambda messages, count, room: list(reversed(shorten(messages, count, room))),
        lambda messages, count, room: len(shorten(messages, count, room)),
        shorten([], lambda messages: 0, 0),
    ],
    "06.6": [
        EXACT,  # copied from the table
        quality.Scores(TARGETS, (LOGITS + 1e-6 * LOGITS.flip(0)).log_softmax(-1)),  # fp32 again, by another backend
        LOGITS,
        quality.Scores(TARGETS, (LOGITS * 9).log_softmax(-1)),
        quality.Scores(TARGETS[:5], LOGITS[:5]),
        EXACT.loss,
    ],
    "06.7": [0, FIRST_WRONG - 1, FIRST_WRONG + 1, 60 + FIRST_WRONG, 2 * FIRST_WRONG, FIRST_WRONG + 0.5, math.nan, "x"],
}
