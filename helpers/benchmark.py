"""Time the same work on several backends: workload, metrics, repetition, and result records.

What is the same for all: token ids in, number of tokens out (the end token is ignored), greedy decoding, batch,
limits, CPU threads. What differs is the contender: a backend and a precision. Each runs in a process of its own,
so that its memory is its own, and all take turns, so that a disturbance of the machine hits all alike.

The metrics, and whose definition each is:
  TTFT               request to first token (trtllm-bench, vllm bench, MLPerf)
  TPOT               (E2E - TTFT) / (output tokens - 1) of one request (trtllm-bench calls the same sum ITL)
  ITL                the single gaps between streamed tokens, as a client sees them (vllm bench serve); batch 1 only
  E2E                request to last token
  output throughput  batch x output tokens / E2E: the first token counts too (trtllm-bench's headline, vllm bench)
  per user           1 / TPOT (trtllm-bench)
  limit              ours: the time to read once the bytes that a decode step must read (see `bytes_per_step`)
  build              ours: the engine's build; for torch_compile, by how much its first request was late
  start              ours: a new process to a loaded engine, imports included
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import hardware, models
from .backends.worker import Worker
from .errors import BackendUnavailable, CourseError, InputError, WorkerError
from .progress import Progress
from .recipe import COMPILED, BuildRecipe

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
# Largest error of the logits against fp32, as a share of the largest logit: rounding of the type, with some room.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 6e-2, "int8": 6e-2, "fp8": 0.15, "int4": 0.25}
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}
TIME_LIMIT_S = 900.0  # for one request; torch.compile compiles in its first


@dataclass(frozen=True)
class Workload:
    """What every contender has to do. Results of different workloads do not enter one table."""

    model: str = "stories"
    input_len: int = 16
    output_len: int = 64
    repeats: int = 5
    warmup: int = 2
    threads: int = 0  # CPU threads, the same for all; 0: one while the weights fit in cache, else every free core
    max_batch_size: int = 4  # with the next two: the limits that engines are built for and caches sized by
    max_input_len: int = 64
    max_seq_len: int = 256
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "repeats", "max_batch_size"):
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
            device=self.device,
        )


@dataclass
class Row:
    """One contender at one batch size: the samples of every repeat, in seconds, in the order they were taken."""

    backend: str
    precision: str
    batch_size: int
    status: str = "ok"  # or "failed", or "absent": not installed here
    reason: str = ""  # why it is not ok
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    warmup_e2e_s: list[float] = field(default_factory=list)  # apart: the first of them is the cold one
    build_s: float = 0.0
    start_s: float = 0.0
    load_s: float = 0.0
    disk_bytes: int = 0
    peak_host_bytes: int = 0  # of the whole process, Python and libraries included
    peak_device_bytes: int = 0
    bytes_per_step: int = 0
    limit_s: float = 0.0
    tokens_equal: int = 0  # how many of the reference's tokens came out the same, from the first on
    logit_error: float | None = None  # largest difference over largest logit; None: the backend gives no logits
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"

    @property
    def agrees(self) -> bool:
        """Whether it computes what the fp32 reference computes, within its precision's rounding."""
        return self.logit_error is None or self.logit_error <= TOLERANCE[self.precision]

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
    schema: int = SCHEMA

    def at(self, batch_size: int) -> list[Row]:
        return [row for row in self.rows if row.batch_size == batch_size]

    def row(self, name: str, batch_size: int = 1) -> Row:
        """One contender's row by its name, such as "aot fp32"; InputError if it was not measured."""
        for row in self.at(batch_size):
            if row.name == name and row.status == "ok":
                return row
        have = ", ".join(f"{row.name} (batch {row.batch_size})" for row in self.rows if row.status == "ok")
        raise InputError(f"No measurement of {name!r} at batch {batch_size}.", fix=f"There are: {have or 'none'}.")

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({row.batch_size for row in self.rows})

    def throughput(self, row: Row) -> float:
        """Output tokens per second: batch x output tokens / E2E."""
        return row.batch_size * self.workload.output_len / row.median("e2e_s")


# Records


def save(record: Record, path: str | Path) -> Path:
    Path(path).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    return Path(path)


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
        for row in record.rows:
            _check_row(row, record.workload)
    except (TypeError, KeyError, InputError) as error:
        raise _refused(path, f"{type(error).__name__}: {error}") from error
    return record


def merge(*records: Record) -> Record:
    """The rows of several records in one. They must have done the same work on the same machine."""
    first = records[0]
    for other in records[1:]:
        different = [
            f"{name}: {_brief(mine)} and {_brief(theirs)}"
            for name in ("workload", "hardware", "threads")
            if (mine := getattr(first, name)) != (theirs := getattr(other, name))
        ]
        if different:
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


def _brief(value: Any) -> str:
    return str(value)[:80]


def _refused(path: Path, what: str) -> InputError:
    return InputError(
        f"{path.name} is not read: {what}.",
        cause="The file was cut, edited, or written by another version of the course.",
        fix="Measure again: helpers bench --out FILE",
    )


# The limit


