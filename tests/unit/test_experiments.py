"""The experiment runner: each combination once, kept as it comes, resumed without repeating."""

import asyncio
import csv
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets", reason="the notebook tools are not in this environment")

from helpers.course.experiments import read_rows, rows_picture, run_grid
from helpers.course.widgets import experiment_runner
from helpers.errors import InputError, RecipeError

GRID = {"a": [1, 2], "b": ["x", "y"]}


def measured(calls):
    def measure(a, b):
        calls.append((a, b))
        return {"figure": a * 1.5}

    return measure


def test_each_combination_is_measured_once_and_kept_as_it_comes(tmp_path):
    calls, file = [], tmp_path / "grid.json"
    steps = run_grid(measured(calls), GRID, file)
    assert next(steps) == [] and len(next(steps)) == 1 and len(next(steps)) == 2
    assert json.loads(file.read_text(encoding="utf-8")) == read_rows(file) and len(calls) == 2
    rows = list(run_grid(measured(calls), GRID, file))[-1]  # interrupted, and begun again
    assert calls == [(1, "x"), (1, "y"), (2, "x"), (2, "y")] and rows[3] == {"a": 2, "b": "y", "figure": 3.0}
    assert list(run_grid(measured(calls), GRID, file)) == [rows] and len(calls) == 4
    with file.with_suffix(".csv").open(encoding="utf-8", newline="") as lines:
        assert [line["figure"] for line in csv.DictReader(lines)] == ["1.5", "1.5", "3.0", "3.0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.csv", "grid.json"]


def test_a_larger_grid_goes_on_from_a_smaller_one(tmp_path):
    calls, file = [], tmp_path / "grid.json"
    list(run_grid(measured(calls), {"a": [1], "b": ["x"]}, file))
    assert len(list(run_grid(measured(calls), GRID, file))[-1]) == 4 and len(calls) == 4


def test_a_figure_may_be_an_error(tmp_path):
    """Such as int8's, against fp32."""
    calls, grid, file = [], {"bits": [4, 8]}, tmp_path / "r.json"

    def measure(bits):
        calls.append(bits)
        return {"error": 0.5**bits}

    rows = [list(run_grid(measure, grid, file))[-1] for _ in range(2)][-1]
    assert calls == [4, 8] and "bits=4 0.0625" in rows_picture(rows, grid, "error").alt


def test_what_an_engine_refuses_is_a_row_and_a_fault_of_the_measurement_is_an_error(tmp_path):
    def refuses(a):
        if a == 1:
            raise RecipeError("No.", fix="Take 2.")
        if a == 3:
            raise ZeroDivisionError
        return {"figure": 1.0}

    rows = list(run_grid(refuses, {"a": [1, 2]}, tmp_path / "r.json"))[-1]
    assert rows == [{"a": 1, "error": "No. Fix: Take 2."}, {"a": 2, "figure": 1.0}]
    with pytest.raises(ZeroDivisionError):
        list(run_grid(refuses, {"a": [2, 3]}, tmp_path / "r.json"))
    assert read_rows(tmp_path / "r.json") == rows
    again = list(run_grid(lambda a: {"figure": 5.0}, {"a": [1, 2]}, tmp_path / "r.json"))[-1]  # the cause is mended
    assert again == [{"a": 2, "figure": 1.0}, {"a": 1, "figure": 5.0}]


NO_FIGURES = [(3.5, "returns 3.5"), ({"other": 1.0}, "measured: other"), ({"figure": "fast"}, "measured: none is")]
NO_FIGURES += [({"figure": 1.0, "place": Path()}, "no file can hold"), ({"figure": 1.0, "a": 3}, "returns {")]


@pytest.mark.parametrize(("result", "words"), NO_FIGURES)
def test_a_measurement_without_the_figure_is_told_at_once(result, words, tmp_path):
    runner = experiment_runner(lambda a, b: result, GRID, tmp_path / "r.json", "figure")
    runner.button.click()
    assert words in runner.errors.outputs[0]["text"] and "Fix:" in runner.errors.outputs[0]["text"]
    assert len(read_rows(tmp_path / "r.json")) <= 1


def test_figures_may_come_from_numpy_and_torch(tmp_path):
    figures = {"ms": np.float32(1.5), "tokens": torch.tensor(3)}
    rows = list(run_grid(lambda a: figures, {"a": [1]}, tmp_path / "r.json"))[-1]
    assert read_rows(tmp_path / "r.json") == rows == [{"a": 1, "ms": 1.5, "tokens": 3}]


