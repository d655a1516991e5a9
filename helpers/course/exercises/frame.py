"""The frame of every exercise: what is checked against what, the learner's code at arm's length, hints, solutions."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from helpers.course import learner
from helpers.errors import CourseError, InputError, printable, shown

# The module that holds the exercises of a notebook.
MODULES = {
    "00": "start",
    "01": "engine",
    "02": "build",
    "03": "generate",
    "04": "compare",
    "05": "trouble",
    "06": "own_model",
    "07": "lab",
    "08": "diagnose",
}
SOLUTIONS = Path(__file__).parent / "solutions"
OPEN = "Put your answer in place of None and run the cell again."


@dataclass(frozen=True)
class Exercise:
    """One exercise. Its `judge` takes the answer and, by the names of its arguments, what the notebook froze. It
    returns what there is to say about a right answer, and raises a CourseError that says what is wrong with another."""

    number: str  # "03.2": of notebook 03
    title: str
    expects: str  # what is expected of an answer, in words that do not give it away
    hints: tuple[str, ...]  # each deeper than the one before
    points: int
    judge: Callable[..., str]


def exercise(number: str, title: str, expects: str, *hints: str, points: int = 1) -> Callable[..., Exercise]:
    """Decorates the judge of an exercise."""
    return lambda judge: Exercise(number, title, expects, hints, points, judge)


@dataclass(frozen=True)
class Outcome:
    """What a check found. `state` is "right", "wrong" or "open" (not answered yet)."""

    state: str
    message: str

    def __bool__(self) -> bool:
        return self.state == "right"

    def __str__(self) -> str:
        opening = {"right": "Right.", "wrong": "Not yet.", "open": "Open."}[self.state]
        return printable(f"{opening} {self.message}")

    __repr__ = __str__  # the last line of a cell shows it


class _Open(Exception):
    """The learner's function is still the one that the notebook came with."""


def check(number: str, answer: Any = None) -> Outcome:
    """Judge an answer at once. None, and `...` from a function, are open: a notebook runs before anybody answers."""
    task = find(number)
    if answer is None or answer is ...:
        return Outcome("open", OPEN)
    with _frozen(task) as given:
        try:
            outcome = Outcome("right", task.judge(answer, **given))
        except _Open:
            return Outcome("open", "Put your code in place of `...` and run the cell again.")
        except CourseError as error:
            outcome = Outcome("wrong", str(error))
        except Exception as error:  # an answer may be anything, and do anything when it is looked at
            outcome = Outcome("wrong", f"This cannot be read as an answer ({type(error).__name__}: {error!s:.200}).")
    tries, note = learner.record_answer(number, outcome.state, _fingerprint(answer))
    if outcome:
        return Outcome("right", outcome.message + note)
    yours = "your function" if inspect.isroutine(answer) else shown(answer)
    level, most = min(tries, len(task.hints)), len(task.hints)
    message = f"{outcome.message}\n  yours: {yours}\n  expected: {task.expects}"
    message += f"\n  hint {level} of {most}: {task.hints[level - 1]}"
    if level == most:
        message += f'\nIf you have tried enough: solution("{number}")'
    return Outcome("wrong", message + note)


def hint(number: str) -> None:
    """Print a hint without a try; the next call prints a deeper one."""
    task = find(number)
    given = learner.record_hint(number, len(task.hints))
    print(f"Hint {given} of {len(task.hints)} for {number}: {task.hints[given - 1]}")


@dataclass(frozen=True)
class Solution:
    """A page's section, as Markdown."""

    text: str

    def __repr__(self) -> str:
        return self.text

    _repr_markdown_ = __repr__


def solution(number: str) -> Solution:
    """A right answer, with the reason. The learner's file notes that it was shown."""
    task = find(number)
    text = read_solutions(number[:2])[number]
    learner.record_solution(number)
    return Solution(f"**{number} {task.title}**\n\n{text}")


def read_solutions(notebook: str) -> dict[str, str]:
    """Every solution of a notebook: the Markdown under each heading "## 03.1" of its page."""
    page = (SOLUTIONS / f"{notebook}.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (\d\d\.\d+)[^\n]*\n", page, flags=re.MULTILINE)
    return {number: text.strip() for number, text in zip(parts[::2], parts[1::2], strict=True)}


# ---- the exercises ---------------------------------------------------------------------------------------------


