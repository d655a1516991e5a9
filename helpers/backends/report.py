"""What is inside an engine: the operations that went in, the kernels that came out, and the bytes they read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from helpers.display import Table
from helpers.errors import EngineCorrupt, InputError, need

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
    inputs: tuple[str, ...] = ()  # names of the operations whose results it reads
    line: str = ""  # the text of that line, where known


@dataclass(frozen=True)
class Kernel:
    """One piece of compiled work after fusion. `fused` are names of the operations that it does in one go.

    details, where known: "bytes" that it reads and writes; "outside", those of them that belong to weights, inputs and
    outputs of the graph, by tensor; "seconds", a list, one for each measured step; "code".
    """

    graph: str
    name: str
    kind: str  # "generated" by the compiler, "library" call, "ours" (gpu_kernels.py), or TensorRT's layer type
    fused: tuple[str, ...]
    dtype: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def must(self) -> int:
        """Bytes that it has to move however it is fused: of what comes from outside of the graph, or leaves it."""
        return sum(self.details["outside"].values())


@dataclass(frozen=True)
class EngineReport:
    """Both sides of a build. Every operation is in at least one kernel, or listed in `removed`, which also has what
    was taken out before fusion."""

    backend: str
    operations: list[Operation]
    kernels: list[Kernel]
    removed: dict[str, str] = field(default_factory=dict)  # "graph/name" of what has no kernel: what took it out
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of each file of the engine

    def graphs(self) -> list[str]:
        return list(dict.fromkeys(operation.graph for operation in self.operations))

    def of(self, graph: str) -> EngineReport:
        """The part of the report that is about one graph, such as "decode_b1"."""
        if graph not in self.graphs():
            have = ", ".join(self.graphs()) or "none"
            raise InputError(f"The report has no graph {graph!r:.80}.", fix=f"There are: {have}.")
        return replace(
            self,
            operations=[o for o in self.operations if o.graph == graph],
            kernels=[k for k in self.kernels if k.graph == graph],
            removed={name: by for name, by in self.removed.items() if name.startswith(f"{graph}/")},
        )

    def largest(self, count: int = 5) -> list[Kernel]:
        """The kernels that do the most operations."""
        return sorted(self.kernels, key=lambda k: -len(k.fused))[:count]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EngineReport:
        operations = [
            Operation(**{**o, "shape": tuple(o["shape"]), "inputs": tuple(o.get("inputs", ()))})
            for o in fields["operations"]
        ]
        kernels = [Kernel(**{**k, "fused": tuple(k["fused"])}) for k in fields["kernels"]]
        removed = fields["removed"]
        if isinstance(removed, list):  # of an engine that was built when reports did not say it
            removed = dict.fromkeys(removed, "not recorded: build the engine again")
        return cls(**{**fields, "operations": operations, "kernels": kernels, "removed": removed})

    def __str__(self) -> str:
        rows = []
        for part in map(self.of, self.graphs()):
            largest = [f"{len(k.fused)} operations in one {k.kind} kernel" for k in part.largest(1)]
            rows.append((part.operations[0].graph, len(part.operations), len(part.kernels), *(largest or [""])))
        kernels = Table("", ("graph", "operations", "kernels", "largest kernel"), rows)
        return f"{kernels}\n\n{self.without_kernel()}" if self.removed else str(kernels)

    def without_kernel(self) -> Table:
        """The operations that have no kernel, by what took them out."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, by in self.removed.items():
            graph, _, operation = name.partition("/")
            groups.setdefault((graph, by), []).append(operation)
        rows = [(graph, len(names), by, ", ".join(names[:3])) for (graph, by), names in groups.items()]
        return Table("Operations without a kernel", ("graph", "operations", "because", "such as"), rows)


def read_report(folder: Path, sizes: dict[str, int] | None = None) -> EngineReport:
    """The report that a build wrote. sizes: bytes of each file of the engine, for the report's `sizes`."""
    try:
        fields = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        return EngineReport.from_dict({**fields, "sizes": sizes or fields["sizes"]})
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineCorrupt(
            f"The report of engine {folder.name!r} cannot be read: {error}.",
            cause="The file was changed or cut after the build.",
            fix="Build it again: build(recipe, force=True).",
        ) from error


def write_report(report: EngineReport, folder: Path) -> None:
    (folder / REPORT_FILE).write_text(json.dumps(report.to_dict()), encoding="utf-8")


def need_report(*given: Any) -> None:
    """InputError for another thing than a report, such as the engine or its folder."""
    for report in given:
        need(report, EngineReport, "Give a report: inspect(engine).")


def need_reports(given: Any) -> None:
    """The same of several, each by its name."""
    need(given, Mapping, "Give each report with a name: {'fp32': inspect(engine)}.")
    need_report(*given.values())
