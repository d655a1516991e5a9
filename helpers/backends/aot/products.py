"""The matrix product in the forms that Inductor compiles well, and the decoder's phases with them.

model/llama.py says what is computed. This file says how a product is written so that the generated loop is fast on one
kind of processor: which layout the weights have, and how many bytes are loaded at once.

Shapes: M rows of the input, K columns, N rows of the weight, P rows of a packed block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.model import llama
from helpers.model.config import ModelConfig
from helpers.model.llama import scale_and_bias
from helpers.model.weights import GROUP, INT4, WORD, Weights, int4_numbers

TILE = 4  # rows of x that one loop over a packed weight takes; 8 need all registers of AVX2 and gain little elsewhere


class Formed(llama.Decoder):
    """A decoder whose products have a form (see `matmul`).

    materialize: have intermediates that several products read written to memory once. Without it Inductor inlines, say,
    the norm into the product behind it and computes it again for each of that product's rows.
    """

    def __init__(self, config: ModelConfig, product: str, materialize: bool):
        super().__init__(config)
        self.product, self.materialize = product, materialize

    def matmul(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        return matmul(weights, name, x, self.product)

    def keep(self, x: Tensor) -> Tensor:
        # Inductor's lowering of as_strided needs its input in memory.
        return x.as_strided(x.shape, x.stride()) if self.materialize else x


class Prefill(Formed, llama.Prefill):
    """Reads prompts."""


class Decode(Formed, llama.Decode):
    """One step."""


def matmul(weights: Weights, name: str, x: Tensor, product: str) -> Tensor:
    """x [M, K] times the transpose of the weight [N, K], in one of three forms of the same product.

    "library"  hands it to the matrix library (MKL, cuBLAS); best for many rows
    "rows"     writes it as products and sums over the checkpoint's layout; the compiler generates the loop and
               fuses its neighbours into it; best for one row
    "packed"   the same over blocks of P weight rows side by side ([N/P, K, P]; see `pack`), so that one vector
               register holds P outputs and nothing is summed across lanes; up to TILE rows of x meet each block that
               is loaded

    int8 and int4 weights are widened inside the generated loop: what is read from memory is one byte, or 5 bits, a
    weight.
    """
    packed = f"{name}.weight.packed" in weights
    if product == "library" or (product == "packed" and not packed and x.shape[0] > TILE):
        y = F.linear(*_widened(weights, name, x))
    elif packed:
        y = _packed(weights, name, x)
    elif f"{name}.step" in weights:
        (y,) = _int4([x], *(weights[f"{name}.{kind}"][..., None] for kind in INT4))  # blocks of one row
        y = y.transpose(0, 1).flatten(1)
    else:
        weight = weights[f"{name}.weight"].to(x.dtype)
        y = (weight[:, None] * x).sum(-1).transpose(0, 1)  # the weight's rows outermost: each is read once
    return scale_and_bias(weights, name, y)


def _packed(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x [M, K] and a packed weight: [M, N].

    R rows of x are R sums in one loop: what is loaded, and widened, of the weight serves them all.
    """
    blocks, count = weights[f"{name}.weight.packed"], x.shape[0]
    if count > TILE and count % TILE:
        x = F.pad(x, (0, 0, 0, TILE - count % TILE))
    at_once = next(rows for rows in (TILE, 2, 1) if x.shape[0] % rows == 0)  # R
    rows = x.unflatten(0, (-1, at_once)).unbind(1)  # R times [M/R, K]
    if f"{name}.shared.packed" in weights:
        sums = _int4(rows, blocks.view(torch.int32), *_halves(weights[f"{name}.shared.packed"]))
    else:
        words = f"{name}.scale" in weights and blocks.dtype == torch.float32
        parts = _bytes(blocks, x.dtype) if words else _columns(blocks, x)
        sums = [_sum_of_products(parts, row) for row in rows]
    products = torch.stack(sums, 2).flatten(1, 2)  # [N/P, M/R, R, P] to [N/P, M, P]
    return products[:, :count].transpose(0, 1).flatten(1)  # [M, N/P, P], [M, N]


def _sum_of_products(parts: list[Tensor], x: Tensor) -> Tensor:
    """Parts of blocks [N/P, K/4, P] and the entries of x [M, K] that they meet: [N/P, M, P]."""
    entries = (x[None, :, j :: len(parts), None] for j in range(len(parts)))  # [1, M, K/4, 1]
    return reduce(torch.add, (part[:, None] * entry for part, entry in zip(parts, entries, strict=True))).sum(2)


def _as_words(weight: Tensor) -> bool:
    """Whether int8 weights [N, K] are read as 32-bit words: on CPUs without AVX-512.

    Inductor loads as many bytes as the vector has room for when they are widened. AVX-512 does so with a mask. For
    shorter vectors its code goes by way of the stack, and that takes several times as long as the rest of a product.
    """
    if weight.dtype != torch.int8 or weight.device.type != "cpu" or weight.shape[1] % 4:
        return False
    return torch.backends.cpu.get_cpu_capability() != "AVX512"


