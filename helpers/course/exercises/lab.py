"""Notebook 07: the laboratory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, expect, judge, same_as
from helpers.course.values import number, numbers, plain, whole

if TYPE_CHECKING:
    from helpers.backends.report import EngineReport


@judge("07.1")
def generated_kernels(answer: Any, fused: EngineReport, apart: EngineReport) -> None:
    def right(report: EngineReport) -> int:
        return sum(kernel.kind == "generated" for kernel in report.kernels)

    same_as(answer, right, [(fused,), (apart,)], whole)


@judge("07.2")
def most_for_nothing(answer: Any, apart: EngineReport, fused: EngineReport) -> None:
    # The notebook's largest kernels could also save most; in the third report the largest moves nothing for nothing.
    largest = max(fused.kernels, key=lambda kernel: kernel.details["bytes"])
    size = 4 * largest.details["bytes"]
    needed = replace(largest, details={**largest.details, "bytes": size, "outside": {"weight": size}})
    for report in (apart, fused, replace(fused, kernels=[needed, *fused.kernels])):
        spare = [kernel.details["bytes"] - kernel.must for kernel in report.kernels]
        at = whole(call(answer, report))
        expect(0 <= at < len(spare), f"There are {len(spare)} kernels, with the numbers 0 to {len(spare) - 1}.")
        expect(spare[at] == max(spare), f"Kernel {at} could save {spare[at]:,} bytes, another {max(spare):,}.")


@judge("07.3")
def rows_beyond(answer: Any) -> None:
    cases = [(2**20, 256), (32 * 2**20, 1024), (1000, 3), (100, 64)]
    same_as(answer, lambda cache, columns: cache // (4 * columns) + 1, cases, whole)


@judge("07.4")
def pack_blocks(answer: Any) -> None:
    import torch

    for rows, columns, side in ((6, 5, 3), (32, 7, 16), (8, 8, 8)):
        matrix = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
        blocks = torch.as_tensor(plain(call(answer, matrix, side)))
        shape = (rows // side, columns, side)
        expect(tuple(blocks.shape) == shape, f"Of {rows} by {columns} and P = {side} it makes {tuple(blocks.shape)}.")
        right = torch.stack([matrix[at : at + side].T for at in range(0, rows, side)])
        expect(bool(torch.equal(blocks.float(), right)), "The shape is right, and numbers stand in other places.")


@judge("07.5")
def quantize(answer: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(7)
    for rows, columns in ((4, 32), (3, 5), (1, 1)):
        weight = torch.randn(rows, columns, generator=generator) * torch.tensor(10.0) ** torch.arange(rows)[:, None]
        if rows > 1:
            weight[1] = 0
        result = call(answer, weight)
        pair = isinstance(result, (tuple, list)) and len(result) == 2
        expect(pair, "It has to return two things: the whole numbers, and the scales.")
        whole_numbers, scale = (torch.as_tensor(plain(part)).double() for part in result)
        expect(whole_numbers.shape == weight.shape, f"The numbers have the shape {tuple(whole_numbers.shape)}.")
        expect(scale.numel() == rows, f"There are {scale.numel()} scales for {rows} rows.")
        numbers(scale)
        expect(bool((whole_numbers == whole_numbers.round()).all()), "Not all of them are whole numbers.")
        expect(number(whole_numbers.abs().max()) <= 127, "Some lie beyond 127.")
        error = (whole_numbers * scale.view(rows, 1) - weight.double()).abs()
        limit = weight.double().abs().amax(1, keepdim=True) / 127 / 2
        near = bool((error <= limit * 1.001 + 1e-12).all())
        expect(near, "Number times scale is further from the weight than half a step.")
