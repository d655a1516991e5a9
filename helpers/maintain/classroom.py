"""The learner's copies of the notebooks, and what they have answered: for `make lab` and for an instructor.

Copies lie in work/ (helpers/course/learner.py), without outputs. A copy that nobody has worked in follows the course;
one that somebody has worked in is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.course import learner
from helpers.course.exercises import frame
from helpers.display import Table
from helpers.errors import InputError, StoreError, why_refused
from helpers.maintain import notebooks
from helpers.paths import named, owned_folder

if TYPE_CHECKING:
    from nbformat import NotebookNode

ORIGIN = "course_sha256"  # in a copy's metadata: what the course's notebook said when the copy was made


def update(folder: Path = notebooks.NOTEBOOKS) -> list[str]:
    """Make copies that are missing, renew those that nobody has worked in, and say which are kept instead."""
    remarks = []
    with _work_folder() as work:
        for source in notebooks.select(folder):
            nb, copy = notebooks.read(source), work / source.name
            if not copy.exists():
                _write_copy(nb, copy)
                continue
            versions, why = _state(copy)
            if _text(nb) in versions:
                continue
            if why:
                remarks.append(
                    f"{copy.name}: the course has a newer one. Yours is kept, because {why}; "
                    f"helpers course reset {source.stem[:2]} takes the new one and keeps yours beside it."
                )
            else:
                _write_copy(nb, copy)
    return remarks


def reset(name: str, folder: Path = notebooks.NOTEBOOKS) -> Path | None:
    """A fresh copy of one notebook ("03"). Returns where the learner's own now is; None if there was none."""
    source = _one(name, folder)
    nb, kept = notebooks.read(source), None
    with _work_folder() as work:
        copy, fresh = work / source.name, work / f".{source.stem}.fresh"
        _write_copy(nb, fresh)
        if copy.exists():
            dated = f"{source.stem}.{datetime.now():%Y-%m-%d}"
            kept = next(path for n in count(1) if not (path := work / f"{dated}-{n}.ipynb").exists())
            copy.rename(kept)
        fresh.replace(copy)
    return kept


def _write_copy(nb: NotebookNode, copy: Path) -> None:
    nb.metadata[ORIGIN] = _text(nb)
    notebooks.clear(nb)
    notebooks.write(nb, copy)


def _state(copy: Path) -> tuple[set[str | None], str]:
    """What a copy was made from and what it says now, and why it may hold somebody's work; "" if nobody has touched
    it."""
    try:
        nb = notebooks.read(copy)
    except InputError:
        return set(), "it cannot be read as a notebook"
    ran = any(cell.get("outputs") or cell.get("execution_count") for cell in nb.cells)
    origin, text = nb.metadata.get(ORIGIN), _text(nb)
    if origin is None:
        return {text}, "it does not say what it was made from"
    return {origin, text}, "you have worked in it" if ran or origin != text else ""


def _text(nb: NotebookNode) -> str:
    """What the cells say, as a hash. JupyterLab changes metadata as soon as a notebook is opened."""
    text = json.dumps([(cell.cell_type, cell.source) for cell in nb.cells])
    return hashlib.sha256(text.encode()).hexdigest()


def _one(name: str, folder: Path) -> Path:
    sources = notebooks.select(folder, [name])
    if len(stems := [source.stem for source in sources]) > 1:
        raise InputError(f"{name!r} names {len(sources)} notebooks.", fix=f"Name one, whole: {', '.join(stems)}.")
    return sources[0]


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    """The folder of the copies, made if it is missing. StoreError if it cannot be written."""
    work = learner.work_folder()
    try:
        work.mkdir(parents=True, exist_ok=True)
        yield work
    except OSError as error:
        raise StoreError(
            f"The copies of the notebooks cannot be written to {work}: {error.strerror or error}.",
            cause=why_refused(error),
            fix=learner.how_to_write(error),
        ) from error


# ---- what was answered -----------------------------------------------------------------------------------------


