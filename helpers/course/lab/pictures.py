"""Pictures of what a compiler made of a graph, drawn from its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from helpers.backends.report import EngineReport, need_report, need_reports
from helpers.course.lab.profile import by_work, moved, need_times, seconds, work_of
from helpers.display import COLOURS, HATCHES, Picture, new_figure, plain, stacked_bars

PALE = ("#9ECAE1", "#FDD49E", "#A1D9B4", "#E7C6DC", "#D6EAF8", "#F5B7A1")  # COLOURS, for black text on them
MARKS = "os^Dvx"


def clusters(report: EngineReport, steps: int | None = None) -> Picture:
    """The graph of a small report, top to bottom; operations of one kernel have its number and its colour. steps: how
    many of the merges are done; all, if it is left out."""
    need_report(report)
    homes = _homes(report, steps)
    figure, axes = new_figure(width=4.6, height=0.6 + 0.34 * (1 + max(_levels(report).values(), default=0)))
    _draw(axes, report, homes, labels=True)
    counts = f"{len(report.operations)} operations in {_count(report, homes)} kernels"
    return Picture(figure, f"Graph: {counts}. {_words(report)}")


def merges(report: EngineReport) -> list[int]:
    """The kernels that do several operations, in the order in which they run."""
    return [at for at, kernel in enumerate(report.kernels) if len(kernel.fused) > 1]


def replay(report: EngineReport, frames: int = 4) -> Picture:
    """Fusion step by step: the same graph several times, each time with more of its operations merged into kernels.

    The order is the report's: the kernel that runs first is merged first.
    """
    need_report(report)
    steps = len(merges(report))
    frames = max(2, min(frames, steps + 1))
    figure, first = new_figure(width=5.2, height=0.5 + 0.2 * (2 + max(_levels(report).values(), default=0)))
    first.remove()
    counts = []
    for at, axes in enumerate(figure.subplots(1, frames)):
        homes = _homes(report, round(at * steps / (frames - 1)))
        _draw(axes, report, homes, labels=False)
        counts.append(_count(report, homes))
        axes.set_title(f"{counts[-1]} kernels", fontsize="medium")
    words = ", then ".join(f"{count} kernels" for count in counts)
    return Picture(figure, f"The same graph {frames} times, as operations merge: {words}. {_words(report)}")


def _count(report: EngineReport, homes: Mapping[str, int]) -> int:
    """How many kernels there are if an operation without a home is one."""
    return len({homes.get(operation.name, operation.name) for operation in report.operations})


def _homes(report: EngineReport, steps: int | None = None) -> dict[str, int]:
    """The kernel of each operation: of several, the last, which is the one that does not do it over."""
    kernels = range(len(report.kernels)) if steps is None else merges(report)[:steps]
    homes = {name: at for at, kernel in enumerate(report.kernels) for name in kernel.fused}
    return {name: home for name, home in homes.items() if home in kernels}


def _words(report: EngineReport) -> str:
    kinds = {operation.name: operation.op for operation in report.operations}
    parts = [", ".join(kinds.get(n, n) for n in kernel.fused) for kernel in report.kernels]
    return " ".join(f"Kernel {at}: {part}." for at, part in enumerate(parts, start=1))


def _levels(report: EngineReport) -> dict[str, int]:
    """How far down each operation stands: one below the lowest that it reads."""
    levels: dict[str, int] = {}
    for operation in report.operations:
        levels[operation.name] = 1 + max((levels[name] for name in operation.inputs if name in levels), default=-1)
    return levels


def _draw(axes: Any, report: EngineReport, homes: Mapping[str, int], labels: bool) -> None:
    from matplotlib.patches import Rectangle

    levels = _levels(report)
    seen: Counter[int] = Counter()
    places = {}
    for name, level in levels.items():
        places[name] = (seen[level], level)
        seen[level] += 1
    width = 1 + max((x for x, _ in places.values()), default=0)
    for operation in report.operations:
        x, y = places[operation.name]
        for source in operation.inputs:
            if source in places:
                (x0, y0) = places[source]
                axes.plot([x0, x], [y0 + 0.35, y - 0.35], color="#777777", linewidth=1, zorder=0)
        home = homes.get(operation.name)
        face = "white" if home is None else PALE[home % len(PALE)]
        hatch = "" if home is None or labels else HATCHES[home % len(HATCHES)]
        axes.add_patch(Rectangle((x - 0.42, y - 0.35), 0.84, 0.7, facecolor=face, edgecolor="#333333", hatch=hatch))
        if labels:
            number = "" if home is None else f"{home + 1}: "
            axes.text(x, y, plain(number + operation.op[:16]), ha="center", va="center", color="black")
    axes.set_xlim(-0.6, width - 0.4)
    axes.set_ylim(max(levels.values(), default=0) + 0.6, -0.6)
    axes.axis("off")


def time_by_work(reports: Mapping[str, EngineReport]) -> Picture:
    """Bars of a step's time, before and after, stacked by what the kernels are for. Every kernel has its seconds."""
    need_reports(reports)
    each = [by_work(report) for report in reports.values()]
    parts = {work: [times[work] * 1e3 for times in each] for work in each[0]}
    words = [
        f"{name} {sum(times.values()) * 1e3:.2f} ms in {len(report.kernels)} launches ("
        + ", ".join(f"{work} {took * 1e3:.3f}" for work, took in times.items())
        + ")"
        for (name, report), times in zip(reports.items(), each, strict=True)
    ]
    return Picture(stacked_bars(list(reports), parts, "ms a step, kernels alone", " ms"), f"Bars: {'; '.join(words)}.")


def roofline(report: EngineReport, bandwidth: float) -> Picture:
    """Each kernel by the bytes that it moves and its time; the line is the time that moving them takes at least."""
    moved(report)  # refused where a kernel's bytes are not known
    need_times(report)
    ops = {operation.name: operation.op for operation in report.operations}
    points: dict[str, list[tuple[float, float]]] = {}
    for kernel in report.kernels:
        point = (kernel.details["bytes"], seconds(kernel) * 1e6)
        points.setdefault(work_of(kernel, ops), []).append(point)
    figure, axes = new_figure(width=5.2, height=3.6)
    for at, (work, places) in enumerate(points.items()):
        axes.plot(*zip(*places, strict=True), MARKS[at], color=COLOURS[at], label=f"{work} ({len(places)})", alpha=0.8)
    every = [x for places in points.values() for x, _ in places]
    ends = [max(1, min(every)), max(every)]
    axes.plot(ends, [end / bandwidth * 1e6 for end in ends], color="black", label=f"{bandwidth / 1e9:.0f} GB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that the kernel reads and writes")
    axes.set_ylabel("microseconds")
    axes.legend(frameon=False, loc="upper left")
    words = "; ".join(
        f"{work}: {len(p)} kernels, {sum(y for _, y in p):.0f} microseconds" for work, p in points.items()
    )
    return Picture(
        figure, f"Points: bytes and time of each kernel, and the line of {bandwidth / 1e9:.0f} GB/s. {words}."
    )
