"""Notebook 05: troubles with requests and engines."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import choice, choices, numbers, plain, whole

if TYPE_CHECKING:
    from helpers.recipe import BuildRecipe

NAMES = ("EngineNotFound", "EngineCorrupt", "EngineMismatch", "LimitError", "OutOfMemory", "RecipeError")
SHARES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.06, "int8": 0.06}  # of the largest logit: what rounding makes


@exercise(
    "05.1",
    "After an update",
    f"the name of one error, out of: {', '.join(NAMES)}",
    "The files are whole, and the engine is found. What else does compiled code depend on?",
    "Section 5 changes one line of a manifest. The library's version stands there too.",
)
def after_an_update(answer: Any) -> str:
    expect(choice(answer, NAMES) == "EngineMismatch", "That is not what it says.")
    return "The manifest names the version of PyTorch, and the engine's code calls into that library."


@exercise(
    "05.2",
    "The line that is the cause",
    "a whole number: the line of the log that names the cause, counted from 1",
    "Who fails last only tells that something before it failed.",
    "Look for the first line that is an error. A warning that comes before it says why, but does not fail.",
)
def the_cause(answer: Any, log: str) -> str:
    lines = log.strip().splitlines()
    cause = next(number for number, line in enumerate(lines, start=1) if "[E]" in line)
    number = whole(answer)
    expect(number != len(lines), "That line is the last consequence: it says that the build failed, not why.")
    expect(number == cause, "That line is not it.")
    return "The first error is the cause. The warning above it says what was short: memory."


@exercise(
    "05.3",
    "End at the end token",
    "a function that returns the ids before the first end token, or all of them if there is none",
    "A model may have several end tokens. Which of them comes first in the answer?",
    "Go through the ids in their order, and stop at one that is among end_ids.",
    points=2,
)
def end_at(answer: Any) -> str:
    for ids, ends in (([5, 7, 2, 9, 2], [2]), ([5, 7], [2]), ([2, 5], [2]), ([8, 3, 4, 2], [2, 3]), ([], [2])):
        right = ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
        result = numbers(call(answer, list(ids), list(ends)))
        expect(result == right, f"For {ids} and the end tokens {ends} it gives {result}. Right is {right}.")
    return "That is what the loop around an engine does, if it knows the end tokens."


@exercise(
    "05.4",
    "A prompt that fits",
    "a function that returns the begin token and the last tokens, as many as both limits allow",
    "Two limits count: max_input_len, and what new_tokens leave of max_seq_len.",
    "With room for n tokens: the first one, and the last n - 1. A list that fits stays as it is.",
    points=2,
)
def fit(answer: Any, recipe: BuildRecipe) -> str:
    longest, most = recipe.max_input_len, recipe.max_seq_len
    for length, new in (
        (5, 20),
        (longest + 36, 20),
        (longest, most - 10),
        (longest + 1, 1),
        (longest, 20),
        (9, most - 1),
    ):
        ids = list(range(101, 101 + length))
        room = min(longest, most - new)
        right = ids if length <= room else [ids[0], *ids[length - room + 1 :]]
        result = numbers(call(answer, list(ids), recipe, new))
        told = f"{len(result)} tokens" if len(result) != len(right) else "other tokens"
        expect(result == right, f"Of {length} tokens, with {new} new ones, it keeps {told}. Right are {len(right)}.")
    return "Right for short prompts, for long ones, and for long answers."


@exercise(
    "05.5",
    "Rounding or a fault?",
    "a function that returns True for a fault, and False for what rounding in that precision can make",
    "How far are the logits apart, as a share of the largest exact one? Section 7 computes it.",
    "The limits are in section 7 too: less than 0.01 % in fp32, 1 % in fp16, and 6 % in bf16 and int8.",
    "(logits - exact).abs().max() / exact.abs().max(), compared with the limit of the precision.",
    points=3,
)
def is_fault(answer: Any) -> str:
    import torch

    exact = torch.tensor([[-8.0, 0.5, 3.0, 1.0]])
    for precision, share in SHARES.items():
        for factor, right in ((0.0, False), (0.5, False), (-0.5, False), (2.0, True), (-2.0, True)):
            logits = exact.clone()
            logits[0, 1] += factor * share * 8.0
            result = plain(call(answer, exact.clone(), logits, precision))
            expect(result in (True, False), f"It returns {result!r:.80}, and not True or False.")
            far = f"{abs(factor) * share:.3%} of the largest"
            expect(result == right, f"In {precision}, {far} apart, it says {result}. That is {_words(right)}.")
    return "So two right engines may give two texts, and a wrong one the same text."


def _words(fault: bool) -> str:
    return "more than rounding makes" if fault else "what rounding can make"


@exercise(
    "05.6",
    "Which files were changed?",
    "a function that returns the names of the files that are gone or are not what the manifest says",
    "Two ways to be wrong: the file is not there, or its bytes have another hash.",
    "hashlib.sha256(path.read_bytes()).hexdigest() is the hash of a file.",
    "Go through the manifest, not through the folder: what is gone cannot be found there.",
    points=3,
)
def damaged(answer: Any) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder, content = Path(name), {"a.pt2": b"one", "b.pt2": b"two", "c.json": b"{}", "d.bin": b""}
        manifest = {file: hashlib.sha256(data).hexdigest() for file, data in content.items()}
        for changes in ({}, {"b.pt2": b"twO"}, {"a.pt2": None}, {"c.json": b"", "d.bin": b"x"}, {"d.bin": None}):
            for file, data in {**content, **changes}.items():
                (folder / file).unlink(missing_ok=True)
                if data is not None:
                    (folder / file).write_bytes(data)
            result = choices(call(answer, folder, dict(manifest)), list(content))
            right = ", ".join(sorted(changes)) or "none"
            expect(result == set(changes), f"It names {', '.join(sorted(result)) or 'none'}. Changed are: {right}.")
    return "The course does this before any code of an engine runs."
