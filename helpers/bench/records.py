"""What a benchmark leaves: workload, rows, and where and how they were measured, as JSON that loads back.

A record that is cut, edited or of another schema is refused with what is wrong. Rows of different work or different
machines do not enter one table.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from helpers.errors import InputError, need, shown
from helpers.machine import hardware
from helpers.machine.commands import run
from helpers.machine.load import BUSY
from helpers.paths import PROJECT, check_writable, named, read_text, refused, write_text
from helpers.recipe import BuildRecipe

SCHEMA = 2
# Largest error of the logits against fp32, as a share of the largest logit: rounding of the type, with some room.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 6e-2, "int8": 6e-2, "fp8": 0.15, "int4": 0.25}
HAVE_DECODE_GRAPHS = ("aot", "tensorrt")  # one for each of a recipe's decode_batch_sizes
STEADY = 1.25  # a contender whose slowest run took more than this times its fastest was disturbed
HOST_BOUND = 0.1  # a contender waits for its host where the GPU is idle for more than this share of a decode step
REFERENCES = Path(__file__).parent / "references"


@dataclass(frozen=True)
class Workload:
    """What every contender has to do. Results of different workloads do not enter one table."""

    model: str = "stories"
    input_len: int = 16
    output_len: int = 64
    repeats: int = 5
    warmup: int = 2
    threads: int = 0  # on a CPU, the same for all; 0: one while the weights fit in cache, else every free core
    max_batch_size: int = 4  # with the next two: the limits that engines are built for and caches sized by
    max_input_len: int = 64
    max_seq_len: int = 256
    decode_batch_sizes: tuple[int, ...] = ()  # batch sizes with a decode graph of their own, beside 1 and the largest
    device: str = "auto"
    start_together: bool = False  # all contenders built and started at once: quicker, but they disturb each other

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Workload).items():
            value = getattr(self, name)
            try:
                _from_json(kind, list(value) if isinstance(value, tuple) else value, f"Workload.{name}")
            except ValueError as error:
                raise InputError(f"{error}.", fix="Give a value of the kind of its default.") from None
        for name in ("input_len", "output_len", "repeats", "warmup", "max_batch_size"):
            if getattr(self, name) < (2 if name == "output_len" else 1):
                raise InputError(
                    f"Workload.{name} is {getattr(self, name)}.",
                    fix="Give 1 or more; output_len 2 or more, for a single token has no time per output token.",
                )
        if self.threads > 1024:  # which the threads' library ends a process for, where the system grants fewer
            raise InputError(f"Workload.threads is {self.threads}.", fix="Give at most 1024, as in a recipe.")
        if self.input_len > self.max_input_len or self.input_len + self.output_len > self.max_seq_len:
            raise InputError(
                f"{self.input_len} tokens in and {self.output_len} out do not fit the limits "
                f"max_input_len={self.max_input_len}, max_seq_len={self.max_seq_len}.",
                fix="Raise the limits, or ask for fewer tokens.",
            )
        if outside := [size for size in self.decode_batch_sizes if not 1 <= size <= self.max_batch_size]:
            raise InputError(
                f"Decode batch size {outside[0]} is not from 1 to max_batch_size={self.max_batch_size}.",
                fix="Give sizes in that range, or raise the limit.",
            )
        # 1 and the largest have a graph anyway, so naming them asks for nothing else.
        sizes = set(self.decode_batch_sizes) - {1, self.max_batch_size}
        object.__setattr__(self, "decode_batch_sizes", tuple(sorted(sizes)))

    def recipe(self, backend: str, precision: str, threads: int = 0) -> BuildRecipe:
        """The recipe of one contender. threads: of a CPU, for the backend that compiles for their number; the others
        take it from the process that they run in (process.py), and a GPU has none."""
        compiled_for = backend == "aot" and threads and hardware.resolve_device(self.device) == "cpu"
        return BuildRecipe(
            model=self.model,
            backend=backend,
            precision=precision,
            max_batch_size=self.max_batch_size,
            max_input_len=self.max_input_len,
            max_seq_len=self.max_seq_len,
            decode_batch_sizes=self.decode_batch_sizes if backend in HAVE_DECODE_GRAPHS else (),
            device=self.device,
            num_threads=threads if compiled_for else 0,
        )


@dataclass
class Row:
    """One contender at one batch size: the samples of every repeat, in seconds, in the order they were taken."""

    backend: str
    precision: str
    batch_size: int
    status: str = "ok"  # or "failed", or "absent": it cannot run on this machine
    reason: str = ""  # why it is not ok
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)  # of the batch's first sequence
    warmup_e2e_s: list[float] = field(default_factory=list)  # apart: the first of them is the cold one
    build_s: float = 0.0
    start_s: float = 0.0
    load_s: float = 0.0
    disk_bytes: int = 0
    peak_host_bytes: int = 0  # of the whole process, Python and libraries included
    device_bytes: int = 0  # of the whole process on the GPU, after all batch sizes
    bytes_per_step: int = 0
    limit_s: float = 0.0
    tokens_equal: int | None = None  # how many of the reference's tokens came out the same, from the first on
    logit_error: float | None = None  # largest difference over largest logit; None: not compared
    versions: dict[str, str] = field(default_factory=dict)
    # What it really used, as its process says; None where it does not.
    device: str | None = None
    threads: int | None = None
    decode_graph: int | None = None  # sequences in the decode graph that it ran
    # Of one decode step, as machine/gpu_time.py reads it. None: no GPU, or not seen.
    gpu_busy_s: float | None = None
    gpu_handover_s: float | None = None

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"

    @property
    def agrees(self) -> bool | None:
        """Whether it computes what the fp32 reference computes, within its precision's rounding. None: not compared,
        as with dummy weights, which each backend draws for itself."""
        return None if self.logit_error is None else self.logit_error <= TOLERANCE[self.precision]

    @property
    def gpu_idle(self) -> float | None:
        """The share of a decode step in which the GPU waits for its host; None where that was not measured."""
        if self.gpu_busy_s is None or self.gpu_handover_s is None:
            return None
        return max(0.0, 1 - (self.gpu_busy_s + self.gpu_handover_s) / self.median("tpot_s"))

    @property
    def memory_bytes(self) -> int:
        """Of the device that it ran on; 0: not measured."""
        return self.device_bytes or (0 if self.device == "cuda" else self.peak_host_bytes)

    @property
    def first_token_s(self) -> float:
        """From a new process to its first token. The first request may be later than a usual one; what torch_compile
        takes then is its `build_s`."""
        late = 0.0 if self.backend == "torch_compile" else self.warmup_e2e_s[0] - self.median("e2e_s")
        return self.start_s + max(0.0, late) + self.median("ttft_s")

    def median(self, metric: str) -> float:
        return statistics.median(self._samples(metric))

    def spread(self, metric: str) -> tuple[float, float]:
        """The least and the largest sample."""
        samples = self._samples(metric)
        return min(samples), max(samples)

    def _samples(self, metric: str) -> list[float]:
        every = {name: value for name, value in vars(self).items() if isinstance(value, list)}
        if metric not in every:
            raise InputError(f"A row has no samples of {shown(metric)}.", fix=f"Give one of {', '.join(every)}.")
        return every[metric]

    def itl_percentile(self, percent: float) -> float:
        """The smallest gap that at least `percent` of all gaps do not exceed (nearest rank)."""
        ordered = sorted(self.itl_s)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan


@dataclass(frozen=True)
class Host:
    """The computer around it all: its processor, and what else it did meanwhile."""

    processor: str
    cores: int  # that this process may use
    other_work: float  # cores that it kept busy while the rounds ran: the largest mean of a batch size


@dataclass
class Record:
    """What a run measured, where, with which versions and settings. It is written as JSON and loads back."""

    workload: Workload
    rows: list[Row]
    hardware: dict[str, Any]
    host: Host
    versions: dict[str, str]
    threads: int
    bandwidth: float  # bytes per second that reading memory reached, in the same run
    date: str
    commit: str = ""
    command: str = ""
    schema: int = SCHEMA

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({row.batch_size for row in self.rows})

    def at(self, batch_size: int | None = None) -> list[Row]:
        """The rows at a batch size, or at the smallest that there is. InputError if there are none."""
        size = min(self.batch_sizes, default=1) if batch_size is None else batch_size
        if rows := [row for row in self.rows if row.batch_size == size]:
            return rows
        sizes = ", ".join(map(str, self.batch_sizes)) or "none"
        raise InputError(f"The record has nothing at batch {size}.", fix=f"Its batch sizes: {sizes}.")

    def measured(self, batch_size: int | None = None) -> list[Row]:
        """Of the same rows those that did not fail. InputError if all did."""
        rows = self.at(batch_size)
        if good := [row for row in rows if row.status == "ok"]:
            return good
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in rows)
        raise InputError(f"At batch {rows[0].batch_size} nothing was measured.", cause=f"{reasons}.")

    def find(self, name: str, batch_size: int = 1) -> Row | None:
        """One contender's row by its name, such as "aot fp32"; None if it was not measured."""
        ok = (row for row in self.rows if row.batch_size == batch_size and row.status == "ok")
        return next((row for row in ok if row.name == name), None)

    def row(self, name: str, batch_size: int = 1) -> Row:
        """The same; InputError if it was not measured."""
        if row := self.find(name, batch_size):
            return row
        have = ", ".join(f"{row.name} (batch {row.batch_size})" for row in self.rows if row.status == "ok")
        raise InputError(f"No measurement of {name!r} at batch {batch_size}.", fix=f"There are: {have or 'none'}.")

    def throughput(self, row: Row) -> float:
        """Output tokens per second: batch x output tokens / E2E."""
        need(row, Row, "Give a row: record.row('aot fp32').")
        return row.batch_size * self.workload.output_len / row.median("e2e_s")

    @property
    def place(self) -> str:
        """Where and when it was measured, for a caption."""
        threads = f", threads: {self.threads}" if self.hardware["device"] == "cpu" else ""
        host = f", host: {self.host.processor}" if self.hardware["device"] == "cuda" else ""
        return f"{self.hardware['name']} ({self.hardware['device']}{threads}{host}), {self.date[:10]}"

    def remarks(self, *batch_sizes: int) -> str:
        """What every table and picture of these rows says beside their figures; "" if nothing is amiss.

        batch_sizes: without any, all that there are.
        """
        rows = [row for size in batch_sizes or self.batch_sizes for row in self.at(size) if row.status == "ok"]
        remarks = {"Disturbed": self.disturbances(rows), "Waiting for its host": self.host_waits(rows)}
        return "".join(f". {title}: {'; '.join(texts)}" for title, texts in remarks.items() if texts)

    def host_waits(self, rows: Sequence[Row]) -> list[str]:
        """The contenders whose GPU waits for the processor beside it: on another host they take another time. For how
        long, the column "GPU idle" says."""
        if self.hardware["device"] != "cuda":
            return []
        waits = dict.fromkeys(row.name for row in rows if row.gpu_idle and row.gpu_idle > HOST_BOUND)
        unseen = dict.fromkeys(row.name for row in rows if row.gpu_idle is None)
        remarks = [", ".join(waits)] if waits else []
        if unseen:
            remarks.append("not recorded" + (f" of {', '.join(unseen)}" if len(unseen) < len(rows) else ""))
        return remarks

    def disturbances(self, rows: Sequence[Row]) -> list[str]:
        """What makes these rows less than a fair comparison: another's work on the machine, runs that differ by more
        than STEADY, or a contender that used something else than was asked."""
        remarks = []
        if self.host.other_work > BUSY * self.host.cores:
            kept, cores = self.host.other_work, self.host.cores
            remarks.append(f"other work kept {kept:.1f} cores busy beside the {cores} that were used here")
        spreads = [(row.name, row.spread("tpot_s")[1] / row.spread("tpot_s")[0]) for row in rows]
        if uneven := [(name, spread) for name, spread in spreads if spread > STEADY]:
            names = ", ".join(dict.fromkeys(name for name, _ in uneven))
            remarks.append(f"slowest run up to {max(spread for _, spread in uneven):.1f} times the fastest: {names}")
        for row in rows:
            if row.device not in (None, self.hardware["device"]):
                remarks.append(f"{row.name} ran on {row.device}")
            if self.hardware["device"] == "cpu" and row.threads not in (None, self.threads):
                remarks.append(f"{row.name} used {row.threads} threads")
        return list(dict.fromkeys(remarks))


