"""The decoder's decode step as a GPU runs it best: see gpu_kernels.py for why and how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from helpers.backends.aot import gpu_kernels
from helpers.backends.aot.products import Decode
from helpers.model.llama import Cache, scale_and_bias
from helpers.model.weights import Weights


class GpuDecode(Decode):
    """Several sequences: attention is our kernel, a product ours or the library's, the rest is the compiler's."""

    def through(self, weights: Weights, x: Tensor, positions: Tensor, span: Tensor, cache: Cache) -> Tensor:
        cos, sin = weights["rope.cos"], weights["rope.sin"]  # whole: the kernel looks up its position's row
        return self.layers(weights, x, cos, sin, cache, positions)

    def attend(self, heads: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        return gpu_kernels.decode_attention(self.keep(heads.flatten(1)), cos, sin, *rest)

    def matmul(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        if not gpu_kernels.skinny(x, weight):
            return super().matmul(weights, name, x)
        return scale_and_bias(weights, name, gpu_kernels.split_matmul(x, weight).sum(0)).to(x.dtype)


class GpuDecodeOne(GpuDecode):
    """One sequence: each product is a kernel of ours too, with the norm, activation or sum beside it."""

    def project(self, weights: Weights, norm: str, names: Iterable[str], x: Tensor) -> list[Tensor]:
        return [self.product_of(weights, name, x, norm=weights[norm]) for name in names]

    def gated(self, weights: Weights, layer: str, x: Tensor) -> Tensor:
        name = f"{layer}gate_up"
        if f"{name}.weight" not in weights:  # the recipe keeps the two apart
            return super().gated(weights, layer, x)
        return self.product_of(weights, name, x, norm=weights[f"{layer}mlp_norm"], gated=True)

    def add(self, weights: Weights, name: str, h: Tensor, x: Tensor) -> Tensor:
        return self.product_of(weights, name, h, residual=x)

    def product_of(
        self,
        weights: Weights,
        name: str,
        x: Tensor,
        *,
        norm: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        scales_and_bias = (weights.get(f"{name}.{kind}") for kind in ("scale", "step", "least", "bias"))
        eps = self.config.rms_norm_eps
        return gpu_kernels.matvec(x, weights[f"{name}.weight"], *scales_and_bias, norm, eps, residual, gated)