def bytes_per_step(workload: Workload, precision: str, batch_size: int) -> int:
    """Bytes that one decode step has to read: each weight once, and the keys and values of the sequences.

    weights  parameters x bytes of the precision; an embedding table of its own does not count (one row is read)
    KV       2 x layers x KV heads x head size x tokens x bytes, at the mean length of the sequences: all of the
             prompt and half of the answer
    Norms and int8 scales count as weights; they are below 1 %.
    """
    config = models.find(workload.model).config
    weights = config.parameter_count()
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    on_gpu = hardware.resolve_device(workload.device) == "cuda"
    kv = (2 if on_gpu else 4) if precision == "int8" else max(1, int(BYTES[precision]))
    length = workload.input_len + workload.output_len // 2
    return int(weights * BYTES[precision]) + config.kv_cache_bytes(batch_size, length, kv)


def least_time(size: int, device: str, threads: int) -> float:
    """Seconds to read `size` bytes once, by the best of 20 sums over one float32 array of that size.

    The array is read again and again, as a decode step reads its weights. So where these fit in the processor's
    cache, the limit is the cache's, not the memory's.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.ones(max(1, size // 4), device=device)
        best = math.inf
        for _ in range(20):
            start = time.perf_counter()
            values.sum().item()
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        torch.set_num_threads(before)


# The run


def run(
    workload: Workload,
    contenders: Sequence[str],
    batch_sizes: Sequence[int] = (1,),
    *,
    quiet: bool = False,
    keep: Callable[[Record], Any] | None = None,
) -> Record:
    """Measure each contender ("aot", "aot:int8", ...) at each batch size, and return the record.

    A contender that fails becomes a row with its reason; the others go on. `keep` is called after each batch size
    with what there is so far.
    """
    pairs = [_parse(contender) for contender in contenders]
    for size in batch_sizes:
        if not 1 <= size <= workload.max_batch_size:
            raise InputError(f"Batch {size} is not from 1 to max_batch_size={workload.max_batch_size}.")
    record = _empty_record(workload)
    title = f"{len(pairs)} contenders, {workload.repeats} rounds each"
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(title, quiet=quiet))
        runners: dict[str, _Runner] = {}
        for backend, precision in pairs:
            runner = _Runner(workload, record.threads, backend, precision)
            stack.callback(runner.close)
            runners[f"{backend} {precision}"] = runner
            with progress.phase(f"load {backend} {precision}"):
                runner.start()
        prompts = make_prompts(workload, max(batch_sizes))
        with progress.phase("reference tokens"):
            reference = _reference(runners, record, prompts[0])
        for size in batch_sizes:
            record.rows += _measure_batch(runners, record, prompts[:size], reference, progress)
            if keep:
                keep(record)
    return record


def _measure_batch(
    runners: dict[str, _Runner], record: Record, prompts: list[list[int]], reference: dict[str, Any], progress: Progress
) -> list[Row]:
    """Warm-up of each, then rounds in which each has its turn."""
    workload, size = record.workload, len(prompts)
    work = {"prompts": prompts, "output_len": workload.output_len}
    turns = []
    for name, runner in runners.items():
        with progress.phase(f"warm up {name}, batch {size}"):
            if runner.worker is None and runner.row.status == "ok":  # an earlier batch size ended it
                runner.start()
            row = _new_row(runner.row, record, size)
            turns.append((row, runner))
            if answer := runner.ask(row, "check", **work):
                row.tokens_equal = _equal_prefix(answer["tokens"], reference["tokens"])
                row.logit_error = _logit_error(answer["logits"], reference["logits"])
                row.warmup_e2e_s.append(answer["seconds"])
            for _ in range(workload.warmup - 1):
                if answer := runner.ask(row, "measure", stream=False, **work):
                    row.warmup_e2e_s.append(answer["e2e_s"])
    for turn in range(workload.repeats):
        with progress.phase(f"round {turn + 1}, batch {size}"):
            for row, runner in turns:
                if answer := runner.ask(row, "measure", stream=size == 1, **work):
                    for metric in ("ttft_s", "tpot_s", "e2e_s"):
                        getattr(row, metric).append(answer[metric])
                    row.itl_s += answer["itl_s"]
                    row.limit_s = min(row.limit_s, _limit(row, record))
    for row, runner in turns:
        if answer := runner.ask(row, "memory"):
            row.peak_host_bytes, row.peak_device_bytes = answer["host"], answer["device"]
        if row.status == "ok" and row.backend == "torch_compile":
            row.build_s = max(0.0, row.warmup_e2e_s[0] - row.median("e2e_s"))
    return [row for row, _ in turns]


def _new_row(template: Row, record: Record, size: int) -> Row:
    empty: dict[str, Any] = {name: [] for name in ("ttft_s", "tpot_s", "e2e_s", "itl_s", "warmup_e2e_s")}
    step = bytes_per_step(record.workload, template.precision, size)
    row = replace(template, batch_size=size, bytes_per_step=step, **empty)
    row.limit_s = _limit(row, record)
    return row


def _limit(row: Row, record: Record) -> float:
    return least_time(row.bytes_per_step, record.hardware["device"], record.threads)


def make_prompts(workload: Workload, count: int) -> list[list[int]]:
    """`count` different prompts of exactly input_len token ids: beginnings of stories for the bundled model,
    else random ids. The same ones in every run."""
    import random

    if workload.model == "stories":
        from tokenizers import Tokenizer

        from .stories.grammar import draw_corpus

        tokenizer = Tokenizer.from_file(str(models.BUNDLED / "tokenizer.json"))
        texts = (story.text for story in draw_corpus(4 * count + 16, "benchmark"))
        encoded = [tokenizer.encode(text).ids[: workload.input_len] for text in texts]
        different = list(dict.fromkeys(tuple(ids) for ids in encoded if len(ids) == workload.input_len))
        if len(different) >= count:
            return [list(ids) for ids in different[:count]]
    vocabulary = models.find(workload.model).config.vocab_size
    rng = random.Random(0)
    return [[rng.randrange(3, vocabulary) for _ in range(workload.input_len)] for _ in range(count)]


def _reference(runners: dict[str, _Runner], record: Record, prompt: list[int]) -> dict[str, Any]:
    """What PyTorch computes in fp32 for the first prompt: every row is compared with it."""
    runner = runners.get("pytorch fp32") or _Runner(record.workload, record.threads, "pytorch", "fp32")
    if runner.worker is None:
        runner.start()
    row = replace(runner.row)
    answer = runner.ask(row, "check", prompts=[prompt], output_len=record.workload.output_len)
    if runner not in runners.values():
        runner.close()
    if answer is None:
        raise WorkerError(f"There is no reference to compare with: {row.reason}", fix="Mend the pytorch backend first.")
    return answer


def _equal_prefix(tokens: list[int], reference: list[int]) -> int:
    for position, (mine, theirs) in enumerate(zip(tokens, reference, strict=False)):
        if mine != theirs:
            return position
    return min(len(tokens), len(reference))


def _logit_error(logits: list[float] | None, reference: list[float] | None) -> float | None:
    if logits is None or reference is None:
        return None
    return max(abs(a - b) for a, b in zip(logits, reference, strict=True)) / max(map(abs, reference))


def batch_sizes(text: str) -> list[int]:
    """ "1,4" to [1, 4]."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"Batch sizes are numbers with commas between, not {text!r}.", fix="Such as 1,4.") from None