@cache
def exercises_of(notebook: str) -> dict[str, Exercise]:
    """The exercises of a notebook ("03") by number, in order; none for what is no notebook."""
    name = f"{__package__}.{MODULES.get(notebook, '')}"
    if notebook not in MODULES or importlib.util.find_spec(name) is None:
        return {}
    tasks = [value for value in vars(importlib.import_module(name)).values() if isinstance(value, Exercise)]
    return {task.number: task for task in sorted(tasks, key=lambda task: int(task.number[3:]))}


def find(number: str) -> Exercise:
    known = exercises_of(number[:2]) if isinstance(number, str) else {}
    if not isinstance(number, str) or number not in known:
        numbers = ", ".join(known) or "those of notebooks " + ", ".join(filter(exercises_of, MODULES))
        raise InputError(f"There is no exercise {shown(number)}.", fix=f"There are: {numbers}.")
    return known[number]


# ---- what answers are checked against --------------------------------------------------------------------------

_given: dict[str, dict[str, Any]] = {}  # by notebook


def freeze(notebook: str, **given: Any) -> None:
    """Hand the exercises of a notebook what they are checked against: the measurement that the learner's tables show,
    copied, so that nothing moves it; and engines, which are opened again where they have been closed."""
    if not isinstance(notebook, str) or not exercises_of(notebook):
        raise InputError(f"There are no exercises of notebook {shown(notebook)}.", fix="Give its number, such as '03'.")
    _given[notebook] = {name: _kept(value) for name, value in given.items()}
    print(f"The exercises of notebook {notebook} are checked against this run: {', '.join(given)}.")


def _kept(value: Any) -> Any:
    from helpers.backends.base import Engine

    parameters = getattr(type(value), "__dataclass_params__", None)
    if isinstance(value, Engine) or (parameters and parameters.frozen):
        return value
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return copy.deepcopy(value)


@contextlib.contextmanager
def _frozen(task: Exercise) -> Iterator[Mapping[str, Any]]:
    """What the judge asks for by the names of its arguments."""
    from helpers.backends.base import Engine
    from helpers.engine import load

    notebook = task.number[:2]
    given = _given.get(notebook, {})
    names = list(inspect.signature(task.judge).parameters)[1:]
    if missing := [name for name in names if name not in given]:
        raise InputError(
            f"Exercise {task.number} has nothing to check against yet: {', '.join(missing)}.",
            cause="The notebook hands over its measurement in one cell, above the first exercise.",
            fix=f'Run the cell with freeze("{notebook}", ...), and what it needs above it.',
        )
    with contextlib.ExitStack() as opened:
        values = {name: given[name] for name in names}
        for name, value in values.items():
            if isinstance(value, Engine) and value.closed:
                values[name] = opened.enter_context(load(value.recipe))
        yield values


# ---- the learner's code ----------------------------------------------------------------------------------------


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the learner's function returns. What goes wrong in it is told as the learner's, down to their own line."""
    if not callable(function):
        raise InputError(f"A function is asked for, not {shown(function)}. Give its name, without parentheses.")
    try:
        result = function(*arguments)
    except (Exception, SystemExit) as error:  # the learner's code, so any
        raise _in_their_words(function, error) from error
    if result is ...:
        raise _Open
    if result is None:
        raise InputError(
            "Your function returns None. Is `return` missing in its last line? What it prints is not what it returns."
        )
    return result


def _in_their_words(function: Callable[..., Any], error: BaseException) -> InputError:
    """The error with the learner's part of the traceback: their cells lie in one folder, and lines below are ours."""
    place = Path(getattr(getattr(function, "__code__", None), "co_filename", "")).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if Path(frame.filename).parent == place]
    lines = [f"\n  line {frame.lineno}, in {frame.name}: {frame.line}" for frame in frames]
    return InputError(f"Your code raises {type(error).__name__}: {error!s:.500}{''.join(lines)}")


def _fingerprint(answer: Any) -> str:
    """Equal for the same answer given again, which is no new try."""
    code = getattr(answer, "__code__", None)
    text = f"{code.co_code!r}{code.co_consts!r}{code.co_names!r}" if code else shown(answer)
    return hashlib.sha256(re.sub(r" at 0x\w+", "", text).encode(errors="replace")).hexdigest()[:12]


def expect(condition: Any, why: str) -> None:
    """The answer is wrong unless the condition holds."""
    if not condition:
        raise InputError(why)
