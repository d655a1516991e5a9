"""The experiment runner: a grid of settings, measured one after the other while the kernel stays free."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from helpers.course.experiments import Grid, Measure, read_rows, rows_picture, rows_table, run_grid
from helpers.course.widgets.panel import Panel, as_html, button, row
from helpers.display import Table
from helpers.paths import named


def experiment_runner(measure: Measure, grid: Grid, file: Path | str, metric: str) -> ExperimentRunner:
    """Run measures what `file` has no row of yet; Stop ends it after the running measurement. metric: what is drawn."""
    next(run_grid(measure, grid, file))  # what it refuses is refused here
    return ExperimentRunner(measure, grid, named(file), metric)


class ExperimentRunner(Panel):
    def __init__(self, measure: Measure, grid: Grid, file: Path, metric: str):
        import ipywidgets as w

        super().__init__()
        self.grid, self.file, self.measure, self.metric = grid, file, measure, metric
        self.rows = read_rows(file)
        self.button = button("Run", "Measure what is missing", lambda: self._start(self._run()))
        self.stop_button.tooltip = "End after the measurement that runs; what is measured is kept"
        self.bar = w.IntProgress(0, min=0, max=prod(map(len, grid.values())), description="measured")
        self.picture, self.shown = w.HTML(), []  # an error leaves what was measured
        self.controls = [self.button]
        self.view = w.VBox([row(self.button, self.stop_button, self.bar), self.errors, self.output, self.picture])
        self.draw()

    def measured(self) -> int:
        """How many of the grid's combinations have a row; the file may have others too."""
        return sum(all(row.get(name) in values for name, values in self.grid.items()) for row in self.rows)

    def draw(self) -> None:
        super().draw()
        self.bar.value = self.measured()
        picture = rows_picture(self.rows, self.grid, self.metric)
        self.picture.value = as_html(picture) if picture else ""

    def _run(self) -> Iterator[float]:
        """Each measurement in a thread, and the kernel is asked again meanwhile."""
        steps = run_grid(self.measure, self.grid, self.file)
        with ThreadPoolExecutor(1) as thread:
            while not self._stopping:
                step: Any = thread.submit(next, steps, None)
                while not step.done():
                    yield 0.05
                if step.result() is None:
                    return
                self.rows = step.result()
                self.draw()

    def twin(self) -> Table:
        return rows_table(self.rows, f"{self.measured()} of {self.bar.max} settings, in {self.file.name}")
