"""GPU kernels of our own for decode, as TensorRT-LLM has plugins where its compiler's kernels are not enough.

A step with one token a sequence does little work in each operation, so what counts is how few kernels there are and
how fast each reads its bytes. `matvec` reads a weight once and does the norm before it and the sum or activation
after it on the way; `decode_attention` does rotary embedding, the write to the KV cache and attention. That leaves
five kernels a layer. For several sequences `split_matmul` is the product. Written in Triton
(https://triton-lang.org); imported only where there is a GPU.

Shapes: B sequences, H heads, G KV heads, D head size (a power of two), S cache length, K and N a weight's columns
and rows. Arithmetic is in float32, whatever the tensors hold; with int8 and int4 weights products are of integers,
exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from helpers.backends.aot import early_start
from helpers.model.weights import GROUP

# How programs share the work: found by trying all of a step's kernels together on an H100 (split_matmul and attention:
# on an H200). Another GPU may like others better, and gets right results with these too.
# A program of `matvec` gives one number of the result, and takes so many columns of the weight at once. For rows of at
# most so many columns: columns at once, warps.
TILES = {4096: (1024, 1), 6144: (2048, 2), 1 << 30: (2048, 4)}
INT8_ROWS, INT8_BYTES = 4, 512  # int8 takes whole rows: four, eight of long ones; each thread so many bytes of them
INT4_ROWS, INT4_BYTES = 2, 64  # int4 too: two, four of long ones
SPLIT_ROWS, SPLIT_COLUMNS, SPLIT_WARPS, SPLIT_STAGES = 64, 128, 4, 4
MOST_PARTS = 4  # so few that the compiler adds them up inside the operation that follows, not in a kernel of their own
SKINNY = 64  # up to so many sequences a product reads more than it computes
ENTRIES, ATTENTION_WARPS, ATTENTION_STAGES = 128, 4, 3
LONG = 512  # a longer cache is shared by several programs, each with ENTRIES of it, if there are few sequences
BUSY = 128  # programs that fill a GPU


# Instructions with effects of their own would hide from PyTorch which tensors a kernel writes to. So these two are said
# to have none, and each gives a zero: what is added to it cannot happen before.


@triton.jit
def _let_next_start(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """0. From here on the kernel that follows may start, where this one leaves room (early_start.py)."""
    zero = 0
    if EARLY:
        instruction: tl.constexpr = "griddepcontrol.launch_dependents; mov.u32 $0, 0;"
        zero = tl.inline_asm_elementwise(instruction, "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    return zero


@triton.jit
def _wait_for_last(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """0, once the kernel before has written all it has to. What depends on none of it is loaded before this."""
    zero = 0
    if EARLY:
        instruction: tl.constexpr = "griddepcontrol.wait; mov.u32 $0, 0;"
        zero = tl.inline_asm_elementwise(instruction, "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    return zero * 16  # so that the compiler sees that addresses stay aligned


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    result, other, row, bias, residual, y,
    N: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What follows a product: bias, gate, residual, and the store. other: the second half's, if GATED."""
    if BIASED:
        result += tl.load(bias + row, mask=row < N).to(tl.float32)
        if GATED:
            other += tl.load(bias + N + row, mask=row < N).to(tl.float32)
    if GATED:
        result = result / (1 + tl.exp(-result)) * other
    if ADDED:
        result += tl.load(residual + row, mask=row < N).to(tl.float32)
    tl.store(y + row, result, mask=row < N)


