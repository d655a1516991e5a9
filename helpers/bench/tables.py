"""Tables and pictures of benchmark records: contenders side by side, records side by side, claims beside figures."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Mapping

from helpers.bench.records import REFERENCES, Record, Row, differences, same_work
from helpers.display import COLOURS, HATCHES, Picture, Table, new_figure
from helpers.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MISSING = "no record of this workload from another machine comes with the course yet."
_AGREES = {True: "yes", False: "NO", None: "-"}


def table(record: Record, batch_size: int = 1) -> Table:
    """One table of a record: a column for each contender, a row for each metric. `formulas` says what they mean."""
    rows = [row for row in record.at(batch_size) if row.status != "absent"]
    ok = [row.status == "ok" for row in rows]
    absent = [row.name for row in record.at(batch_size) if row.status == "absent"]

    def line(name: str, show: Callable[[Row], str]) -> list[str]:
        return [name, *(show(row) if good else "" for row, good in zip(rows, ok, strict=True))]

    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.2f}" if seconds == seconds else "-"  # nan: not measured

    def mb(size: int) -> str:
        return f"{size / 1e6:.0f}" if size else "-"

    lines = [
        line("TTFT, ms", lambda r: ms(r.median("ttft_s"))),
        line("TPOT, ms", lambda r: ms(r.median("tpot_s"))),
        line("  least to most", lambda r: " to ".join(map(ms, r.spread("tpot_s")))),
        line("  limit, ms", lambda r: ms(r.limit_s)),
        line("  limit / TPOT", lambda r: f"{r.limit_s / r.median('tpot_s'):.0%}"),
        line("ITL p50, ms", lambda r: ms(r.itl_percentile(50))),
        line("ITL p90, ms", lambda r: ms(r.itl_percentile(90))),
        line("ITL p99, ms", lambda r: ms(r.itl_percentile(99))),
        line("E2E, ms", lambda r: ms(r.median("e2e_s"))),
        line("output tokens/s", lambda r: f"{record.throughput(r):,.0f}"),
        line("tokens/s per user", lambda r: f"{1 / r.median('tpot_s'):,.0f}"),
        line("build, s", lambda r: f"{r.build_s:.0f}"),
        line("start, s", lambda r: f"{r.start_s:.1f}"),
        line("  of it load, s", lambda r: f"{r.load_s:.2f}"),
        line("first request, ms", lambda r: ms(r.warmup_e2e_s[0])),
        line("host memory, MB", lambda r: mb(r.peak_host_bytes)),
        *([line("GPU memory, MB", lambda r: mb(r.device_bytes))] if any(r.device_bytes for r in rows) else []),
        line("engine on disk, MB", lambda r: mb(r.disk_bytes)),
        line(
            "tokens as fp32",
            lambda r: "-" if r.tokens_equal is None else f"{r.tokens_equal} of {record.workload.output_len}",
        ),
        line("logits off by", lambda r: "-" if r.logit_error is None else f"{r.logit_error:.0e}"),
        line("agrees", lambda r: _AGREES[r.agrees]),
    ]
    if not all(ok):
        lines.append(["failed", *(row.reason for row in rows)])
    work = record.workload
    caption = (
        f"{work.model}, batch {batch_size}, {work.input_len} tokens in, {work.output_len} out, "
        f"medians of {work.repeats}; {record.place}"
    )
    missing = f". Not on this machine: {', '.join(absent)}" if absent else ""
    return Table(caption + missing, ("", *(row.name for row in rows)), lines)


def formulas() -> Table:
    """What each number of `table` is, and whose definition."""
    rows = (
        ("TTFT", "time from the request to its first token", "trtllm-bench, vllm bench, MLPerf"),
        ("TPOT", "(E2E - TTFT) / (output tokens - 1)", "MLPerf, vllm bench; trtllm-bench also says ITL"),
        ("limit", "time to read the bytes of one step once (weights, KV cache)", "ours"),
        ("ITL", "each gap between two tokens of the first sequence; percentiles by nearest rank", "vllm bench"),
        ("E2E", "time from the request to its last token; of a batch, the last request's", "all"),
        ("output tokens/s", "batch x output tokens / E2E", "trtllm-bench, vllm bench"),
        ("tokens/s per user", "1 / TPOT", "trtllm-bench"),
        ("build", "the engine's build; torch_compile: first request less a usual one", "ours"),
        ("start", "from a new process to a loaded engine, imports included", "ours"),
        ("host memory", "most that the process held, Python and libraries included", "ours"),
        ("GPU memory", "what the GPU had more of when the process had ended: CUDA's share is in it", "ours"),
        ("logits off by", "largest difference to PyTorch's fp32 logits / largest logit", "ours"),
    )
    return Table("Formulas", ("number", "formula", "definition of"), rows)


def tpot(record: Record, batch_size: int = 1) -> Picture:
    """TPOT as bars, every run as a dot, and each contender's limit as a line across its bar."""
    rows = [row for row in record.at(batch_size) if row.status == "ok"]
    figure, axes = new_figure(height=0.9 + 0.5 * len(rows))
    names = [row.name for row in rows]
    axes.barh(names, [row.median("tpot_s") * 1e3 for row in rows], 0.6, color=COLOURS[4], edgecolor=COLOURS[0])
    for y, row in enumerate(rows):
        samples = [value * 1e3 for value in row.tpot_s]
        axes.plot(samples, [y] * len(samples), "o", color="black", markersize=3.5)
        limit = row.limit_s * 1e3
        axes.plot([limit, limit], [y - 0.42, y + 0.42], color=COLOURS[5], linewidth=3, label="" if y else "limit")
        axes.text(max(samples), y, f"  {row.median('tpot_s') * 1e3:.2f} (limit {limit:.2f})", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(max(row.tpot_s) for row in rows) * 1e3 * 1.3)
    axes.set_xlabel("TPOT, milliseconds: median (bar, number) and every run (dots)")
    axes.legend(loc="lower right", frameon=False)
    words = "; ".join(f"{r.name} {r.median('tpot_s') * 1e3:.2f}, limit {r.limit_s * 1e3:.2f}" for r in rows)
    return Picture(figure, f"Bars: milliseconds per output token at batch {batch_size}. {words}.")


