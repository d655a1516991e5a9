"""The frame of every exercise: its page, what its answer is checked against, and the learner's code at arm's length."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from helpers.course import learner
from helpers.course.values import plain
from helpers.errors import BackendUnavailable, CourseError, InputError, OutOfMemory, StoreError, printable, shown
from helpers.machine.plain_torch import plain_torch

# The module with the judges of a notebook's exercises.
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
PAGES = Path(__file__).parent / "pages"
OPEN = "Put your answer in place of None and run the cell again."
Judge = Callable[..., "str | None"]
_judges: dict[str, Judge] = {}  # by number


@dataclass(frozen=True)
class Exercise:
    """A section of a notebook's page, and the judge of its answers."""

    number: str  # "03.2": of notebook 03
    title: str
    points: int
    expects: str  # what is expected of an answer, in words that do not give it away
    hints: list[str]  # each deeper than the one before
    solution: str  # Markdown: a right answer as code, and the reason
    judge: Judge

    @property
    def reason(self) -> str:
        return self.solution.rpartition("```\n")[2].replace("\n", " ")


def judge(number: str) -> Callable[[Judge], Judge]:
    """Decorates the judge of an exercise. It takes the answer and, by the names of its arguments, what the notebook
    froze. It raises a CourseError that says what is wrong with an answer. Of a right one it may return what there is to
    say about this run; else the page's reason is shown."""

    def register(function: Judge) -> Judge:
        _judges[number] = function
        return function

    return register