@triton.jit
def _early_matvec(  # type: ignore[no-untyped-def]
    x, weight, bias, norm, residual, y,
    EPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    BIASED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + _let_next_start(EARLY)
    products = tl.zeros([COLUMNS], tl.float32)
    gated = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in tl.static_range(0, K, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        at = weight + row * K + k
        first = tl.load(at, mask=k < K, other=0.0, eviction_policy="evict_first")
        if GATED:
            second = tl.load(at + N * K, mask=k < K, other=0.0, eviction_policy="evict_first")
        if start == 0:
            zero = _wait_for_last(EARLY)
            x += zero
            residual += zero
        v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORMED:
            squares += v * v
            v *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        products += first.to(tl.float32) * v
        if GATED:
            gated += second.to(tl.float32) * v
    result = tl.sum(products, 0)
    other = tl.sum(gated, 0)
    if NORMED:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + EPS)
        result *= factor
        other *= factor
    _finish(result, other, row, bias, residual, y, N, BIASED, ADDED, GATED)


@triton.jit
def _add_and_highest(a0, a1, b0, b1):
    return a0 + b0, tl.maximum(a1, b1)


@triton.jit
def _words(values, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest byte of each of [COLUMNS] integers, four to a word."""
    even, odd = tl.split(tl.reshape(values & 0xFF, [COLUMNS // 4, 2, 2]))
    b0, b2 = tl.split(even)
    b1, b3 = tl.split(odd)
    return b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)


@triton.jit
def _dp4a(weights, x, sums):
    """Words of four int8 weights [ROWS, C] times words of x [1, C], four products added to sums, in one instruction."""
    dp4a: tl.constexpr = "dp4a.s32.s32 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(dp4a, "=r,r,r,r", [weights, x, sums], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _as_integers(  # type: ignore[no-untyped-def]
    x, norm, EPS: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, NORMED: tl.constexpr
):
    """x as 16-bit integers [COLUMNS] in the low half of words, and what a step of them is worth.

    Widening each small weight to float would take longer than reading it. So x becomes an integer: 32512 steps up to
    its largest value, finer than the 256 that bf16 has between two powers of two.
    """
    k = tl.arange(0, COLUMNS)
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORMED:
        weighted = v * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        squares, highest = tl.reduce((v * v, tl.abs(weighted)), 0, _add_and_highest)
        factor = tl.rsqrt(squares / K + EPS)
        v = weighted
    else:
        highest = tl.max(tl.abs(v), 0)
        factor = 1.0
    highest = tl.maximum(highest, 1e-30)
    # Adding 1.5 * 2**23 leaves the rounded value in a float's lowest bits, as two's complement.
    bits = (v * (32512.0 / highest) + 12582912.0).to(tl.int32, bitcast=True)
    return bits, highest / 32512.0 * factor


@triton.jit
def _dot(weights, high, low):
    """Words of int8 weights [ROWS, C] times x = 256 * high + low [1, C]: the sum over each row, [ROWS] in float32."""
    upper = tl.sum(_dp4a(weights, high, 0), 1)
    return upper.to(tl.float32) * 256.0 + tl.sum(_dp4a(weights, low, 0), 1).to(tl.float32)


@triton.jit
def _early_matvec_int8(  # type: ignore[no-untyped-def]
    x, weight, scale, bias, norm, residual, y,
    EPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BIASED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS) + _let_next_start(EARLY)
    word = tl.arange(0, COLUMNS // 4)
    inside = (row < N)[:, None] & (word < K // 4)[None, :]
    at = weight.to(tl.pointer_type(tl.int32)) + row[:, None] * (K // 4) + word[None, :]
    first = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
    if GATED:
        second = tl.load(at + N * (K // 4), mask=inside, other=0, eviction_policy="evict_first")
    zero = _wait_for_last(EARLY)
    bits, unit = _as_integers(x + zero, norm, EPS, K, COLUMNS, NORMED)
    low = _words(bits, COLUMNS)[None, :]
    high = _words((bits + 128) >> 8, COLUMNS)[None, :]
    result = _dot(first, high, low) * unit * tl.load(scale + row, mask=row < N)
    other = result
    if GATED:
        other = _dot(second, high, low) * unit * tl.load(scale + N + row, mask=row < N)
    _finish(result, other, row, bias, residual + zero, y, N, BIASED, ADDED, GATED)


@triton.jit
def _dot_int4(words, step, least, even, odd):
    """Words of int4 weights [ROWS, C], their groups' step and least value, times x [1, C]: [ROWS] in float32.

    even and odd: the words of x that meet a word's even and odd numbers; of each its high and its low bytes.
    """
    evens, odds = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    upper = _dp4a(evens, even[0], _dp4a(odds, odd[0], 0)).to(tl.float32)
    lower = _dp4a(evens, even[1], _dp4a(odds, odd[1], 0)).to(tl.float32)
    ones = tl.full([1, 1], 0x01010101, tl.int32)
    of_x = _dp4a(ones, even[0], _dp4a(ones, odd[0], 0)) * 256 + _dp4a(ones, even[1], _dp4a(ones, odd[1], 0))
    return tl.sum((upper * 256.0 + lower) * step + of_x.to(tl.float32) * least, 1)


@triton.jit
def _early_matvec_int4(  # type: ignore[no-untyped-def]
    x, weight, step, least, bias, norm, residual, y,
    EPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS) + _let_next_start(EARLY)
    word = tl.arange(0, COLUMNS // 8)
    inside = (row < N)[:, None] & (word < K // 8)[None, :]
    at = row[:, None] * (K // 8) + word[None, :]
    group = row[:, None] * (K // GROUP) + word[None, :] // (GROUP // 8)
    first = tl.load(weight + at, mask=inside, other=0, eviction_policy="evict_first")
    first_step = tl.load(step + group, mask=inside, other=0.0)
    first_least = tl.load(least + group, mask=inside, other=0.0)
    if GATED:
        second = tl.load(weight + N * (K // 8) + at, mask=inside, other=0, eviction_policy="evict_first")
        second_step = tl.load(step + N * (K // GROUP) + group, mask=inside, other=0.0)
        second_least = tl.load(least + N * (K // GROUP) + group, mask=inside, other=0.0)
    zero = _wait_for_last(EARLY)
    bits, unit = _as_integers(x + zero, norm, EPS, K, COLUMNS, NORMED)
    in_even, in_odd = tl.split(tl.reshape(bits, [COLUMNS // 2, 2]))
    HALF: tl.constexpr = COLUMNS // 2
    even = _words((in_even + 128) >> 8, HALF)[None, :], _words(in_even, HALF)[None, :]
    odd = _words((in_odd + 128) >> 8, HALF)[None, :], _words(in_odd, HALF)[None, :]
    result = _dot_int4(first, first_step, first_least, even, odd) * unit
    other = result
    if GATED:
        other = _dot_int4(second, second_step, second_least, even, odd) * unit
    _finish(result, other, row, bias, residual + zero, y, N, BIASED, ADDED, GATED)


@torch.library.triton_op("helpers::matvec", mutates_args={})
def matvec(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    step: Tensor | None,
    least: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """x [1, K] times the transpose of weight [N, K]: [1, N], of x's type.

    norm [K]: x is RMS-normalized first. scale [N], float32: of int8 rows, for which 4 divides K. step and least
    [N, K/32], float16: of int4 weights [N, K/8] (model/weights.py). residual [1, N] is added last. gated: the weight
    holds gate [N/2, K] and up [N/2, K], and the result is silu(gate) * up [1, N/2].
    """
    columns, rows = x.shape[1], weight.shape[0]
    rows = rows // 2 if gated else rows
    y = torch.empty((1, rows), device=x.device, dtype=x.dtype)
    bias, norm, added = (x if t is None else t for t in (bias, norm, residual))  # a kernel's pointers are never None
    switches = {"BIASED": bias is not x, "NORMED": norm is not x, "ADDED": residual is not None, "GATED": gated}
    switches["EARLY"] = _early()
    whole = triton.next_power_of_2(columns)
    halves = 2 if gated else 1  # a program reads two rows for each that it writes
    if step is not None and least is not None:
        tile = INT4_ROWS if whole <= 4096 else 2 * INT4_ROWS
        warps = max(1, tile * whole // 2 * halves // (32 * INT4_BYTES))
        torch.library.wrap_triton(_early_matvec_int4)[(triton.cdiv(rows, tile),)](
            x, weight, step, least, bias, norm, added, y,
            EPS=eps, N=rows, K=columns, ROWS=tile, COLUMNS=whole, GROUP=GROUP, num_warps=min(32, warps), **switches,
        )  # fmt: skip
    elif scale is not None:
        tile = INT8_ROWS if whole <= 4096 else 2 * INT8_ROWS
        warps = max(1, tile * whole * halves // (32 * INT8_BYTES))
        torch.library.wrap_triton(_early_matvec_int8)[(triton.cdiv(rows, tile),)](
            x, weight, scale, bias, norm, added, y,
            EPS=eps, N=rows, K=columns, ROWS=tile, COLUMNS=whole, num_warps=min(32, warps), **switches,
        )  # fmt: skip
    else:
        width, warps = next(tile for most, tile in TILES.items() if columns <= most)
        torch.library.wrap_triton(_early_matvec)[(rows,)](
            x, weight, bias, norm, added, y,
            EPS=eps, N=rows, K=columns, COLUMNS=min(width, whole), num_warps=max(warps, halves), **switches,
        )  # fmt: skip
    return y


@triton.jit
def _early_split_matmul(  # type: ignore[no-untyped-def]
    x, weight, y,
    B: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS) + _let_next_start(EARLY)
    x += _wait_for_last(EARLY)
    b = tl.arange(0, BATCH)
    sums = tl.zeros([BATCH, ROWS], tl.float32)
    for start in tl.range(0, SPAN, COLUMNS, num_stages=STAGES):
        k = tl.program_id(1) * SPAN + start + tl.arange(0, COLUMNS)
        inside = (row < N)[:, None] & (k < K)[None, :]
        w = tl.load(weight + row[:, None] * K + k[None, :], mask=inside, other=0, eviction_policy="evict_first")
        v = tl.load(x + b[:, None] * K + k[None, :], mask=(b < B)[:, None] & (k < K)[None, :], other=0.0)
        sums = tl.dot(v, tl.trans(w.to(v.dtype)), sums)
    at = (tl.program_id(1) * B + b[:, None]) * N + row[None, :]
    tl.store(y + at, sums, mask=(b < B)[:, None] & (row < N)[None, :])


def skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether `split_matmul` is the faster product for x [B, K] and weight [N, K], as seen on an H200.

    A library has none for int8 weights: they would first be widened, which takes longer than the product. For floats
    it is behind only where a weight has too few rows to keep a GPU busy.
    """
    few_rows = weight.shape[0] <= SPLIT_ROWS * BUSY
    suits = weight.dtype == torch.int8 or (few_rows and weight.is_floating_point())
    return x.shape[0] <= SKINNY and x.itemsize == 2 and suits


@torch.library.triton_op("helpers::split_matmul", mutates_args={})
def split_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] of 16-bit floats times the transpose of weight [N, K], as float32 parts [P, B, N] to be added up.

    The columns are divided among P programs ("split-K"), so that many read at once also where rows are few. Adding
    up is left to the operation that follows. int8 weights are widened in registers; their scale is the caller's.
    """
    batch, (rows, columns) = x.shape[0], weight.shape
    blocks = triton.cdiv(rows, SPLIT_ROWS)
    padded = max(16, triton.next_power_of_2(batch))
    room = (3 if padded <= 32 else 1) * BUSY  # programs that run at once: a small batch leaves memory for more of them
    parts = 1
    while parts < MOST_PARTS and 2 * parts * blocks <= room and 2 * parts * SPLIT_COLUMNS <= columns:
        parts *= 2
    span = SPLIT_COLUMNS * triton.cdiv(columns, parts * SPLIT_COLUMNS)
    y = torch.empty((parts, batch, rows), device=x.device, dtype=torch.float32)
    stage = SPLIT_COLUMNS * (SPLIT_ROWS * weight.itemsize + padded * x.itemsize)
    torch.library.wrap_triton(_early_split_matmul)[(blocks, parts)](
        x, weight, y, B=batch, N=rows, K=columns, SPAN=span, ROWS=SPLIT_ROWS, BATCH=padded, COLUMNS=SPLIT_COLUMNS,
        STAGES=max(2, min(SPLIT_STAGES, (_shared_memory() - 16384) // stage)), num_warps=SPLIT_WARPS, EARLY=_early(),
    )  # fmt: skip
    return y


def _early() -> bool:
    """Whether this GPU's kernels can start before the one that they wait for has ended."""
    return torch.cuda.get_device_capability() >= early_start.CAPABILITY


def _shared_memory() -> int:
    """Bytes that one program can have, on this GPU."""
    device = torch.cuda.current_device()
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@triton.jit
def _early_attend(  # type: ignore[no-untyped-def]
    heads, cos, sin, keys, values, positions, out, top, total,
    cache_b, cache_g, cache_s, span,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    ENTRIES: tl.constexpr, PIECES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One sequence, one KV head with its group of query heads, `span` entries of the cache."""
    b = tl.program_id(0) // KV_HEADS + _let_next_start(EARLY)
    g = tl.program_id(0) % KV_HEADS
    piece = tl.program_id(1)
    group: tl.constexpr = HEADS // KV_HEADS
    position = tl.load(positions + b)
    row = tl.arange(0, ROWS)  # the group's heads, padded to what tl.dot takes
    inside = (row < group)[:, None]
    d = tl.arange(0, SIZE)
    swapped = (d + SIZE // 2) % SIZE  # see llama.rotate: the halves are swapped by address
    c = tl.load(cos + position * SIZE + d).to(tl.float32)
    s = tl.load(sin + position * SIZE + d).to(tl.float32)
    heads += _wait_for_last(EARLY)
    first = heads + b * (HEADS + 2 * KV_HEADS) * SIZE
    query = first + (g * group + row[:, None]) * SIZE
    q = tl.load(query + d[None, :], mask=inside, other=0.0).to(tl.float32) * c[None, :]
    q += tl.load(query + swapped[None, :], mask=inside, other=0.0).to(tl.float32) * s[None, :]
    new = first + (HEADS + g) * SIZE
    key = (tl.load(new + d).to(tl.float32) * c + tl.load(new + swapped).to(tl.float32) * s).to(keys.dtype.element_ty)
    value = tl.load(new + KV_HEADS * SIZE + d)
    entry = b * cache_b + g * cache_g + d
    q = q.to(key.dtype)
    if piece == 0:  # the new entry is this program's; nobody reads it from the cache in this step
        tl.store(keys + entry + position * cache_s, key)
        tl.store(values + entry + position * cache_s, value)
        highest = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1) * SCALE
        weight = tl.full([ROWS], 1.0, tl.float32)
        result = tl.zeros([ROWS, SIZE], tl.float32) + value.to(tl.float32)[None, :]
    else:
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        result = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(piece * span, min(position, (piece + 1) * span), ENTRIES):
        n = start + tl.arange(0, ENTRIES)
        old = n < min(position, (piece + 1) * span)
        at = entry[None, :] + n[:, None] * cache_s
        k = tl.load(keys + at, mask=old[:, None], other=0.0)
        v = tl.load(values + at, mask=old[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        scores = tl.where(old[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        factor = tl.exp(highest - higher)
        shares = tl.exp(scores - higher[:, None])
        weight = weight * factor + tl.sum(shares, 1)
        result = result * factor[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        highest = higher
    at = (b * HEADS + g * group + row) * PIECES + piece
    if PIECES == 1:
        result /= weight[:, None]
    else:
        tl.store(top + at, highest, mask=row < group)
        tl.store(total + at, weight, mask=row < group)
    tl.store(out + at[:, None] * SIZE + d[None, :], result, mask=inside)


def _entries(keys: Tensor) -> int:
    """So many that the pipeline of loads fits a program's shared memory."""
    return max(16, min(ENTRIES, 16384 // (keys.shape[3] * keys.itemsize)))


@torch.library.triton_op("helpers::decode_attention", mutates_args={"keys", "values"})
def _pieces(
    heads: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor, pieces: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, length, size = keys.shape
    number = heads.shape[1] // size - 2 * kv_heads
    entries = _entries(keys)
    kind = heads.dtype if pieces == 1 else torch.float32
    out = torch.empty((batch, number, pieces, size), device=heads.device, dtype=kind)
    top = torch.empty((batch, number, pieces), device=heads.device, dtype=torch.float32)
    total = torch.empty_like(top)
    torch.library.wrap_triton(_early_attend)[(batch * kv_heads, pieces)](
        heads, cos, sin, keys, values, positions, out, top, total,
        keys.stride(0), keys.stride(1), keys.stride(2), length if pieces == 1 else entries,
        SCALE=size**-0.5, HEADS=number, KV_HEADS=kv_heads, SIZE=size,
        ROWS=max(16, triton.next_power_of_2(number // kv_heads)),
        ENTRIES=entries, PIECES=pieces, EARLY=_early(), num_warps=ATTENTION_WARPS, num_stages=ATTENTION_STAGES,
    )  # fmt: skip
    return out, top, total


def decode_attention(
    heads: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor
) -> Tensor:
    """heads [B, (H + G + G) * D]: q, k and v of one token a sequence, contiguous, not yet rotated. -> [B, H * D]

    Rotates q and k by cos and sin [S, D], writes k and v into the cache [B, G, S, D] at positions [B], attends to
    all entries up to there. A long cache is read in pieces side by side, each softmax scaled by its own highest
    score, and the pieces are joined at the end ("flash decoding": https://pytorch.org/blog/flash-decoding/).
    """
    batch, kv_heads, length, _ = keys.shape
    pieces = 1 if length <= LONG or batch * kv_heads >= BUSY else triton.cdiv(length, _entries(keys))
    out, top, total = _pieces(heads, cos, sin, keys, values, positions, pieces)
    if pieces == 1:
        return out.flatten(1)
    share = (top - top.amax(-1, keepdim=True)).exp()
    joined = (out * share[..., None]).sum(-2) / (total * share).sum(-1)[..., None]
    return joined.to(heads.dtype).flatten(1)


def operations(kernel: str, switches: Mapping[str, bool]) -> list[str]:
    """What a call of one of the kernels does in one go, in the compiler's words: for the engine's report.

    kernel: its function's name, such as "matvec"; switches: the constants that it was called with.
    """
    if kernel == "split_matmul":
        return ["mm"]
    if kernel == "attend":
        rotate_and_keep = ["mul", "mul", "add"] * 2 + ["index_put"] * 2
        scores = ["mul", "sum", "mul", "where"]
        return rotate_and_keep + scores + ["amax", "sub", "exp", "sum"] + ["mul", "sum", "div"]
    product = {"matvec_int8": ["mul", "sum", "mul"], "matvec_int4": ["mul", "add", "mul", "sum"]}.get(
        kernel, ["mul", "sum"]
    )
    product += ["add"] if switches["BIASED"] else []
    does = ["pow", "mean", "add", "rsqrt", "mul", "mul"] if switches["NORMED"] else []
    does += product * 2 + ["silu", "mul"] if switches["GATED"] else product
    return does + (["add"] if switches["ADDED"] else [])
