"""Time the same work on several backends, fairly: the run and its metrics. records.py keeps what it measured.

What is the same for all: token ids in, number of tokens out (the end token is ignored), greedy decoding, batch,
limits, and threads on a CPU. What differs is the contender: a backend and a precision. Each runs in a process of its
own, so that its memory is its own, and all take turns, so that a disturbance of the machine hits all alike.

tables.formulas lists the metrics, what each is, and whose definition. A time ends when the caller holds the token ids,
so the device has done its work by then.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import takewhile
from typing import Any

from filelock import FileLock

from helpers import backends
from helpers.bench.records import Host, Record, Row, Workload, commit
from helpers.errors import BackendUnavailable, CourseError, InputError, WorkerError, need, shown
from helpers.machine import environments, hardware
from helpers.machine.load import OtherWork
from helpers.machine.worker import Worker
from helpers.model.checkpoint import BUNDLED, find_checkpoint
from helpers.paths import compilers_folder, owned_folder, temporary_folder, user_id
from helpers.progress import Progress, held, hushed, say, shown_if_slow
from helpers.recipe import COMPILED, BuildRecipe
from helpers.recipe.fields import not_allowed

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.625}  # int4: see model/weights.py
TIME_LIMIT_S = 900.0  # for one request; torch.compile compiles in its first
BUILD_LIMIT_S = 3600.0


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
    if not isinstance(workload, Workload):
        raise InputError(f"A workload is a Workload, not {shown(workload)}.", fix="Give Workload(model='stories').")
    for what, values, kind in (("Contenders", contenders, str), ("Batch sizes", batch_sizes, int)):
        if not isinstance(values, (list, tuple)) or not values or any(type(value) is not kind for value in values):
            raise InputError(f"{what} are {shown(values)}.", fix="Give a list, such as ['pytorch', 'aot'] and [1, 4].")
    if keep is not None and not callable(keep):
        raise InputError(f"What keeps the record is {shown(keep)}.", fix="Give keep=records.keeper('record.json').")
    asked: dict[tuple[str, str], str] = {}  # "aot" and "aot:fp32" are one
    for size in batch_sizes:
        if not 1 <= size <= workload.max_batch_size:
            raise InputError(
                f"Batch {size} is not from 1 to max_batch_size={workload.max_batch_size}.",
                fix="Give sizes in that range, or raise the limit.",
            )
    with hushed(quiet):
        with shown_if_slow("Looking at this machine and the model", "look"):  # PyTorch and transformers are imported
            for contender in contenders:
                workload.recipe(*_parse(contender), workload.threads)  # RecipeError for what does not exist
                asked.setdefault(_parse(contender), contender)
            record = empty_record(workload)
        runners = [make_runner(workload, record.threads, contender) for contender in asked.values()]
        return run_all(record, runners, batch_sizes, keep=keep)


def run_all(
    record: Record,
    runners: list[Runner],
    batch_sizes: Sequence[int],
    *,
    keep: Callable[[Record], Any] | None = None,
) -> Record:
    """The same with contenders that the caller made: fills the record, and ends them."""
    workload = record.workload
    prompts = make_prompts(workload, max(batch_sizes))
    title = f"{len(runners)} contenders, {workload.repeats} rounds each"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_turn())
        progress = stack.enter_context(Progress(title))
        for runner in runners:
            stack.callback(runner.close)
        if workload.start_together:
            with progress.phase("start all at once"), ThreadPoolExecutor(len(runners)) as pool:
                list(pool.map(lambda runner: runner.prepare(prompts, batch_sizes), runners))
        else:
            for runner in runners:
                with progress.phase(f"start {runner.row.name}"):
                    runner.prepare(prompts, batch_sizes)
        if not workload.model.startswith("dummy:"):  # of random weights, each backend draws its own
            with progress.phase("compare with PyTorch fp32"):
                _compare(runners, record, prompts[0])
        for size in batch_sizes:
            record.rows += _measure(runners, record, prompts[:size], progress)
            if keep:
                keep(record)
        if any(row.device == "cuda" for row in record.rows):
            with progress.phase("watch the GPU at work"):
                _watch_gpu(runners, record, prompts)
        if record.hardware["device"] == "cuda":
            with progress.phase("end, and see what the GPU gets back"):
                _device_memory(runners, record)
            if keep:
                keep(record)
    return record


def _turn() -> contextlib.AbstractContextManager[None]:
    """Two benchmarks of one user would time each other: the second starts nothing until the first has ended. The lock
    is in no store, because a benchmark of engines that are built already needs none that can be written to."""
    lock = FileLock(temporary_folder() / f"trtllm-course-benchmark-{user_id()}.lock")
    return held(lock, "runs a benchmark")


def _measure(runners: list[Runner], record: Record, prompts: list[list[int]], progress: Progress) -> list[Row]:
    """Warm-up of each at one batch size, then rounds in which each has its turn."""
    workload, size = record.workload, len(prompts)
    work = {"prompts": prompts, "output_len": workload.output_len}
    turns = [(runner.rows[size], runner) for runner in runners]
    with progress.phase(f"warm up, batch {size}"):
        for row, runner in turns:
            row.bytes_per_step = bytes_per_step(workload, row.precision, size)
            row.limit_s = _limit(row, record)
            for _ in range(workload.warmup - 1):  # the first was part of the start
                if answer := runner.ask(row, "measure", **work):
                    row.warmup_e2e_s.append(answer["e2e_s"])
    other_work = OtherWork()
    for turn in range(workload.repeats):
        with progress.phase(f"round {turn + 1}, batch {size}"):
            for row, runner in turns:
                if answer := runner.ask(row, "measure", **work):
                    for metric in ("ttft_s", "tpot_s", "e2e_s"):
                        getattr(row, metric).append(answer[metric])
                    row.itl_s += answer["itl_s"]
                    row.limit_s = min(row.limit_s, _limit(row, record))
    record.host = replace(record.host, other_work=max(record.host.other_work, other_work.cores()))
    for row, _ in turns:
        if row.status == "ok" and row.backend == "torch_compile":
            row.build_s = max(0.0, row.warmup_e2e_s[0] - row.median("e2e_s"))
    return [row for row, _ in turns]


def _compare(runners: list[Runner], record: Record, prompt: list[int]) -> None:
    """Each row's tokens and logits beside what PyTorch computes in fp32 for the first prompt."""
    runner = next((r for r in runners if r.row.name == "pytorch fp32"), None)
    own = runner or Runner(record.workload, record.threads, "pytorch", "fp32")
    row = replace(own.row)
    expected = own.ask(row, "check", prompts=[prompt], output_len=record.workload.output_len, logits=True)
    if runner is None:
        own.close()
    if expected is None:  # the rows then say that they were not compared
        return
    for runner in runners:
        for size, answer in runner.answers.items():
            row = runner.rows[size]
            row.tokens_equal = _equal_prefix(answer["tokens"], expected["tokens"])
            # Of each phase; all are scores of the same token, which the reference has from prefill.
            errors = [_logit_error(logits, expected["logits"][0]) for logits in answer["logits"]]
            row.logit_error = next(filter(math.isnan, errors), max(errors, default=None))
            if row.logit_error is not None and not math.isfinite(row.logit_error):
                row.status, row.reason, row.logit_error = "failed", "Its logits hold infinity or NaN.", None


