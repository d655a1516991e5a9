"""Answers to the exercises of notebook 07: right ones of every kind, and the mistakes that learners make."""

import math

import numpy as np
import torch
from answers_01 import OPS, kernel

from helpers.backends.report import EngineReport

STEP = "decode_b1"
MOVED = [(900, 800), (500, 100)]  # of each kernel: bytes that it moves, and must
FUSED = EngineReport(
    "aot", OPS[STEP], [kernel(STEP, "generated", 0, 4, *MOVED[0]), kernel(STEP, "library", 4, 6, *MOVED[1])]
)
APART = EngineReport("aot", OPS[STEP], [kernel(STEP, "generated", at, at + 1, 9 - at, 1) for at in range(6)])


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {"fused": FUSED, "apart": APART}


def spare(report):
    saved = [k.details["bytes"] - k.must for k in report.kernels]
    return saved.index(max(saved))


def quantized(weight):
    scale = weight.abs().max(1).values / 127
    return (weight / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale.tolist()


RIGHT = {
    "07.1": [
        lambda report: sum(k.kind == "generated" for k in report.kernels),
        lambda report: np.int64(len([k for k in report.kernels if k.kind != "library"])),
    ],
    "07.2": [spare, lambda report: torch.tensor([k.details["bytes"] - k.must for k in report.kernels]).argmax()],
    "07.3": [
        lambda cache, columns: cache // (columns * 4) + 1,
        lambda cache, columns: math.floor(cache / columns / 4) + 1,
    ],
    "07.4": [
        lambda m, P: m.view(-1, P, m.shape[1]).permute(0, 2, 1),
        lambda m, P: np.stack([block.T for block in np.split(m.numpy(), len(m) // P)]),
        lambda m, P: [block.T for block in m.split(P)],
    ],
    "07.5": [quantized, lambda w: [np.asarray(part) for part in quantized(w)], lambda w: list(map(list, quantized(w)))],
}
WRONG = {
    "07.1": [lambda report: len(report.kernels), lambda report: 1, lambda report: None, 3],
    "07.2": [
        lambda report: max(range(len(report.kernels)), key=lambda at: report.kernels[at].details["bytes"]),
        lambda report: 0,
        lambda report: 1 + spare(report),
        lambda report: -1,
        lambda report: None,
    ],
    "07.3": [
        lambda cache, columns: cache // (columns * 4),
        lambda cache, columns: math.ceil(cache / columns / 4),  # what fills it exactly still fits
        lambda cache, columns: cache // columns + 1,
        lambda cache, columns: cache / columns / 4 + 1,
        lambda cache, columns: None,
    ],
    "07.4": [
        lambda m, P: m.view(-1, P, m.shape[1]),
        lambda m, P: m.view(-1, m.shape[1], P),  # the shape alone
        lambda m, P: m.T.reshape(-1, m.shape[1], P),
        lambda m, P: m,
        lambda m, P: None,
    ],
    "07.5": [
        lambda w: (w.round(), torch.ones(len(w))),
        lambda w: ((w / w.abs().amax(1, keepdim=True) * 127).round(), w.abs().amax(1) / 127),  # 0 / 0
        lambda w: ((w / w.abs().max() * 127).round(), (w.abs().max() / 127).expand(len(w))),  # one scale for all
        lambda w: (w / w.abs().amax().clamp(min=1), torch.ones(len(w))),  # not rounded
        lambda w: quantized(w)[0],
        lambda w: w,
        lambda w: None,
    ],
}