# Files


def keeper(path: str | Path) -> Callable[[Record], Path]:
    """The call that writes a record to `path`. InputError at once if nothing can be written there: a measurement
    takes minutes."""
    check_writable(named(path))
    return lambda record: save(record, path)


def save(record: Record, path: str | Path) -> Path:
    """Write a record as JSON, whole or not at all."""
    need_records(record)
    path = named(path)
    write_text(path, json.dumps(asdict(record), indent=1) + "\n")
    return path


def read(path: str | Path) -> Record:
    """A record from its file. Truncated, incomplete, of another schema or with wrong types: refused with what is
    wrong."""
    path = named(path)
    try:
        raw = json.loads(read_text(path))
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            schema = raw.get("schema") if isinstance(raw, dict) else None
            raise ValueError(f"its schema is {schema!r}, this course reads {SCHEMA}")
        record: Record = _from_json(Record, raw, "record")
        _check(record)
    except OSError as error:
        raise refused(path, "read", error) from error
    except (ValueError, RecursionError, InputError) as error:
        raise InputError(
            f"{path.name} is not read: {error}.",
            cause="The file was cut, edited, written by another version of the course, or by --json and not by --out.",
            fix="Measure again: helpers bench --out FILE",
        ) from error
    return record


def _from_json(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as the type that a field declares; ValueError if it is none. Numbers are finite and not negative:
    all that a record holds are counts, bytes and seconds."""
    origin, arguments = get_origin(kind), get_args(kind)
    if type(None) in arguments:
        return None if value is None else _from_json(arguments[0], value, where)
    if kind is Any:
        return value
    if is_dataclass(kind) and type(value) is dict:
        kinds = get_type_hints(kind)
        for problem, names in (("lacks", kinds.keys() - value.keys()), ("has unknown", value.keys() - kinds)):
            if names:
                raise ValueError(f"{where} {problem} {', '.join(sorted(names))}")
        parts = {name: _from_json(kinds[name], item, f"{where}.{name}") for name, item in value.items()}
        return kind(**parts)  # type: ignore[operator]
    if origin in (list, tuple) and type(value) is list:
        return origin(_from_json(arguments[0], item, where) for item in value)
    if origin is dict and type(value) is dict:
        return {name: _from_json(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind in (int, float) and type(value) in (int, kind) and 0 <= value < 2**63:
        return kind(value)
    if kind in (str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where} is {shown(value):.60}")


def _check(record: Record) -> None:
    """What types alone do not say; ValueError."""
    if not all(isinstance(record.hardware.get(name), str) for name in ("name", "device")):
        raise ValueError("hardware has no name or device")
    for row in record.rows:
        if row.status not in ("ok", "failed", "absent"):
            raise ValueError(f"{row.name}: status is {row.status!r}")
        if not re.fullmatch(r"[\w.-]+", row.backend) or row.precision not in TOLERANCE or row.batch_size < 1:
            raise ValueError(f"there is no contender {row.name!r} at batch {row.batch_size}")
        if row.status != "ok":
            continue
        for metric in ("ttft_s", "tpot_s", "e2e_s"):
            if len(getattr(row, metric)) != record.workload.repeats:
                raise ValueError(f"{row.name}: {metric} is not {record.workload.repeats} times")
        times = [*row.ttft_s, *row.tpot_s, *row.e2e_s, *row.warmup_e2e_s, row.limit_s]
        if not row.warmup_e2e_s or not all(1e-9 < seconds < 1e9 for seconds in times):
            raise ValueError(f"{row.name}: a time is missing, or is none that anything can take")


def references() -> list[Record]:
    """The records that come with the course, measured by its own `bench` command."""
    return [read(path) for path in sorted(REFERENCES.glob("*.json"))]


def reference(model: str, input_len: int | None = None) -> Record | None:
    """The course's record of this model (and prompt length) on a GPU, or None if there is none."""
    for record in references():
        same = record.workload.model == model and input_len in (None, record.workload.input_len)
        if same and record.hardware["device"] == "cuda":
            return record
    return None


def commit() -> str:
    """The course's commit, with "+" if files differ from it. COURSE_COMMIT names it for a copy without git; else ""."""
    if given := os.environ.get("COURSE_COMMIT"):
        return given
    # Named, for git would also find a repository around the course's folder, or that of GIT_DIR.
    own = f"--git-dir={PROJECT / '.git'}", f"--work-tree={PROJECT}"
    answer = run(["git", *own, "describe", "--always", "--abbrev=12", "--dirty=+"], 10)
    return answer.stdout.strip() if answer.returncode == 0 else ""


# Records together


def need_records(*given: Any) -> None:
    """InputError for another thing than a record, such as its file."""
    for record in given:
        need(record, Record, "Give a record: records.read('record.json').")


def merge(*records: Record) -> Record:
    """Several records in one, of the same work on the same machine with the same versions. The rows of a batch size are
    those of the last record that has all its contenders: only these took turns."""
    if not records:
        raise InputError("There are no records to merge.", fix="Give one or more.")
    need_records(*records)
    first = records[0]
    for other in records[1:]:
        if different := differences(first, other, ("workload", "hardware", "threads", "versions")):
            raise InputError(
                f"These records do not belong in one table: they differ in {'; '.join(different)}.",
                cause="Times of different work, or of different machines, say nothing about the backends.",
                fix="Put them side by side instead: helpers bench --compare A.json B.json",
            )
    rows: list[Row] = []
    for size in sorted({size for record in records for size in record.batch_sizes}):
        runs = [[row for row in record.rows if row.batch_size == size] for record in records]
        names = [{row.name for row in run if row.status == "ok"} for run in runs]
        whole = [run for run, own in zip(runs, names, strict=True) if run and own == set().union(*names)]
        if not whole:
            raise InputError(
                f"These records do not belong in one table: at batch {size} no one of them has all the contenders.",
                cause="What was measured at different times took no turns, so a disturbance hits some of them only.",
                fix="Measure them in one run, or look at each record alone: tables.overview.",
            )
        rows += whole[-1]
    busiest = max((record.host for record in records), key=lambda host: host.other_work)
    return replace(first, rows=rows, date=max(record.date for record in records), host=busiest)


def same_work(record: Record) -> Record:
    """The record without what may differ between machines that do the same work: repeats, threads, manner of start."""
    plain = Workload()
    equal = {name: getattr(plain, name) for name in ("repeats", "warmup", "threads", "device", "start_together")}
    return replace(record, workload=replace(record.workload, **equal))


def differences(mine: Record, theirs: Record, names: tuple[str, ...]) -> list[str]:
    """What differs between two records in these fields, such as "workload.output_len: 64 and 32"."""
    different = []
    for name in names:
        a, b = getattr(mine, name), getattr(theirs, name)
        if isinstance(a, Workload):
            a, b = asdict(a), asdict(b)
        if isinstance(a, dict):
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            different += [f"{name}.{key}: {a.get(key)} and {b.get(key)}" for key in keys]
        elif a != b:
            different.append(f"{name}: {a} and {b}")
    return different
