"""What is said about compiled engines, judged by a record; and the usual comparison table, filled from one.

Each judgement is a sentence with its figures and a verdict. It holds for the machine and the model of its record.

Figures are intervals. What every run measured lies between its least and its largest sample: the true median is in
there with a probability of 94 % for five runs and 75 % for three (1 - 2 / 2^n). Contenders take turns, so a ratio of
two is taken round by round, and what disturbed a whole round falls out of it. What was measured once or twice (build,
start, first request and memory are measured once) is taken as known to no better than 10 %; and beside other work on
the machine, a time may have been as much longer as that took of the cores. Where all contenders were started at once,
each may have waited for all others. A verdict is only given where the whole interval is on one side.

On a GPU there is one more uncertainty. A contender that waits for its host takes another time on another host, however
often it is measured on this one. So its time is only known to lie between what its GPU works in a step and the longest
run; where nobody looked at the GPU, between the limit and the longest run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from helpers.bench.records import HOST_BOUND, TOLERANCE, Record, Row, need_records
from helpers.bench.tables import METRICS, memory_metric
from helpers.display import Table
from helpers.errors import need

Interval = tuple[float, float]  # least and most
CANNOT_TELL = "cannot be told from these runs"
NOT_MEASURED = ("not measured", "open")
# Each situation, the metric of tables.py that counts in it, and what was measured of it; less is better.
SITUATIONS: dict[str, tuple[str, Callable[[Row], Sequence[float]]]] = {
    "one answer, each next word soon (TPOT)": ("TPOT (least), ms", lambda r: r.tpot_s),
    "the first word soon (TTFT)": ("TTFT, ms", lambda r: r.ttft_s),
    "many answers at a time (tokens/s)": ("output tokens/s", lambda r: r.e2e_s),
    "a model that is new or changes (first token ever)": (
        "first token ever, s",
        lambda r: [r.build_s + r.first_token_s],
    ),
    "a process that starts often (first token, built before)": ("first token, s", lambda r: [r.first_token_s]),
    "little memory": ("memory, MB", lambda r: [r.memory_bytes]),
}


def interval(samples: Sequence[float]) -> Interval:
    least, most = min(samples), max(samples)
    return (least, most) if len(samples) > 2 else (0.9 * least, 1.1 * most)


def seconds(record: Record, samples: Sequence[float]) -> Interval:
    """The same of times, in this record."""
    least, most = interval(samples)
    if len(samples) > 2:
        return least, most
    beside = record.host.other_work / record.host.cores
    beside += len({row.name for row in record.rows}) - 1 if record.workload.start_together else 0
    return least / (1 + beside), most


def ratio(over: Sequence[float], under: Sequence[float]) -> Interval:
    """Least and most of over / under, whose samples were taken in turns, round by round."""
    if len(over) != len(under) or len(over) < 3:
        return _divide(interval(over), interval(under))
    return interval([a / b for a, b in zip(over, under, strict=True)])


def _divide(over: Interval, under: Interval) -> Interval:
    return over[0] / under[1], over[1] / under[0]


def claims(mine: Record, theirs: Record | None) -> Table:
    """Each claim with this machine's figure and verdict, and the reference machine's."""
    need_records(mine, theirs or mine)
    here, there = judge(mine), judge(theirs) if theirs else {}
    rows = [(claim, *here[claim], *there.get(claim, ("no record", "open"))) for claim in here]
    columns = ("claim", "measured here", "verdict here", "measured there", "verdict there")
    return Table(_places(mine, theirs), columns, rows)


def guide(mine: Record, theirs: Record | None) -> Table:
    """For each situation the contender whose figure is best among those that compute the right thing, or those that
    these runs do not tell apart, on this machine and on the reference machine."""
    need_records(mine, theirs or mine)
    best = [_best(record) if record else None for record in (mine, theirs)]
    rows = [(situation, *(b[situation][1] if b else "no record" for b in best)) for situation in SITUATIONS]
    return Table(_places(mine, theirs), ("what counts", "least or most here", "there"), rows)


def aspects(record: Record, lines: Mapping[str, int]) -> Table:
    """Setup, speed, memory, flexibility and best use of each contender, in measured and counted things.

    lines: lines of code of the shortest program for each backend. Another model costs the time to the first token
    again: what was built is for one model only.
    """
    need_records(record)
    need(lines, Mapping, "Give the lines alone: programs.lines.")
    best, largest = _best(record), _largest(record)
    metrics = ("first token ever, s", "first token, s", "TPOT (least), ms", memory_metric(record))
    table: list[tuple[Any, ...]] = []
    for row in record.measured():
        many = record.find(row.name, largest)
        table.append(
            (
                row.name,
                lines.get(row.backend, "-"),
                *(METRICS[name](record, row) for name in metrics),
                METRICS["output tokens/s"](record, many) if many else "-",
                ", ".join(s.partition(" (")[0] for s, (names, _) in best.items() if row.name in names) or "-",
            )
        )
    if not any(row.backend == "tensorrt_llm" for row in record.measured()):
        reason = next((row.reason for row in record.at() if row.backend == "tensorrt_llm"), "-")
        table.append(("tensorrt_llm", lines.get("tensorrt_llm", "-"), *["not measured by us"] * 5, reason))
    columns = ("contender", "setup: lines of code", *metrics, f"tokens/s, batch {largest}", "best here for")
    return Table(f"{record.workload.model}; {record.place}{record.remarks()}", columns, table)


def _best(record: Record) -> dict[str, tuple[list[str], str]]:
    """Situation to the names of those that lead, best first, and a sentence of these and the first one's figure."""
    best = {}
    for situation, (metric, samples) in SITUATIONS.items():
        size = _largest(record) if metric == "output tokens/s" else None
        rows = [row for row in record.measured(size) if row.agrees is not False and all(samples(row))]
        rows = sorted(rows, key=lambda row: statistics.median(samples(row)))  # noqa: B023
        known = interval if metric == "memory, MB" else partial(seconds, record)
        least = [_floor(record, row) if samples(row) is row.tpot_s else known(samples(row))[0] for row in rows]
        names = [row.name for row, low in zip(rows, least, strict=True) if low <= known(samples(rows[0]))[1]]
        shown = METRICS[memory_metric(record) if metric == "memory, MB" else metric]
        figure = f"{shown(record, rows[0])} {metric.rpartition(' ')[2]}" if rows else "nothing that agrees with PyTorch"
        best[situation] = names, f"{' or '.join(names) or 'none'}: {figure}" + (f" at batch {size}" if size else "")
    return best


