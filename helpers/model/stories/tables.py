"""The words of the stories: one table per kind of word, the most frequent row first.

A row is a dictionary of the forms that the grammar asks for. The form "" is the word itself; "a" is the
word after its article ("a kite", "an owl"); rows of people have pronouns, rows of places have spots to
search, and so on. A form that is a list is a table of its own, from which the grammar draws later: where a
thing may hide depends on the place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.paths import read_toml

Row = dict[str, Any]

WORDS = read_toml(Path(__file__).parent / "words.toml")


def _split(text: str) -> list[str]:
    separator = ";" if ";" in text else ","
    return [" ".join(word.split()) for word in text.split(separator)]


def _row(word: str, **forms: Any) -> Row:
    return {"": word, "a": ("an " if word[0] in "aeiou" else "a ") + word, **forms}


def _rows(words: str) -> list[Row]:
    return [_row(word) for word in _split(words)]


def _columns(table: str) -> list[list[str]]:
    """The cells of a table, one row a line; a line that begins with a blank continues the one before."""
    lines = table.replace("\n    ", " ").strip().split("\n")
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def _take_turns(*tables: list[Row]) -> list[Row]:
    return [row for turn in zip(*tables, strict=True) for row in turn]


def _people(names: str, kind: str, he: str, him: str, his: str) -> list[Row]:
    forms = {"kind": kind, "a_kind": f"a {kind}", "he": he, "him": him, "his": his, "they": "they"}
    return [_row(name, name=name, **forms) for name in names.split()]


def _tables() -> dict[str, list[Row]]:
    tables = {name: _rows(words) for name, words in WORDS["words"].items()}
    girls = _people(WORDS["girls"], "girl", "she", "her", "her")
    boys = _people(WORDS["boys"], "boy", "he", "him", "his")
    tables["HEROES"] = _take_turns(girls, boys)
    # A story told by its hero says "I", "me", "my" where another says "Mia", "her", "her".
    first_person = {"": "I", "he": "I", "him": "me", "his": "my", "they": "we"}
    tables["NARRATORS"] = [{**row, **first_person} for row in tables["HEROES"]]
    tables["FRIENDS"] = _take_turns(
        _people(WORDS["he_friends"], "", "he", "him", "his"),
        _people(WORDS["she_friends"], "", "she", "her", "her"),
    )
    tables["THINGS"] = _take_turns(
        *(
            [_row(word, ways=_rows(WORDS["ways"][kind])) for word in _split(words)]
            for kind, words in WORDS["things"].items()
        )
    )
    tables["PLACES"] = []
    for where, purposes, near, far, found in _columns(WORDS["places"]):
        forms = {"purposes": purposes, "near": near, "far": far, "found": found}
        lists = {form: _rows(cell) for form, cell in forms.items()}
        tables["PLACES"].append(_row(where.split(" ", 2)[2], where=where, **lists))
    tables["WEATHER"] = [_row(word, now=now, home=home) for word, now, home in _columns(WORDS["weather"])]
    tables["TROUBLES"] = [_row(trouble, mend=mend) for trouble, mend in _columns(WORDS["troubles"])]
    return tables


TABLES = _tables()
