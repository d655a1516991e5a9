"""What Inductor's scheduler decided, taken down while it compiles: operations in, kernels out."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

import torch

from helpers.backends.aot.early_start import PREFIX
from helpers.backends.aot.stages import FREE, HOOKS, Stage, causes, op_name, take_down
from helpers.backends.report import EngineReport, Kernel, Operation

# Why the scheduler launches no kernel for an operation that is still in its graph
IN_PLACE = "joined in place: its parts are written where it would put them"
IN_READERS = "computed where it is read, inside of other kernels"
LENGTH = "a length or an index: computed between kernels"


class InductorRecorder:
    """Takes down what Inductor's scheduler decided, through the hook that runs right after fusion; and, through the
    hooks before it, what it got."""

    def __init__(self, graph: str, exported: torch.fx.Graph):
        self.graph = graph
        self.exported = take_down(exported)
        self.stages: list[Stage] = []
        self.removed: dict[str, str] = {}  # what took out each operation that no kernel does
        self.operations: list[Operation] = []
        self.kernels: list[Kernel] = []
        self.calls: set[Any] = set()  # what library calls do, and kernels of ours

    def __call__(self, nodes: list[Any]) -> list[Any]:
        from torch._inductor.virtualized import V

        calls = [m for n in nodes for m in n.get_nodes() if _is_extern(m) and m.node is not None]
        ours = {n for n in V.graph.graph.nodes if n.op == "call_function" and _is_ours(n)}
        self.calls = {call.node.get_origin_node() for call in calls} | ours
        self.operations = [o for n in V.graph.graph.nodes if self._is_work(n) for o in self._operations(n)]
        kernels = [self._kernel(node) for node in nodes]
        self.kernels = [k for k in kernels if k.kind != "nothing"]
        self.stages.append(take_down(V.graph.graph))
        self.removed = self._removed({name for k in kernels if k.kind == "nothing" for name in k.fused})
        return nodes

    def options(self) -> dict[str, Any]:
        """Inductor's options that let it see the graph on its way."""
        return {"_post_fusion_custom_pass": self, **dict.fromkeys(HOOKS, self.look)}

    def look(self, graph: torch.fx.Graph) -> None:
        self.stages.append(take_down(graph))

    def _removed(self, placed: set[str]) -> dict[str, str]:
        """placed: operations of pieces that the scheduler has nothing to launch for."""
        done = {name for kernel in self.kernels for name in kernel.fused}
        removed = causes(self.exported, self.stages)
        for operation in self.operations:
            if operation.name not in done:
                late = IN_PLACE if operation.name in placed else IN_READERS if operation.dtype else LENGTH
                removed.setdefault(operation.name, late)
        return {name: by for name, by in removed.items() if name not in done}

    def __deepcopy__(self, memo: dict) -> InductorRecorder:
        return self  # Inductor copies its settings; what the copy saw must arrive here

    def report(self, calls: int = 1, part: str = "") -> EngineReport:
        """What one step does in this library. calls: how often it is called; each call's names get its number.
        part: what they get beside it, where the graph has several libraries."""
        report = EngineReport("aot", [], [])
        for call in range(calls):
            mark = f"{part}@{call + 1}" if calls > 1 else part
            operations = [
                replace(o, name=o.name + mark, inputs=tuple(name + mark for name in o.inputs)) for o in self.operations
            ]
            kernels = [_of_call(kernel, mark) for kernel in self.kernels]
            report.operations.extend(operations)
            report.kernels.extend(kernels)
            report.removed.update({f"{self.graph}/{name}{mark}": by for name, by in self.removed.items()})
        return report

    def _is_work(self, node: Any) -> bool:
        return node.op == "call_function" and _op_name(node) not in FREE

    def _operations(self, node: Any) -> list[Operation]:
        """Nearly always one. A kernel of ours fused them by hand: what it does in one go, by its own account."""
        value = node.meta.get("val")
        shape = tuple(d if isinstance(d, int) else str(d) for d in getattr(value, "shape", ()))
        source, line = source_line(node.meta.get("stack_trace") or "")
        rest: dict[str, Any] = {"dtype": _dtype_name(value), "shape": shape, "source": source, "line": line}
        if not _is_ours(node):
            inputs = tuple(i.name for i in self._inputs(node))
            return [Operation(self.graph, node.name, _op_name(node), inputs=inputs, **rest)]
        from helpers.backends.aot import gpu_kernels

        call = node.name.removeprefix("triton_kernel_wrapper_mutation").strip("_") or "0"  # unique in its graph
        does = gpu_kernels.operations(*_wrapped(node))
        return [Operation(self.graph, f"{op}_{call}.{at}", op, **rest) for at, op in enumerate(does)]

    def _inputs(self, node: Any) -> list[Any]:
        """The work whose results a node reads, by way of whatever only renames or takes them apart."""
        every = [[n] if self._is_work(n) else self._inputs(n) for n in node.all_input_nodes]
        return list(dict.fromkeys(n for several in every for n in several))

    def _kernel(self, scheduled: Any) -> Kernel:
        from torch._inductor.virtualized import V

        members = scheduled.get_nodes()
        extern = any(map(_is_extern, members))
        does = {o for m in members for o in _origins(m) if self._is_work(o) and (extern or o not in self.calls)}
        origins = {n.name: n for n in V.graph.graph.nodes if n in does}  # in the order of the graph
        ours = [node for node in origins.values() if extern and _is_ours(node)]
        if ours:  # Inductor names with it what made its inputs, and that comes before it
            origins = {ours[-1].name: ours[-1]}
        names = [operation.name for node in origins.values() for operation in self._operations(node)]
        ops = sorted({_op_name(o) for o in origins.values()})
        # Taking one result of a call that has several is scheduled like a call, and does nothing either.
        nothing = not names or all(type(m).__name__ == "NopKernelSchedulerNode" for m in members)
        kind = "nothing" if nothing else "ours" if ours else "library" if extern else "generated"
        dtype = next((str(m.node.get_dtype()).removeprefix("torch.") for m in members if _has_dtype(m)), "")
        details = {} if nothing else _traffic(scheduled)
        return Kernel(self.graph, "_".join(["fused", *ops])[:120], kind, tuple(names), dtype, details)


