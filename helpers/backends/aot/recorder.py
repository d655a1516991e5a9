"""What Inductor's scheduler decided, taken down while it compiles: operations in, kernels out."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from helpers.backends.aot.early_start import PREFIX
from helpers.backends.report import EngineReport, Kernel, Operation


class InductorRecorder:
    """Takes down what Inductor's scheduler decided, through the hook that runs right after fusion."""

    # Not work: they only rename, index or take apart what another operation made.
    FREE = frozenset(
        "view reshape _unsafe_view permute transpose t slice select unsqueeze squeeze expand alias as_strided split "
        "split_with_sizes getitem detach sym_size sym_numel sym_stride full_like empty".split()
    )

    def __init__(self, graph: str):
        self.graph = graph
        self.operations: list[Operation] = []
        self.kernels: list[Kernel] = []

    def __call__(self, nodes: list[Any]) -> list[Any]:
        from torch._inductor.virtualized import V

        self.operations = [o for n in V.graph.graph.nodes if self._is_work(n) for o in self._operations(n)]
        self.kernels = [k for k in map(self._kernel, nodes) if k.kind != "nothing"]
        return nodes

    def __deepcopy__(self, memo: dict) -> InductorRecorder:
        return self  # Inductor copies its settings; what the copy saw must arrive here

    def report(self, calls: int = 1, part: str = "") -> EngineReport:
        """What one step does in this library. calls: how often it is called; each call's names get its number.
        part: what they get beside it, where the graph has several libraries."""
        report = EngineReport("aot", [], [])
        for call in range(calls):
            mark = f"{part}@{call + 1}" if calls > 1 else part
            operations = [replace(o, name=o.name + mark) for o in self.operations]
            kernels = [replace(k, fused=tuple(name + mark for name in k.fused)) for k in self.kernels]
            used = {name for kernel in kernels for name in kernel.fused}
            report.operations.extend(operations)
            report.kernels.extend(kernels)
            report.removed.extend(f"{self.graph}/{o.name}" for o in operations if o.name not in used)
        return report

    def _is_work(self, node: Any) -> bool:
        return node.op == "call_function" and _op_name(node) not in self.FREE

    def _operations(self, node: Any) -> list[Operation]:
        """Nearly always one. A kernel of ours fused them by hand: what it does in one go, by its own account."""
        value = node.meta.get("val")
        shape = tuple(d if isinstance(d, int) else str(d) for d in getattr(value, "shape", ()))
        rest = (_dtype_name(value), shape, _source_line(node))
        if not _is_ours(node):
            return [Operation(self.graph, node.name, _op_name(node), *rest)]
        from helpers.backends.aot import gpu_kernels

        call = node.name.removeprefix("triton_kernel_wrapper_mutation").strip("_") or "0"  # unique in its graph
        does = gpu_kernels.operations(*_wrapped(node))
        return [Operation(self.graph, f"{op}_{call}.{at}", op, *rest) for at, op in enumerate(does)]

    def _kernel(self, scheduled: Any) -> Kernel:
        members = scheduled.get_nodes()
        origins = {o.name: o for m in members for o in _origins(m) if self._is_work(o)}
        names = [operation.name for name in sorted(origins) for operation in self._operations(origins[name])]
        ops = sorted({_op_name(o) for o in origins.values()})
        extern = any(type(m).__name__ == "ExternKernelSchedulerNode" for m in members)
        # Taking one result of a call that has several is scheduled like a call, and does nothing either.
        nothing = not names or all(type(m).__name__ == "NopKernelSchedulerNode" for m in members)
        ours = any(map(_is_ours, origins.values()))
        kind = "nothing" if nothing else "ours" if ours else "library" if extern else "generated"
        dtype = next((str(m.node.get_dtype()).removeprefix("torch.") for m in members if _has_dtype(m)), "")
        return Kernel(self.graph, "_".join(["fused", *ops])[:120], kind, tuple(names), dtype)


def _origins(member: Any) -> Iterable[Any]:
    """The operations that a scheduled piece of work does. A library call does one; Inductor also names those that
    made its inputs, and they run elsewhere."""
    if member.node is None:
        return ()
    own = member.node.get_origin_node() if type(member).__name__ == "ExternKernelSchedulerNode" else None
    return [own] if own is not None else member.node.get_origins()


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
    if _is_ours(node):
        return _wrapped(node)[0]
    target = node.target
    packet = getattr(target, "_overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def _dtype_name(value: Any) -> str:
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


def _source_line(node: Any) -> str:
    """The innermost line of the traced module's own file, as "llama.py:88"."""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")
    ]
    if not lines:
        return ""
    path, number = lines[-1].split('"')[1], lines[-1].split("line ")[1].split(",")[0]
    return f"{Path(path).name}:{number}"


def report_on_module(module: Any, inputs: tuple, name: str = "module") -> EngineReport:
    """What AOTInductor makes of any module: the report alone, without an engine in the store."""
    from torch._inductor.utils import fresh_cache

    recorder = InductorRecorder(name)
    with torch.no_grad(), fresh_cache(), tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(module, inputs)
        options = {"_post_fusion_custom_pass": recorder, "cpp.threads": 1}
        options["aot_inductor.package_cpp_only"] = True  # written, not compiled: the report needs no more
        package = str(Path(temporary) / "module.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    return recorder.report()