def batching(record: Record) -> Picture:
    """Output throughput against time per token: one line for each contender, one point for each batch size."""
    figure, axes = new_figure(height=3.4)
    words = []
    throughputs: list[float] = []
    for index, name in enumerate(dict.fromkeys(row.name for row in record.rows if row.status == "ok")):
        rows = sorted((r for r in record.rows if r.name == name and r.status == "ok"), key=lambda r: r.batch_size)
        x, y = [r.median("tpot_s") * 1e3 for r in rows], [record.throughput(r) for r in rows]
        throughputs += y
        axes.plot(x, y, "osD^v*"[index % 6] + "-", color=COLOURS[index % 6], label=name)
        for row, at, height in zip(rows, x, y, strict=True):
            axes.annotate(f"{row.batch_size}", (at, height), (5, 5), textcoords="offset points", fontsize="small")
        points = ", ".join(f"{value:,.0f} at batch {r.batch_size}" for r, value in zip(rows, y, strict=True))
        words.append(f"{name}: {points}")
    label = "TPOT, milliseconds (less is better); the number at a point is the batch size"
    if throughputs and max(throughputs) > 20 * min(throughputs):  # the small ones would lie on each other
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")
        label += "; logarithmic"
    else:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("output tokens/s")
    axes.legend(frameon=False)
    return Picture(figure, f"Lines: output tokens per second against time per token. {'; '.join(words)}.")


def compare(mine: Record, theirs: Record, names: tuple[str, str] = ("A", "B")) -> Table:
    """Two records side by side, contender by contender: TPOT of each, and their ratio."""
    rows = []
    for row in mine.rows:
        other = theirs.find(row.name, row.batch_size)
        if other is None or row.status != "ok":
            continue
        a, b = row.median("tpot_s"), other.median("tpot_s")
        rows.append((row.name, row.batch_size, f"{a * 1e3:.2f}", f"{b * 1e3:.2f}", f"{a / b:.2f}"))
    settings = differences(mine, theirs, ("workload", "hardware", "threads", "versions"))
    caption = "The records differ in: " + "; ".join(settings) if settings else "Same work, same machine, same versions."
    columns = ("contender", "batch", f"TPOT of {names[0]}, ms", f"of {names[1]}, ms", f"{names[0]} / {names[1]}")
    return Table(caption, columns, rows)


def overview(record: Record) -> Table:
    """All of a record in one table: a line for each contender at each batch size."""
    lines = []
    for size in record.batch_sizes:
        for row in record.at(size):
            if row.status != "ok":
                lines.append((row.name, size, f"{row.status}: {row.reason}", "", "", "", "", ""))
                continue
            memory = row.device_bytes or row.peak_host_bytes
            lines.append(
                (
                    row.name,
                    size,
                    f"{row.median('ttft_s') * 1e3:.2f}",
                    f"{row.median('tpot_s') * 1e3:.2f}",
                    f"{row.limit_s / row.median('tpot_s'):.0%}",
                    f"{record.throughput(row):,.0f}",
                    f"{memory / 1e6:,.0f}",
                    _AGREES[row.agrees],
                )
            )
    of = "GPU" if record.hardware["device"] == "cuda" else "host"
    columns = ("contender", "batch", "TTFT, ms", "TPOT, ms", "limit / TPOT", "tokens/s", f"{of} memory, MB", "agrees")
    work = record.workload
    return Table(f"{work.model}, {work.input_len} tokens in, {work.output_len} out; {record.place}", columns, lines)


