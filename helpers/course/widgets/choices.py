"""What a token was chosen from: plain functions, and a distribution as rows of bars."""

from __future__ import annotations

import html
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.backends.base import need_engine
from helpers.errors import InputError, shown
from helpers.model.sampling import SamplingParams, next_token_distribution
from helpers.model.tokenizer import INCOMPLETE

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine

START = "Once upon a time, there was a little girl named Mia. She lived in a small house by the river. She had a"


@dataclass(frozen=True)
class Choice:
    """One token of an answer, with what it was chosen from."""

    text: str  # the answer so far, this token included
    chosen: str
    candidates: list[tuple[str, float]]  # the likeliest tokens, and the chosen one, with their probabilities


def candidates(
    engine: Engine,
    probabilities: Tensor,
    count: int = 8,
    after: Sequence[int] = (),
    logits: Tensor | None = None,
) -> list[tuple[str, float]]:
    """The `count` likeliest tokens of a distribution [V], likeliest first, as text that follows the tokens `after`.

    logits: [V], which tell the order of those that cannot be chosen. All tokens that end a text are one row, of the
    text "".
    """
    if type(count) is not int or count < 1:
        raise InputError(f"The number of candidates is {shown(count)}.", fix="Give 1 or more.")
    order = (probabilities if logits is None else logits).argsort(descending=True, stable=True)
    order = order[probabilities[order].argsort(descending=True, stable=True)]
    rows: dict[str, float] = {}
    for token in order[: count + len(engine.end_ids)].tolist():
        name = _name(engine, token, after)
        if name in rows or len(rows) < count:
            rows[name] = rows.get(name, 0.0) + probabilities[token].item()
    return list(rows.items())


def _name(engine: Engine, token: int, after: Sequence[int]) -> str:
    """A token's text; "" where it ends the text. One that is no text, such as a padding token, or a part of a character
    is told by its id, because others have the same text."""
    if token in engine.end_ids:
        return ""
    text = engine.detokenize([token], after)
    return text if text.strip(INCOMPLETE) else f"(token {token})"


def stream_choices(engine: Engine, prompt: str, sampling: SamplingParams, count: int = 8) -> Iterator[Choice]:
    """`engine.stream`, showing for each token what it was chosen from."""
    seen: deque[Tensor] = deque()  # logits [V] of the tokens that were chosen and not handed out yet

    def keep(logits: Tensor) -> None:
        seen.append(logits[0].cpu().float())

    need_engine(engine)
    before = engine.tokenize(prompt)
    text = ""
    for token in engine.stream(prompt, sampling, observe=keep):
        logits = seen.popleft()
        distribution = next_token_distribution(logits, sampling, before)  # [V]
        options = candidates(engine, distribution, count, before, logits)
        chosen = _name(engine, token.token_id, before)
        if chosen not in dict(options):  # an unlikely one was drawn
            options.append((chosen, distribution[token.token_id].item()))
        before.append(token.token_id)
        text += token.text
        yield Choice(text, chosen, options)


def bars(options: list[tuple[str, float]], chosen: str | None = None) -> str:
    """A distribution as an HTML table with a bar for each token; the chosen one is marked by an arrow too."""
    rows = []
    for text, probability in options:
        mark, colour = ("&#9654;", "#d55e00") if text == chosen else ("", "#4a90c4")
        bar = f"<div style='background:{colour};height:1em;width:{probability * 9:.2f}em'></div>"
        rows.append(
            f"<tr><td>{mark}</td><td style='text-align:right;white-space:pre;font-family:monospace'>"
            f"{html.escape(visible(text))}</td>"
            f"<td style='text-align:right'>{probability:6.1%}</td><td style='width:9em'>{bar}</td></tr>"
        )
    return f"<table style='line-height:1.3;border-spacing:6px 0'>{''.join(rows)}</table>"


def visible(token: str) -> str:
    """A token's text where one has to see it."""
    return token.replace("\n", "\\n") or "(end)"
