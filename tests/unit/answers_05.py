"""Answers to the exercises of notebook 05: right ones of every kind, and the mistakes that learners make."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from helpers import BuildRecipe
from helpers.errors import EngineMismatch

RECIPE = BuildRecipe(max_batch_size=4, max_input_len=64, max_seq_len=256)
LOG = """
[TRT] [I] Init builder kernel library: CPU +1973, GPU +350, now: CPU 2225, GPU 777 (MiB)
[TRT] [W] Skipping tactic 0 due to insufficient memory on requested size of 1700241408
[TRT] [E] Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[layers.7]}.)
AssertionError: Engine building failed, please check the error log.
"""


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {"recipe": RECIPE, "log": LOG}


def end_at(ids, end_ids):
    return ids[: next((i for i, token in enumerate(ids) if token in end_ids), len(ids))]


def yielded(ids, end_ids):
    for token in ids:
        if token in end_ids:
            return
        yield token


def fit(ids, recipe, new_tokens):
    room = min(recipe.max_input_len, recipe.max_seq_len - new_tokens)
    while len(ids) > room:
        ids.pop(1) if len(ids) > 1 else ids.pop()
    return ids


def share(exact, logits):
    return (logits - exact).abs().max() / exact.abs().max()


LIMITS = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.06, "int8": 0.06}


def damaged(folder, manifest):
    return [
        name
        for name, digest in manifest.items()
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
    ]


def digest(data):
    return hashlib.sha256(data).hexdigest()


def exists(folder, manifest):
    return [name for name in manifest if not (folder / name).exists()]


RIGHT = {
    "05.1": ["EngineMismatch", "enginemismatch", "Engine mismatch", EngineMismatch, np.str_("EngineMismatch")],
    "05.2": [3, 3.0, "3", np.int64(3), torch.tensor([3])],
    "05.3": [
        end_at,
        yielded,
        lambda i, e: torch.tensor(end_at(i, e)),
        lambda i, e: np.array(end_at(i, e)),
        lambda i, e: tuple(end_at(i, e)),
    ],
    "05.4": [fit, lambda i, r, n: tuple(fit(i, r, n)), lambda i, r, n: np.array(fit(i, r, n))],
    "05.5": [
        lambda e, o, p: bool(share(e, o) > LIMITS[p]),
        lambda e, o, p: share(e, o) > LIMITS[p],  # a tensor of one truth
        lambda e, o, p: [[share(e, o) > LIMITS[p]]],
        lambda e, o, p: np.bool_(share(e, o).item() >= LIMITS[p]),
        lambda e, o, p: int(share(e, o) > LIMITS[p]),
    ],
    "05.6": [
        damaged,
        lambda f, m: set(damaged(f, m)),
        lambda f, m: tuple(damaged(f, m)),
        lambda f, m: ", ".join(damaged(f, m)),
    ],
}  # fmt: skip
WRONG = {
    "05.1": ["EngineCorrupt", "EngineNotFound", "LimitError", "an error", None.__class__],
    "05.2": [1, 2, 4, 0, 3.5, "line 3", [3, 4]],
    "05.3": [
        lambda i, e: i,
        lambda i, e: i[: i.index(e[0])] if e[0] in i else i,  # only the first kind of end
        lambda i, e: i[: end_at(i, e).__len__() + 1],  # with the end token
        lambda i, e: [token for token in i if token not in e],
        lambda i, e: i[: next((i.index(end) for end in reversed(e) if end in i), len(i))],  # the last in the list wins
        lambda i, e: i[::-1],
        [5, 7],
    ],
    "05.4": [
        lambda i, r, n: i,
        lambda i, r, n: i[: r.max_input_len],
        lambda i, r, n: i[:1] + i[-(r.max_input_len - 1) :],  # forgets the answer
        lambda i, r, n: i[-min(r.max_input_len, r.max_seq_len - n) :],  # without the begin token
        lambda i, r, n: i[:1] + i[-(min(r.max_input_len, r.max_seq_len - n) - 1) :],  # doubles what fits
        64,
    ],
    "05.5": [
        lambda e, o, p: True,
        lambda e, o, p: False,
        lambda e, o, p: bool(share(e, o) > 0.06),
        lambda e, o, p: bool((o - e).max() / e.abs().max() > LIMITS[p]),  # only what is too large
        lambda e, o, p: bool((o - e).abs().mean() / e.abs().max() > LIMITS[p]),
        lambda e, o, p: bool((o - e).abs().max() > LIMITS[p]),  # no share
        lambda e, o, p: bool((o - e).abs().max() / e.max() > LIMITS[p]),  # of no use where all are negative
        lambda e, o, p: bool((o - e).abs().max() / (e.max() - e.min()) > LIMITS[p]),
        lambda e, o, p: bool((o - e).norm() / e.norm() > LIMITS[p]),
        lambda e, o, p: bool((o - e).abs().sum() / e.abs().max() > LIMITS[p]),
        lambda e, o, p: float(share(e, o)),
        lambda e, o, p: "fault",
    ],
    "05.6": [
        exists,
        lambda f, m: [name for name in m if (f / name).exists() and name not in damaged(f, m)],  # the whole ones
        lambda f, m: [name for name in m if hashlib.sha256((f / name).read_bytes()).hexdigest() != m[name]],
        lambda f, m: list(m),
        lambda f, m: [],
        lambda f, m: [str(Path(f) / name) for name in damaged(f, m)],
        {"a.pt2"},
        lambda f, m: [n for n in m if not (f / n).exists() or digest((f / n).read_text().encode()) != m[n]],
    ],
}  # fmt: skip
