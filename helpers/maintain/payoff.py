"""Draw the README's picture from the committed records: python -m helpers.maintain.payoff"""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

from helpers.bench.records import REFERENCES, Record, read
from helpers.display import COLOURS, HATCHES, new_panels
from helpers.errors import status_of
from helpers.paths import PROJECT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = PROJECT / "docs" / "payoff.png"
RECORDS = {  # and what is said of the model
    "cpu-stories.json": "The bundled model, 5 million parameters",
    "h100-tinyllama-128.json": "TinyLlama's shape, 1.1 billion parameters, random weights",
}
WORDS = {
    "pytorch": "PyTorch, eager",
    "torch_compile": "torch.compile",
    "vllm": "vLLM",
    "aot": "engine (aot)",
}


def draw(axes: Axes, record: Record, model: str) -> None:
    """Bars: the median time per token at batch 1; lines: the least and the most of the samples."""
    rows = sorted(
        (row for row in record.at(1) if row.status == "ok"), key=lambda row: row.median("tpot_s"), reverse=True
    )
    for place, row in enumerate(rows):
        engine = row.backend == "aot"
        median, (least, most) = row.median("tpot_s") * 1e3, (t * 1e3 for t in row.spread("tpot_s"))
        colour, hatch = (COLOURS[0], HATCHES[0]) if engine else (COLOURS[1], HATCHES[1])
        axes.barh(place, median, 0.6, color=colour, hatch=hatch, edgecolor="white")
        axes.plot([least, most], [place, place], color="black", marker="|")
        axes.text(max(most, median), place, f"  {median:.2f} ms, least {least:.2f}", va="center")
    axes.set_yticks(range(len(rows)), [f"{WORDS[row.backend]}, {row.precision}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(row.spread("tpot_s")[1] for row in rows) * 1.35e3)
    place_and_remarks = textwrap.fill(f"{record.place}{record.remarks(1)}", 95)
    axes.set_title(f"{model}\n{place_and_remarks}", loc="left", fontsize="small")


def main() -> None:
    figure, panels = new_panels(len(RECORDS), 1, width=8.0, height=5.4)
    for axes, (name, model) in zip(panels, RECORDS.items(), strict=True):
        draw(axes, read(REFERENCES / name), model)
    figure.supxlabel("milliseconds per token of one answer (TPOT); line: least and most", fontsize="medium")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(status_of(main))
