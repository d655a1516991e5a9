"""For whoever teaches a room: how long each section takes, and which machines are ready.

A plan needs two times: a section's reading time, from its words, and its running time, from a run on this machine.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.display import Table
from helpers.errors import CourseError, InputError
from helpers.maintain import notebooks
from helpers.paths import engines_folder, refused

if TYPE_CHECKING:
    from nbformat import NotebookNode

WORDS_PER_MINUTE = 150  # of prose with code between it; people read plain prose at 200 to 250
LEARNER_BYTES = 3 * 2**30  # what one learner's kernel and builds may hold at once; docs/instructors.md has the figures
CORES = 2  # of a learner


@dataclass
class Section:
    """A section of the second degree. seconds: of all its cells in one run."""

    notebook: str
    title: str
    words: int = 0
    cells: int = 0
    seconds: float = 0.0


def sections(nb: NotebookNode, name: str, cell_seconds: dict[int, float]) -> list[Section]:
    """The notebook cut at its headings "## ..."; what comes before the first is the section "" ."""
    numbers = {id(cell): number for number, cell in notebooks.code_cells(nb)}
    parts = [Section(name, "")]
    for cell in nb.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            parts.append(Section(name, cell.source.partition("\n")[0].removeprefix("## ").strip()))
        if cell.cell_type == "markdown":
            parts[-1].words += len(cell.source.split())
        elif id(cell) in numbers:
            parts[-1].cells += 1
            parts[-1].seconds += cell_seconds.get(numbers[id(cell)], 0.0)
    return parts


def timings(only: Sequence[str] = (), folder: Path = notebooks.NOTEBOOKS) -> dict[str, Any]:
    """Run the notebooks here, and tell each section's words, cells and seconds, and each notebook's peak of memory."""
    from helpers.machine import hardware

    rows: list[Section] = []
    peaks, problems = {}, []
    for source in notebooks.select(folder, only):
        print(source.stem, flush=True)
        with _PeakMemory() as memory:
            nb, result = notebooks.run_notebook(source)
        rows += sections(nb, source.stem, result.cell_seconds)
        peaks[source.stem] = memory.peak
        problems += [f"{source.stem}: {problem}" for problem in result.problems]
    return {
        "ok": not problems,
        "date": date.today().isoformat(),
        "machine": str(hardware.describe()),
        "versions": _versions(),
        "sections": [asdict(row) for row in rows],
        "peak_bytes": peaks,
        "problems": problems,
    }


def timings_table(answer: dict[str, Any]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for name, peak in answer["peak_bytes"].items():
        parts = [Section(**part) for part in answer["sections"] if part["notebook"] == name]
        words, cells = sum(part.words for part in parts), sum(part.cells for part in parts)
        rows.append((name, *_minutes(words, sum(part.seconds for part in parts)), cells, f"{peak / 2**30:.1f}"))
        rows += [(f"  {part.title or '(top)'}", *_minutes(part.words, part.seconds), part.cells, "") for part in parts]
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    caption = f"Minutes of each section; {answer['machine']}, {answer['date']}, {versions}"
    return Table(caption, ("section", "reading", "running", "cells", "GiB at most"), rows)


def _minutes(words: int, seconds: float) -> tuple[str, str]:
    return f"{words / WORDS_PER_MINUTE:.1f}", f"{seconds / 60:.1f}"


class _PeakMemory:
    """The most that the processes started here held at one time, in bytes, looked at twice a second. What several of
    them share is counted once where the system says so (PSS)."""

    def __enter__(self) -> _PeakMemory:
        self.peak, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._end.wait(0.5):
            held = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    info = process.memory_full_info()
                    held += getattr(info, "pss", 0) or info.rss
                except psutil.Error:
                    continue  # it ended meanwhile
            self.peak = max(self.peak, held)


# The machines of a room


def describe(report: dict[str, Any], learners: int) -> dict[str, Any]:
    """A machine in one entry: the doctor's report, with what a room needs to know beside it."""
    from helpers.machine import hardware
    from helpers.machine.doctor import SPACE

    if learners < 1:
        raise InputError(
            f"A room for {learners} learners?", fix="Give the number of learners: helpers doctor --room 20"
        )
    free, disk_for = hardware.free_memory(), 0
    with contextlib.suppress(CourseError):  # a store that cannot be made: the doctor's line on engines says why
        disk_for = int(shutil.disk_usage(engines_folder()).free // SPACE)
    return report | {
        "host": platform.node(),
        "cores": hardware.free_cores(),
        "free_bytes": free,
        "learners": learners,
        "room_for": free // LEARNER_BYTES,
        "disk_for": disk_for,
        "ok": report["ok"] and free >= learners * LEARNER_BYTES,
        "versions": _versions(),
    }


def summary(machines: Sequence[dict[str, Any]]) -> Table:
    """A line for each machine, and what is to be mended on it. A version that differs from most machines' is named."""
    usual = {}
    for name in dict.fromkeys(name for machine in machines for name in machine["versions"]):
        versions = [machine["versions"].get(name, "none") for machine in machines]
        usual[name] = max(versions, key=versions.count)
    rows = []
    for machine in machines:
        remarks = [f"{c['name']}: {c['found']}" for c in machine["checks"] if c["status"] == "failure"]
        if machine["room_for"] < machine["learners"]:
            remarks.insert(0, f"memory for {machine['room_for']} of {machine['learners']} learners")
        fewer = {"disk": machine["disk_for"], "cores": machine["cores"] // CORES}
        remarks += [f"{what} for {n} of {machine['learners']}" for what, n in fewer.items() if n < machine["learners"]]
        remarks += [
            f"{name} {machine['versions'].get(name, 'none')}, not {version}"
            for name, version in usual.items()
            if machine["versions"].get(name, "none") != version
        ]
        memory = f"{machine['free_bytes'] / 2**30:.0f}"
        warnings = sum(check["status"] == "warning" for check in machine["checks"])
        status = "ready" if machine["ok"] else "NOT READY"
        rows.append(
            (machine["host"], status, machine["cores"], memory, machine["room_for"], warnings, "; ".join(remarks))
        )
    columns = ("machine", "status", "cores", "GiB free", "learners", "warnings", "to mend")
    return Table(" ".join(f"{name} {version}" for name, version in usual.items()), columns, rows)


def read_reports(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What `helpers doctor --room --json` wrote on each machine."""
    machines = []
    for file in files:
        try:
            machine = json.loads(file.read_text(encoding="utf-8"))
            if told := machine.get("error"):  # what the command could not do there
                raise InputError(f"{file}: {told['what']}", cause=told["cause"], fix=told["fix"])
            summary([machine])  # whatever is missing is missed here, and the file is named
        except OSError as error:
            raise refused(file, "read", error) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} is no report of a machine ({type(error).__name__}: {error}).",
                fix="On each machine: helpers doctor --room --json > NAME.json",
            ) from error
        machines.append(machine)
    hosts = [machine["host"] for machine in machines]
    for file, machine in zip(files, machines, strict=True):
        if hosts.count(machine["host"]) > 1:  # cloned machines keep their name
            machine["host"] += f" ({file})"
    return machines


def _versions() -> dict[str, str]:
    names = [name for name in ("torch", "transformers", "jupyterlab") if importlib.util.find_spec(name)]
    return {"Python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
