"""What is inside an engine: the operations that went in, the kernels that came out, and the bytes they read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

from .errors import EngineCorrupt

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Operation:
    """One operation of the graph before fusion. `name` is unique in its graph; `op` is the kind, such as "mul"."""

    graph: str
    name: str
    op: str
    dtype: str
    shape: tuple[int | str, ...] = ()  # a string where the length is known only at run time
    source: str = ""  # the module's line it came from, where known
    node: str = ""  # the ONNX node it came from, where there is one


@dataclass(frozen=True)
class Kernel:
    """One piece of compiled work after fusion. `fused` are names of the operations that it does in one go."""

    graph: str
    name: str
    kind: str  # "generated" by the compiler, "library" call, "ours" (gpu_kernels.py), or TensorRT's layer type
    fused: tuple[str, ...]
    dtype: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineReport:
    """Both sides of a build. Every operation is in at least one kernel, or listed in `removed`."""

    backend: str
    operations: list[Operation]
    kernels: list[Kernel]
    removed: list[str] = field(default_factory=list)  # "graph/name" of what the compiler found unnecessary
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of each file of the engine

    def graphs(self) -> list[str]:
        return list(dict.fromkeys(operation.graph for operation in self.operations))

    def of(self, graph: str) -> EngineReport:
        """The part of the report that is about one graph, such as "decode_b1"."""
        return EngineReport(
            self.backend,
            [o for o in self.operations if o.graph == graph],
            [k for k in self.kernels if k.graph == graph],
            [r for r in self.removed if r.startswith(f"{graph}/")],
            self.sizes,
        )

    def operation_counts(self) -> Counter[str]:
        return Counter(operation.op for operation in self.operations)

    def largest(self, count: int = 5) -> list[Kernel]:
        """The kernels that do the most operations."""
        return sorted(self.kernels, key=lambda k: -len(k.fused))[:count]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EngineReport:
        operations = [Operation(**{**o, "shape": tuple(o["shape"])}) for o in fields["operations"]]
        kernels = [Kernel(**{**k, "fused": tuple(k["fused"])}) for k in fields["kernels"]]
        return cls(**{**fields, "operations": operations, "kernels": kernels})

    def __str__(self) -> str:
        rows = [f"{'graph':<12} {'operations':>10} {'kernels':>8}   largest kernel"]
        for graph in self.graphs():
            part = self.of(graph)
            big = part.largest(1)
            words = f"{len(big[0].fused)} operations in one {big[0].kind} kernel" if big else ""
            rows.append(f"{graph:<12} {len(part.operations):>10} {len(part.kernels):>8}   {words}")
        return "\n".join(rows)


def read_report(folder: Path) -> EngineReport:
    try:
        return EngineReport.from_dict(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineCorrupt(
            f"The report of engine {folder.name!r} cannot be read: {error}.",
            cause="The file was changed or cut after the build.",
            fix=f"Remove the engine and build it again: python -m helpers remove {folder.name}",
        ) from error


def write_report(report: EngineReport, folder: Path) -> None:
    (folder / REPORT_FILE).write_text(json.dumps(report.to_dict()), encoding="utf-8")


def inspect(engine: Path | str | Any) -> EngineReport:
    """What is inside a built engine: give its folder, its name or its recipe.

    Reads the report that the build wrote; the engine's native code is not loaded.
    """
    from . import store

    folder = store.locate(engine)
    manifest = store.verify(folder, only=(REPORT_FILE,))
    report = read_report(folder)
    return EngineReport(
        report.backend,
        report.operations,
        report.kernels,
        report.removed,
        {name: entry["bytes"] for name, entry in manifest["files"].items()},
    )


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

    def removed(self) -> list[str]:
        used = {name for kernel in self.kernels for name in kernel.fused}
        return [f"{self.graph}/{o.name}" for o in self.operations if o.name not in used]

    def _is_work(self, node: Any) -> bool:
        return node.op == "call_function" and _op_name(node) not in self.FREE

    def _operations(self, node: Any) -> list[Operation]:
        """Nearly always one. A kernel of ours fused them by hand: what it does in one go, by its own account."""
        value = node.meta.get("val")
        shape = tuple(d if isinstance(d, int) else str(d) for d in getattr(value, "shape", ()))
        rest = (_dtype_name(value), shape, _source_line(node))
        if not _is_ours(node):
            return [Operation(self.graph, node.name, _op_name(node), *rest)]
        from . import gpu_kernels

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
    return kernel.__name__.lstrip("_"), {**node.kwargs["kwargs"], **others}


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
