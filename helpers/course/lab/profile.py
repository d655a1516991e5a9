"""How long each kernel takes, from torch.profiler: of an engine, of a compiled module, and of eager PyTorch as the
"before".

    report = profile(engine, inspect(folder).of("decode_b1"))    # on a CPU, of an `aot` engine built to be timed:
                                                                 # options={"time_kernels": True}
    before = profile(load(recipe.replace(backend="pytorch")))    # the same report: each operation is a kernel
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from helpers.backends.aot.early_start import PREFIX
from helpers.backends.aot.engine import AotEngine
from helpers.backends.aot.graphs import prefill_width, sequences
from helpers.backends.aot.stages import FREE as NO_WORK
from helpers.backends.base import Engine, need_engine
from helpers.backends.report import EngineReport, Kernel, Operation, need_report
from helpers.display import Table
from helpers.errors import BackendUnavailable, InputError

ROUNDS = 9
GENERATED = re.compile(r"(graph_\d+_)?cpp_fused|triton_")
COMPILED = re.compile(f"{GENERATED.pattern}|aoti_torch_")  # what compiled code launches
ATEN = re.compile(f"{GENERATED.pattern}|aten::")  # in a compiled module, the library is called by ATen
FIRST = re.compile(r"Mem(cpy|set) |void scal_kernel")  # launched by the product after it, to fill its output
SECOND = re.compile(r".*(splitK_?reduce|reduce_1Block)", re.IGNORECASE)  # by the one before it, to add up its parts
PROFILERS_OWN = "Activity Buffer Request"  # an event that repeats the kernels of the call that it happens in
WRITTEN = re.compile(f"triton_|{PREFIX}")  # on a GPU: a kernel that the compiler wrote, or one of ours
BOOKKEEPING = "lift_fresh empty_strided to resolve_conj resolve_neg detach_ is_nonzero".split()  # nothing is computed
FREE = {f"aten::{name}" for name in (*NO_WORK, *BOOKKEEPING)}


def launches(step: Callable[[], Any], pattern: re.Pattern[str], rounds: int = ROUNDS) -> list[list[tuple[str, float]]]:
    """Name and seconds of each kernel that a step launches, in order, once for each round.

    On a CPU these are the outermost events whose name fits. On a GPU, what ran there.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's own messages stand among a cell's outputs
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    for _ in range(2):
        step()
    every = []
    for _ in range(rounds):
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            step()
            if cuda:
                torch.cuda.synchronize()
        events = sorted(profiler.events() or (), key=lambda event: event.time_range.start)
        calls = [e for e in events if _caller(e, pattern) is e and e.name not in FREE]
        every.append(gpu_launches(events, pattern) or [(e.name, e.cpu_time * 1e-6) for e in calls])
    return every


def _caller(event: Any, pattern: re.Pattern[str]) -> Any:
    """The outermost event whose name fits, of an event and those that it happened in. None if there is none."""
    caller = None
    while event is not None:
        caller = event if pattern.match(event.name) else caller
        event = event.cpu_parent
    return caller


def gpu_launches(events: list[Any], pattern: re.Pattern[str]) -> list[tuple[str, float]]:
    """What ran on a GPU, in order. A library may launch several kernels in one call: together they are one here. What
    was launched by a call whose name does not fit is left out. Of calls from compiled code the profiler knows nothing;
    there, a kernel that begins or ends another's work goes with it."""
    gpu = torch.autograd.DeviceType.CUDA
    launched = [  # by a library, in order: each kernel's name and the call
        (kernel.name, _caller(event, pattern))
        for event in events
        if event.device_type != gpu and event.name != PROFILERS_OWN
        for kernel in event.kernels
        if not WRITTEN.match(kernel.name)
    ]
    ran: list[tuple[str, float]] = []
    last, begun = None, 0.0
    for event in events:
        if event.device_type != gpu or event.is_user_annotation:
            continue
        at = next((at for at, (name, _) in enumerate(launched) if name == event.name), None)
        caller = event if at is None else launched[at][1]
        launched = launched if at is None else launched[at + 1 :]
        if caller is None or caller.name in FREE:
            continue
        took = event.time_range.elapsed_us() * 1e-6
        if caller is event and FIRST.match(event.name):
            begun += took
        elif caller is last or (caller is event and ran and SECOND.match(event.name)):
            ran[-1] = ran[-1][0], ran[-1][1] + took
        else:
            ran.append((caller.name, begun + took))
            last, begun = caller, 0.0
    return ran


