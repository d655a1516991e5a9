"""What is said about compiled engines, judged by a record; and the usual comparison table, filled from one.

Each judgement is a sentence with its figure and a verdict. It holds for the machine and the model of its record.
"""

from __future__ import annotations

from collections.abc import Mapping

from helpers.bench.records import Record, Row
from helpers.display import Table

NOT_MEASURED = ("not measured", "open")


def claims(mine: Record, theirs: Record | None) -> Table:
    """Each claim with this machine's figure and verdict, and the reference machine's."""
    here, there = judge(mine), judge(theirs) if theirs else {}
    rows = [(claim, *here[claim], *there.get(claim, ("no record", "open"))) for claim in here]
    place = f"; there: {theirs.workload.model}, {theirs.place}" if theirs else ""
    columns = ("claim", "measured here", "verdict here", "measured there", "verdict there")
    return Table(f"Here: {mine.workload.model}, {mine.place}{place}", columns, rows)


def judge(record: Record) -> dict[str, tuple[str, str]]:
    """Claim to (what was measured, verdict)."""
    eager = _row(record, "pytorch")
    engine = _row(record, "aot", eager)
    compiled, vllm = _row(record, "torch_compile", eager), _row(record, "vllm", eager)
    int8 = record.find("aot int8")
    largest = max(record.batch_sizes)
    said = {}
    for other, words in ((eager, "eager PyTorch"), (compiled, "torch.compile"), (vllm, "vLLM")):
        said[f"2 to 5 times faster than {words}"] = _faster(engine, other)
    said["lower memory usage than eager PyTorch"] = _memory(engine, eager, "yes", "no")
    said["vLLM uses more memory"] = _memory(engine, vllm, "yes", "no")
    said["a build takes 10 to 30 minutes"] = _build(engine)
    said["the first inference is slower"] = _first(engine)
    said["batching helps throughput"] = _batching(record, engine, largest)
    said["int8 without loss of accuracy"] = _accuracy(record, int8)
    return said


def aspects(record: Record, lines: Mapping[str, int]) -> Table:
    """Setup, speed, memory, flexibility and best use of each contender, in measured and counted things.

    lines: lines of code of the shortest program for each backend. Another model costs the time to the first token
    again: what was built is for one model only.
    """
    size = max(record.batch_sizes)
    rows = [row for row in record.at(1) if row.status == "ok"]
    many = {row.name: record.throughput(row) for row in record.at(size) if row.status == "ok"}
    ever = {row.name: row.build_s + row.start_s + row.median("ttft_s") for row in rows}
    pace = {row.name: row.median("tpot_s") for row in rows}
    table: list[tuple[int | str, ...]] = []
    for row in rows:
        best = [
            words
            for words, leads in (
                ("pace of one answer", pace[row.name] == min(pace.values())),
                (f"{size} at a time", many.get(row.name) == max(many.values())),
                ("trying models out", ever[row.name] == min(ever.values())),
            )
            if leads
        ]
        table.append(
            (
                row.name,
                lines.get(row.backend, "-"),
                f"{ever[row.name]:.1f}",
                f"{row.start_s + row.median('ttft_s'):.1f}",
                f"{pace[row.name] * 1e3:.2f}",
                f"{many[row.name]:,.0f}" if row.name in many else "-",
                f"{(row.device_bytes or row.peak_host_bytes) / 1e6:,.0f}",
                ", ".join(best) or "-",
            )
        )
    table.append(("tensorrt_llm", lines.get("tensorrt_llm", "-"), *["not measured by us"] * 5, "-"))
    columns = (
        "contender",
        "setup: lines of code",
        "first token ever (another model: again), s",
        "first token of a later process, s",
        "speed: TPOT, ms",
        f"tokens/s, batch {size}",
        f"memory ({'GPU' if any(r.device_bytes for r in rows) else 'host'}), MB",
        "best here for",
    )
    return Table(f"{record.workload.model}; {record.place}", columns, table)


def guide(mine: Record, theirs: Record | None) -> Table:
    """For each situation the contender whose figure is best, on this machine and on the reference machine."""
    here = _best(mine)
    there = _best(theirs) if theirs else {}
    rows = [(situation, found, there.get(situation, "no record")) for situation, found in here.items()]
    place = f"; there: {theirs.workload.model}, {theirs.place}" if theirs else ""
    return Table(
        f"Here: {mine.workload.model}, {mine.place}{place}", ("what counts", "least or most here", "there"), rows
    )


