"""A checkpoint's tensors as the decoder's weights: renamed, cast, projections joined, int8 with its scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from helpers.model.config import ModelConfig

Weights = dict[str, Tensor]


def convert(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    int8: bool,
    qkv: bool,
    gate_up: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors to this module's weights: renamed, cast, projections joined, int8 with its scales.

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
            if config.tie_word_embeddings and int8:  # otherwise the head reads the embedding itself
                yield from _linear("head", "weight", tensor, dtype, int8)
            continue
        owner, kind = name.rsplit(".", 1)
        prefix, _, part = owner.rpartition(".")
        joined = next((key for key, parts in joins.items() if part in parts), None)
        if joined is None:
            yield from _linear(owner, kind, tensor, dtype, int8)
            continue
        key = f"{prefix}.{joined}"
        parts = waiting.setdefault(f"{key}.{kind}", {})
        parts[part] = tensor
        if len(parts) == len(joins[joined]):
            yield from _linear(key, kind, torch.cat([parts[p] for p in joins[joined]]), dtype, int8)
            del waiting[f"{key}.{kind}"]


def _linear(owner: str, kind: str, tensor: Tensor, dtype: torch.dtype, int8: bool) -> Iterator[tuple[str, Tensor]]:
    if kind == "bias" or not int8:
        yield f"{owner}.{kind}", tensor.to(dtype)
        return
    # Symmetric, one scale a row: w = q * s with s = max|w| / 127, the scheme TensorRT-LLM calls W8A16.
    wide = tensor.float()
    scale = wide.abs().amax(1).clamp_min(1e-12) / 127
    yield f"{owner}.weight", (wide / scale[:, None]).round().clamp_(-127, 127).to(torch.int8)
    yield f"{owner}.scale", scale


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
