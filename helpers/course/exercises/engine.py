"""Notebook 01: what is an engine?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import choices, number, whole

if TYPE_CHECKING:
    from helpers.backends.report import EngineReport


@exercise(
    "01.1",
    "Which engines are refused?",
    'a set of the letters "A", "B", "C"',
    "Section 6 shows what an engine depends on. Are a recipe's limits in it?",
    "An engine that was built here with the versions of today is loaded, whatever its limits are.",
)
def refused(answer: Any) -> str:
    letters = choices(answer, ("A", "B", "C"))
    expect("A" not in letters, "A was built here, and by the versions that are here. Other limits are no reason.")
    expect("B" in letters, "B calls inner functions of another PyTorch.")
    expect("C" in letters, "C may use instructions that this processor does not have.")
    return "Versions and architecture decide; the recipe does not."


@exercise(
    "01.2",
    "Join three matrices",
    "a function of the three weights that returns one tensor, as the engine keeps it",
    "One product shall give all three results, side by side. Which axis of a weight counts its results?",
    "A weight of PyTorch has a row for each of its results, so the rows of all three go one below the other.",
)
def joined(answer: Any) -> str:
    import torch

    generator = torch.Generator().manual_seed(1)
    for rows in ((4, 2, 2), (6, 3, 3)):
        parts = [torch.randn(n, 5, generator=generator) for n in rows]
        result = torch.as_tensor(call(answer, *[part.clone() for part in parts]))
        right = torch.cat(parts)
        shape = tuple(result.shape)
        expect(
            shape == tuple(right.shape), f"Of rows {rows} with 5 columns it makes {shape}, not {tuple(right.shape)}."
        )
        expect(bool(torch.equal(result, right)), "The shape is right, and numbers stand in other places.")
    return "One product with it gives queries, keys and values at once."


@exercise(
    "01.3",
    "Count the library's kernels",
    "a function of a report and a graph's name that returns how many of its kernels call a library",
    "report.of(graph) is the part of the report that is about one graph.",
    'A kernel that calls a library has the kind "library".',
)
def library_kernels(answer: Any, report: EngineReport) -> str:
    for graph in report.graphs():
        right = sum(kernel.kind == "library" for kernel in report.of(graph).kernels)
        expect(whole(call(answer, report, graph)) == right, f"For {graph!r} it is {right}.")
    return "A prompt has many rows, and libraries multiply those well. A step has one row for each sequence."


@exercise(
    "01.4",
    "The kernel that does most",
    "a function of a report and a graph's name that returns how many operations its largest kernel does",
    "A kernel's `fused` lists its operations.",
    "It is the largest of the lengths.",
)
def largest_kernel(answer: Any, report: EngineReport) -> str:
    for graph in report.graphs():
        right = max(len(kernel.fused) for kernel in report.of(graph).kernels)
        expect(whole(call(answer, report, graph)) == right, f"For {graph!r} it is {right}.")
    return "So many operations, and nothing between them is written to memory."


@exercise(
    "01.5",
    "How much of an engine is weights?",
    "a function of a dict of file sizes that returns which share of all bytes lies in .safetensors files, from 0 to 1",
    "Add up the sizes of those files whose name ends so, and divide by the sum of all.",
    "sizes.items() gives each name with its bytes.",
    points=2,
)
def weight_share(answer: Any, report: EngineReport) -> str:
    for sizes in (report.sizes, {"a.safetensors": 3, "b.pt2": 1}, {"a.safetensors.txt": 4, "b.safetensors": 1}):
        right = sum(size for name, size in sizes.items() if name.endswith(".safetensors")) / sum(sizes.values())
        share = number(call(answer, dict(sizes)))
        expect(abs(share - 100 * right) > 1e-6 or right == 0, "That is percent: a share lies between 0 and 1.")
        expect(abs(share - right) < 0.005, f"For {len(sizes)} files it gives {share:.3f}.")
    return "The code is small beside the numbers that it works on."
