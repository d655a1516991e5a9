"""The Llama-family decoder that the compilers see: Llama, Mistral, Qwen2 and Qwen3.

Two entry points, one for each phase: `Prefill` reads a whole prompt, `Decode` one token a sequence. Both update
the KV cache in place. Weights come in as arguments, so every graph compiled from here shares one set of them.

Shapes: B sequences, T prompt tokens, S cache length, E hidden size, H heads, G KV heads, D head size, V vocabulary,
I intermediate size. M rows go through the layers: B * T tokens in prefill, B in decode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.model.config import ModelConfig
from helpers.model.weights import Weights, dense, stored_names

Cache = list[Tensor]  # k0, v0, k1, v1, ...: each [B, G, S, D]


def scale_and_bias(weights: Weights, name: str, y: Tensor) -> Tensor:
    """What follows a product of int8 weights, of weights with a bias, or neither: y [M, N] stays [M, N]."""
    if f"{name}.scale" in weights:
        y = y * weights[f"{name}.scale"].to(y.dtype)
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"]
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., E] over the root of its mean square, times weight [E]. In float32, because squares overflow in fp16."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x [..., D]; cos and sin [..., D], the first half of sin already negated.

    Swapping the halves is a change of index, not a copy: it fuses into the product.
    """
    halves = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # [..., 2, D/2], swapped, [..., D]
    return (x * cos + halves * sin).to(x.dtype)


class Decoder(nn.Module):
    """What both phases share. A backend overrides `matmul` and `keep` with what suits its compiler."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def matmul(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        """x [M, K] times the transpose of the named weight [N, K], with its scale and bias: [M, N]."""
        return scale_and_bias(weights, name, F.linear(x, dense(weights, name, x.dtype)))

    def keep(self, x: Tensor) -> Tensor:
        """An intermediate that several products read: a backend may have it written to memory."""
        return x

    def project(self, weights: Weights, norm: str, names: Iterable[str], x: Tensor) -> list[Tensor]:
        """x [M, E], normalized, times the transpose of each of the named weights [N, E]: several [M, N]."""
        x = self.keep(rms_norm(x, weights[norm], self.config.rms_norm_eps))
        return [self.matmul(weights, name, x) for name in names]

    def add(self, weights: Weights, name: str, h: Tensor, x: Tensor) -> Tensor:
        """The residual connection: x [M, E] plus h [M, N] times the transpose of the named weight [E, N]: [M, E]."""
        return self.keep(x + self.matmul(weights, name, self.keep(h)))

    def heads(self, weights: Weights, layer: str, x: Tensor) -> Tensor:
        """x [M, E] to the queries, keys and values of all heads, [M, H + G + G, D], not yet rotated."""
        c = self.config
        projected = self.project(
            weights, layer + "attention_norm", stored_names(weights, layer, "qkv", "q", "k", "v"), x
        )
        heads = torch.cat(projected, -1) if len(projected) > 1 else projected[0]  # [M, (H + G + G) * D]
        heads = heads.unflatten(-1, (-1, c.head_dim))  # [M, H + G + G, D]
        if not c.qk_norm:
            return heads
        q, k, v = self.split(heads)  # [M, H, D], [M, G, D], [M, G, D]
        q = rms_norm(q, weights[layer + "q_norm"], c.rms_norm_eps)
        k = rms_norm(k, weights[layer + "k_norm"], c.rms_norm_eps)
        return torch.cat([q, k, v], 1)  # [M, H + G + G, D]

    def split(self, heads: Tensor) -> tuple[Tensor, ...]:
        """[M, H + G + G, D] to queries [M, H, D], keys [M, G, D] and values [M, G, D]."""
        return heads.split((self.config.num_attention_heads, *[self.config.num_key_value_heads] * 2), 1)

    def gated(self, weights: Weights, layer: str, x: Tensor) -> Tensor:
        """The gated half of the MLP: x [M, E] to silu(gate) * up [M, I]."""
        projected = self.project(weights, layer + "mlp_norm", stored_names(weights, layer, "gate_up", "gate", "up"), x)
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)  # [M, I] each, out of [M, 2 * I]
        return F.silu(gate) * up

    def layers(
        self, weights: Weights, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, positions: Tensor, *rest: Tensor
    ) -> Tensor:
        """x [M, E] through all layers: [M, E]. cos, sin, positions and the rest are what attention needs."""
        for i in range(self.config.num_hidden_layers):
            layer = f"layers.{i}."
            heads = self.heads(weights, layer, x)  # [M, H + G + G, D]
            h = self.attend(heads, cos, sin, cache[2 * i], cache[2 * i + 1], positions, *rest)  # [M, H * D]
            x = self.add(weights, layer + "o", h, x)
            x = self.add(weights, layer + "down", self.gated(weights, layer, x), x)
        return x

    def logits(self, weights: Weights, x: Tensor) -> Tensor:
        """x [M, E] to logits [M, V], in float32."""
        return self.project(weights, "norm", ["head"], x)[0].float()

    def attend(self, heads: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        """Rotate queries and keys to their positions, then attention: [M, H + G + G, D] to [M, H * D]."""
        q, k, v = self.split(heads)  # [M, H, D], [M, G, D], [M, G, D]
        return self.attention(self.keep(rotate(q, cos, sin)), rotate(k, cos, sin), v, *rest)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        raise TypeError("Decoder has two phases: use Prefill or Decode")

    def embed(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Token ids [M] to their rows of the embedding [V, E]: [M, E]."""
        return self.keep(weights["embedding"][tokens])


