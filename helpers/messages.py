"""What libraries say when something is wrong: tables of known messages, and the one walk that searches them.

A table is a JSON file of cards. The first card that matches counts, so causes stand before their consequences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from helpers import errors
from helpers.errors import CourseError

ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b\n]*\x07?)")  # colours and titles of a terminal
QUESTION = 200  # characters that a person types at most; more was copied
LONGEST_LINE = 500  # characters of a line that are shown


@dataclass(frozen=True)
class Card:
    """One trouble.

    words    any of these marks it, in upper or lower case: all in one line of the text. "..." stands for anything in
             between; "^" before the words and "$" after them tie them to the line's beginning and end.
    where    "line": in any line; "last line": only where the text ends with it, as it does when a program hangs;
             "question": only in one line that a person typed, for troubles that give no message
    error    the CourseError that it becomes, if a library raised it
    source   where the text and its remedy were read
    shown    the notebook and section that cause it and mend it
    """

    words: tuple[str, ...]
    cause: str
    fix: str
    where: str = "line"
    error: str = "CourseError"
    source: str = ""
    shown: str = ""

    def as_error(self, what: str) -> CourseError:
        kind: type[CourseError] = getattr(errors, self.error)
        return kind(what, cause=self.cause, fix=self.fix)


class Match(NamedTuple):
    card: Card
    number: int  # of the line, from 1
    line: str


def read_cards(path: Path) -> list[Card]:
    cards = json.loads(path.read_text(encoding="utf-8"))
    return [Card(**{**card, "words": tuple(card["words"])}) for card in cards]


def plain(text: str) -> str:
    """A log without colours; what overwrites a line is a line of its own."""
    return ESCAPES.sub("", text).replace("\r", "\n").strip()


def matches(text: str, cards: Iterable[Card]) -> Iterator[Match]:
    """Each card that the text matches, in their order, with the first such line. Linear in the length of the text."""
    text = plain(text)
    lowered = text.lower()
    lines: list[str] = []
    for card in cards:
        if card.where == "question" and ("\n" in text or len(text) > QUESTION):
            continue
        where = lowered[lowered.rfind("\n") + 1 :] if card.where == "last line" else lowered
        starts = [start for words in card.words if (start := _first_line(where, words.lower())) is not None]
        if starts:
            lines = lines or text.split("\n")
            number = len(lines) if card.where == "last line" else lowered.count("\n", 0, min(starts)) + 1
            yield Match(card, number, lines[number - 1].strip()[:LONGEST_LINE])


def _first_line(text: str, words: str) -> int | None:
    """Where the first line begins that holds the words, or None. Each line is looked at once, so that no text, however
    made, takes longer than its length: a regular expression with several ".*" could take the square of it."""
    parts = words.removeprefix("^").removesuffix("$").split("...")
    place = text.find(parts[0])
    while place >= 0:
        begin = text.rfind("\n", 0, place) + 1
        end = text.find("\n", place)
        line = text[begin : end if end >= 0 else len(text)].strip()
        if (
            (not words.startswith("^") or line.startswith(parts[0]))
            and (not words.endswith("$") or line.endswith(parts[-1]))
            and _in_order(line, parts)
        ):
            return begin
        place = text.find(parts[0], end) if end >= 0 else -1
    return None


def _in_order(line: str, parts: list[str]) -> bool:
    place = 0
    for part in parts:
        place = line.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True