def _parse(contender: str) -> tuple[str, str]:
    backend, _, precision = contender.partition(":")
    BuildRecipe(backend=backend, precision=precision or "fp32")  # RecipeError for names that do not exist
    return backend, precision or "fp32"


def _empty_record(workload: Workload) -> Record:
    machine = hardware.describe(workload.device)
    size = models.find(workload.model).config.parameter_count() * 4
    threads = workload.threads or hardware.default_threads(size)
    versions = {"python": sys.version.split()[0], **hardware.versions(), "transformers": _version("transformers")}
    return Record(
        workload,
        [],
        json.loads(json.dumps(asdict(machine))),  # as it will be read back
        versions,
        threads,
        hardware.measure_bandwidth(workload.device, threads),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        _commit(),
    )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # no git here
    return done.stdout.strip()


# A contender in a process of its own


class _Runner:
    """Starts the worker, asks one thing at a time, and turns whatever goes wrong into a row's reason."""

    def __init__(self, workload: Workload, threads: int, backend: str, precision: str):
        self.recipe = workload.recipe(backend, precision)
        self.threads = threads
        self.row = Row(backend, precision, batch_size=1)  # what is true at every batch size
        self.worker: Worker | None = None
        self.cache = tempfile.TemporaryDirectory()  # torch.compile's: what earlier runs left would hide its cost

    def start(self) -> None:
        """Build the engine if need be, and load it in a new process."""
        from . import backends, engine, store

        try:
            backends.module(self.recipe.backend)
            if self.recipe.backend in COMPILED:
                folder = engine.build(self.recipe, quiet=True)
                self.row.build_s = sum(store.read_manifest(folder)["seconds"].values())
                self.row.disk_bytes = store.size(folder)
            started = time.perf_counter()
            self.worker = Worker("helpers.benchmark_process")
        except CourseError as error:
            _fail(self.row, error)
            return
        arguments = {"recipe": self.recipe.to_dict(), "threads": self.threads, "cache": self.cache.name}
        if answer := self.ask(self.row, "load", **arguments):
            self.row.start_s = time.perf_counter() - started
            self.row.load_s, self.row.versions = answer["load_s"], answer["versions"]

    def ask(self, row: Row, call: str, **arguments: Any) -> dict[str, Any] | None:
        """The answer, or None once this row has failed."""
        if row.status != "ok" or self.worker is None:
            return None
        try:
            return self.worker.call(call, time_limit=TIME_LIMIT_S, **arguments)
        except CourseError as error:
            _fail(row, error)
            if isinstance(error, WorkerError):  # that ended the process
                self.end()
            return None

    def end(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def close(self) -> None:
        self.end()
        self.cache.cleanup()


def _fail(row: Row, error: CourseError) -> None:
    row.status = "absent" if isinstance(error, BackendUnavailable) else "failed"
    row.reason = error.what if row.status == "failed" else "not installed here"
