"""What a benchmark leaves: workload, rows, and where and how they were measured, as JSON that loads back.

A record that is cut, edited or of another schema is refused with what is wrong. Rows of different work or different
machines do not enter one table.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from helpers.errors import InputError
from helpers.paths import PROJECT
from helpers.recipe import BuildRecipe

SCHEMA = 2
# Largest error of the logits against fp32, as a share of the largest logit: rounding of the type, with some room.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 6e-2, "int8": 6e-2, "fp8": 0.15, "int4": 0.25}
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
        object.__setattr__(self, "decode_batch_sizes", tuple(self.decode_batch_sizes))  # JSON has lists
        for name in ("input_len", "output_len", "repeats", "warmup", "max_batch_size"):
            if getattr(self, name) < (2 if name == "output_len" else 1):
                raise InputError(f"Workload.{name} is {getattr(self, name)}.", fix="Give 1 or more (output_len: 2).")
        if self.input_len > self.max_input_len or self.input_len + self.output_len > self.max_seq_len:
            raise InputError(
                f"{self.input_len} tokens in and {self.output_len} out do not fit the limits "
                f"max_input_len={self.max_input_len}, max_seq_len={self.max_seq_len}.",
                fix="Raise the limits, or ask for fewer tokens.",
            )

    def recipe(self, backend: str, precision: str) -> BuildRecipe:
        return BuildRecipe(
            model=self.model,
            backend=backend,
            precision=precision,
            max_batch_size=self.max_batch_size,
            max_input_len=self.max_input_len,
            max_seq_len=self.max_seq_len,
            decode_batch_sizes=self.decode_batch_sizes,
            device=self.device,
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

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"

    @property
    def agrees(self) -> bool | None:
        """Whether it computes what the fp32 reference computes, within its precision's rounding. None: not compared,
        as with dummy weights, which each backend draws for itself."""
        return None if self.logit_error is None else self.logit_error <= TOLERANCE[self.precision]

    def median(self, metric: str) -> float:
        return statistics.median(getattr(self, metric))

    def spread(self, metric: str) -> tuple[float, float]:
        """The least and the largest sample."""
        return min(getattr(self, metric)), max(getattr(self, metric))

    def itl_percentile(self, percent: float) -> float:
        """The smallest gap that at least `percent` of all gaps do not exceed (nearest rank)."""
        ordered = sorted(self.itl_s)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan


@dataclass
class Record:
    """What a run measured, where, with which versions and settings. It is written as JSON and loads back."""

    workload: Workload
    rows: list[Row]
    hardware: dict[str, Any]
    versions: dict[str, str]
    threads: int
    bandwidth: float  # bytes per second that reading memory reached, in the same run
    date: str
    commit: str = ""
    command: str = ""
    schema: int = SCHEMA

    def at(self, batch_size: int) -> list[Row]:
        return [row for row in self.rows if row.batch_size == batch_size]

    def find(self, name: str, batch_size: int = 1) -> Row | None:
        """One contender's row by its name, such as "aot fp32"; None if it was not measured."""
        return next((r for r in self.at(batch_size) if r.name == name and r.status == "ok"), None)

    def row(self, name: str, batch_size: int = 1) -> Row:
        """The same; InputError if it was not measured."""
        if found := self.find(name, batch_size):
            return found
        have = ", ".join(f"{row.name} (batch {row.batch_size})" for row in self.rows if row.status == "ok")
        raise InputError(f"No measurement of {name!r} at batch {batch_size}.", fix=f"There are: {have or 'none'}.")

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({row.batch_size for row in self.rows})

    def throughput(self, row: Row) -> float:
        """Output tokens per second: batch x output tokens / E2E."""
        return row.batch_size * self.workload.output_len / row.median("e2e_s")

    @property
    def place(self) -> str:
        """Where and when it was measured, for a caption."""
        threads = f", threads: {self.threads}" if self.hardware["device"] == "cpu" else ""
        return f"{self.hardware['name']} ({self.hardware['device']}{threads}), {self.date[:10]}"