def judge(record: Record) -> dict[str, tuple[str, str]]:
    """Claim to (what was measured, verdict), at the record's smallest batch size."""
    eager, compiled, vllm = (_pair(record, backend) for backend in ("pytorch", "torch_compile", "vllm"))
    engine = eager[0] if eager else next((row for row in _right(record) if row.backend == "aot"), None)
    wrong = [row.name for row in _ok(record) if row.agrees is False]
    missing = (f"not measured: of {' and '.join(wrong)} the answers are wrong", "open") if wrong else NOT_MEASURED
    return {
        "2 to 5 times faster than eager PyTorch": _faster(record, *eager) if eager else missing,
        "2 to 5 times faster than torch.compile": _faster(record, *compiled) if compiled else missing,
        "2 to 5 times faster than vLLM": _faster(record, *vllm) if vllm else missing,
        "lower memory usage than eager PyTorch": _memory(*eager) if eager else missing,
        "vLLM uses more memory": _memory(*vllm) if vllm else missing,
        "a build takes 10 to 30 minutes": _build(record, engine) if engine else missing,
        "the first inference is slower": _first(record, engine) if engine else missing,
        "batching helps throughput": _batching(record, engine) if engine else missing,
        "int8 without loss of accuracy": _accuracy(record),
    }


def _ok(record: Record) -> list[Row]:
    return [row for row in record.at() if row.status == "ok"]


def _right(record: Record) -> list[Row]:
    """Of what computes something else, it does not matter how fast it is. What was not compared stays."""
    return [row for row in _ok(record) if row.agrees is not False]


def _largest(record: Record) -> int:
    return max((row.batch_size for row in record.rows if row.status == "ok"), default=1)


def _places(mine: Record, theirs: Record | None) -> str:
    there = f". There: {theirs.workload.model}, {theirs.place}{theirs.remarks()}" if theirs else ""
    return f"Here: {mine.workload.model}, {mine.place}{mine.remarks()}{there}"


