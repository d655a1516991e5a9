"""The Llama-family decoder as two ONNX graphs, prefill and decode, for TensorRT.

The modules are those of llama.py. What differs: an engine's inputs and outputs are plain buffers, so the graphs read
the KV cache as inputs and return the new entries as outputs, and whoever runs them writes those into the cache. And
the weights are constants of the graph, since TensorRT lays them out anew, joins and narrows them while it builds.

Shapes: B sequences, T prompt tokens, S cache length, G KV heads, D head size, V vocabulary, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import llama, models, onnx_export
from .models import ModelConfig

PREFILL, DECODE = "prefill", "decode"


def cache_names(config: ModelConfig) -> list[str]:
    """k0, v0, k1, v1, ...: the decode graph's cache inputs. The outputs with the new entries are new_k0, ..."""
    return [f"{kind}{layer}" for layer in range(config.num_hidden_layers) for kind in "kv"]


def input_names(config: ModelConfig, graph: str) -> list[str]:
    return ["tokens"] if graph == PREFILL else ["tokens", "positions", *cache_names(config)]


def output_names(config: ModelConfig) -> list[str]:
    return ["logits", *(f"new_{name}" for name in cache_names(config))]


class _Graph(llama.Decoder):
    """A phase with its weights as buffers. `new` collects the cache entries that the layers make."""

    def __init__(self, config: ModelConfig, weights: llama.Weights):
        super().__init__(config, "library", materialize=False)
        self.names = list(weights)
        for name, tensor in weights.items():
            self.register_buffer(_buffer(name), tensor)
        self.new: list[Tensor] = []

    def weights(self) -> llama.Weights:
        return {name: getattr(self, _buffer(name)) for name in self.names}

    def logits(self, x: Tensor, weights: llama.Weights) -> Tensor:
        return llama.matmul(weights, "head", x, "library").float()


class OnnxPrefill(_Graph):
    """tokens [1, T] to the logits [1, V] of the last one, and each layer's keys and values [1, G, T, D]."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        weights, length = self.weights(), tokens.shape[1]
        self.new = []
        cos, sin = weights["rope.cos"][:length, None], weights["rope.sin"][:length, None]
        unused: Any = [None] * (2 * self.config.num_hidden_layers)  # prefill starts from an empty cache
        x = self.layers(weights, self.embed(weights, tokens[0]), cos, sin, unused, tokens)
        return self.logits(x[-1:], weights), *self.new

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *unused: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or G, T, D]
        self.new += [k, v]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


class OnnxDecode(_Graph):
    """tokens [B] at positions [B] and the cache (2L of [B, G, S, D]) to logits [B, V] and new entries [B, G, 1, D].

    Every step reads all S cache entries and masks those that lie in the future: the shapes stay the same, which
    TensorRT's kernels and a CUDA graph want.
    """

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> tuple[Tensor, ...]:
        weights = self.weights()
        self.new = []
        cos, sin = weights["rope.cos"][positions, None], weights["rope.sin"][positions, None]
        span = torch.arange(cache[0].shape[2])
        here = (span == positions[:, None])[:, None, :, None]  # [B, 1, S, 1]: the entry that this step makes
        visible = (span <= positions[:, None])[:, None, None]  # [B, 1, 1, S]
        x = self.layers(weights, self.embed(weights, tokens), cos, sin, cache, positions, here, visible)
        return self.logits(x, weights), *self.new

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *masks: Tensor
    ) -> Tensor:
        here, visible = masks
        k, v = k[:, :, None], v[:, :, None]  # [B, G, 1, D]
        self.new += [k, v]
        keys, values = torch.where(here, k, keys), torch.where(here, v, values)
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=visible, enable_gqa=True)
        return out[:, :, 0].flatten(1)


def load_weights(checkpoint: models.Checkpoint, dtype: torch.dtype, length: int) -> llama.Weights:
    """The decoder's weights and rope tables for `length` positions. TensorRT joins the projections by itself."""
    config = checkpoint.config
    weights = dict(llama.convert(models.tensors(checkpoint), config, dtype, int8=False, qkv=False, gate_up=False))
    weights.setdefault("head.weight", weights["embedding"])  # tied embeddings
    return weights | llama.rope_tables(config, length, dtype)


def export(
    graph: str,
    config: ModelConfig,
    weights: llama.Weights,
    path: Path,
    *,
    cache_length: int,
    batch_sizes: tuple[int, ...],
) -> None:
    """Write one phase as ONNX. With one batch size, decode's shapes are all fixed; with several, the batch varies."""
    inputs: tuple[Any, ...]
    shapes: Any = None
    varies = {0: torch.export.Dim.AUTO}
    if graph == PREFILL:
        module: _Graph = OnnxPrefill(config, weights)
        inputs, shapes = (torch.ones(1, min(5, cache_length - 1), dtype=torch.long),), ({1: torch.export.Dim.AUTO},)
    else:
        module = OnnxDecode(config, weights)
        batch = max(batch_sizes)
        tokens = torch.ones(batch, dtype=torch.long)
        size = (batch, config.num_key_value_heads, cache_length, config.head_dim)
        cache = [torch.zeros(size, dtype=weights["embedding"].dtype) for _ in cache_names(config)]
        inputs = (tokens, torch.zeros_like(tokens), cache)
        if len(batch_sizes) > 1:
            shapes = (varies, varies, [varies] * len(cache))
    onnx_export.write(module, inputs, path, shapes, input_names(config, graph), output_names(config))


def profiles(
    graph: str, config: ModelConfig, max_input_len: int, cache_length: int, batch_sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Least, likely and greatest shape of every input that varies; for decode one profile a batch size."""
    if graph == PREFILL:
        return [{"tokens": ((1, 1), (1, max(1, max_input_len // 2)), (1, max_input_len))}]
    if len(batch_sizes) == 1:
        return []
    heads, size = config.num_key_value_heads, config.head_dim
    found = []
    for batch in batch_sizes:
        shapes: dict[str, tuple[int, ...]] = {"tokens": (batch,), "positions": (batch,)}
        shapes |= dict.fromkeys(cache_names(config), (batch, heads, cache_length, size))
        found.append({name: (shape, shape, shape) for name, shape in shapes.items()})
    return found


def _buffer(name: str) -> str:
    """A buffer's name may hold no dot."""
    return name.replace(".", "__")
