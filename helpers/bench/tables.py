"""Tables and pictures of benchmark records: contenders side by side, records side by side, claims beside figures."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from helpers.bench.records import REFERENCES, Record, Row, differences, need_records, same_work
from helpers.display import COLOURS, Picture, Table, grouped_bars, new_figure, sample_bars, stacked_bars
from helpers.errors import InputError
from helpers.paths import read_toml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "no record of this workload from another machine comes with the course yet."


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds == seconds else "-"  # nan: there is none


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size else "-"


def _median_and_least(row: Row) -> str:
    return f"{_ms(row.median('tpot_s'))} ({_ms(min(row.tpot_s))})"


# How each metric of a row shows; "-" where it is not known or not there. FORMULAS says what they are.
METRICS: dict[str, Callable[[Record, Row], str]] = {
    "TTFT, ms": lambda _, r: _ms(r.median("ttft_s")),
    "TPOT, ms": lambda _, r: _ms(r.median("tpot_s")),
    "TPOT (least), ms": lambda _, r: _median_and_least(r),
    "least to most, ms": lambda _, r: " to ".join(map(_ms, r.spread("tpot_s"))),
    "GPU idle": lambda _, r: "-" if r.gpu_idle is None else f"{r.gpu_idle:.0%}",
    "limit, ms": lambda _, r: _ms(r.limit_s),
    "limit / TPOT": lambda _, r: f"{r.limit_s / r.median('tpot_s'):.0%}",
    "ITL p50, ms": lambda _, r: _ms(r.itl_percentile(50)),
    "ITL p90, ms": lambda _, r: _ms(r.itl_percentile(90)),
    "ITL p99, ms": lambda _, r: _ms(r.itl_percentile(99)),
    "E2E, ms": lambda _, r: _ms(r.median("e2e_s")),
    "output tokens/s": lambda record, r: f"{record.throughput(r):,.0f}",
    "tokens/s per user": lambda _, r: f"{1 / r.median('tpot_s'):,.0f}",
    "build, s": lambda _, r: f"{r.build_s:.0f}",
    "start, s": lambda _, r: f"{r.start_s:.1f}",
    "of it load, s": lambda _, r: f"{r.load_s:.2f}",
    "first request, ms": lambda _, r: _ms(r.warmup_e2e_s[0]),
    "first token, s": lambda _, r: f"{r.first_token_s:.1f}",
    "first token ever, s": lambda _, r: f"{r.build_s + r.first_token_s:.1f}",
    "host memory, MB": lambda _, r: _mb(r.peak_host_bytes),
    "GPU memory, MB": lambda _, r: _mb(r.device_bytes),
    "engine on disk, MB": lambda _, r: _mb(r.disk_bytes),
    "ran on": lambda _, r: f"cpu, threads: {r.threads}" if r.device == "cpu" else r.device or "-",
    "decode graph": lambda _, r: str(r.decode_graph or "-"),
    "tokens as fp32": lambda record, r: (
        "-" if r.tokens_equal is None else f"{r.tokens_equal} of {record.workload.output_len}"
    ),
    "logits off by": lambda _, r: "-" if r.logit_error is None else f"{r.logit_error:.0e}",
    "agrees": lambda _, r: {True: "yes", False: "NO", None: "-"}[r.agrees],
}
FORMULAS = (
    ("TTFT", "time from the request to its first token", "trtllm-bench, vllm bench, MLPerf"),
    ("TPOT", "(E2E - TTFT) / (output tokens - 1)", "MLPerf, vllm bench; trtllm-bench also says ITL"),
    ("TTFT and TPOT of a batch", "means over its requests", "ours"),
    ("least to most", "TPOT of the single runs", "ours"),
    ("GPU idle", "1 - (GPU's work + going on to what is queued) / TPOT: it waits for the host", "ours"),
    ("limit", "time to read the bytes of one step once (weights, KV cache)", "ours"),
    ("ITL", "each gap between two tokens of the first sequence; percentiles by nearest rank", "vllm bench serve"),
    ("E2E", "time from the request to its last token; of a batch, the last request's", "all"),
    ("output tokens/s", "batch x output tokens / E2E: the first token counts too", "trtllm-bench, vllm bench"),
    ("tokens/s per user", "1 / TPOT", "trtllm-bench"),
    ("build", "the engine's build; torch_compile: first request less a usual one", "ours"),
    ("start", "from a new process to a loaded engine, imports included", "ours"),
    ("first token", "start + TTFT + what the first request took longer than a usual one", "ours"),
    ("first token ever", "build + first token", "ours"),
    ("host memory", "most that the process held, Python and libraries included", "ours"),
    ("GPU memory", "what the GPU had more of when the process had ended: CUDA's share is in it", "ours"),
    ("ran on", "device, and on a CPU the threads, that its process says it used", "ours"),
    ("decode graph", "sequences in the graph that its steps ran in", "ours"),
    ("logits off by", "largest difference to PyTorch's fp32 logits / largest logit", "ours"),
)
SPEED = ("TPOT, ms", "least to most, ms", "output tokens/s", "agrees")  # in tables of several records


def memory_metric(record: Record) -> str:
    return f"{'GPU' if record.hardware['device'] == 'cuda' else 'host'} memory, MB"


def _work(record: Record) -> str:
    work = record.workload
    return f"{work.model}, {work.input_len} tokens in, {work.output_len} out"


def table(record: Record, batch_size: int | None = None) -> Table:
    """One table of a record: a column for each contender, a line for each metric. `formulas` says what they mean.
    batch_size: without one, the smallest of the record."""
    need_records(record)
    rows = [row for row in record.at(batch_size) if row.status != "absent"]
    absent = [row.name for row in record.at(batch_size) if row.status == "absent"]
    shown = {name: show for name, show in METRICS.items() if name != "TPOT (least), ms"}  # it is in the next two
    lines = [[name, *(show(record, row) if row.status == "ok" else "" for row in rows)] for name, show in shown.items()]
    lines = [line for line in lines if not set(line[1:]) <= {"-", ""} or line[0] == "agrees"]
    if any(row.status != "ok" for row in rows):
        lines.append(["failed", *(row.reason for row in rows)])
    size = record.at(batch_size)[0].batch_size
    caption = f"{_work(record)}, batch {size}, medians of {record.workload.repeats}; {record.place}"
    missing = f". Not on this machine: {', '.join(absent)}" if absent else ""
    return Table(caption + missing + record.remarks(size), ("", *(row.name for row in rows)), lines)


def formulas() -> Table:
    """What each number of `table` is, and whose definition."""
    return Table("Formulas", ("number", "formula", "definition of"), FORMULAS)


def overview(record: Record) -> Table:
    """All of a record in one table: a line for each contender at each batch size."""
    need_records(record)
    idle = ("GPU idle",) if any(row.gpu_idle is not None for row in record.rows if row.status == "ok") else ()
    speed = ("TTFT, ms", "TPOT, ms", "least to most, ms", *idle, "limit / TPOT", "output tokens/s")
    metrics = (*speed, memory_metric(record), "agrees")
    lines = []
    for row in sorted(record.rows, key=lambda row: row.batch_size):
        failed = [f"{row.status}: {row.reason}", *[""] * (len(metrics) - 1)]
        cells = [METRICS[name](record, row) for name in metrics] if row.status == "ok" else failed
        lines.append((row.name, row.batch_size, *cells))
    caption = f"{_work(record)}; {record.place}{record.remarks()}"
    return Table(caption, ("contender", "batch", *metrics), lines)


def compare(mine: Record, theirs: Record, names: tuple[str, str] = ("A", "B")) -> Table:
    """Two records side by side, for what either measured: TPOT of each, the ratios of medians and of least times."""
    need_records(mine, theirs)
    measured = [(row.name, row.batch_size) for record in (mine, theirs) for row in record.rows if row.status == "ok"]
    rows = []
    for contender in dict.fromkeys(measured):
        one, other = mine.find(*contender), theirs.find(*contender)
        cells = [_median_and_least(row) if row else "not measured" for row in (one, other)]
        if one and other:
            ratios = (one.median("tpot_s") / other.median("tpot_s"), min(one.tpot_s) / min(other.tpot_s))
            rows.append((*contender, *cells, *(f"{ratio:.2f}" for ratio in ratios)))
        else:
            rows.append((*contender, *cells, "-", "-"))
    settings = differences(mine, theirs, ("workload", "hardware", "threads", "versions"))
    caption = f"The records differ in: {'; '.join(settings)}" if settings else "Same work, same machine, same versions"
    for name, record in zip(names, (mine, theirs), strict=True):
        caption += f". {name}: {record.place}{record.remarks()}"
    ratio = f"{names[0]} / {names[1]}"
    columns = ("contender", "batch", *(f"{name}: TPOT (least), ms" for name in names), ratio, f"{ratio}, least")
    return Table(caption, columns, rows)


def beside(mine: Record, theirs: Record | None, batch_size: int | None = None) -> Table:
    """This machine's results and the reference machine's in columns of their own, for every contender of either.

    Raises InputError if the two did different work; how often, and on what, may differ.
    """
    need_records(mine, theirs or mine)
    different, checkpoint = [], mine.versions.get("checkpoint")
    if theirs:
        work = theirs.workload
        if checkpoint and theirs.versions.get("checkpoint") == checkpoint:  # one model, in a folder of each machine's
            work = replace(work, model=mine.workload.model)
        different = differences(same_work(mine), same_work(replace(theirs, workload=work)), ("workload",))
    if len({record.versions.get("checkpoint") for record in (mine, theirs) if record} - {None}) > 1:
        different.append("the checkpoint's files")
    if different:
        raise InputError(
            f"These records do not belong in one table: they differ in {'; '.join(different)}.",
            fix="Measure the same work, or look at each record alone: tables.overview.",
        )
    size = mine.at(batch_size)[0].batch_size
    names = dict.fromkeys(row.name for r in (mine, theirs) if r for row in r.rows if row.batch_size == size)
    rows = []
    for contender in names:
        cells = []
        for record in (mine, theirs):
            row = record.find(contender, size) if record else None
            cells += [METRICS[m](record, row) for m in SPEED] if record and row else ["not measured", "-", "-", "-"]
        rows.append((contender, *cells))
    there = theirs.place + theirs.remarks(size) if theirs else MISSING
    columns = ("contender", *(f"{where}: {name}" for where in ("here", "there") for name in SPEED))
    return Table(f"Batch {size}. Here: {mine.place}{mine.remarks(size)}. There: {there}", columns, rows)


def tpot(record: Record, batch_size: int | None = None) -> Picture:
    """TPOT as bars, every run as a dot, and each contender's limit as a line across its bar."""
    need_records(record)
    rows = record.measured(batch_size)
    samples = {row.name: [value * 1e3 for value in row.tpot_s] for row in rows}
    figure = sample_bars(samples, "TPOT, milliseconds", {row.name: row.limit_s * 1e3 for row in rows})
    words = "; ".join(
        f"{r.name} {_ms(r.median('tpot_s'))} (least {_ms(min(r.tpot_s))}), limit {_ms(r.limit_s)}" for r in rows
    )
    size = rows[0].batch_size
    return _picture(figure, f"Bars: milliseconds per output token at batch {size}. {words}", record, size)


