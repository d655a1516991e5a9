"""A seeded probabilistic grammar of short children's stories whose entropy is known exactly.

The bundled model is trained on stories drawn here, so its loss has a known best value: no model can have a
lower mean loss than the entropy of the grammar. The grammar is unambiguous (one text has one derivation), so
the probability of a story is the product of the probabilities of the choices that made it.

How a template is written (rules.txt has one alternative a line: its weight within the rule, then its template; the
words are in words.toml):

    {OPENING}             expand another rule
    {thing=THINGS}        draw a row of the table THINGS, call it `thing`, write it
    {thing=THINGS:a}      the same, written in its form "a" ("a kite")
    {way=thing.ways}      draw from a table that belongs to the row drawn before
    {thing} {hero:his}    write a row drawn before, or one of its forms: this is the agreement to be learned
    {hero:He}             the form "he" with a capital letter

Units: log probabilities and entropies are natural logarithms (nats), per story unless stated otherwise.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from helpers.model.stories.tables import TABLES, Row


class ParseError(ValueError):
    """The text is not a story of the grammar."""


@dataclass(frozen=True)
class Story:
    """A story, and the natural logarithm of its probability under the grammar (nats)."""

    text: str
    log_probability: float


class Expand(NamedTuple):
    """Expand another rule."""

    rule: str


class Draw(NamedTuple):
    """Draw a row of a table, name it, and write one of its forms."""

    name: str
    table: str
    form: str


class Recall(NamedTuple):
    """Write a form of a row drawn before."""

    name: str
    form: str


Symbol = str | Expand | Draw | Recall  # a plain string is written as it is
_FIELD = re.compile(
    r"\{(?:(?P<name>[a-z_]+)=(?P<table>[\w.]+)|(?P<recall>[a-z_]+)|(?P<rule>[A-Z_]+))(?::(?P<form>\w+))?\}"
)


def _compile(template: str) -> tuple[Symbol, ...]:
    symbols: list[Symbol] = []
    end = 0
    for field in _FIELD.finditer(template):
        if field.start() > end:
            symbols.append(template[end : field.start()])
        form = field["form"] or ""
        if field["rule"]:
            symbols.append(Expand(field["rule"]))
        elif field["name"]:
            symbols.append(Draw(field["name"], field["table"], form))
        else:
            symbols.append(Recall(field["recall"], form))
        end = field.end()
    if end < len(template):
        symbols.append(template[end:])
    return tuple(symbols)


class Options:
    """Weighted alternatives: the right-hand sides of a rule, or the rows of a table."""

    def __init__(self, values: list[Any], weights: list[float]):
        total = sum(weights)
        self.values = values
        self.probabilities = [weight / total for weight in weights]
        self.log_probabilities = [math.log(p) for p in self.probabilities]
        self.entropy = -sum(p * math.log(p) for p in self.probabilities)  # nats
        self._cumulative = list(accumulate(self.probabilities))

    def draw(self, rng: random.Random) -> tuple[Any, float]:
        index = min(bisect(self._cumulative, rng.random()), len(self.values) - 1)
        return self.values[index], self.log_probabilities[index]


def _table_options(rows: list[Row]) -> Options:
    # Zipf-like, as words are in real text: frequent words for greedy decoding to settle on without ties, and
    # a long tail that temperature and top-p cut visibly.
    options = Options(rows, [1 / (rank + 3) for rank in range(len(rows))])
    for row in rows:
        for form, value in row.items():
            if isinstance(value, list):
                row[form] = _table_options(value)
    return options


def _read_rules(text: str) -> dict[str, Options]:
    rules: dict[str, list[tuple[float, tuple[Symbol, ...]]]] = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            if line:
                alternatives = rules.setdefault(line, [])
            continue
        weight, template = line.strip().split(" ", 1)
        alternatives.append((float(weight), _compile(template)))
    return {rule: Options([s for _, s in lines], [w for w, _ in lines]) for rule, lines in rules.items()}


_TABLES = {name: _table_options(rows) for name, rows in TABLES.items()}
_RULES = _read_rules((Path(__file__).parent / "rules.txt").read_text(encoding="utf-8"))
# rows that have tables of their own -> the table of these rows
_OWNERS = {"place": "PLACES", "thing": "THINGS"}


def _options(draw: Draw, drawn: dict[str, Row]) -> Options:
    if "." in draw.table:
        owner, form = draw.table.split(".")
        return drawn[owner][form]
    return _TABLES[draw.table]


def _write(row: Row, form: str) -> str:
    if form[:1].isupper():
        text = row[form.lower()]
        return text[0].upper() + text[1:]
    return row[form]


def draw(rng: random.Random) -> Story:
    """Draw one story. The same state of `rng` gives the same story."""
    written: list[str] = []
    drawn: dict[str, Row] = {}
    total = 0.0
    todo: list[Symbol] = [Expand("STORY")]
    while todo:
        symbol = todo.pop()
        if isinstance(symbol, str):
            written.append(symbol)
        elif isinstance(symbol, Recall):
            written.append(_write(drawn[symbol.name], symbol.form))
        elif isinstance(symbol, Draw):
            row, log_probability = _options(symbol, drawn).draw(rng)
            total += log_probability
            drawn[symbol.name] = row
            written.append(_write(row, symbol.form))
        else:
            symbols, log_probability = _RULES[symbol.rule].draw(rng)
            total += log_probability
            todo.extend(reversed(symbols))
    return Story("".join(written), total)


def draw_corpus(n: int, seed: int | str) -> list[Story]:
    """Draw `n` stories. The same seed gives the same stories; a larger `n` continues the smaller one's."""
    rng = random.Random(seed)
    return [draw(rng) for _ in range(n)]