def _watch_gpu(runners: list[Runner], record: Record, prompts: list[list[int]]) -> None:
    """What the GPU does in a decode step of each row, by a trace of one more request. It comes last, for a profiler
    that was on may leave something behind. Where it sees nothing, the row stays without."""
    for runner in runners:
        for row in runner.rows.values():
            if row.device == "cuda" and runner.worker:
                work = {"prompts": prompts[: row.batch_size], "output_len": record.workload.output_len}
                attempt = replace(row)  # what goes wrong here takes nothing from what was measured
                if answer := runner.ask(attempt, "gpu_time", **work):
                    row.gpu_busy_s, row.gpu_handover_s = answer["busy_s"], answer["handover_s"]
                elif attempt.reason:
                    say(f"{row.name}, batch {row.batch_size}: {attempt.reason}")


def _device_memory(runners: list[Runner], record: Record) -> None:
    """End one process after the other; what the GPU then has more of was that process's."""
    import torch

    for runner in runners:
        before, _ = torch.cuda.mem_get_info()
        runner.end()
        free = before
        for _ in range(20):  # the driver needs a moment
            time.sleep(0.25)
            now, _ = torch.cuda.mem_get_info()
            if now == free and now > before:
                break
            free = now
        for row in record.rows:
            if row.status == "ok" and (row.backend, row.precision) == (runner.row.backend, runner.row.precision):
                row.device_bytes = max(0, free - before)


