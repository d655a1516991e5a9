"""Fusion step by step: with each step of a slider, one more group of operations becomes a kernel."""

from __future__ import annotations

from helpers.backends.report import EngineReport, need_report
from helpers.course.lab.pictures import clusters, merges, replay
from helpers.course.widgets.panel import Panel, as_html, slider
from helpers.display import Picture


def fusion_replay(report: EngineReport) -> FusionReplay:
    """A slider over the merges that a report lists; for readers, the same as small pictures side by side."""
    return FusionReplay(report)


class FusionReplay(Panel):
    def __init__(self, report: EngineReport):
        import ipywidgets as w

        super().__init__()
        need_report(report)
        self._report = report
        self.step = slider("kernels merged", 0, 0, len(merges(report)))
        self.controls = [self.step]
        self.view = w.VBox([self.step, self.errors, self.output])
        self.redraw_with(self.draw, self.step)

    def draw(self) -> None:
        self.output.value = as_html(clusters(self._report, self.step.value))

    def twin(self) -> Picture:
        return replay(self._report)
