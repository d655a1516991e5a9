"""Notebook 07: the laboratory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import number, numbers, whole
from helpers.errors import InputError

if TYPE_CHECKING:
    from helpers.backends.report import EngineReport


@exercise(
    "07.1",
    "Count the kernels that a model launches",
    "a function of a report that returns how many of its kernels the compiler wrote itself",
    "Each kernel of report.kernels says who made it.",
    'Its `kind` is "generated" where the compiler wrote it.',
)
def generated_kernels(answer: Any, fused: EngineReport, apart: EngineReport) -> str:
    for report in (fused, apart):
        right = sum(kernel.kind == "generated" for kernel in report.kernels)
        expect(whole(call(answer, report)) == right, f"Of {len(report.kernels)} kernels, {right} are generated.")
    return "The others are calls of a library."


@exercise(
    "07.2",
    "The kernel that moves most for nothing",
    "a function of a report that returns the number of a kernel, counted from 0",
    'kernel.details["bytes"] are the bytes that a kernel moves, kernel.must those of them that it must.',
    "What could be saved is the difference of the two.",
    points=2,
)
def most_for_nothing(answer: Any, apart: EngineReport, fused: EngineReport) -> str:
    for report in (apart, fused):
        spare = [kernel.details["bytes"] - kernel.must for kernel in report.kernels]
        at = whole(call(answer, report))
        expect(0 <= at < len(spare), f"There are {len(spare)} kernels, with the numbers 0 to {len(spare) - 1}.")
        expect(spare[at] == max(spare), f"Kernel {at} could save {spare[at]:,} bytes, another {max(spare):,}.")
    return "That is where a fused neighbour would help most."


@exercise(
    "07.3",
    "How many rows until the cache is too small",
    "a function of a cache's bytes and the columns of a float32 matrix that returns the fewest rows that do not fit",
    "One row has so many columns of 4 bytes each.",
    "Rows that fill the cache exactly still fit. One more does not.",
    points=2,
)
def rows_beyond(answer: Any) -> str:
    for cache, columns in ((2**20, 256), (32 * 2**20, 1024), (1000, 3), (100, 64)):
        rows = whole(call(answer, cache, columns))
        right = cache // (4 * columns) + 1
        expect(rows == right, f"For {cache:,} bytes and {columns} columns it gives {rows}; the fewest are {right}.")
    return "Below that, an unfused chain finds its intermediate results in the cache, and fusion saves little."


@exercise(
    "07.4",
    "Pack a matrix",
    "a function of a matrix [N, K] and a number P that returns the blocks [N / P, K, P]",
    "First cut the rows into N / P groups of P rows: [N / P, P, K].",
    "Then let the last two axes change places.",
    points=2,
)
def pack_blocks(answer: Any) -> str:
    import torch

    for rows, columns, side in ((6, 5, 3), (32, 7, 16), (8, 8, 8)):
        matrix = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
        blocks = torch.as_tensor(call(answer, matrix.clone(), side))
        shape = (rows // side, columns, side)
        expect(tuple(blocks.shape) == shape, f"Of {rows} by {columns} and P = {side} it makes {tuple(blocks.shape)}.")
        right = torch.stack([matrix[at : at + side].T for at in range(0, rows, side)])
        expect(bool(torch.equal(blocks.float(), right)), "The shape is right, and numbers stand in other places.")
    return "The P numbers that a vector register takes now lie side by side."


@exercise(
    "07.5",
    "Quantize weights to int8",
    "a function of a matrix that returns whole numbers from -127 to 127, and a scale for each row",
    "The largest number of a row, without its sign, becomes 127.",
    "So a row's scale is its largest absolute value over 127, and numbers are divided by it and rounded.",
    "A row of zeros has no largest value: any scale but 0 will do.",
    points=3,
)
def quantize(answer: Any) -> str:
    import torch

    generator = torch.Generator().manual_seed(7)
    for rows, columns in ((4, 32), (3, 5), (1, 1)):
        weight = torch.randn(rows, columns, generator=generator) * torch.tensor(10.0) ** torch.arange(rows)[:, None]
        if rows > 1:
            weight[1] = 0
        result = call(answer, weight.clone())
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise InputError("It has to return two things: the whole numbers, and the scales.")
        whole_numbers, scale = (torch.as_tensor(part).double() for part in result)
        expect(whole_numbers.shape == weight.shape, f"The numbers have the shape {tuple(whole_numbers.shape)}.")
        expect(scale.numel() == rows, f"There are {scale.numel()} scales for {rows} rows.")
        numbers(scale)
        expect(bool((whole_numbers == whole_numbers.round()).all()), "Not all of them are whole numbers.")
        expect(number(whole_numbers.abs().max()) <= 127, "Some lie beyond 127.")
        error = (whole_numbers * scale.view(rows, 1) - weight.double()).abs()
        limit = weight.double().abs().amax(1, keepdim=True) / 127 / 2
        expect(
            bool((error <= limit * 1.001 + 1e-12).all()),
            "Number times scale is further from the weight than half a step.",
        )
    return "Every weight is met to half a step, and no data was needed for that."