# The limit


def bytes_per_step(workload: Workload, precision: str, batch_size: int) -> int:
    """Bytes that one decode step has to read: each weight once, and the keys and values of the sequences.

    weights  parameters x bytes of the precision; an embedding table of its own does not count (one row is read)
    KV       2 x layers x KV heads x head size x tokens x bytes, at the mean length of the sequences: all of the
             prompt and half of the answer
    Norms and int8 scales count as weights; they are below 1 %. With int4, the head is int8, as `aot` keeps it.
    """
    need(workload, Workload, "Give Workload(model='stories'), or a record's: record.workload.")
    if precision not in BYTES:
        raise not_allowed("The precision whose bytes are counted", precision, f"one of {', '.join(BYTES)}")
    config = find_checkpoint(workload.model).config
    weights = config.parameter_count()
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    on_gpu = hardware.resolve_device(workload.device) == "cuda"
    kv = (2 if on_gpu else 4) if precision in ("int8", "int4", "fp8") else int(BYTES[precision])
    length = workload.input_len + workload.output_len // 2
    head = config.vocab_size * config.hidden_size if precision == "int4" else 0
    weight_bytes = int((weights - head) * BYTES[precision]) + head
    return weight_bytes + config.kv_cache_bytes(batch_size, length, kv)


def _limit(row: Row, record: Record) -> float:
    return hardware.least_time(row.bytes_per_step, record.hardware["device"], record.threads)


# What goes in, and what comes out


def make_prompts(workload: Workload, count: int) -> list[list[int]]:
    """`count` different prompts of exactly input_len token ids: beginnings of stories for the bundled model,
    else random ids. The same ones in every run."""
    import random

    if workload.model == "stories":
        from tokenizers import Tokenizer

        from helpers.model.stories.grammar import draw_corpus

        tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
        texts = (story.text for story in draw_corpus(4 * count + 16, "benchmark"))
        encoded = [tokenizer.encode(text).ids[: workload.input_len] for text in texts]
        different = list(dict.fromkeys(tuple(ids) for ids in encoded if len(ids) == workload.input_len))
        if len(different) >= count:
            return [list(ids) for ids in different[:count]]
    vocabulary = find_checkpoint(workload.model).config.vocab_size
    rng = random.Random(0)
    return [[rng.randrange(3, vocabulary) for _ in range(workload.input_len)] for _ in range(count)]


def _equal_prefix(tokens: list[int], reference: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, reference, strict=False)))


def _logit_error(logits: list[float], reference: list[float]) -> float:
    """Largest difference over largest logit; where all are zero, as it is. Both less their mean: some backends give
    logits less a constant."""
    if not all(map(math.isfinite, logits)):
        return math.nan
    means = sum(logits) / len(logits), sum(reference) / len(reference)
    mine, theirs = ([v - mean for v in values] for values, mean in zip((logits, reference), means, strict=True))
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / (max(map(abs, theirs)) or 1.0)


