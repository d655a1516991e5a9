"""Answers to the exercises of notebook 03: right ones of every kind, and the mistakes that learners make."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from helpers import SamplingParams
from helpers.course.exercises.generate import FaultyEngine

NARROW = "Once upon a time, there was a little"
HAD_A = "Once upon a time, there was a little girl named Mia. She lived in a small house by the river. She had a"


def names(engine):
    """What the notebook holds where its exercises begin."""
    times = {"ttft_s": 2.7413e-3, "tpot_s": 0.3689e-3}
    return {"engine": engine, "narrow": NARROW, "prompt": HAD_A, "faulty": FaultyEngine(engine), **times}


def numpy_step(logits, temperature, top_p):
    """Another right way: from the smallest token up, what may go without leaving less than top_p."""
    scores = logits.numpy().astype(np.float64) / temperature
    p = np.exp(scores - scores.max())
    p /= p.sum()
    for i in np.argsort(p)[:-1]:
        if p[p > p[i]].sum() >= top_p:
            p[i] = 0
    return p / p.sum()


def step(logits, temperature, top_p, scale=True, strict=False, late=False):
    """The right way, and with the switches, usual wrong ones."""
    p, order = (logits if late else logits / temperature).softmax(-1).sort(descending=True)
    gone = (p.cumsum(-1) if strict else p.cumsum(-1) - p) >= top_p
    p = p.masked_fill(gone, 0)
    if late:
        p = p ** (1 / temperature)
    return torch.zeros_like(logits).scatter(0, order, p / p.sum() if scale else p)


def second_best(engine, prompt, count):
    logits = engine.prefill([engine.tokenize(prompt)])
    chosen = []
    while len(chosen) < count:
        token = logits.topk(2).indices[:, 1]
        chosen.append(token)
        logits = engine.decode(token)
    return torch.cat(chosen)


def second_best_anew(engine, prompt, count):
    ids = engine.tokenize(prompt)
    for _ in range(count):
        ids = [*ids, engine.logits(ids).argsort()[-2].item()]
    return ids[-count:]


def best(engine, prompt, count):
    return engine.generate(prompt, SamplingParams(temperature=0, max_tokens=count))[0].token_ids


TENTH = 2.7413 + 9 * 0.3689
RIGHT = {
    "03.1": [0.55, "0.55", Fraction(11, 20), np.float32(0.55), torch.tensor(0.55), Decimal("0.55"), 0.1 + 0.45, [0.55]],
    "03.2": [TENTH, 6.06, 6.1, round(2.74 + 9 * 0.37, 2), np.float64(TENTH), torch.tensor(TENTH), "6.06"],
    "03.3": [0.1, 0.01, "0.05", np.float32(0.1), torch.tensor([0.1]), Fraction(1, 10), 1e-9],
    "03.4": [step, numpy_step, lambda *a: step(*a).tolist(), lambda *a: step(*a).double(), lambda *a: tuple(step(*a))],
    "03.5": [
        second_best,
        second_best_anew,
        lambda *a: np.array(second_best_anew(*a)),
        lambda *a: second_best(*a)[None],  # a batch of one row
        lambda *a: map(int, second_best(*a)),
    ],
    "03.6": [7, 7.0, "7", torch.tensor(7), np.int32(7)],
}
WRONG = {
    "03.1": [0.5, 0.6, 0.53, 0.54, 55, 1.0, 0.05, math.nan, "boy", True],
    "03.2": [
        2.7413 + 10 * 0.3689,
        2.7413 + 8 * 0.3689,
        10 * 0.3689,
        TENTH / 1000,
        10 * (2.7413 + 0.3689),
        2.7413,
        math.nan,
        "6 ms",
    ],
    "03.3": [0, -0.1, 0.3, 1, 50, math.nan, math.inf, "cold"],
    "03.4": [
        lambda x, t, p: step(x, t, p, scale=False),
        lambda x, t, p: step(x, t, p, strict=True),  # without the token that reaches top_p
        lambda x, t, p: step(x, t, p, late=True),  # top_p before the temperature
        lambda x, t, p: step(x, 1 / t, p),
        lambda x, t, p: (x / t).softmax(-1),  # no top_p
        lambda x, t, p: step(x, t, p).sort(descending=True).values,  # not put back
        lambda x, t, p: step(x, t, p)[:-1],
        lambda x, t, p: x,
        lambda x, t, p: step(x, t, p) * math.nan,
        lambda x, t, p: print(step(x, t, p).sum()),
        lambda x, t, p: 1 / 0,
        lambda x: x,
        0.5,
    ],
    "03.5": [
        best,
        lambda e, p, n: second_best_anew(e, p, n + 1),
        lambda e, p, n: second_best_anew(e, p, n)[:-1] if n > 1 else [],
        lambda e, p, n: e.tokenize(p) + second_best_anew(e, p, n),
        lambda e, p, n: [e.logits(p).argsort()[-2].item()] * n,
        lambda e, p, n: e.detokenize(second_best_anew(e, p, n)),
        lambda e, p, n: None,
        [1, 2],
    ],
    "03.6": [6, 8, 1, 12, 7.5, math.nan, "none"],
}