def profile(engine: Engine, report: EngineReport | None = None, prompt: str = "Once upon a time") -> EngineReport:
    """The report of one graph with the measured seconds of each kernel; without a report, what eager PyTorch launches
    in a decode step."""
    need_engine(engine)
    if report is not None:
        need_report(report)
        if len(report.graphs()) != 1:
            have = ", ".join(report.graphs()) or "none"
            raise InputError(
                f"A step runs one graph; the report is of {have}.", fix="Give one: report.of('decode_b1')."
            )
    ids, graph = engine.tokenize(prompt), report.graphs()[0] if report else ""
    size = sequences(graph) if graph else 1
    read, write = partial(engine.prefill, [ids] * size), partial(engine.decode, [14] * size)
    step = read if graph.startswith("prefill") else write
    with engine.alone():
        read()
        if report is None:
            return _eager(launches(step, ATEN))
        if isinstance(engine, AotEngine) and engine.device == "cuda":  # there, some calls are known by ATen
            return with_seconds(report, launches(_graph_alone(engine, graph, ids), ATEN))
        return with_seconds(report, launches(step, COMPILED))


def _graph_alone(engine: AotEngine, graph: str, ids: list[int]) -> Callable[[], Any]:
    """A GPU's graph as it is called before the engine records it: once it is, all its kernels are one launch."""
    size = sequences(graph)
    filled = ids + ids[-1:] * (prefill_width(engine.recipe, "cuda", len(ids)) - len(ids))
    ends, cache = torch.full((size,), len(ids), device="cuda"), [c[:size] for c in engine.cache]
    if graph.startswith("prefill"):
        inputs = [torch.tensor([filled] * size, device="cuda"), ends]
    else:
        inputs = [torch.full_like(ends, 14), ends, engine.span]
    return lambda: engine.graphs[graph].run(*inputs, cache)


def with_seconds(report: EngineReport, every: list[list[tuple[str, float]]]) -> EngineReport:
    """Launches of one kind happen in the order of the report's kernels; BackendUnavailable unless there are equally
    many."""
    apart = report.backend == "aot" and report.kernels and report.kernels[0].name == "embedding"
    kernels = report.kernels[1:] if apart else report.kernels  # torch looks the embedding up, before the graph
    columns = list(zip(*_usual(every), strict=True))
    by_kind: dict[str, list[Any]] = {"generated": [], "ours": [], "library": []}
    for column in columns:
        by_kind[_kind(column[0][0])].append(column)
    if any(len(launched) != sum(k.kind == kind for k in kernels) for kind, launched in by_kind.items()):
        raise BackendUnavailable(
            f"The profiler saw {len(columns)} launches in a step, and the report lists {len(kernels)} kernels.",
            cause="On a CPU an engine's kernels can only be told apart if it was built for it. On a GPU a library may "
            "launch several in one call.",
            fix='On a CPU, build it with options={"time_kernels": True}.',
        )
    timed = []
    for kernel in kernels:
        column = by_kind[kernel.kind].pop(0)
        seconds = [took for _, took in column]
        timed.append(replace(kernel, details={**kernel.details, "seconds": seconds, "launch": column[0][0]}))
    return replace(report, kernels=timed)


def _usual(every: list[list[tuple[str, float]]]) -> list[list[tuple[str, float]]]:
    """The rounds in which the same was launched as in most. None if most differ."""
    counts = Counter(tuple(name for name, _ in launched) for launched in every)
    names, often = counts.most_common(1)[0]
    return [r for r in every if tuple(name for name, _ in r) == names] if often > len(every) / 2 else []


def _kind(launch: str) -> str:
    if launch.startswith(PREFIX):
        return "ours"
    return "generated" if GENERATED.match(launch) else "library"


