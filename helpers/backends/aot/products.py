"""The matrix product in the forms that Inductor compiles well, and the decoder's phases with them.

model/llama.py says what is computed. This file says how a product is written so that the generated loop is fast on one
kind of processor: which layout the weights have, and how many bytes are loaded at once.

Shapes: M rows of the input, K columns, N rows of the weight, P rows of a packed block.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.model import llama
from helpers.model.config import ModelConfig
from helpers.model.llama import scale_and_bias
from helpers.model.weights import GROUP, INT4, WORD, Weights, int4_numbers


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
               register holds P outputs and nothing is summed across lanes

    int8 and int4 weights are widened inside the generated loop: what is read from memory is one byte, or 5 bits, a
    weight.
    """
    if product == "library":
        y = F.linear(*_widened(weights, name, x))
    elif product == "packed" and f"{name}.weight.packed" in weights:
        y = _packed(weights, name, x)
    elif f"{name}.step" in weights:
        y = _int4(x, *(weights[f"{name}.{kind}"][..., None] for kind in INT4))  # blocks of one row
    else:
        weight = weights[f"{name}.weight"].to(x.dtype)
        y = (weight[:, None] * x).sum(-1).transpose(0, 1)  # the weight's rows outermost: each is read once
    return scale_and_bias(weights, name, y)


def _packed(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x [M, K] and a packed weight: [M, N]."""
    blocks = weights[f"{name}.weight.packed"]
    if f"{name}.shared.packed" in weights:
        return _int4(x, blocks.view(torch.int32), *_halves(weights[f"{name}.shared.packed"]))
    words = f"{name}.scale" in weights and blocks.dtype == torch.float32
    parts = _bytes(blocks, x) if words else _columns(blocks, x)
    products = (part[:, None] * entries[None, :, :, None] for part, entries in parts)
    return reduce(torch.add, products).sum(2).transpose(0, 1).flatten(1)  # [N/P, M, P], [M, N/P, P], [M, N]


def _as_words(weight: Tensor) -> bool:
    """Whether int8 weights [N, K] are read as 32-bit words: on CPUs without AVX-512.

    Inductor loads as many bytes as the vector has room for when they are widened. AVX-512 does so with a mask. For
    shorter vectors its code goes by way of the stack, and that takes several times as long as the rest of a product.
    """
    if weight.dtype != torch.int8 or weight.device.type != "cpu" or weight.shape[1] % 4:
        return False
    return torch.backends.cpu.get_cpu_capability() != "AVX512"


def _bytes(words: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of four int8 columns in each 32-bit word, the first, second, third and fourth, and the entries of x they meet.

    words: [N, K/4] or [N/P, K/4, P], typed float32, because only that is loaded at once; x: [M, K].
    """
    bits = words.view(torch.int32)
    return [((bits << 24 - 8 * j >> 24).to(x.dtype), x[:, j::4]) for j in range(4)]  # the lowest byte comes first


def _columns(blocks: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Blocks [N/P, K, P] and x [M, K] in four parts of every fourth column; whole where 4 does not divide K.

    Each addition to a sum waits for the one before, two to four cycles. With four parts, a step of the generated loop
    adds up four products by themselves and then one number to the sum: a quarter of the waiting.
    """
    if x.shape[1] % 4:
        return [(blocks.to(x.dtype), x)]
    return [(blocks[:, j::4].to(x.dtype), x[:, j::4]) for j in range(4)]


def _int4(x: Tensor, words: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """x [M, K] and blocks of int4 weights, words [N/P, K/8, P], step and least [N/P, K/32, P]: [M, N].

    w = q * s + m, so a group's part of a row's product is s * sum(q * x) + m * sum(x). It is added up a word at a time:
    of m * sum(x), a quarter with each of the four.
    """
    words = words.unflatten(1, (-1, GROUP // WORD))[:, None]  # [N/P, 1, K/32, 4, P]
    step, least = (shared[:, None, :, None].to(x.dtype) for shared in (step, least))  # [N/P, 1, K/32, 1, P]
    entries = x.unflatten(1, (-1, GROUP // WORD, WORD))  # [M, K/32, 4, 8]
    sums = x.unflatten(1, (-1, GROUP)).sum(2) / (GROUP // WORD)  # [M, K/32]
    products = (q.to(x.dtype) * entries[..., j, None] for j, q in enumerate(int4_numbers(words)))
    y = reduce(torch.add, products) * step + least * sums[..., None, None]
    return y.sum((2, 3)).transpose(0, 1).flatten(1)  # [N/P, M, P], [M, N/P, P], [M, N]


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
        parts = _bytes(weight.view(torch.float32), x)
    else:
        return x, weight.to(x.dtype)
    return torch.cat([entries for _, entries in parts], -1), torch.cat([part for part, _ in parts], -1)


def pack(weights: Weights, name: str) -> Weights:
    """The packed copy of a product's weights: [N, K] to blocks [N/P, K, P], of words [N/P, K/4, P] (see `_as_words`) or
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