def beside(mine: Record, theirs: Record | None, batch_size: int = 1) -> Table:
    """This machine's results and the reference machine's in columns of their own, for every contender of either.

    Raises InputError if the two did different work; how often, and on what, may differ.
    """
    if theirs and (different := differences(same_work(mine), same_work(theirs), ("workload",))):
        raise InputError(
            f"These records do not belong in one table: they differ in {'; '.join(different)}.",
            fix="Measure the same work, or look at each record alone: comparison.overview.",
        )
    records = [record for record in (mine, theirs) if record]
    names = list(dict.fromkeys(row.name for record in records for row in record.at(batch_size)))
    rows = []
    for name in names:
        line = [name]
        for record in (mine, theirs):
            row = record.find(name, batch_size) if record else None
            if record and row:
                line += [f"{row.median('tpot_s') * 1e3:.2f}", f"{record.throughput(row):,.0f}", _AGREES[row.agrees]]
            else:
                line += ["not measured", "-", "-"]
        rows.append(line)
    there = theirs.place if theirs else MISSING
    columns = (
        "contender",
        "TPOT here, ms",
        "tokens/s here",
        "agrees here",
        "TPOT there, ms",
        "tokens/s there",
        "agrees there",
    )
    return Table(f"Here: {mine.place}. There: {there}", columns, rows)


def first_token(record: Record, batch_size: int = 1) -> Picture:
    """Seconds from nothing to the very first token: build, then start, then the TTFT of the first request."""
    rows = [row for row in record.at(batch_size) if row.status == "ok"]
    figure, axes = new_figure(height=0.9 + 0.5 * len(rows))
    names = [row.name for row in rows]
    parts = {
        "build or compile": [row.build_s for row in rows],
        "start": [row.start_s for row in rows],
        "TTFT": [row.median("ttft_s") for row in rows],
    }
    left = [0.0] * len(rows)
    for (part, values), colour, hatch in zip(
        parts.items(), (COLOURS[1], COLOURS[4], COLOURS[0]), HATCHES, strict=False
    ):
        axes.barh(names, values, 0.6, left=left, label=part, color=colour, hatch=hatch, edgecolor="white")
        left = [a + b for a, b in zip(left, values, strict=True)]
    for y, total in enumerate(left):
        axes.text(total, y, f"  {total:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.2)
    axes.set_xlabel("seconds until the first token ever")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    words = "; ".join(
        f"{row.name} {total:.1f}, of which build {row.build_s:.1f}" for row, total in zip(rows, left, strict=True)
    )
    return Picture(figure, f"Bars: seconds until the first token ever. {words}.")


def memory(record: Record, batch_size: int = 1) -> Picture:
    """Megabytes that each contender's process holds: on the host, and on the GPU if there is one."""
    rows = [row for row in record.at(batch_size) if row.status == "ok"]
    kinds = {"host": [row.peak_host_bytes / 1e6 for row in rows]}
    if any(row.device_bytes for row in rows):
        kinds["GPU"] = [row.device_bytes / 1e6 for row in rows]
    figure, axes = new_figure(height=0.9 + 0.5 * len(rows) * len(kinds))
    height = 0.8 / len(kinds)
    for at, ((kind, values), colour, hatch) in enumerate(zip(kinds.items(), COLOURS, HATCHES, strict=False)):
        spots = [y + (at - (len(kinds) - 1) / 2) * height for y in range(len(rows))]
        bars = axes.barh(spots, values, height * 0.9, label=kind, color=colour, hatch=hatch, edgecolor="white")
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(map(max, kinds.values())) * 1.18)
    axes.set_xlabel("MB held by the process, Python and libraries included")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    words = "; ".join(f"{kind}: " + ", ".join(f"{r.name} {v:,.0f}" for r, v in zip(rows, values, strict=True))
                      for kind, values in kinds.items())  # fmt: skip
    return Picture(figure, f"Bars: megabytes of each process. {words}.")


class Programs:
    """Programs side by side, with their lines counted: blank lines and comments do not count."""

    def __init__(self, programs: Mapping[str, str]):
        self.programs = {name: text.strip("\n") for name, text in programs.items()}
        code = {name: [line.strip() for line in text.splitlines()] for name, text in self.programs.items()}
        self.lines = {name: sum(bool(x) and not x.startswith("#") for x in lines) for name, lines in code.items()}

    def __str__(self) -> str:
        return "\n\n".join(f"# {name}: {self.lines[name]} lines\n{text}" for name, text in self.programs.items())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(n)}: {self.lines[n]} lines</th>' for n in self.programs)
        left = 'style="text-align: left; vertical-align: top"'
        body = "".join(f"<td {left}><pre>{html.escape(text)}</pre></td>" for text in self.programs.values())
        return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"


def published() -> Table:
    """What others published, apart from what this course measured."""
    figures = tomllib.loads((REFERENCES / "published.toml").read_text(encoding="utf-8"))["figure"]
    columns = ("publisher", "date", "software", "hardware", "work", "figure", "link")
    return Table(
        "Published by others; not measured by this course", columns, [[f[c] for c in columns] for f in figures]
    )
