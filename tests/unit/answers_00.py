"""Answers to the exercises of notebook 00: right ones of every kind, and the mistakes that learners make."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from helpers import BuildRecipe, SamplingParams
from helpers.course.exercises.start import DeafEngine

RECIPE = BuildRecipe(backend="pytorch", device="cpu", max_batch_size=4, max_input_len=64, max_seq_len=256)


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {"engine": engine, "tokens": 64, "pytorch_s": 2.5583, "recipe": RECIPE, "deaf": DeafEngine(engine)}


def drafts(engine, prompt, seeds):
    return [
        engine.generate(prompt, SamplingParams(temperature=0.8, max_tokens=16, seed=seed))[0].text for seed in seeds
    ]


def drafts_by_stream(engine, prompt, seeds):
    for seed in seeds:
        settings = SamplingParams(temperature=0.8, max_tokens=16, seed=seed)
        yield prompt + "".join(token.text for token in engine.stream(prompt, settings))


RIGHT = {
    "00.1": [6, 6.0, np.int64(6), torch.tensor(6), torch.tensor([6]), Fraction(6), Decimal(6), "6", " 6 ", (6,)],
    "00.2": [25.0, 64 / 2.56, 64 / 2.5583, 25, "25.02", np.float32(25), torch.tensor(25.0), Fraction(6400, 256)],
    "00.3": ["max_batch_size", "MAX_BATCH_SIZE", " max batch size", np.str_("max_batch_size"), "max_batch_size=4"],
    "00.4": [
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(seed=0),
        SamplingParams(temperature=2.0, top_k=5, top_p=0.9, seed=2**40, max_tokens=1),
    ],
    "00.5": [RECIPE.replace(max_input_len=100, max_seq_len=220), RECIPE.replace(max_input_len=128, max_seq_len=512)],
    "00.6": [
        drafts,
        drafts_by_stream,
        lambda e, p, s: tuple(drafts(e, p, s)),
        lambda e, p, s: np.array(drafts(e, p, s)),
    ],
    "00.7": ["seed", "SEED", "the seed", np.str_("seed"), ["seed"]],
}
WRONG = {
    "00.1": [
        5,
        7,
        6.9,
        5.999,
        "six",
        math.nan,
        math.inf,
        True,
        6j,
        [6, 6],
        [1, 2, 3, 4, 5, 6],
        b"6",
        "Hello, my name is",
    ],
    "00.2": [2.5583 / 64, 0.04, 2.5583, 64, 24, 26, math.nan, "fast", 64 / 2.5583 * 1000],
    "00.3": ["max_input_len", "max_seq_len", "max_tokens", "batch", 5, "", ["max_batch_size", "max_input_len"]],
    "00.4": [
        SamplingParams(temperature=0, seed=1),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_k=1, seed=1),  # one token is kept: nothing is drawn
        SamplingParams(temperature=1e-4, seed=1),
        SamplingParams(temperature=0.8, top_p=1e-6, seed=1),
        {"temperature": 0.8, "seed": 1},
        7,
    ],
    "00.5": [
        RECIPE,
        RECIPE.replace(max_input_len=99, max_seq_len=220),
        RECIPE.replace(max_input_len=100, max_seq_len=219),
        RECIPE.replace(max_input_len=120, max_seq_len=160),
        RECIPE.replace(max_input_len=100, max_seq_len=5000),  # more than the model has positions
        (100, 220),
    ],
    "00.6": [
        lambda e, p, s: [e.generate(p, SamplingParams(temperature=0.8, max_tokens=16, seed=s[0]))[0].text for _ in s],
        lambda e, p, s: drafts(e, p, sorted(s))[:-1],
        lambda e, p, s: drafts(e, p, s[::-1]),
        lambda e, p, s: [e.generate(p, SamplingParams(temperature=0.8, max_tokens=17, seed=i))[0].text for i in s],
        lambda e, p, s: [e.generate(p, SamplingParams(temperature=0.8, max_tokens=16))[0].text for i in s],
        lambda e, p, s: [p for _ in s],
        lambda e, p, s: s,
        lambda e, p, s: drafts(e, p, s)[0],
        lambda e, p, s: None,
        drafts(None, "", []),
    ],
    "00.7": ["temperature", "max_tokens", "top_p", "the engine", "seed or temperature", "", 7, {"seed", "temperature"}],
}