def batch_sizes(text: str) -> list[int]:
    """ "1,4" to [1, 4]."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except (ValueError, AttributeError, TypeError):
        words = f"Batch sizes are numbers with commas between, not {shown(text)}."
        raise InputError(words, fix="Such as 1,4.") from None


def make_runner(workload: Workload, threads: int, contender: str) -> Runner:
    return Runner(workload, threads, *_parse(contender))


def _parse(contender: str) -> tuple[str, str]:
    """ "aot:int8" to backend and precision."""
    backend, _, precision = contender.partition(":")
    return backend, precision or "fp32"


def empty_record(workload: Workload) -> Record:
    """A record of this machine, with its bandwidth measured, and no rows yet."""
    machine = hardware.describe(workload.device)
    checkpoint = find_checkpoint(workload.model)
    threads = workload.threads or hardware.default_threads(checkpoint.config.parameter_count() * 4)
    cpu = hardware.describe("cpu")
    versions = {"python": sys.version.split()[0], **hardware.versions(), "transformers": version("transformers")}
    versions["checkpoint"] = checkpoint.digest()[:12]  # a folder may hold another one tomorrow
    return Record(
        workload,
        [],
        json.loads(json.dumps(asdict(machine))),  # as it will be read back
        Host(cpu.name, cpu.cores, 0.0),
        versions,
        threads,
        hardware.measure_bandwidth(workload.device, threads),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit(),
        _command(),
    )


def _command() -> str:
    """What was typed, if this is `helpers bench`, without the file it writes."""
    words = sys.argv[1:]
    if words[:1] != ["bench"]:
        return ""
    pairs = zip(["", *words], words, strict=False)
    kept = [w for before, w in pairs if "--out" not in (before, w) and not w.startswith("--out=")]
    return shlex.join(["helpers", *kept])


# A contender in a process of its own


class Runner:
    """Starts the worker, asks one thing at a time, and turns whatever goes wrong into a row's reason."""

    module, python = "helpers.bench.process", ""  # what the worker serves, and under which Python

    def __init__(self, workload: Workload, threads: int, backend: str, precision: str):
        self.workload = workload
        # Where the GPU does the work, each backend keeps its own number of CPU threads: vLLM, for one, has its reasons.
        self.threads = threads if hardware.resolve_device(workload.device) == "cpu" else 0
        self.row = Row(backend, precision, batch_size=1)  # what is true at every batch size
        self.rows: dict[int, Row] = {}
        self.answers: dict[int, dict[str, Any]] = {}  # tokens and logits of the first request, by batch size
        self.decode_graphs: list[int] = []
        self.worker: Worker | None = None
        self._folders = contextlib.ExitStack()
        # torch.compile's cache: what earlier runs left would hide its cost.
        place = compilers_folder(temporary_folder())
        self.cache = str(self._folders.enter_context(owned_folder("course-bench-", place)))

    def prepare(self, prompts: list[list[int]], sizes: Sequence[int]) -> None:
        """Build if need be, load in a new process, and answer the first request at each batch size."""
        try:
            self._build()
            self._start()
        except CourseError as error:
            _fail(self.row, error)
            self.end()
        trained = not self.workload.model.startswith("dummy:")
        for size in sizes:
            empty: dict[str, Any] = {name: [] for name in ("ttft_s", "tpot_s", "e2e_s", "itl_s", "warmup_e2e_s")}
            row = self.rows[size] = replace(self.row, batch_size=size, **empty)
            row.decode_graph = min((graph for graph in self.decode_graphs if graph >= size), default=None)
            work = {"prompts": prompts[:size], "output_len": self.workload.output_len}
            if answer := self.ask(row, "check", **work, logits=trained):
                self.answers[size] = answer
                row.warmup_e2e_s.append(answer["seconds"])
                row.peak_host_bytes = answer["host_bytes"]

    def ask(self, row: Row, call: str, **arguments: Any) -> dict[str, Any] | None:
        """The answer, or None once this row has failed."""
        if row.status != "ok":
            return None
        try:
            return (self.worker or self._start()).call(call, time_limit=TIME_LIMIT_S, **arguments)
        except CourseError as error:
            _fail(row, error)
            if isinstance(error, WorkerError):  # that ended the process; the next batch size starts another
                self.end()
            return None

    @property
    def recipe(self) -> BuildRecipe:
        return self.workload.recipe(self.row.backend, self.row.precision, self.threads)

    def _build(self) -> None:
        """In a process that ends with it: what a compiler leaves in memory is not the engine's."""
        if name := backends.ENVIRONMENTS.get(self.row.backend):  # where that is not there, nothing is started
            environments.need_python(name)
        if self.row.backend in COMPILED:
            with Worker(self.module) as builder:
                engine = builder.call("build", time_limit=BUILD_LIMIT_S, recipe=self.recipe.to_dict())
            self.row.build_s, self.row.disk_bytes = engine["seconds"], engine["bytes"]

    def _load_arguments(self) -> dict[str, Any]:
        return {"recipe": self.recipe.to_dict(), "threads": self.threads, "cache": self.cache}

    def _start(self) -> Worker:
        from helpers.backends.aot.backend import SWITCHES  # no engine is compiled with them, so no contender is

        started = time.perf_counter()
        self.worker = Worker(self.module, python=self.python, without=SWITCHES)
        answer = self.worker.call("load", time_limit=TIME_LIMIT_S, **self._load_arguments())
        self.row.start_s = time.perf_counter() - started
        self.decode_graphs = answer.pop("decode_graphs")
        for name, value in answer.items():
            setattr(self.row, name, value)
        return self.worker

    def end(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def close(self) -> None:
        self.end()
        self._folders.close()


def _fail(row: Row, error: CourseError) -> None:
    row.status = "absent" if isinstance(error, BackendUnavailable) else "failed"
    row.reason = error.what