def _of_call(kernel: Kernel, mark: str) -> Kernel:
    """A kernel in one of several calls, each with tensors of its own."""
    outside = {name + mark: size for name, size in kernel.details["outside"].items()}
    fused = tuple(name + mark for name in kernel.fused)
    return replace(kernel, fused=fused, details={**kernel.details, "outside": outside})


def _traffic(scheduled: Any) -> dict[str, Any]:
    """Bytes that a kernel reads and writes, by Inductor's own count (of an open length, as in the exported example);
    and those of them that belong to weights, inputs and outputs of the graph."""
    from torch._inductor.virtualized import V

    moved = dict(scheduled.get_read_write_buffer_accesses(include_reads=True, include_writes=True))
    for name in moved:  # of a table whose rows are looked up, it counts all; what is read are the rows
        reads = [dep for dep in scheduled.read_writes.reads if dep.name == name]
        if reads and all(getattr(dep, "size", ()) and dep.is_indirect() for dep in reads):
            entries = sum(math.prod(dep.size) for dep in reads)
            if getattr(entries, "is_number", True):
                moved[name] = min(moved[name], int(entries) * V.graph.get_dtype(name).itemsize)
    known = {*V.graph.graph_inputs, *V.graph.constants, *V.graph.get_output_names()}
    renamed = getattr(scheduled.scheduler, "mutation_real_name", {})  # an input that is written to has another name
    outside = {name: int(size) for name, size in moved.items() if renamed.get(name, name) in known}
    return {"bytes": int(sum(moved.values())), "outside": outside}


def _origins(member: Any) -> Iterable[Any]:
    """The operations that a scheduled piece of work does. A library call does one; Inductor also names those that
    made its inputs, and they run elsewhere."""
    if member.node is None:
        return ()
    own = member.node.get_origin_node() if _is_extern(member) else None
    return [own] if own is not None else member.node.get_origins()


def _is_extern(member: Any) -> bool:
    return type(member).__name__ == "ExternKernelSchedulerNode"


def _has_dtype(member: Any) -> bool:
    return member.node is not None and hasattr(getattr(member.node, "layout", None), "dtype")


def _is_ours(node: Any) -> bool:
    return "kernel_idx" in node.kwargs  # the call of a kernel written in Triton


def _wrapped(node: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the Triton function that such a node calls."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    while not isinstance(kernel, FunctionType):  # the function is wrapped once or twice
        kernel = kernel.fn
    others = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])  # what a graph cannot hold
    return kernel.__name__.removeprefix(PREFIX), {**node.kwargs["kwargs"], **others}


def _op_name(node: Any) -> str:
    return _wrapped(node)[0] if _is_ours(node) else op_name(node)


def _dtype_name(value: Any) -> str:
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


def source_line(stack_trace: str) -> tuple[str, str]:
    """The innermost line that is not torch's own, as "llama.py:88", and its text; torch's where there is no other."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', stack_trace)
    own = [frame for frame in frames if not frame[0].startswith(str(Path(torch.__file__).parent))] or frames
    if not own:
        return "", ""
    path, number, text = own[-1]
    cell = "ipykernel_" in path or path.startswith("<ipython")
    return f"{'cell' if cell else Path(path).name}:{number}", text.strip()


@contextlib.contextmanager
def whole_stack_traces() -> Iterator[None]:
    """Of where an operation comes from, torch.export keeps the lines of forward(). Meanwhile, of what it calls too."""
    tracer = torch.fx.proxy.TracerBase
    shorten = getattr(tracer, "_filter_traceback_frames", None)

    def keep(self: Any, frames: Any) -> Any:
        self._record_forward_stack_traces_only = False
        return shorten(self, frames)  # type: ignore[misc]

    with mock.patch.object(tracer, "_filter_traceback_frames", keep) if shorten else contextlib.nullcontext():
        yield


TIMED = {"cpp.enable_kernel_profile": True}  # Inductor's option that makes torch.profiler see each function


@contextlib.contextmanager
def kernels_apart() -> Iterator[None]:
    """What is compiled meanwhile has a function for each kernel. As a rule, one function on a CPU holds many loops, and
    no profiler could tell them apart."""
    from torch._inductor.codegen.cpp import CppScheduling

    with mock.patch.object(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM", 0):
        yield
