"""The weights of an `aot` engine: converted from a checkpoint, packed for the CPU's products, saved and read again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from helpers.backends.aot.graphs import WEIGHT_BITS, compute_dtype, packs
from helpers.backends.aot.products import pack
from helpers.model.checkpoint import opened
from helpers.model.config import ModelConfig, expected_shapes
from helpers.model.weights import Weights, convert, rope_tables
from helpers.recipe import BuildRecipe

WEIGHTS = "weights.safetensors"
PACKED = "packed.safetensors"


def convert_weights(
    recipe: BuildRecipe, tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, device: str
) -> Weights:
    """All that the graphs read, from a checkpoint's tensors, but the rope tables."""
    weights: Weights = {}
    joined = {"qkv": recipe.fusion.qkv, "gate_up": recipe.fusion.gate_up}
    dtype, bits = compute_dtype(recipe, device), WEIGHT_BITS.get(recipe.precision)
    for name, tensor in convert(tensors, config, dtype, bits=bits, **joined):
        weights[name] = tensor if tensor.is_meta else tensor.to(device)
    _alias_head(weights)
    if packs(recipe, device):
        for name in [n for n in weights if n.endswith(".weight")]:
            weights |= pack(weights, name.removesuffix(".weight"))
    return weights


def stored_bytes(recipe: BuildRecipe, config: ModelConfig, device: str) -> tuple[int, int]:
    """Bytes of the plain weights and of the packed copy that an engine will have: counted, not estimated, by
    converting tensors that have a shape and no content."""
    shapes = expected_shapes(config).items()
    empty = ((name, torch.empty(shape, dtype=torch.float32, device="meta")) for name, shape in shapes)
    plain, packed = _split(convert_weights(recipe, empty, config, device))
    rope = 2 * recipe.max_seq_len * config.head_dim * compute_dtype(recipe, device).itemsize
    return _bytes(plain) + rope, _bytes(packed)


def save_weights(weights: Weights, recipe: BuildRecipe, config: ModelConfig, folder: Path) -> None:
    from safetensors.torch import save_file

    plain, packed = _split(weights)
    save_file(plain | rope_tables(config, recipe.max_seq_len, plain["norm"].dtype), folder / WEIGHTS)
    if packed:
        save_file(packed, folder / PACKED)


def read_weights(folder: Path, device: str) -> Weights:
    """All that a build saved, on the device."""
    weights: Weights = {}
    for path in (folder / WEIGHTS, folder / PACKED):
        if path.exists() or path.name == WEIGHTS:
            with opened(path, device) as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a dict)
    _alias_head(weights)
    return weights


def _alias_head(weights: Weights) -> None:
    weights.setdefault("head.weight", weights["embedding"])  # tied embeddings


def _split(weights: Weights) -> tuple[Weights, Weights]:
    """The plain weights and the packed copy. A head that is the embedding is kept once."""
    packed = {k: v for k, v in weights.items() if k.endswith(".packed")}
    tied = weights["head.weight"] is weights["embedding"]
    left_out = {*packed, "head.weight"} if tied else {*packed}
    return {k: v for k, v in weights.items() if k not in left_out}, packed


def _bytes(weights: Weights) -> int:
    return sum(w.numel() * w.element_size() for w in weights.values())
