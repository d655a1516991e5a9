"""The Llama-family decoder that the compilers see: Llama, Mistral, Qwen2 and Qwen3.

Two entry points, one for each phase: `Prefill` reads a whole prompt, `Decode` one token a sequence. Both update
the KV cache in place. Weights come in as arguments, so every graph compiled from here shares one set of them.

Shapes: B sequences, T prompt tokens, S cache length, E hidden size, H heads, G KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import ModelConfig

Weights = dict[str, Tensor]
Cache = list[Tensor]  # k0, v0, k1, v1, ...: each [B, G, S, D]


def matmul(weights: Weights, name: str, x: Tensor, product: str) -> Tensor:
    """x [M, K] times the transpose of the weight [N, K], in one of three forms of the same product.

    "library"  hands it to the matrix library (MKL, cuBLAS); best for many rows
    "rows"     writes it as products and sums over the checkpoint's layout; the compiler generates the loop and
               fuses its neighbours into it; best for one row
    "packed"   the same over blocks of P weight rows side by side ([N/P, K, P]; see `pack`), so that one vector
               register holds P outputs and nothing is summed across lanes

    int8 weights are widened inside the generated loop: what is read from memory is one byte a weight.
    """
    if product == "packed" and f"{name}.packed" in weights:
        blocks = weights[f"{name}.packed"]
        words = f"{name}.scale" in weights and blocks.dtype == torch.float32
        parts = _bytes(blocks, x) if words else _columns(blocks, x)
        products = (part[:, None] * entries[None, :, :, None] for part, entries in parts)
        y = reduce(torch.add, products).sum(2)  # [N/P, M, P]
        y = y.transpose(0, 1).reshape(x.shape[0], -1)
    elif product == "library":
        y = F.linear(*_widened(x, weights[f"{name}.weight"]))
    else:
        weight = weights[f"{name}.weight"].to(x.dtype)
        y = (weight[:, None] * x).sum(-1).transpose(0, 1)  # the weight's rows outermost: each is read once
    return scale_and_bias(weights, name, y)


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
    """Blocks [N/P, K, P] and x [M, K]: whole, or, where P is 8 (AVX2), in four parts of every fourth column.

    Each addition to a sum waits for the one before. With four parts, a step of the generated loop adds up four
    products by themselves and then one number to the sum: a quarter of the waiting.
    """
    if blocks.shape[-1] != 8 or x.shape[1] % 4:
        return [(blocks.to(x.dtype), x)]
    return [(blocks[:, j::4], x[:, j::4]) for j in range(4)]


def _widened(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] and the weight [N, K] in its type, the columns of both in the same order."""
    if not _as_words(weight):
        return x, weight.to(x.dtype)
    parts = _bytes(weight.view(torch.float32), x)
    return torch.cat([entries for _, entries in parts], -1), torch.cat([part for part, _ in parts], -1)


