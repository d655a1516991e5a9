"""Tables and pictures, for people who look and for people who listen.

A table has a caption and real header cells. A picture carries its finding as text (`alt`), prints its numbers beside
the bars, and never tells two things apart by colour alone.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most colour-blind people can tell apart; each goes with a hatch of its own.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")


@dataclass(frozen=True)
class Table:
    """Rows under a caption: plain text in a terminal, an HTML table in a notebook."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __str__(self) -> str:
        cells = [[str(c) for c in self.columns], *([str(c) for c in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(self._pad(i, text, widths[i]) for i, text in enumerate(row)).rstrip() for row in cells]
        return "\n".join([self.caption, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col" style="{self._align(i)}">{_html(c)}</th>' for i, c in enumerate(self.columns))
        body = []
        for row in self.rows:
            first, *rest = (_html(c) for c in row)
            cells = "".join(f'<td style="{self._align(i)}">{c}</td>' for i, c in enumerate(rest, start=1))
            body.append(f'<tr><th scope="row" style="{self._align(0)}">{first}</th>{cells}</tr>')
        caption = f'<caption style="text-align: left; caption-side: top">{_html(self.caption)}</caption>'
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def _numeric(self, column: int) -> bool:
        number = r"^[-+~]?[\d,. ]+(?:x|%|[ ]?[a-zA-Z/]{1,8})?$|^(?:-|not measured|)$"
        return all(re.match(number, str(row[column])) for row in self.rows)

    def _align(self, column: int) -> str:
        return "text-align: right" if self._numeric(column) else "text-align: left"

    def _pad(self, column: int, text: str, width: int) -> str:
        return text.rjust(width) if self._numeric(column) else text.ljust(width)


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
        return data, {"image/png": {"alt": self.alt}}

    def __repr__(self) -> str:
        return self.alt


def new_figure(width: float = 7.5, height: float = 3.0) -> tuple[Figure, Axes]:
    """A figure outside pyplot: nothing to close, and nothing is shown twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _html(value: Any) -> str:
    text = html.escape(str(value))
    if not text.startswith("https://"):
        return text
    return f'<a href="{text}" style="overflow-wrap: anywhere">{text}</a>'