def _pair(record: Record, backend: str) -> tuple[Row, Row] | None:
    """The engine's row and a backend's in the same precision: else the comparison would be one of precisions."""
    rows = {(row.backend, row.precision): row for row in _right(record)}
    pairs = ((rows.get(("aot", row.precision)), row) for row in rows.values() if row.backend == backend)
    return next(((engine, other) for engine, other in pairs if engine), None)


def times(figure: Interval) -> str:
    """Such as "2.0 to 2.8 times"; close to 1 with one digit more."""
    digits = 1 if min(figure) >= 1.95 or max(figure) < 0.5 else 2
    least, most = (f"{value:.{digits}f}" for value in figure)
    return f"{least} times" if least == most else f"{least} to {most} times"


def _verdict(figure: Interval, low: float, high: float = math.inf, below: str = "no") -> str:
    if low <= figure[0] and figure[1] <= high:
        return "yes"
    return below if figure[1] < low else "more" if figure[0] > high else CANNOT_TELL


def _faster(record: Record, engine: Row, other: Row) -> tuple[str, str]:
    figure = ratio(other.tpot_s, engine.tpot_s)
    both = " and ".join(f"{r.name} {METRICS['TPOT (least), ms'](record, r)}" for r in (engine, other))
    words = f"TPOT {times(figure)} shorter: median (least) of {both} ms"
    (low, high), theirs, mine = figure, _floor(record, other), _floor(record, engine)
    if theirs < min(other.tpot_s):
        low = min(low, theirs / max(engine.tpot_s))
    if mine < min(engine.tpot_s):
        high = max(high, max(other.tpot_s) / mine)
    on_any_host = (low, high)
    if on_any_host != figure:
        words += f"; with any host beside this GPU {times(on_any_host)}"
    return words, _verdict(on_any_host, 2, 5, below="no, slower" if on_any_host[1] < 1 else "no")


def _floor(record: Record, row: Row) -> float:
    """The shortest step that another host beside the same GPU could make of it."""
    least = min(row.tpot_s)
    if record.hardware["device"] != "cuda" or (row.gpu_idle is not None and row.gpu_idle <= HOST_BOUND):
        return least
    return min(least, row.limit_s if row.gpu_busy_s is None else row.gpu_busy_s)


def _memory(engine: Row, other: Row) -> tuple[str, str]:
    """Both claims about memory say that the other's is larger."""
    kind = "GPU" if engine.device_bytes and other.device_bytes else "host"
    mine, theirs = (r.device_bytes if kind == "GPU" else r.peak_host_bytes for r in (engine, other))
    figures = f"{kind}: {mine / 1e6:,.0f} MB, {other.backend} {theirs / 1e6:,.0f} MB"
    return (figures, _verdict(ratio([theirs], [mine]), 1)) if mine and theirs else NOT_MEASURED


def _build(record: Record, engine: Row) -> tuple[str, str]:
    minutes = engine.build_s / 60
    return f"{minutes:.1f} minutes", _verdict(seconds(record, [minutes]), 10, 30, below="less")


def _first(record: Record, engine: Row) -> tuple[str, str]:
    """Slower: later than the latest of the others by more than these differ among themselves."""
    first, (least, most) = engine.warmup_e2e_s[0], interval(engine.e2e_s)
    low, high = seconds(record, [first])
    verdict = "yes" if low > most + (most - least) else "no" if high < least else CANNOT_TELL
    return f"first request {times((first / most, first / least))} a later one", verdict


def _batching(record: Record, engine: Row) -> tuple[str, str]:
    size = _largest(record)
    many = record.find(engine.name, size)
    if not many or size == engine.batch_size:
        return NOT_MEASURED
    least, most = _divide(interval(engine.e2e_s), interval(many.e2e_s))  # of other rounds
    gain = (least * size / engine.batch_size, most * size / engine.batch_size)
    return f"{times(gain)} the tokens/s at batch {size}", _verdict(gain, 1)


def _accuracy(record: Record) -> tuple[str, str]:
    int8 = next((row for row in _ok(record) if row.name == "aot int8"), None)
    if not int8 or int8.logit_error is None:
        return NOT_MEASURED
    equal = f"{int8.tokens_equal} of {record.workload.output_len} tokens as fp32"
    verdict = "yes" if int8.logit_error <= TOLERANCE["fp32"] else "no, but the loss is small" if int8.agrees else "no"
    return f"{equal}; logits off by {int8.logit_error:.1%}", verdict
