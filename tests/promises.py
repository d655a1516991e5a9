"""What the course promises, tried as often as there is time: some attempts in every run, many in `make nightly`.

A test with the mark `promise(title, few, many)` takes the fixture `attempts` and hands it one attempt; or it counts by
itself, with `how_many(few, many)`. The report ends with one table: attempts and failures of each promise. Each night's
rows are added to build/promises.csv.
"""

from __future__ import annotations

import csv
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

NIGHTLY = bool(os.environ.get("COURSE_NIGHTLY"))
SEED = int(os.environ.get("COURSE_SEED") or (time.time() if NIGHTLY else 0))  # a night tries what no other has tried
# Seconds for one promise; after that the table says how many attempts there were. The longest, killed compilers, take
# ten minutes of two idle cores.
LONGEST = 1200.0 if NIGHTLY else 60.0
KEPT = Path(__file__).parents[1] / "build" / "promises.csv"  # when, seed, promise, attempts, failures, seconds


def how_many(few: int, many: int) -> int:
    return many if NIGHTLY else few


@pytest.fixture
def attempts(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable:
    """attempts(one): call one(random numbers) again and again. All failures are counted; the first is raised."""

    def run(one: Callable[[random.Random], None]) -> None:
        _, few, many = request.node.get_closest_marker("promise").args
        start, done, failures = time.monotonic(), 0, []
        while done < how_many(few, many) and (time.monotonic() - start < LONGEST or not done):
            try:
                one(random.Random(f"{SEED} {done}"))
            except Exception as error:  # counted; the first one is raised below
                error.add_note(f"attempt {done} of COURSE_SEED={SEED}") if hasattr(error, "add_note") else None
                failures.append(error)
            done += 1
        record_property("attempts", (done, len(failures)))
        if failures:
            raise failures[0]

    return run


class Table:
    """The plugin that collects the rows and prints them."""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item):
        report = (yield).get_result()
        mark = item.get_closest_marker("promise")
        if mark and report.when == "call" and not report.skipped:
            title, few, many = mark.args
            counted = dict(report.user_properties).get("attempts", (how_many(few, many), int(report.failed)))
            report.user_properties.append(("promise", (title, *counted, round(report.duration))))

    def pytest_terminal_summary(self, terminalreporter):
        rows: dict[str, list] = {}
        for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
            for title, *numbers in (value for name, value in report.user_properties if name == "promise"):
                rows[title] = [old + new for old, new in zip(rows.get(title, [0, 0, 0]), numbers, strict=True)]
        if rows and (NIGHTLY or any(failures for _, failures, _ in rows.values())):
            from helpers.display import Table as Shown

            columns = ("promise", "attempts", "failures", "seconds")
            terminalreporter.section(f"promises (COURSE_SEED={SEED})")
            terminalreporter.write_line(str(Shown("", columns, [(title, *row) for title, row in rows.items()])))
        if rows and NIGHTLY:
            KEPT.parent.mkdir(exist_ok=True)
            with KEPT.open("a", encoding="utf-8", newline="") as file:
                night = (time.strftime("%Y-%m-%d %H:%M"), SEED)
                csv.writer(file).writerows((*night, title, *row) for title, row in rows.items())