class Prefill(Decoder):
    """Prompts [B, T] of `lengths` [B] tokens, filled up on the right, to the logits [B, V] of each one's last token.

    What fills a prompt up does no harm: attention looks only back, and decode overwrites each entry that it left in
    the cache before reading there.
    """

    def forward(self, weights: Weights, tokens: Tensor, lengths: Tensor, cache: Cache) -> Tensor:
        x = self.through(weights, self.embed(weights, tokens.flatten()), cache)  # [B * T, E]
        return self.end(weights, x.unflatten(0, tokens.shape), lengths)  # [B, V]

    def through(self, weights: Weights, x: Tensor, cache: Cache) -> Tensor:
        """x [B * T, E] through the layers, for the B of the cache: [B * T, E]."""
        batch = len(cache[0])
        length = x.shape[0] // batch
        tables = weights["rope.cos"][:length], weights["rope.sin"][:length]  # [T, D]
        cos, sin = (table[None].expand(batch, -1, -1).flatten(0, 1)[:, None] for table in tables)  # [B * T, 1, D]
        return self.layers(weights, x, cos, sin, cache, torch.arange(length, device=x.device))

    def end(self, weights: Weights, x: Tensor, lengths: Tensor) -> Tensor:
        """x [B, T, E] after the layers to the logits [B, V] of each prompt's last token."""
        return self.logits(weights, x[torch.arange(len(x), device=x.device), lengths - 1])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """q [B * T, H, D], k and v [B * T, G, D], cache [B, G, S, D], positions [T]: to [B * T, H * D]."""
        keys[:, :, positions] = self.sequences(k, keys)  # [B, G, T, D]
        values[:, :, positions] = self.sequences(v, keys)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = (x[:, :, None].expand(-1, -1, group, -1).flatten(1, 2) for x in (k, v))  # [B * T, H, D]
        q, k, v = (self.sequences(x, keys) for x in (q, k, v))  # [B, H, T, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]
        return out.transpose(1, 2).flatten(2).flatten(0, 1)  # [B, T, H, D], [B, T, H * D], [B * T, H * D]

    def sequences(self, x: Tensor, keys: Tensor) -> Tensor:
        """[B * T, H, D] to [B, H, T, D], for the B of a cache."""
        return x.unflatten(0, (keys.shape[0], -1)).transpose(1, 2)


class Decode(Decoder):
    """One step: tokens [B] at positions [B] to logits [B, V].

    span [n] holds 0 .. n-1 for an n past every position: attention reads n cache entries, no more.
    """

    def forward(self, weights: Weights, tokens: Tensor, positions: Tensor, span: Tensor, cache: Cache) -> Tensor:
        x = self.through(weights, self.embed(weights, tokens), positions, span, cache)  # [B, E]
        return self.end(weights, x)  # [B, V]

    def through(self, weights: Weights, x: Tensor, positions: Tensor, span: Tensor, cache: Cache) -> Tensor:
        """x [B, E] through the layers: [B, E]."""
        cos, sin = weights["rope.cos"][positions, None], weights["rope.sin"][positions, None]  # [B, 1, D]
        hidden = span[None] > positions[:, None]  # [B, n]: entries that lie in the future, or in no sequence
        return self.layers(weights, x, cos, sin, cache, positions, hidden)

    def end(self, weights: Weights, x: Tensor) -> Tensor:
        """x [B, E] after the layers to logits [B, V]."""
        return self.logits(weights, x)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *rest: Tensor
    ) -> Tensor:
        """q [B, H, D], k and v [B, G, D], cache [B, G, S, D], positions [B], hidden [B, n]: to [B, H * D].

        Grouped heads read their keys and values directly, as products and sums that the compiler fuses.
        """
        (hidden,) = rest
        batch, (_, kv_heads, _, size) = q.shape[0], keys.shape
        rows = torch.arange(batch, device=q.device)
        keys[rows, :, positions] = k  # one entry [G, D] of each sequence
        values[rows, :, positions] = v
        n = hidden.shape[1]
        k, v = keys[:, :, None, :n], values[:, :, None, :n]  # [B, G, 1, n, D]
        q = q.view(batch, kv_heads, -1, 1, size)  # [B, G, H/G, 1, D]
        scores = (q.float() * k.float()).sum(-1) * size**-0.5  # [B, G, H/G, n]
        weights = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)  # [B, G, H/G, n]
        # What a hidden entry holds must not matter: nothing times NaN, which an earlier request may have left, is NaN.
        v = v.float().masked_fill(hidden[:, None, None, :, None], 0.0)
        out = (weights[..., None] * v).sum(-2)  # [B, G, H/G, D]
        return out.to(q.dtype).flatten(1)  # [B, H * D]
