"""Notebook 05: troubles with requests and engines."""

from __future__ import annotations

import hashlib
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, expect, judge, same_as
from helpers.course.values import alone, choice, choices, numbers, whole
from helpers.paths import full_is_told, temporary_folder

if TYPE_CHECKING:
    from helpers.recipe import BuildRecipe

NAMES = ("EngineNotFound", "EngineCorrupt", "EngineMismatch", "LimitError", "OutOfMemory", "RecipeError")
SHARES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.06, "int8": 0.06}  # of the largest logit: what rounding makes


@judge("05.1")
def after_an_update(answer: Any) -> None:
    expect(choice(answer, NAMES) == "EngineMismatch", "That is not what it says.")


@judge("05.2")
def the_cause(answer: Any, log: str) -> None:
    lines = log.strip().splitlines()
    cause = next(number for number, line in enumerate(lines, start=1) if "[E]" in line)
    number = whole(answer)
    expect(number != len(lines), "That line is the last consequence: it says that the build failed, not why.")
    expect(number == cause, "That line is not it.")


@judge("05.3")
def end_at(answer: Any) -> None:
    def right(ids: list[int], ends: list[int]) -> list[int]:
        return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]

    cases = [
        ([5, 7, 2, 9, 2], [2]),
        ([5, 7], [2]),
        ([2, 5], [2]),
        ([8, 3, 4, 2], [2, 3]),
        ([8, 2, 4, 3], [2, 3]),
        ([], [2]),
    ]
    same_as(answer, right, cases, lambda ids: numbers(ids, whole))


@judge("05.4")
def fit(answer: Any, recipe: BuildRecipe) -> None:
    longest, most = recipe.max_input_len, recipe.max_seq_len
    short, long = [(5, 20), (9, most - 1)], [(longest + 36, 20), (longest + 1, 1)]
    for length, new in (*short, *long, (longest, most - 10), (longest, 20)):
        ids = list(range(101, 101 + length))
        room = min(longest, most - new)
        right = ids if length <= room else [ids[0], *ids[length - room + 1 :]]
        result = numbers(call(answer, ids, recipe, new))
        told = f"{len(result)} tokens" if len(result) != len(right) else "other tokens"
        expect(result == right, f"Of {length} tokens, with {new} new ones, it keeps {told}. Right are {len(right)}.")


@judge("05.5")
def is_fault(answer: Any) -> None:
    import torch

    # Of many, neither their sum nor their mean tells what one does; of some models, all are negative.
    logits_of = [torch.linspace(-8.0, largest, 500)[None] for largest in (7.0, -1.0)]
    one, every = torch.zeros(1, 500), torch.ones(1, 500)
    one[0, 250] = 1.0
    cases = (
        (0.0, one, False),
        (0.5, one, False),
        (-0.5, one, False),
        (0.5, every, False),
        (1.5, one, True),
        (-1.5, one, True),
    )
    for (precision, share), exact in product(SHARES.items(), logits_of):
        for factor, where, right in cases:
            logits = exact + factor * share * 8.0 * where
            result = alone(call(answer, exact, logits, precision))
            expect(result in (True, False), f"It returns {result!r:.80}, and not True or False.")
            makes = "more than rounding makes" if right else "what rounding can make"
            far = f"{'one logit' if where is one else 'every logit'} {abs(factor) * share:.3%} of the largest apart"
            expect(result == right, f"In {precision}, {far}, it says {result}. That is {makes}.")


@judge("05.6")
@full_is_told()
def damaged(answer: Any) -> None:
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as name:
        folder, content = Path(name), {"a.pt2": b"PK\xae\xff\r\n", "b.pt2": b"two", "c.json": b"{}", "d.bin": b""}
        manifest = {file: hashlib.sha256(data).hexdigest() for file, data in content.items()}
        for changes in ({}, {"b.pt2": b"twO"}, {"a.pt2": None}, {"c.json": b"", "d.bin": b"x"}, {"d.bin": None}):
            for file, data in {**content, **changes}.items():
                (folder / file).unlink(missing_ok=True)
                if data is not None:
                    (folder / file).write_bytes(data)
            result = choices(call(answer, folder, manifest), list(content))
            right = ", ".join(sorted(changes)) or "none"
            expect(result == set(changes), f"It names {', '.join(sorted(result)) or 'none'}. Changed are: {right}.")