def test_the_picture_tells_small_figures_apart():
    rows = [{"a": 1, "ms": 0.39}, {"a": 2, "ms": 0.12}, {"a": 3}, {"a": 4, "ms": float("nan")}, {"a": 5, "ms": "none"}]
    picture = rows_picture(rows, {"a": [1, 2, 3, 4, 5]}, "ms")
    assert {text.get_text() for text in picture.figure.axes[0].texts} == {"0.39", "0.12"}


def test_rows_of_more_settings_than_the_grid_has_are_refused(tmp_path):
    """One of them would stand for all."""
    both = {"precision": ["fp32", "int8"], "batch": [1, 4]}
    *_, rows = run_grid(lambda precision, batch: {"ms": 3.0}, both, tmp_path / "rows.json")
    fewer = {"batch": [1, 4]}
    for call in (
        lambda: next(run_grid(lambda batch: {"ms": 3.0}, fewer, tmp_path / "rows.json")),
        lambda: rows_picture(rows, fewer, "ms"),
    ):
        with pytest.raises(InputError, match="differ in more settings than batch"):
            call()
    with pytest.raises(InputError, match="lack one of threads"):
        rows_picture(rows, {"threads": [1]}, "ms")


@pytest.mark.parametrize("content", ["{", "3", "[3]", '[{"other": 1}]'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "r.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError):
        list(run_grid(measured([]), GRID, tmp_path / "r.json"))
    assert (tmp_path / "r.json").read_text(encoding="utf-8") == content


@pytest.mark.parametrize("grid", [{}, "xy", {"a": []}, {"a": 3}, {"a": "xy"}, {"a": [{1}]}], ids=str)
def test_what_is_no_grid_is_refused(grid, tmp_path):
    with pytest.raises(InputError, match="grid"):
        next(run_grid(measured([]), grid, tmp_path / "r.json"))


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    with pytest.raises(InputError, match="ends in .json"):  # r.csv is the name of the other file
        list(run_grid(measured([]), GRID, tmp_path / "r.csv"))
    with pytest.raises(InputError, match="cannot be written"):
        list(run_grid(measured([]), GRID, tmp_path / "missing" / "r.json"))


def test_the_widget_runs_in_the_background_stops_and_goes_on(tmp_path):
    calls, threads = [], set()

    def slow(a, b):
        threads.add(threading.current_thread())
        time.sleep(0.1)
        calls.append((a, b))
        return {"figure": float(a)}

    runner = experiment_runner(slow, GRID, tmp_path / "r.json", "figure")

    async def click():
        runner.button.click()
        beats = 0
        while len(runner.rows) < 2:
            await asyncio.sleep(0.01)
            beats += 1  # the loop is free meanwhile
        runner.button.click()  # is ignored
        runner.stop_button.click()
        await runner.task
        return beats

    assert asyncio.run(click()) > 5 and 2 <= len(calls) <= 3 and threading.main_thread() not in threads
    again = experiment_runner(slow, GRID, tmp_path / "r.json", "figure")
    assert again.bar.value == len(calls) == len(again.rows)
    again.button.click()
    assert len(calls) == 4 == again.bar.value and "Bars: figure" in again.picture.value
    assert "4 of 4 settings" in again._repr_mimebundle_()[0]["text/html"]
    smaller = experiment_runner(slow, {**GRID, "a": [1]}, tmp_path / "r.json", "figure")
    assert "2 of 2 settings" in smaller.output.value and rows_picture([], GRID, "figure") is None


def test_the_widget_shows_a_fault_of_the_measurement(tmp_path):
    runner = experiment_runner(lambda a: 1 / a, {"a": [0]}, tmp_path / "r.json", "figure")
    runner.button.click()
    assert "ZeroDivisionError" in runner.errors.outputs[0]["text"] and not runner.button.disabled


def test_figures_have_texts_as_names_and_a_file_that_cannot_be_written_is_told_first(tmp_path):
    with pytest.raises(InputError, match="measurement returns"):
        list(run_grid(lambda a: {4: 1.0}, {"a": [1]}, tmp_path / "r.json"))
    with pytest.raises(InputError, match="cannot be written"):
        list(run_grid(lambda a: pytest.fail("measured"), {"a": [1]}, tmp_path / "nowhere" / "r.json"))
