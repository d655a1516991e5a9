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
        caption = f'<caption style="text-align: left; caption-side: top">{_html(_line(self.caption))}</caption>'
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


def _html(text: str) -> str:
    text = html.escape(text)
    if not text.startswith("https://"):
        return text
    return f'<a href="{text}" style="overflow-wrap: anywhere">{text}</a>'