def save(record: Record, path: str | Path) -> Path:
    """Write a record as JSON, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read(path: str | Path) -> Record:
    """A record from its file. Truncated, incomplete or of another schema: refused with what is wrong."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no record {path.name!r}.", fix="Write one: helpers bench --out FILE") from None
    except ValueError as error:
        raise _refused(path, f"it is not whole JSON ({error})") from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else None
        raise _refused(path, f"its schema is {found}, this course reads {SCHEMA}")
    try:
        rows = [_from_fields(Row, row) for row in raw["rows"]]
        record = _from_fields(Record, {**raw, "workload": _from_fields(Workload, raw["workload"]), "rows": rows})
        for key in ("name", "device"):
            record.hardware[key]
        for row in record.rows:
            _check_row(row, record.workload)
    except (TypeError, KeyError, AttributeError, InputError) as error:
        raise _refused(path, f"{type(error).__name__}: {error}") from error
    return record


def references() -> list[Record]:
    """The records that come with the course, measured on one data-centre GPU by its own `bench` command."""
    return [read(path) for path in sorted(REFERENCES.glob("*.json"))]


def reference(model: str, input_len: int | None = None) -> Record | None:
    """The course's record of this model (and prompt length), or None if there is none."""
    for record in references():
        if record.workload.model == model and input_len in (None, record.workload.input_len):
            return record
    return None


def commit() -> str:
    """The course's commit, with "+" if files differ from it. COURSE_COMMIT says it for a copy without git; else ""."""
    if said := os.environ.get("COURSE_COMMIT"):
        return said
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def merge(*records: Record) -> Record:
    """The rows of several records in one. They must have done the same work on the same machine."""
    first = records[0]
    for other in records[1:]:
        if different := differences(first, other, ("workload", "hardware", "threads")):
            raise InputError(
                f"These records do not belong in one table: they differ in {'; '.join(different)}.",
                cause="Times of different work, or of different machines, say nothing about the backends.",
                fix="Put them side by side instead: helpers bench --compare A.json B.json",
            )
    rows: dict[tuple[str, int], Row] = {}
    for record in records:
        for row in record.rows:
            if row.status == "ok" or (row.name, row.batch_size) not in rows:
                rows[row.name, row.batch_size] = row
    return replace(first, rows=list(rows.values()), date=max(record.date for record in records))


def same_work(record: Record) -> Record:
    """The record without what may differ between machines that do the same work: repeats, threads, manner of start."""
    plain = Workload()
    equal = {name: getattr(plain, name) for name in ("repeats", "warmup", "threads", "device", "start_together")}
    return replace(record, workload=replace(record.workload, **equal))


def differences(mine: Record, theirs: Record, names: tuple[str, ...]) -> list[str]:
    """What differs between two records in these fields, such as "workload.output_len: 64 and 32"."""
    found = []
    for name in names:
        a, b = getattr(mine, name), getattr(theirs, name)
        if isinstance(a, Workload):
            a, b = asdict(a), asdict(b)
        if isinstance(a, dict):
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            found += [f"{name}.{key}: {a.get(key)} and {b.get(key)}" for key in keys]
        elif a != b:
            found.append(f"{name}: {a} and {b}")
    return found


def _from_fields(kind: Any, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    if missing := sorted(known - values.keys()):
        raise KeyError(f"{kind.__name__} lacks {', '.join(missing)}")
    if unknown := sorted(values.keys() - known):
        raise KeyError(f"{kind.__name__} has unknown {', '.join(unknown)}")
    return kind(**values)


def _check_row(row: Row, workload: Workload) -> None:
    if row.status not in ("ok", "failed", "absent"):
        raise KeyError(f"status {row.status!r}")
    if row.status == "ok":
        for metric in ("ttft_s", "tpot_s", "e2e_s"):
            samples = getattr(row, metric)
            if len(samples) != workload.repeats or not all(isinstance(s, float) and s > 0 for s in samples):
                raise KeyError(f"{row.name}: {metric} is not {workload.repeats} times")


def _refused(path: Path, what: str) -> InputError:
    return InputError(
        f"{path.name} is not read: {what}.",
        cause="The file was cut, edited, or written by another version of the course.",
        fix="Measure again: helpers bench --out FILE",
    )