def _bytes(words: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Of four int8 columns in each 32-bit word, the first, second, third and fourth.

    words: [N, K/4] or [N/P, K/4, P], typed float32, because only that is loaded at once.
    """
    bits = words.view(torch.int32)
    return [(bits << 24 - 8 * j >> 24).to(dtype) for j in range(4)]  # the lowest byte comes first


def _columns(blocks: Tensor, x: Tensor) -> list[Tensor]:
    """Blocks [N/P, K, P] for x [M, K] in four parts of every fourth column; whole where 4 does not divide K.

    Each addition to a sum waits for the one before, two to four cycles. With four parts, a step of the generated loop
    adds up four products by themselves and then one number to the sum: a quarter of the waiting.
    """
    count = 1 if x.shape[1] % 4 else 4
    return [blocks[:, j::count].to(x.dtype) for j in range(count)]


def _int4(rows: Sequence[Tensor], words: Tensor, step: Tensor, least: Tensor) -> list[Tensor]:
    """Several x [M, K] and blocks of int4 weights, words [N/P, K/8, P], step and least [N/P, K/32, P].

    Returns for each x [N/P, M, P].

    w = q * s + m, so a group's part of a row's product is s * sum(q * x) + m * sum(x). It is added up a word at a time:
    of m * sum(x), a quarter with each of the four.
    """
    words = words.unflatten(1, (-1, GROUP // WORD))[:, None]  # [N/P, 1, K/32, 4, P]
    dtype = rows[0].dtype
    step, least = (shared[:, None, :, None].to(dtype) for shared in (step, least))  # [N/P, 1, K/32, 1, P]
    numbers = [q.to(dtype) for q in int4_numbers(words)]
    results = []
    for x in rows:
        entries = x.unflatten(1, (-1, GROUP // WORD, WORD))  # [M, K/32, 4, 8]
        sums = x.unflatten(1, (-1, GROUP)).sum(2) / (GROUP // WORD)  # [M, K/32]
        products = (q * entries[..., j, None] for j, q in enumerate(numbers))
        results.append((reduce(torch.add, products) * step + least * sums[..., None, None]).sum((2, 3)))
    return results


def _halves(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of the two fp16 numbers in each 32-bit word, typed float32 as in `_bytes`, the first and the second as floats.

    fp16 numbers loaded as such cost a fifth of an int4 product's time. Here one load brings both, and their bits go to
    the places that sign, exponent and mantissa have in float32. That makes 2^-112 of each number, for float32 counts
    exponents from another zero.
    """
    bits = pairs.view(torch.int32)
    kept = -0x70002000  # 0x8fffe000: not the three copies of the sign that >> makes, nor what lies behind the mantissa
    first, second = ((each >> 3 & kept).view(torch.float32) * 2.0**112 for each in (bits << 16, bits))
    return first, second


def _widened(weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] and the weight [N, K] in its type, the columns of both in the same order."""
    weight = weights[f"{name}.weight"]
    if f"{name}.step" in weights:
        shared = (weights[f"{name}.{kind}"].repeat_interleave(GROUP // WORD, 1) for kind in INT4[1:])  # [N, K/8]
        step, least = (each.to(x.dtype) for each in shared)
        parts = [(q * step + least, x[:, j::WORD]) for j, q in enumerate(int4_numbers(weight))]
    elif _as_words(weight):
        parts = [(part, x[:, j::4]) for j, part in enumerate(_bytes(weight.view(torch.float32), x.dtype))]
    else:
        return x, weight.to(x.dtype)
    return torch.cat([entries for _, entries in parts], -1), torch.cat([part for part, _ in parts], -1)


def pack(weights: Weights, name: str) -> Weights:
    """The packed form of a product's weights: [N, K] to blocks [N/P, K, P], of words [N/P, K/4, P] (see `_as_words`) or
    of int4's [N/P, K/8, P], with step and least value of each group in one word [N/P, K/32, P]; none where P does not
    divide N.

    P is 8 for 32-bit weights and words with AVX2, a register's sums (float32), and 16 else: a register's with AVX-512,
    two registers' for 16-bit weights with AVX2, and untried on other processors.
    """
    weight = weights[f"{name}.weight"]
    int4 = f"{name}.step" in weights
    columns = weight.view(torch.float32) if int4 or _as_words(weight) else weight
    rows = 8 if columns.itemsize == 4 and torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
    if len(weight) % rows:
        return {}
    tensors = {"weight": columns}
    if int4:
        pairs = torch.stack([weights[f"{name}.{kind}"] for kind in INT4[1:]], 2)  # [N, K/32, 2], the first lowest
        tensors["shared"] = pairs.view(torch.float32)
    return {
        f"{name}.{kind}.packed": tensor.view(len(weight) // rows, rows, -1).permute(0, 2, 1).contiguous()
        for kind, tensor in tensors.items()
    }