@cache
def exercises_of(notebook: str) -> dict[str, Exercise]:
    """The exercises of a notebook ("03") by number, in order; none for what is no notebook."""
    if notebook not in MODULES:
        return {}
    importlib.import_module(f"{__package__}.{MODULES[notebook]}")
    tasks = {}
    for section in (PAGES / f"{notebook}.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        head, expects, hints, solution = section.strip().split("\n\n", 3)
        number, _, title = head.partition(" ")
        title, _, points = title.partition(" (")
        expects = expects.removeprefix("Expected: ").replace("\n", " ")
        deeper = [" ".join(hint.split()) for hint in f"\n{hints}".split("\n- ")[1:]]
        tasks[number] = Exercise(number, title, int(points[:1] or 1), expects, deeper, solution, _judges[number])
    return tasks


def find(number: str) -> Exercise:
    known = exercises_of(number[:2]) if isinstance(number, str) else {}
    if not isinstance(number, str) or number not in known:
        numbers = ", ".join(known) or "those of notebooks " + ", ".join(MODULES)
        raise InputError(f"There is no exercise {shown(number)}.", fix=f"There are: {numbers}.")
    return known[number]


@dataclass(frozen=True)
class Outcome:
    """What a check tells. `state` is "right", "wrong" or "open" (not answered yet)."""

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
    with plain_torch(), _frozen(task) as given:  # what the notebook sets for its own tensors makes no answer wrong
        try:
            outcome = Outcome("right", task.judge(answer, **given) or task.reason)
        except _Open:
            return Outcome("open", "Put your code in place of `...` and run the cell again.")
        except (BackendUnavailable, OutOfMemory):  # of this machine, not of the answer
            raise
        except CourseError as error:
            outcome = Outcome("wrong", str(error))
        except Exception as error:  # an answer may be anything, and do anything when it is looked at
            outcome = Outcome("wrong", f"This cannot be read as an answer ({type(error).__name__}: {error!s:.200}).")
    tries, note = learner.record_answer(number, outcome.state, _fingerprint(answer, outcome.message))
    if outcome:
        return Outcome("right", outcome.message + note)
    level, most = min(tries, len(task.hints)), len(task.hints)
    message = f"{outcome.message}\n  yours: {_short(answer)}\n  expected: {task.expects}"
    message += f"\n  hint {level} of {most}: {task.hints[level - 1]}"
    if level == most:
        message += f'\nIf you have tried enough: solution("{number}")'
    return Outcome("wrong", message + note)


def hint(number: str) -> None:
    """Print a hint without a try; the next call prints a deeper one."""
    task = find(number)
    try:
        given, note = learner.record_hint(number, len(task.hints)), ""
    except StoreError as error:  # as in `check`
        given, note = 1, f"\n({error})"
    print(f"Hint {given} of {len(task.hints)} for {number}: {task.hints[given - 1]}{note}")


class Solution(str):
    """Markdown, which a notebook shows as such."""

    __repr__ = _repr_markdown_ = str.__str__


def solution(number: str) -> Solution:
    """A right answer, with the reason. The learner's file notes that it was shown."""
    task = find(number)
    try:
        learner.record_solution(number)
    except StoreError as error:
        print(f"({error})")
    return Solution(f"**{number} {task.title}**\n\n{task.solution}")


# ---- what answers are checked against --------------------------------------------------------------------------

_given: dict[str, dict[str, Any]] = {}  # by notebook


def freeze(notebook: str, **given: Any) -> None:
    """Hand the exercises of a notebook what they are checked against: the measurement that the learner's tables show,
    copied, so that nothing moves it; and engines, which are opened again where they have been closed."""
    if not isinstance(notebook, str) or not exercises_of(notebook):
        raise InputError(f"There are no exercises of notebook {shown(notebook)}.", fix="Give its number, such as '03'.")
    _given[notebook] = {name: _copied(value) for name, value in given.items()}
    print(f"The exercises of notebook {notebook} are checked against this run: {', '.join(given)}.")


def _copied(value: Any) -> Any:
    """A copy that the learner's code may change; an engine as it is."""
    from helpers.backends.base import Engine

    if isinstance(value, Engine):
        return value
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
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
        result = function(*map(_copied, arguments))
    except (Exception, SystemExit) as error:  # the learner's code, so any
        raise _in_their_words(function, error) from error
    if result is ...:
        raise _Open
    if result is None:
        raise InputError(
            "Your function returns None. Is `return` missing in its last line? What it prints is not what it returns."
        )
    return result


def same_as(
    function: Callable[..., Any],
    right: Callable[..., Any],
    cases: Iterable[tuple[Any, ...]],
    read: Callable[[Any], Any] = plain,
    mistakes: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """The learner's function is wrong unless it gives what the right one gives, in each case. read: makes a plain value
    of what it returns. mistakes: what to say to whom has which function, for the usual ones."""
    for case in cases:
        result, expected = read(call(function, *case)), right(*case)
        if result == expected:
            continue
        for words, usual in (mistakes or {}).items():
            expect(result != usual(*case), words)
        told = ", ".join(f"{part!r}" for part in case if isinstance(part, (str, int, float, list, tuple, dict)))
        given = f"For {told:.200} it" if told else "It"
        raise InputError(f"{given} gives {shown(result)}. Right is {shown(expected)}.")


def _in_their_words(function: Callable[..., Any], error: BaseException) -> InputError:
    """The error with the learner's part of the traceback: their cells lie in one folder, and lines below are ours."""
    place = Path(getattr(getattr(function, "__code__", None), "co_filename", "")).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if Path(frame.filename).parent == place]
    lines = [f"\n  line {frame.lineno}, in {frame.name}: {frame.line}" for frame in frames[-5:]]  # it may call itself
    return InputError(f"Your code raises {type(error).__name__}: {error!s:.500}{''.join(lines)}")


def _short(answer: Any) -> str:
    """The answer as an outcome names it. Of settings it shows those that are not the default: all are too many."""
    from helpers import BuildRecipe, SamplingParams

    if inspect.isroutine(answer):
        return "your function"
    if not isinstance(answer, (BuildRecipe, SamplingParams)):
        return shown(answer)
    default = vars(type(answer)())
    chosen = [f"{name}={value!r:.80}" for name, value in vars(answer).items() if value != default[name]]
    return f"{type(answer).__name__}({', '.join(chosen)})"


def _fingerprint(answer: Any, told: str) -> str:
    """Equal for the same answer given again, which is no new try. told: what was said of it, because a function may
    call others."""
    code = getattr(answer, "__code__", None)
    text = f"{code.co_code!r}{code.co_consts!r}{code.co_names!r}" if code else shown(answer, 10**6)
    return hashlib.sha256(re.sub(r" at 0x\w+", "", text + told).encode(errors="replace")).hexdigest()[:12]


def expect(condition: Any, why: str) -> None:
    """The answer is wrong unless the condition holds."""
    if not condition:
        raise InputError(why)
