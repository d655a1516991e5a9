"""A grid of settings, each measured once: rows that are kept as they come, and not measured again."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

from helpers.course.values import plain
from helpers.display import Picture, Table, grouped_bars
from helpers.errors import CourseError, InputError, shown
from helpers.paths import check_writable, named, refused, write_text

Grid = Mapping[str, Sequence[Any]]
Row = dict[str, Any]
Measure = Callable[..., Row]  # takes the settings by name, and returns what it measured by name


def read_rows(file: Path | str) -> list[Row]:
    """What has been measured so far; nothing where there is no file."""
    file = named(file)
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise refused(file, "read", error) from None
    except ValueError as error:
        raise InputError(f"{file.name!r} cannot be read: {error}.", fix="Name another file.") from None
    if not _are_rows(rows):
        raise InputError(f"{file.name!r} holds no rows of an experiment.", fix="Name another file.")
    return rows


def run_grid(measure: Measure, grid: Grid, file: Path | str) -> Iterator[list[Row]]:
    """Call measure(**settings) for each combination that `file` has no row of. After each, all rows: JSON in the file,
    CSV beside it. A combination that an engine refuses has a row that says why, and is tried again the next time. A row
    is known by its settings alone: after a change of `measure`, or on another machine, name another file.
    """
    file = named(file)
    if file.suffix == ".csv":
        raise InputError(f"{file.name!r} is written beside the rows.", fix="Name a file that ends in .json.")
    every = list(grid.values()) if isinstance(grid, Mapping) else []
    if not every or not all(isinstance(values, (list, tuple, range)) and len(values) for values in every):
        raise InputError(f"This is no grid: {shown(grid)}.", fix="Give each setting a list of values.")
    if not all(value is None or isinstance(value, (str, int, float)) for values in every for value in values):
        raise InputError(f"A grid's values are texts and numbers, not {shown(grid)}.", fix="Give what a file can hold.")
    try:
        signature(measure).bind(**dict.fromkeys(grid))
    except TypeError as error:
        words = f"The measurement cannot be called with {', '.join(grid)}: {error}."
        fix = "Give the function itself, with a parameter for each setting of the grid."
        raise InputError(words, fix=fix) from None
    rows = read_rows(file)
    _check_settings(rows, grid, f"Name another file than {file.name!r}.")
    check_writable(file)
    rows = [row for row in rows if not _refused(row)]
    yield rows
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        if any(all(row[name] == value for name, value in settings.items()) for row in rows):
            continue
        try:
            result = measure(**settings)
        except CourseError as error:
            result = {"error": str(error).replace("\n", " ")}
        named_well = isinstance(result, dict) and all(isinstance(name, str) for name in result)
        if not named_well or settings.keys() & result.keys():  # a row is known by its settings
            fix = "Return figures by names, texts that no setting has: {'ms': 3.2}."
            raise InputError(f"The measurement returns {shown(result)}.", fix=fix)
        result = {name: plain(value) for name, value in result.items()}  # a file holds no arrays and tensors
        try:
            json.dumps(result)
        except (TypeError, ValueError):
            words = f"The measurement returns {shown(result)}, which no file can hold."
            raise InputError(words, fix="Return numbers and texts by name: {'ms': 3.2}.") from None
        rows = [*rows, {**settings, **result}]
        write_rows(rows, file)
        yield rows


def write_rows(rows: list[Row], file: Path | str) -> None:
    """JSON and CSV, each whole or not at all."""
    _need_rows(rows)
    file, text = named(file), io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file.with_suffix(".csv"), text.getvalue())
    write_text(file, json.dumps(rows, indent=1) + "\n")


def rows_table(rows: list[Row], caption: str) -> Table:
    _need_rows(rows)
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["nothing yet"]
    cells = [[f"{v:.3f}" if isinstance(v := row.get(name, ""), float) else v for name in names] for row in rows]
    return Table(caption, names, cells)


def rows_picture(rows: list[Row], grid: Grid, metric: str) -> Picture | None:
    """Bars of one figure; None where nothing is measured yet."""
    _need_rows(rows)
    good = [row for row in rows if not _refused(row)]
    names = sorted({name for row in good for name, value in row.items() if _is_figure(value)} - set(grid))
    if good and metric not in names:
        raise InputError(
            f"No row has a figure {metric!r}.", fix=f"Name one that is measured: {', '.join(names) or 'none is'}."
        )
    _check_settings(rows, grid, "Give the grid that they were measured by, or only some of the rows.")
    named = {", ".join(f"{n}={row[n]}" for n in grid): row[metric] for row in good if _is_figure(row.get(metric))}
    if not named:
        return None
    words = "; ".join(f"{name} {value:.3g}" for name, value in named.items())
    return Picture(grouped_bars(list(named), {metric: list(named.values())}, metric), f"Bars: {metric}. {words}.")


def _need_rows(rows: Any) -> None:
    if not _are_rows(rows):
        fix = "run_grid hands over all rows after each measurement. The last of these: *_, rows = run_grid(...)."
        raise InputError(f"A list of rows is asked for, not {shown(rows)}.", fix=fix)


def _check_settings(rows: list[Row], grid: Grid, fix: str) -> None:
    """InputError unless the grid's settings tell the rows apart: else one row would stand for another."""
    if not all(set(grid) <= set(row) for row in rows):
        raise InputError(f"These are another experiment's rows: some lack one of {', '.join(grid)}.", fix=fix)
    if len({tuple(row[name] for name in grid) for row in rows}) < len(rows):
        raise InputError(f"These rows differ in more settings than {', '.join(grid)}.", fix=fix)


def _are_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(row, dict) for row in value)


def _refused(row: Row) -> bool:
    """An error in numbers, such as that of int8, is a figure like others."""
    return isinstance(row.get("error"), str)


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