def _picture(figure: Figure, words: str, record: Record, *sizes: int) -> Picture:
    """With what the record remarks on these batch sizes, for those who look and for those who listen."""
    if remarks := record.remarks(*sizes):
        figure.suptitle(textwrap.fill(remarks.removeprefix(". "), 110), x=0.01, ha="left", fontsize="small")
    return Picture(figure, f"{words}{remarks}.")


def batching(record: Record) -> Picture:
    """Output throughput against time per token: one line for each contender, one point for each batch size."""
    need_records(record)
    figure, axes = new_figure(height=3.4)
    words = []
    throughputs: list[float] = []
    names = dict.fromkeys(row.name for row in record.rows if row.status == "ok")
    for index, name in enumerate(names or [row.name for row in record.measured()]):  # InputError where all failed
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
    return _picture(figure, f"Lines: output tokens per second against time per token. {'; '.join(words)}", record)


def first_token(record: Record, batch_size: int | None = None) -> Picture:
    """Seconds from nothing to the very first token: build, then start, then the first request up to its token."""
    need_records(record)
    rows = record.measured(batch_size)
    parts = {
        "build or compile": [row.build_s for row in rows],
        "start": [row.start_s for row in rows],
        "first request": [row.first_token_s - row.start_s for row in rows],
    }
    figure = stacked_bars([row.name for row in rows], parts, "seconds until the first token ever", " s")
    words = "; ".join(f"{r.name} {r.build_s + r.first_token_s:.1f}, of which build {r.build_s:.1f}" for r in rows)
    return _picture(figure, f"Bars: seconds until the first token ever. {words}", record, rows[0].batch_size)


def memory(record: Record, batch_size: int | None = None) -> Picture:
    """Megabytes that each contender's process holds: on the host, and on the GPU if there is one."""
    need_records(record)
    rows = record.measured(batch_size)
    kinds = {"host": [row.peak_host_bytes / 1e6 for row in rows]}
    if any(row.device_bytes for row in rows):
        kinds["GPU"] = [row.device_bytes / 1e6 for row in rows]
    figure = grouped_bars([row.name for row in rows], kinds, "MB held by the process, Python and libraries included")
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
    figures = read_toml(REFERENCES / "published.toml")["figure"]
    columns = ("publisher", "date", "software", "hardware", "work", "figure", "link")
    return Table(
        "Published by others; not measured by this course", columns, [[f[c] for c in columns] for f in figures]
    )
