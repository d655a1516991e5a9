"""A checkpoint's tensors as the decoder's weights: renamed, cast, projections joined; int8 or int4 for products.

int8: [N, K], symmetric, one scale a row, w = q * s with s = max|w| / 127: the scheme that TensorRT-LLM calls W8A16.
int4: each 32 weights of a row share a step s and a least value m, w = q * s + m with q from 0 to 15: [N, K/8] int32,
each eight numbers, the first in the lowest bits; s and m [N, K/32] in fp16: 5 bits a weight, as in llama.cpp's Q4_1.
The head stays int8, as there: as int4 it alone moved SmolLM2's next-token distribution by 0.05 nats (KL divergence).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from helpers.errors import BuildError
from helpers.model.config import ModelConfig

Weights = dict[str, Tensor]

INT4 = ("weight", "step", "least")  # the tensors of a product with int4 weights
GROUP, WORD = 32, 8  # int4 weights of a row that share a step and a least value, and those in a word
ROWS_AT_ONCE = 4096  # of a weight that is made int4: what that takes is a few times as large as they are


def convert(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    bits: int | None = None,
    qkv: bool,
    gate_up: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors to this module's weights. bits: 8 or 4 for the weights of products; None leaves them
    floats.

    Yields each as soon as it is complete, so the source can be read one tensor at a time.
    """
    joins = {"qkv": ("q", "k", "v") if qkv else (), "gate_up": ("gate", "up") if gate_up else ()}
    waiting: dict[str, dict[str, Tensor]] = {}
    for source, tensor in tensors:
        name = _rename(source)
        if "norm" in name:
            yield name, tensor.to(dtype)
            continue
        if name == "embedding":
            yield name, tensor.to(dtype)
            if config.tie_word_embeddings and bits:  # otherwise the head reads the embedding itself
                yield from _linear("head", "weight", tensor, dtype, bits)
            continue
        owner, kind = name.rsplit(".", 1)
        prefix, _, part = owner.rpartition(".")
        joined = next((key for key, parts in joins.items() if part in parts), None)
        if joined is None:
            yield from _linear(owner, kind, tensor, dtype, bits)
            continue
        key = f"{prefix}.{joined}"
        parts = waiting.setdefault(f"{key}.{kind}", {})
        parts[part] = tensor
        if len(parts) == len(joins[joined]):
            yield from _linear(key, kind, torch.cat([parts[p] for p in joins[joined]]), dtype, bits)
            del waiting[f"{key}.{kind}"]


def _linear(
    owner: str, kind: str, tensor: Tensor, dtype: torch.dtype, bits: int | None
) -> Iterator[tuple[str, Tensor]]:
    if kind == "bias" or not bits:
        yield f"{owner}.{kind}", tensor.to(dtype)
    elif bits == 4 and owner != "head":
        if tensor.shape[1] % GROUP:
            raise BuildError(
                f"int4 needs rows of a multiple of {GROUP} weights; those of {owner} have {tensor.shape[1]}.",
                cause=f"{GROUP} weights of a row share a step and a least value.",
                fix="Use precision 'int8', which has one scale a row of any length.",
            )
        parts = [_to_int4(rows.float()) for rows in tensor.split(ROWS_AT_ONCE)]
        for name, pieces in zip(INT4, zip(*parts, strict=True), strict=True):
            yield f"{owner}.{name}", torch.cat(pieces)
    else:
        wide = tensor.float()
        scale = wide.abs().amax(1).clamp_min(1e-12) / 127
        yield f"{owner}.weight", (wide / scale[:, None]).round().clamp_(-127, 127).to(torch.int8)
        yield f"{owner}.scale", scale


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] floats to words [N, K/8], step and least value [N, K/32]: the range of each group in 15 steps."""
    groups = weight.unflatten(1, (-1, GROUP))  # [N, K/32, 32]
    least = groups.amin(2, keepdim=True).half()
    step = ((groups.amax(2, keepdim=True) - least) / 15).half()
    numbers = ((groups - least) / step.float().clamp_min(1e-30)).round().clamp(0, 15).int()
    places = torch.arange(0, 4 * WORD, 4, dtype=torch.int32, device=weight.device)
    words = (numbers.flatten(1).unflatten(1, (-1, WORD)) << places).sum(2, dtype=torch.int32)
    return words, step[..., 0], least[..., 0]


def int4_numbers(words: Tensor) -> list[Tensor]:
    """The first to the eighth number of each word, from 0 to 15."""
    return [words >> place & 15 for place in range(0, 4 * WORD, 4)]


def dense(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    """The weight of a product as floats [N, K]. int8 is left without its scale: that follows the product."""
    weight = weights[f"{name}.weight"]
    if f"{name}.step" not in weights:
        return weight.to(dtype)
    groups = torch.stack(int4_numbers(weight), 2).flatten(1).unflatten(1, (-1, GROUP))  # [N, K/32, 32]
    step, least = (weights[f"{name}.{kind}"][..., None].float() for kind in INT4[1:])
    return (groups * step + least).flatten(1).to(dtype)


def _rename(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> layers.3.q.weight, and so on."""
    for old, new in (
        ("model.", ""),
        ("self_attn.", ""),
        ("mlp.", ""),
        ("_proj", ""),
        ("input_layernorm.weight", "attention_norm"),
        ("post_attention_layernorm.weight", "mlp_norm"),
        ("embed_tokens.weight", "embedding"),
        ("lm_head.", "head."),
        ("norm.weight", "norm"),
    ):
        name = name.replace(old, new)
    return name


def stored_names(weights: Weights, layer: str, joined: str, *parts: str) -> list[str]:
    """The joined projection if the engine joined their weights, else each."""
    together = any(name.startswith(f"{layer}{joined}.") for name in weights)
    return [layer + joined] if together else [layer + part for part in parts]


def rope_tables(config: ModelConfig, length: int, dtype: torch.dtype) -> Weights:
    """cos and sin [length, D] for every position; the sign of `rotate`'s first half is in sin.

    Formulas: RoFormer (Su et al. 2021); "linear" divides positions; "llama3" is Llama 3.1's frequency scaling.
    """
    rope, size = config.rope, config.head_dim
    # Type and device are named, because a notebook may have set others as torch's defaults.
    # As transformers rounds them: far into a text, the last bit of a frequency turns a head by a thousandth.
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        frequencies = _llama3_frequencies(frequencies, rope)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return {
        "rope.cos": torch.cat([cos, cos], -1).to(dtype),
        "rope.sin": torch.cat([-sin, sin], -1).to(dtype),
    }


def _llama3_frequencies(frequencies: Tensor, rope: dict) -> Tensor:
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / rope["factor"])
