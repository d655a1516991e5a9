"""Tables and pictures, for people who look and for people who listen.

A table has a caption and real header cells. A picture carries its finding as text (`alt`), prints its numbers beside
the bars, and never tells two things apart by colour alone.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most colour-blind people can tell apart; each goes with a hatch of its own.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")


@dataclass(frozen=True)
class Table:
    """Rows under a caption: plain text in a terminal, an HTML table in a notebook, Markdown in a report.

    Columns of numbers stand to the right. A cell is one line of printable text, whatever it came from.
    """

    caption: str
    columns: Sequence[Any]
    rows: Sequence[Sequence[Any]]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = self._numeric()
        lines = [
            "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([_line(self.caption), *lines] if self.caption else lines)

    __repr__ = __str__

    def markdown(self) -> str:
        cells = [[text.replace("|", "\\|").replace("<", "&lt;") for text in row] for row in self._cells()]
        head, *rows = (f"| {' | '.join(row)} |" for row in cells)
        rule = f"|{'|'.join('---:' if right else '---' for right in self._numeric())}|"
        return "\n".join([*([f"**{_line(self.caption)}**", ""] if self.caption else []), head, rule, *rows])

    def _repr_html_(self) -> str:
        styles = [f"text-align: {'right' if right else 'left'}" for right in self._numeric()]
        head, *rows = [[_html(text) for text in row] for row in self._cells()]
        titles = "".join(f'<th scope="col" style="{s}">{t}</th>' for t, s in zip(head, styles, strict=True))
        body = ""
        for first, *rest in rows:
            cells = "".join(f'<td style="{s}">{t}</td>' for t, s in zip(rest, styles[1:], strict=True))
            body += f'<tr><th scope="row" style="{styles[0]}">{first}</th>{cells}</tr>'
        line = f'<span style="display: inline-block; max-width: 75vw">{_html(_line(self.caption))}</span>'  # a phone's
        caption = f'<caption style="text-align: left; caption-side: top">{line}</caption>'
        return f"<table>{caption}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"

    def _cells(self) -> list[list[str]]:
        return [[_line(cell) for cell in row] for row in (self.columns, *self.rows)]

    def _numeric(self) -> list[bool]:
        number = re.compile(r"[-+~]?[\d,. ]+(?:x|%|[ ]?[a-zA-Z/]{1,8})?|(?:-|not measured|)")
        return [all(number.fullmatch(text) for text in texts) for _, *texts in zip(*self._cells(), strict=True)]


def _line(cell: Any) -> str:
    """One line without control characters: a model's text, or a file's, must not steer the terminal."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "\ufffd" for c in str(cell))


@dataclass(frozen=True)
class Picture:
    """A figure with the sentence that says what is in it, for screen readers and pages without pictures."""

    figure: Figure
    alt: str

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt, "unconfined": True}}  # a phone scrolls it: its words stay legible

    def __repr__(self) -> str:
        return self.alt


def new_panels(
    rows: int, columns: int, width: float = 7.5, height: float = 3.0, **layout: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of several panels, outside pyplot: nothing to close, and nothing is shown twice. layout: as matplotlib's
    Figure.subplots takes it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.subplots(rows, columns, **layout)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, figure.axes


def new_figure(width: float = 7.5, height: float = 3.0) -> tuple[Figure, Axes]:
    """The same of one panel."""
    figure, (axes,) = new_panels(1, 1, width, height)
    return figure, axes


def plain(text: object) -> str:
    """Text for a picture, where "$" would begin a formula; of a number, such as a temperature, its digits."""
    return str(text).replace("$", r"\$")


def sample_bars(
    samples: Mapping[str, Sequence[float]], label: str, limits: Mapping[str, float] | None = None
) -> Figure:
    """A bar for each median, a dot for each sample, and a line across the bar where it has a limit. All in ms."""
    figure, axes = new_figure(height=0.9 + 0.5 * len(samples))
    medians = list(map(median, samples.values()))
    axes.barh(list(map(plain, samples)), medians, 0.6, color=COLOURS[4], edgecolor=COLOURS[0])
    for y, (name, values) in enumerate(samples.items()):
        axes.plot(values, [y] * len(values), "o", color="black", markersize=3.5)
        words = f"  median {median(values):.2f}, least {min(values):.2f}"
        if limits:
            limit = limits[name]
            axes.plot([limit, limit], [y - 0.42, y + 0.42], color=COLOURS[5], linewidth=3, label="" if y else "limit")
            words += f" (limit {limit:.2f})"
        axes.text(max(values), y, words, va="center")
    axes.set_xlim(0, max(map(max, samples.values())) * (1.85 if limits else 1.5))  # with room for the words
    axes.set_xlabel(f"{plain(label)}: median (bar) and every run (dots)")
    axes.invert_yaxis()
    if limits:
        axes.legend(loc="lower right", frameon=False)
    return figure


def stacked_bars(names: Sequence[str], parts: Mapping[str, Sequence[float]], label: str, unit: str = "") -> Figure:
    """One bar for each name, of several parts, with the total at its end. parts: a length for each name."""
    figure, axes = new_figure(height=0.9 + 0.52 * len(names))
    ends = [0.0] * len(names)
    for (part, lengths), colour, hatch in zip(parts.items(), COLOURS, HATCHES, strict=False):
        bars = axes.barh(list(map(plain, names)), lengths, 0.65, ends, color=colour, hatch=hatch, edgecolor="white")
        bars.set_label(part)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for y, total in enumerate(ends):
        axes.text(total, y, f"  {total:.1f}{unit}", va="center")
    return _finish_bars(figure, axes, label, max(ends), len(parts))


def grouped_bars(names: Sequence[str], groups: Mapping[str, Sequence[float]], label: str) -> Figure:
    """For each name one bar of each group, one below the other, with their numbers. groups: a length for each name."""
    figure, axes = new_figure(height=0.9 + (0.15 + 0.35 * len(groups)) * len(names))
    height = 0.8 / len(groups)
    for at, ((group, lengths), colour, hatch) in enumerate(zip(groups.items(), COLOURS, HATCHES, strict=False)):
        spots = [y + (at - (len(groups) - 1) / 2) * height for y in range(len(names))]
        bars = axes.barh(spots, lengths, height * 0.9, label=group, color=colour, hatch=hatch, edgecolor="white")
        axes.bar_label(bars, [f"{length:,.0f}" if length >= 100 else f"{length:.3g}" for length in lengths], padding=3)
    axes.set_yticks(range(len(names)), list(map(plain, names)))
    return _finish_bars(figure, axes, label, max(map(max, groups.values())), len(groups))


def _finish_bars(figure: Figure, axes: Axes, label: str, longest: float, kinds: int) -> Figure:
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.2)
    axes.set_xlabel(plain(label))
    axes.legend(ncols=kinds, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _html(text: str) -> str:
    text = html.escape(text)
    if not text.startswith("https://"):
        return text
    return f'<a href="{text}" style="overflow-wrap: anywhere">{text}</a>'
