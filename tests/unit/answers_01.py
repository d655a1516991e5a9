"""Answers to the exercises of notebook 01: right ones of every kind, and the mistakes that learners make."""

import numpy as np
import torch

from helpers.backends.report import EngineReport, Kernel, Operation

OPS = {graph: [Operation(graph, f"o{at}", "mul", "float32") for at in range(6)] for graph in ("prefill", "decode_b1")}


def kernel(graph, kind, first, end, moved=0, must=0):
    fused = tuple(operation.name for operation in OPS[graph][first:end])
    return Kernel(graph, "k", kind, fused, "float32", {"bytes": moved, "outside": {"w": must}})


REPORT = EngineReport(
    "aot",
    [*OPS["prefill"], *OPS["decode_b1"]],
    [
        kernel("prefill", "library", 0, 1),
        kernel("prefill", "library", 1, 2),
        kernel("prefill", "generated", 2, 6),
        kernel("decode_b1", "generated", 0, 5),
        kernel("decode_b1", "generated", 5, 6),
    ],
    sizes={"weights.safetensors": 900, "decode_b1.pt2": 100},
)


def names(engine):
    """What the notebook holds where its exercises begin."""
    return {"report": REPORT, "torch": torch}


def share(sizes):
    return sum(size for name, size in sizes.items() if name.endswith(".safetensors")) / sum(sizes.values())


RIGHT = {
    "01.1": [{"B", "C"}, ["C", "B"], ("B", "C"), {"b", "c"}, "B & C", ["B, C"]],
    "01.2": [
        lambda q, k, v: torch.cat([q, k, v]),
        lambda q, k, v: torch.vstack((q, k, v)),
        lambda q, k, v: np.concatenate([q.numpy(), k.numpy(), v.numpy()]),
        lambda q, k, v: [*q, *k, *v],
    ],
    "01.3": [
        lambda report, graph: sum(k.kind == "library" for k in report.of(graph).kernels),
        lambda report, graph: len([k for k in report.kernels if k.graph == graph and k.kind == "library"]),
    ],
    "01.4": [
        lambda report, graph: len(report.of(graph).largest(1)[0].fused),
        lambda report, graph: np.max([len(k.fused) for k in report.of(graph).kernels]),
    ],
    "01.5": [share, lambda sizes: np.float32(share(sizes)), lambda sizes: round(share(sizes), 3)],
}
WRONG = {
    "01.1": [{"A", "B", "C"}, {"B"}, "A", {"D"}, {"A"}, []],
    "01.2": [
        lambda q, k, v: torch.cat([q, v, k]),
        lambda q, k, v: torch.cat([q, k]),
        lambda q, k, v: (q, k, v),
        lambda q, k, v: torch.cat([q.T, k.T, v.T], 1),
        lambda q, k, v: q,
        lambda q, k, v: torch.cat([q, k, v]) + 1e-3,
        lambda q, k, v: None,
    ],
    "01.3": [
        lambda report, graph: len(report.of(graph).kernels),
        lambda report, graph: sum(k.kind == "library" for k in report.kernels),
        lambda report, graph: sum(k.kind == "generated" for k in report.of(graph).kernels),
        lambda report, graph: None,
        2,
    ],
    "01.4": [
        lambda report, graph: len(report.of(graph).operations),
        lambda report, graph: len(report.of(graph).kernels),
        lambda report, graph: min(len(k.fused) for k in report.of(graph).kernels),
        lambda report, graph: None,
    ],
    "01.5": [
        lambda sizes: 100 * share(sizes),
        lambda sizes: 1 - share(sizes),
        lambda sizes: sizes["weights.safetensors"] / sum(sizes.values()),
        lambda sizes: sum(size for name, size in sizes.items() if ".safetensors" in name) / sum(sizes.values()),
        lambda sizes: 0.9,
        lambda sizes: None,
    ],
}
