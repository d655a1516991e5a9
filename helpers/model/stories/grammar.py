"""A seeded probabilistic grammar of short children's stories whose entropy is known exactly.

The bundled model is trained on stories drawn here, so its loss has a known best value: no model can have a
lower mean loss than the entropy of the grammar. The grammar is unambiguous (one text has one derivation), so
the probability of a story is the product of the probabilities of the choices that made it.

How a template is written (RULES below; the words are in tables.py):

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
from typing import Any, NamedTuple

from helpers.model.stories.tables import TABLES, Row

# One alternative a line: its weight within the rule, then its template.
RULES_TEXT = """
STORY
    88 {OPENING} {OWNED} {OUTING} {PLOT} {ENDING}
    12 {MORNING} {PLOT} {ENDING}
PLOT
    7 {LOSS} {SEARCH} {MEETING} {FOUND}
    3 {STRANGER} {MENDED}

OPENING
    40 Once upon a time, there was {trait=TRAITS:a} {hero=HEROES:kind} named {hero}. {LIVED}
    20 Once upon a time, {trait=TRAITS:a} {hero=HEROES:kind} named {hero} lived in {HOME}.
    10 Long ago, in {HOME}, there lived {trait=TRAITS:a} {hero=HEROES:kind} named {hero}.
    6 There once was {hero=HEROES:a_kind} named {hero}, who was very {trait=TRAITS}. {LIVED}
    12 Hello, my name is {hero=NARRATORS:name}. I am {age=AGES} years old, and I live in {HOME}.
    4 Hello, my name is {hero=NARRATORS:name}, and this is my story. {LIVED}
LIVED
    1 {hero:He} lived in {HOME}.
HOME
    3 {home_look=HOME_LOOKS:a} {home=HOMES} {site=SITES}
    2 {home=HOMES:a} {site=SITES}
OWNED
    4 {hero:He} had {OWN}, a gift from {hero:his} {family=FAMILY}.
    3 {hero:His} {family=FAMILY} gave {hero:him} {OWN}.
    2 What {hero} loved most was {OWN} from {hero:his} {family=FAMILY}.
OWN
    3 {color=COLORS:a} {thing=THINGS}
    2 {look=LOOKS:a} {color=COLORS} {thing=THINGS}
OUTING
    5 One {time=TIMES}, {hero} {going=GOING} to the {place=PLACES} to {purpose=place.purposes}. {SKY}
    2 One {weather=WEATHER} {time=TIMES}, {hero:he} took the {thing} to the {place=PLACES}.
    2 {weather=WEATHER:now} that {time=TIMES} when {hero} {going=GOING} to the {place=PLACES}.
SKY
    2 It was {weather=WEATHER:a} {time}.
    1 {weather=WEATHER:now}.
MORNING
    2 One {time=TIMES}, {trait=TRAITS:a} {hero=HEROES:kind} named {hero} left {HOME} with {OWN}. {ERRAND}
    1 One {weather=WEATHER} {time=TIMES}, {hero=HEROES:a_kind} named {hero} came out of {HOME}. {ERRAND_WITH}
ERRAND
    1 {SKY} {hero:His} {family=FAMILY} had sent {hero:him} to the {place=PLACES} to {purpose=place.purposes}.
ERRAND_WITH
    1 {hero:He} had {OWN} from {hero:his} {family=FAMILY}, and {going=GOING} to the {place=PLACES}.

LOSS
    4 But then the {thing} {way=thing.ways}.
    3 All of a sudden, the {color} {thing} {way=thing.ways}.
    2 While {hero} was busy, the {thing} {way=thing.ways}.
    1 Oh no! The {thing} {way=thing.ways}!
SEARCH
    4 {hero:He} looked {near=place.near} and {far=place.far}, but the {thing} was gone. {GRIEF}
    2 It was not {near=place.near}. It was not {far=place.far}. {GRIEF}
GRIEF
    3 {hero} felt {sad=SAD}.
    2 {hero:He} sat down and felt {sad=SAD}.
MEETING
    4 Just then {NEWCOMER} came by. "Hello, my name is {friend=FRIENDS}," {said=SAID} the {kind}. {ASKED}
    3 Soon {hero:he} met {NEWCOMER} named {friend=FRIENDS}, who was {doing=DOINGS}. {ASKED}
NEWCOMER
    1 {friend_trait=FRIEND_TRAITS:a} {kind=ANIMALS}
ASKED
    3 "Why are you so {sad}?" "I lost my {color} {thing}," {hero} said. "{promise=PROMISES}," said {friend}.
    2 {hero} told {friend:him} about the {thing}. "{promise=PROMISES}," {said=SAID} {friend} {manner=MANNERS}.
FOUND
    3 {friend} looked {found=place.found}, and there was the {color} {thing}! {JOY}
    2 Together {hero:they} searched the {place}, and {friend} found the {thing} {found=place.found}. {JOY}
    1 The {kind} ran off and came back with the {thing}. It had been {found=place.found}. {JOY}
JOY
    2 {hero} was {glad=GLAD}.
    1 "Thank you, {friend}!" {hero} {said=SAID} {manner=MANNERS}.

STRANGER
    2 {place:Where}, {hero:he} met {NEWCOMER} named {friend=FRIENDS}. {friend} looked {sad=SAD}. {LAMENT}
    1 There {found=place.found} sat {NEWCOMER} named {friend=FRIENDS}, all alone and {sad=SAD}. {LAMENT}
LAMENT
    2 "What is wrong?" {hero} asked {manner=MANNERS}. "I have {trouble=TROUBLES}," {said=SAID} the {kind}.
    1 The {kind} had {trouble=TROUBLES}.
MENDED
    3 {hero} put down the {thing} and {trouble:mend}. "Thank you, {hero:name}!" {said=SAID} {friend}. {PLAY}
    2 So {hero} {trouble:mend}, and the {kind} was {glad=GLAD} again. {PLAY}
PLAY
    1 Then {hero:he} let {friend} play with the {color} {thing}.

ENDING
    5 {SHARED} {LAST}
    4 {HOMEWARD} {LAST}
    2 {SHARED} {HOMEWARD}
SHARED
    3 {friend} and {hero} ate {food=FOODS} and {game=GAMES}.
    2 That {time}, {hero:they} {game=GAMES} and shared {food=FOODS}.
HOMEWARD
    3 {hero:They} walked back to the {home} {weather:home}.
    2 {hero:His} {family} was waiting at the {home} with {food=FOODS}.
LAST
    3 From that {time} on, {friend} and {hero} were best friends.
    2 {hero} never forgot {friend} the {kind}.
    2 And {hero:they} learned that {moral=MORALS}.
    1 And {hero} never lost the {color} {thing} again.
"""


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
_RULES = _read_rules(RULES_TEXT)
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