def derivations(text: str) -> Iterator[float]:
    """The log probability (nats) of each derivation of the text: one for a story, none for another text.

    Raises ParseError after the last derivation if there was none.
    """
    # Depth first. A branch: position in the text, symbols still to match (a linked list), rows drawn, nats.
    branches: list[tuple[int, Any, dict[str, Row], float]] = [(0, (Expand("STORY"), None), {}, 0.0)]
    furthest, expected, found = 0, set[str](), False
    while branches:
        position, todo, drawn, total = branches.pop()
        while todo is not None:
            symbol, todo = todo
            if isinstance(symbol, Expand):
                options = _RULES[symbol.rule]
                for symbols, log_probability in zip(options.values, options.log_probabilities, strict=True):
                    rest = todo
                    for item in reversed(symbols):
                        rest = (item, rest)
                    branches.append((position, rest, drawn, total + log_probability))
                break
            if isinstance(symbol, Draw):
                options = _options(symbol, drawn)
                for row, log_probability in zip(options.values, options.log_probabilities, strict=True):
                    word = _write(row, symbol.form)
                    if text.startswith(word, position):
                        rows = {**drawn, symbol.name: row}
                        branches.append((position + len(word), todo, rows, total + log_probability))
                if position >= furthest:
                    expected = expected | {symbol.name} if position == furthest else {symbol.name}
                    furthest = position
                break
            word = symbol if isinstance(symbol, str) else _write(drawn[symbol.name], symbol.form)
            if not text.startswith(word, position):
                if position >= furthest:
                    expected = expected | {repr(word)} if position == furthest else {repr(word)}
                    furthest = position
                break
            position += len(word)
        else:
            if position == len(text):
                found = True
                yield total
            elif position >= furthest:
                furthest, expected = position, {"the end"}
    if not found:
        raise ParseError(
            f"not a story of the grammar: at character {furthest} stands {text[furthest : furthest + 30]!r}, "
            f"expected {' or '.join(sorted(expected))}. Only whole stories parse: "
            "a text cut off by max_tokens, or with special tokens in it, does not."
        )


def parse(text: str) -> float:
    """The log probability of a story (nats). Raises ParseError, saying where, if the text is none."""
    return next(derivations(text))


def parses(text: str) -> bool:
    """Whether this is a story that the grammar could have told."""
    try:
        parse(text)
    except ParseError:
        return False
    return True


def entropy() -> float:
    """The entropy of the grammar in nats per story. Exact, since no rule is chosen by the words drawn."""
    return _entropy(Expand("STORY"))


def _entropy(symbol: Symbol) -> float:
    if isinstance(symbol, Expand):
        options = _RULES[symbol.rule]
        parts = [sum(map(_entropy, symbols)) for symbols in options.values]
        return options.entropy + sum(p * part for p, part in zip(options.probabilities, parts, strict=True))
    if isinstance(symbol, Draw):
        if "." not in symbol.table:
            return _TABLES[symbol.table].entropy
        owner, form = symbol.table.split(".")
        owners = _TABLES[_OWNERS[owner]]
        return sum(p * row[form].entropy for p, row in zip(owners.probabilities, owners.values, strict=True))
    return 0.0
