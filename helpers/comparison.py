"""Tables and pictures of benchmark records: contenders side by side, records side by side, claims beside figures."""

from __future__ import annotations

from collections.abc import Callable

from .records import Record, Row, differences
from .report import COLOURS, Picture, Table, new_figure


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
        line("agrees", lambda r: {True: "yes", False: "NO", None: "-"}[r.agrees]),
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
    for index, name in enumerate(dict.fromkeys(row.name for row in record.rows if row.status == "ok")):
        rows = sorted((r for r in record.rows if r.name == name and r.status == "ok"), key=lambda r: r.batch_size)
        x, y = [r.median("tpot_s") * 1e3 for r in rows], [record.throughput(r) for r in rows]
        axes.plot(x, y, "osD^v*"[index % 6] + "-", color=COLOURS[index % 6], label=name)
        for row, at, height in zip(rows, x, y, strict=True):
            axes.annotate(f"{row.batch_size}", (at, height), (5, 5), textcoords="offset points", fontsize="small")
        points = ", ".join(f"{value:,.0f} at batch {r.batch_size}" for r, value in zip(rows, y, strict=True))
        words.append(f"{name}: {points}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("TPOT, milliseconds (less is better); the number at a point is the batch size")
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


def claims(record: Record, sweep: Record) -> Table:
    """What is often said about compiled engines, and what this machine measured. `sweep` has several batch sizes."""
    rows = {row.name: row for row in record.at(1) if row.status == "ok"}
    eager, engine = record.row("pytorch fp32"), record.row("aot fp32")
    faster = {name: row.median("tpot_s") / engine.median("tpot_s") for name, row in rows.items()}
    cold = engine.warmup_e2e_s[0] / engine.median("e2e_s")
    largest = max(sweep.batch_sizes)
    gain = sweep.throughput(sweep.row("aot fp32", largest)) / sweep.throughput(sweep.row("aot fp32", 1))
    said = [
        (
            "2 to 5 times faster",
            "TPOT of others / the engine's: "
            + ", ".join(f"{name} {ratio:.1f}" for name, ratio in faster.items() if not name.startswith("aot")),
            _verdict(faster[eager.name], 2, 5),
        ),
        (
            "lower memory usage",
            f"{engine.peak_host_bytes / 1e6:.0f} MB a process, eager PyTorch {eager.peak_host_bytes / 1e6:.0f} MB",
            "yes" if engine.peak_host_bytes < 0.95 * eager.peak_host_bytes else "no",
        ),
        (
            "a build takes 10 to 30 minutes",
            f"{engine.build_s / 60:.1f} minutes for this model",
            "no, not for this model" if engine.build_s < 600 else "yes",
        ),
        (
            "the first inference is slower",
            f"first request {cold:.1f} times as long as the median",
            "yes" if cold > 1.15 else "no",
        ),
        (
            "batching raises throughput",
            f"{gain:.1f} times the tokens/s at batch {largest}",
            "yes" if gain > 1.1 else "no",
        ),
    ]
    if int8 := rows.get("aot int8"):
        of = record.workload.output_len
        measured = f"{int8.tokens_equal} of {of} tokens as fp32; logits off by {int8.logit_error or 0:.1%}"
        said.append(("int8 without loss of accuracy", measured, "small, but not without"))
    if "vllm" not in {row.backend for row in rows.values()}:
        said.append(("vLLM: good speed, more memory", "vLLM is not installed here", "not measured"))
    return Table("Claims, on this machine with this model", ("claim", "measured", "verdict"), said)


def _verdict(ratio: float, low: float, high: float) -> str:
    """Of a claim about the speed against eager PyTorch."""
    if ratio < low:
        return "no, less against eager"
    return "yes, against eager" if ratio <= high else "more, against eager"
