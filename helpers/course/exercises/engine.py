"""Notebook 01: what is an engine?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, expect, judge, same_as
from helpers.course.values import choices, number, plain, whole
from helpers.errors import shown

if TYPE_CHECKING:
    from helpers.backends.report import EngineReport


@judge("01.1")
def refused(answer: Any) -> None:
    letters = choices(answer, ("A", "B", "C"))
    expect("A" not in letters, "A was built here, and by the versions that are here. Other limits are no reason.")
    expect("B" in letters, "B calls inner functions of another PyTorch.")
    expect("C" in letters, "C may use instructions that this processor does not have.")


@judge("01.2")
def joined(answer: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(1)
    for rows in ((4, 2, 2), (6, 3, 3)):
        right = torch.randn(sum(rows), 5, generator=generator)
        result = call(answer, *right.split(rows))
        apart = isinstance(result, (list, tuple)) and len(result) == len(rows)
        expect(not apart, "It returns three things. The engine keeps one tensor.")
        result = torch.as_tensor(plain(result))
        shape = tuple(result.shape)
        expect(shape == (sum(rows), 5), f"Of rows {rows} with 5 columns it makes {shape}, not {(sum(rows), 5)}.")
        expect(bool(torch.equal(result, right)), "The shape is right, and numbers stand in other places.")


@judge("01.3")
def library_kernels(answer: Any, report: EngineReport) -> None:
    def right(report: EngineReport, graph: str) -> int:
        return sum(kernel.kind == "library" for kernel in report.of(graph).kernels)

    same_as(answer, right, [(report, graph) for graph in report.graphs()], whole)


@judge("01.4")
def largest_kernel(answer: Any, report: EngineReport) -> None:
    def right(report: EngineReport, graph: str) -> int:
        return max(len(kernel.fused) for kernel in report.of(graph).kernels)

    same_as(answer, right, [(report, graph) for graph in report.graphs()], whole)


@judge("01.5")
def weight_share(answer: Any, report: EngineReport) -> None:
    for sizes in (report.sizes, {"a.safetensors": 3, "b.pt2": 1}, {"a.safetensors.txt": 4, "b.safetensors": 1}):
        right = sum(size for name, size in sizes.items() if name.endswith(".safetensors")) / sum(sizes.values())
        share = number(call(answer, sizes))
        expect(abs(share - 100 * right) > 1e-6 or right == 0, "That is percent: a share lies between 0 and 1.")
        expect(abs(share - right) < 0.005, f"For {shown(sizes)} it gives {share:.3f}. Right is {right:.3f}.")