def _best(record: Record) -> dict[str, str]:
    rows = [row for row in record.at(1) if row.status == "ok" and row.agrees is not False]
    size = max(record.batch_sizes)
    many = [row for row in record.at(size) if row.status == "ok" and row.agrees is not False]
    pace = min(rows, key=lambda r: r.median("tpot_s"))
    wait = min(rows, key=lambda r: r.median("ttft_s"))
    most = max(many, key=record.throughput)
    new = min(rows, key=lambda r: r.build_s + r.start_s + r.median("ttft_s"))
    restart = min(rows, key=lambda r: r.start_s + r.median("ttft_s"))
    small = min(rows, key=lambda r: r.device_bytes or r.peak_host_bytes)
    return {
        "one answer, each next word soon (TPOT)": f"{pace.name}: {pace.median('tpot_s') * 1e3:.2f} ms",
        "the first word soon (TTFT)": f"{wait.name}: {wait.median('ttft_s') * 1e3:.1f} ms",
        "many answers at a time (tokens/s)": f"{most.name}: {record.throughput(most):,.0f} at batch {size}",
        "a model that is new or changes (first token ever)": f"{new.name}: {new.build_s + new.start_s:.1f} s",
        "a process that starts often (first token, built before)": f"{restart.name}: {restart.start_s:.1f} s",
        "little memory": f"{small.name}: {(small.device_bytes or small.peak_host_bytes) / 1e6:,.0f} MB",
    }


def _row(record: Record, backend: str, like: Row | None = None) -> Row | None:
    """A backend's row at batch 1, in the precision of another row if there is one."""
    rows = [row for row in record.at(1) if row.backend == backend and row.status == "ok"]
    return next((row for row in rows if like is None or row.precision == like.precision), rows[0] if rows else None)


def _faster(engine: Row | None, other: Row | None) -> tuple[str, str]:
    if not engine or not other:
        return NOT_MEASURED
    ratio = other.median("tpot_s") / engine.median("tpot_s")
    verdict = "more" if ratio > 5 else "yes" if ratio >= 2 else "no" if ratio > 1 else "no, slower"
    return f"TPOT {ratio:.1f} times shorter ({engine.name} against {other.name})", verdict


def _memory(engine: Row | None, other: Row | None, yes: str, no: str) -> tuple[str, str]:
    if not engine or not other:
        return NOT_MEASURED
    kind = "GPU" if engine.device_bytes and other.device_bytes else "host"
    mine, theirs = (r.device_bytes if kind == "GPU" else r.peak_host_bytes for r in (engine, other))
    return f"{kind}: {mine / 1e6:,.0f} MB, {other.backend} {theirs / 1e6:,.0f} MB", yes if mine < 0.95 * theirs else no


def _build(engine: Row | None) -> tuple[str, str]:
    if not engine:
        return NOT_MEASURED
    minutes = engine.build_s / 60
    return f"{minutes:.1f} minutes", "yes" if 10 <= minutes <= 30 else "less" if minutes < 10 else "more"


def _first(engine: Row | None) -> tuple[str, str]:
    if not engine:
        return NOT_MEASURED
    cold = engine.warmup_e2e_s[0] / engine.median("e2e_s")
    return f"first request {cold:.1f} times the median", "yes" if cold > 1.15 else "no"


def _batching(record: Record, engine: Row | None, size: int) -> tuple[str, str]:
    many = record.find(engine.name, size) if engine else None
    if not engine or not many or size == 1:
        return NOT_MEASURED
    gain = record.throughput(many) / record.throughput(engine)
    return f"{gain:.1f} times the tokens/s at batch {size}", "yes" if gain > 1.1 else "no"


def _accuracy(record: Record, int8: Row | None) -> tuple[str, str]:
    if not int8 or int8.logit_error is None:
        return NOT_MEASURED
    equal = f"{int8.tokens_equal} of {record.workload.output_len} tokens as fp32"
    return f"{equal}; logits off by {int8.logit_error:.1%}", "small, but not without"