def _eager(every: list[list[tuple[str, float]]]) -> EngineReport:
    """Each operation that Python calls is a kernel of its own."""
    every = _usual(every)
    if not every:
        raise BackendUnavailable("Eager PyTorch did not launch the same operations in each step.", fix="Run it again.")
    ops = [name.removeprefix("aten::") for name, _ in every[0]]
    operations = [Operation("decode", f"{op}_{at}", op, "") for at, op in enumerate(ops)]
    kernels = [Kernel("decode", o.op, "library", (o.name,), "") for o in operations]
    return with_seconds(EngineReport("pytorch", operations, kernels), every)


PRODUCTS = {"mm", "addmm", "bmm", "linear", "matmul", "matrix_multiply", "fc"}
ATTENTION = {"exp", "amax", "softmax", "_softmax", "index_put", "index_put_", "cat", "index_copy_"}
NORM = {"rsqrt", "pow", "mean", "var_mean", "native_layer_norm", "layer_norm", "normalization"}


def work_of(kernel: Kernel, ops: dict[str, str]) -> str:
    """What a kernel is for, by the operations in it. ops: each operation's kind by its name."""
    kinds = {ops.get(name, name).lower() for name in kernel.fused}
    if kinds & ATTENTION and "silu" not in kinds and "neg" not in kinds or any("attention" in kind for kind in kinds):
        return "attention"
    if kinds & PRODUCTS or ("sum" in kinds and "mul" in kinds and "where" not in kinds):
        return "products"
    if "where" in kinds:
        return "attention"
    return "norms" if kinds & NORM else "the rest"


def by_work(report: EngineReport) -> dict[str, float]:
    """Seconds of a step by what they are for."""
    need_times(report)
    ops = {operation.name: operation.op for operation in report.operations}
    totals = dict.fromkeys(("products", "attention", "norms", "the rest"), 0.0)
    for kernel in report.kernels:
        totals[work_of(kernel, ops)] += seconds(kernel)
    return totals


def need_times(report: EngineReport) -> None:
    """InputError for a report without times, of which nothing but zeros could be shown."""
    need_report(report)
    if not any("seconds" in kernel.details for kernel in report.kernels):
        raise InputError(
            "No kernel of this report has a time.",
            cause="A report of a build says what was compiled. How long that takes is measured apart.",
            fix='Measure it: profile(engine, report.of("decode_b1")).',
        )


def seconds(kernel: Kernel) -> float:
    """The median of what was measured; 0 where nothing was."""
    return median(kernel.details.get("seconds", [0.0]))


def costs(report: EngineReport) -> Table:
    """What the kernels of a step cost, the dearest first; those that do the same share a row. A cell is empty where
    nothing was measured, or where the bytes depend on a length that is known only at run time."""
    need_report(report)
    ops = {operation.name: operation.op.strip("_") for operation in report.operations}
    alike: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in report.kernels:
        does = " ".join(sorted({ops.get(name, name) for name in kernel.fused}))
        alike.setdefault((does, kernel.kind), []).append(kernel)
    step, rows = sum(map(seconds, report.kernels)), []
    for names, kernels in sorted(alike.items(), key=lambda item: -sum(map(seconds, item[1]))):
        share = f"{sum(map(seconds, kernels)) / step:.1%}" if step else ""
        known = all("bytes" in kernel.details for kernel in kernels)
        size = [f"{count:,}" for count in moved(replace(report, kernels=kernels))] if known else ["", ""]
        rows.append((*names, len(kernels), share, *size))
    columns = ("operations", "made by", "launches", "of the time", "bytes moved", "bytes it must")
    return Table(f"{len(report.kernels)} kernels of {' and '.join(report.graphs())}", columns, rows)


def moved(report: EngineReport) -> tuple[int, int]:
    """Bytes that the kernels read and write; and how many they must: each weight, input and output once."""
    need_report(report)
    if not all("bytes" in kernel.details for kernel in report.kernels):
        raise InputError(
            "The bytes that these kernels move are not known.",
            cause="A length that the engine leaves open is known only at run time.",
            fix="Look at an engine whose sizes are fixed, such as one built without a profile.",
        )
    outside: dict[str, int] = {}
    for kernel in report.kernels:
        for name, size in kernel.details["outside"].items():
            outside[name] = max(size, outside.get(name, 0))
    return sum(kernel.details["bytes"] for kernel in report.kernels), sum(outside.values())