def scale_and_bias(weights: Weights, name: str, y: Tensor) -> Tensor:
    """What follows a product of int8 weights, of weights with a bias, or neither."""
    if f"{name}.scale" in weights:
        y = y * weights[f"{name}.scale"].to(y.dtype)
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"]
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x [..., D]; cos and sin [..., D], the first half of sin already negated.

    Swapping the halves is a change of index, not a copy: it fuses into the product.
    """
    halves = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos + halves * sin).to(x.dtype)


class Decoder(nn.Module):
    """What both phases share. `product` is the form of the matrix products (see `matmul`)."""

    def __init__(self, config: ModelConfig, product: str, materialize: bool):
        super().__init__()
        self.config, self.product, self.writes = config, product, materialize

    def keep(self, x: Tensor) -> Tensor:
        """Have this intermediate written to memory once.

        Without it Inductor inlines, say, the norm into the product behind it and computes it again for each of
        that product's rows. as_strided is the operation that its lowering must have in memory.
        """
        return x.as_strided(x.shape, x.stride()) if self.writes else x

    def matmul(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        """x [M, K] times the transpose of the named weight [N, K], with its scale and bias: [M, N]."""
        return matmul(weights, name, x, self.product)

    def project(self, weights: Weights, norm: str, names: Iterable[str], x: Tensor) -> list[Tensor]:
        """x [M, E], normalized, times the transpose of each of the named weights."""
        x = self.keep(rms_norm(x, weights[norm], self.config.rms_norm_eps))
        return [self.matmul(weights, name, x) for name in names]

    def add(self, weights: Weights, name: str, h: Tensor, x: Tensor) -> Tensor:
        """The residual connection: x plus h times the transpose of the named weight."""
        return self.keep(x + self.matmul(weights, name, self.keep(h)))

    def heads(self, weights: Weights, layer: str, x: Tensor) -> Tensor:
        """x [M, E] to the queries, keys and values of all heads, [M, H + G + G, D], not yet rotated."""
        c = self.config
        projected = self.project(weights, layer + "attention_norm", _stored(weights, layer, "qkv", "q", "k", "v"), x)
        heads = torch.cat(projected, -1) if len(projected) > 1 else projected[0]
        heads = heads.unflatten(-1, (-1, c.head_dim))
        if not c.qk_norm:
            return heads
        q, k, v = self.split(heads)
        q = rms_norm(q, weights[layer + "q_norm"], c.rms_norm_eps)
        k = rms_norm(k, weights[layer + "k_norm"], c.rms_norm_eps)
        return torch.cat([q, k, v], 1)

    def split(self, heads: Tensor) -> tuple[Tensor, ...]:
        return heads.split((self.config.num_attention_heads, *[self.config.num_key_value_heads] * 2), 1)

    def gated(self, weights: Weights, layer: str, x: Tensor) -> Tensor:
        """The gated half of the MLP: x [M, E] to silu(gate) * up [M, intermediate_size]."""
        projected = self.project(weights, layer + "mlp_norm", _stored(weights, layer, "gate_up", "gate", "up"), x)
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)
        return F.silu(gate) * up

    def layers(
        self, weights: Weights, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, positions: Tensor, *rest: Tensor
    ) -> Tensor:
        for i in range(self.config.num_hidden_layers):
            layer = f"layers.{i}."
            heads = self.heads(weights, layer, x)
            h = self.attend(heads, cos, sin, cache[2 * i], cache[2 * i + 1], positions, *rest)
            x = self.add(weights, layer + "o", h, x)
            x = self.add(weights, layer + "down", self.gated(weights, layer, x), x)
        return x

    def logits(self, weights: Weights, x: Tensor) -> Tensor:
        """x [M, E] to logits [M, V], in float32."""
        return self.project(weights, "norm", ["head"], x)[0].float()

    def attend(self, heads: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        """Rotate queries and keys to their positions, then attention: to [M, H * D]."""
        q, k, v = self.split(heads)
        return self.attention(self.keep(rotate(q, cos, sin)), rotate(k, cos, sin), v, *rest)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        raise TypeError("Decoder has two phases: use Prefill or Decode")

    def embed(self, weights: Weights, tokens: Tensor) -> Tensor:
        return self.keep(weights["embedding"][tokens])


class Prefill(Decoder):
    """Prompts [B, T] of `lengths` [B] tokens, filled up on the right, to the logits [B, V] of each one's last token.

    What fills a prompt up does no harm: attention looks only back, and decode overwrites each entry that it left in
    the cache before reading there.
    """

    def forward(self, weights: Weights, tokens: Tensor, lengths: Tensor, cache: Cache) -> Tensor:
        batch, length = tokens.shape
        x = self.embed(weights, tokens.flatten())
        tables = weights["rope.cos"][:length], weights["rope.sin"][:length]
        cos, sin = (table[None].expand(batch, -1, -1).flatten(0, 1)[:, None] for table in tables)
        x = self.layers(weights, x, cos, sin, cache, torch.arange(length, device=x.device))
        last = x.unflatten(0, (batch, length))[torch.arange(batch, device=x.device), lengths - 1]
        return self.logits(weights, last)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        keys[:, :, positions] = self.sequences(k, keys)
        values[:, :, positions] = self.sequences(v, keys)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = (x[:, :, None].expand(-1, -1, group, -1).flatten(1, 2) for x in (k, v))  # [B * T, H, D]
        q, k, v = (self.sequences(x, keys) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def sequences(self, x: Tensor, keys: Tensor) -> Tensor:
        """[B * T, H, D] to [B, H, T, D], for the B of a cache."""
        return x.unflatten(0, (keys.shape[0], -1)).transpose(1, 2)


class Decode(Decoder):
    """One step: tokens [B] at positions [B] to logits [B, V].

    span [n] holds 0 .. n-1 for an n past every position: attention reads n cache entries, no more.
    """

    def forward(self, weights: Weights, tokens: Tensor, positions: Tensor, span: Tensor, cache: Cache) -> Tensor:
        x = self.embed(weights, tokens)
        cos, sin = weights["rope.cos"][positions, None], weights["rope.sin"][positions, None]
        hidden = span[None] > positions[:, None]  # [B, n]: entries that lie in the future, or in no sequence
        x = self.layers(weights, x, cos, sin, cache, positions, hidden)
        return self.logits(weights, x)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *rest: Tensor
    ) -> Tensor:
        """Grouped heads read their keys and values directly, as products and sums that the compiler fuses."""
        (hidden,) = rest
        batch, (_, kv_heads, _, size) = q.shape[0], keys.shape
        rows = torch.arange(batch, device=q.device)
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        n = hidden.shape[1]
        k, v = keys[:, :, None, :n], values[:, :, None, :n]  # [B, G, 1, n, D]
        q = q.view(batch, kv_heads, -1, 1, size)  # [B, G, H/G, 1, D]
        scores = (q.float() * k.float()).sum(-1) * size**-0.5  # [B, G, H/G, n]
        weights = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
        return (weights[..., None] * v.float()).sum(-2).to(q.dtype).flatten(1)


def _stored(weights: Weights, layer: str, joined: str, *parts: str) -> list[str]:
    """The joined projection if the engine joined their weights, else each."""
    together = f"{layer}{joined}.weight" in weights or f"{layer}{joined}.packed" in weights
    return [layer + joined] if together else [layer + part for part in parts]


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


def pack(weight: Tensor) -> Tensor | None:
    """[N, K] to blocks [N/P, K, P], of words [N/P, K/4, P] (see `_as_words`); None where P does not divide N.

    P is 8 for 32-bit weights and words with AVX2, a register's sums (float32), and 16 else: a register's with AVX-512,
    two registers' for 16-bit weights with AVX2, and untried on other processors.
    """
    columns = weight.view(torch.float32) if _as_words(weight) else weight
    rows = 8 if columns.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
    if len(weight) % rows:
        return None
    return columns.view(len(weight) // rows, rows, -1).permute(0, 2, 1).contiguous()


def rope_tables(config: ModelConfig, length: int, dtype: torch.dtype) -> Weights:
    """cos and sin [length, D] for every position; the sign of `rotate`'s first half is in sin.

    Formulas: RoFormer (Su et al. 2021); "linear" divides positions; "llama3" is Llama 3.1's frequency scaling.
    """
    rope, size = config.rope, config.head_dim
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "llama3":
        frequencies = _llama3_frequencies(frequencies, rope)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
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