def progress() -> list[Table]:
    """A table of the exercises, and one of the predictions."""
    content = learner.read()
    rows, points, of = [], 0, 0
    for notebook in frame.MODULES:
        for task in frame.exercises_of(notebook).values():
            entry = content["exercises"].get(task.number, {})
            right = entry.get("state") == "right"
            points, of = points + right * task.points, of + task.points
            tries = len(entry.get("wrong", ())) + right
            state = "right" if right else "tried" if tries else "open"
            shown = "shown" if entry.get("solution") else ""
            rows.append((task.number, task.title, state, f"{right * task.points} of {task.points}", tries, shown))
    columns = ("exercise", "title", "state", "points", "tries", "solution")
    tables = [Table(f"Exercises: {points} of {of} points", columns, rows)]
    near = [(n, len(guesses), sum(guesses.values())) for n, guesses in sorted(content["predictions"].items())]
    return [*tables, Table("Predictions", ("notebook", "guesses", "near"), near)] if near else tables


@dataclass(frozen=True)
class Mark:
    """One exercise of a graded notebook."""

    number: str
    title: str
    points: int
    of: int
    state: str  # "right", "wrong" or "open": not answered, or its cell did not run


@dataclass(frozen=True)
class Grade:
    """A notebook's points, and what went wrong when it ran."""

    notebook: str  # its file
    marks: list[Mark]
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        points, of = sum(mark.points for mark in self.marks), sum(mark.of for mark in self.marks)
        return {"points": points, "of": of, **asdict(self)}

    def as_gradescope(self) -> dict[str, Any]:
        """results.json as Otter-Grader writes it for Gradescope: a test with a score for each exercise."""
        tests = [
            {
                "name": f"{mark.number} {mark.title}",
                "score": float(mark.points),
                "max_score": float(mark.of),
                "visibility": "visible",
                "output": {"right": "Right.", "wrong": "Not right.", "open": "Not answered."}[mark.state],
                "status": "passed" if mark.state == "right" else "failed",
            }
            for mark in self.marks
        ]
        return {
            "output": "\n".join([Path(self.notebook).stem, *self.problems]),
            "tests": tests,
            "stdout_visibility": "hidden",
        }

    def table(self) -> Table:
        total = self.as_json()
        rows = [(mark.number, mark.title, mark.state, f"{mark.points} of {mark.of}") for mark in self.marks]
        caption = f"{self.notebook}: {total['points']} of {total['of']} points"
        return Table(caption, ("exercise", "title", "state", "points"), rows)


def grade(notebook: str) -> Grade:
    """Run a learner's notebook, a file (its .ipynb may be left out) or the number of a copy in work/, and count the
    points of its exercises.

    All its cells run, also after one that fails; what counts is what its checks say in this run.
    """
    path = named(notebook)
    if not path.is_file() and (whole := path.with_name(f"{path.name}.ipynb")).is_file():
        path = whole
    if not path.is_file():
        path = learner.work_folder() / _one(notebook, notebooks.NOTEBOOKS).name
        if not path.exists():
            raise InputError(f"There is no copy of {path.stem} in {path.parent}.", fix="Give the file of a notebook.")
    tasks = frame.exercises_of(path.name[:2])
    if not tasks:
        raise InputError(
            f"{path.name} has no exercises.", fix="Its name must begin with a notebook's number: 03_....ipynb"
        )
    with owned_folder("course-grade-") as work:
        os.environ[learner.GRADED] = str(work)  # the kernel writes there what its checks say
        try:
            nb, result = notebooks.run_notebook(path, go_on=True)
            answers = learner.read()["exercises"]
        finally:
            del os.environ[learner.GRADED]
    marks = []
    for task in tasks.values():
        entry = answers.get(task.number, {"state": "open", "wrong": []})
        state = "right" if entry["state"] == "right" else "wrong" if entry["wrong"] else "open"
        marks.append(Mark(task.number, task.title, task.points if state == "right" else 0, task.points, state))
    cells = dict(notebooks.code_cells(nb))
    left_out = [(number, why) for number, why in result.skipped if "check(" in cells[number].source]
    result.problems += [f"exercises were not run: {why}" for why in notebooks.grouped(left_out)]
    if others := sorted(answers.keys() - tasks.keys()):
        result.problems.append(f"it answers {', '.join(others)}, of another notebook than its name begins with")
    return Grade(str(path.absolute()), marks, result.problems)
