"""The weights of an `aot` engine: converted from a checkpoint, packed for the CPU's products, saved and read again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from helpers.backends.aot.graphs import WEIGHT_BITS, cache_length, compute_dtype, packs
from helpers.backends.aot.products import pack
from helpers.model.checkpoint import opened
from helpers.model.config import ModelConfig, expected_shapes
from helpers.model.weights import INT4, Weights, convert, rope_tables
from helpers.recipe import BuildRecipe

WEIGHTS = "weights.safetensors"


def convert_weights(
    recipe: BuildRecipe, tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, device: str
) -> Weights:
    """A checkpoint's tensors in the recipe's precision, as the decoder reads them: all but the rope tables."""
    weights: Weights = {}
    joined = {"qkv": recipe.fusion.qkv, "gate_up": recipe.fusion.gate_up}
    dtype, bits = compute_dtype(recipe, device), WEIGHT_BITS.get(recipe.precision)
    for name, tensor in convert(tensors, config, dtype, bits=bits, **joined):
        weights[name] = tensor if tensor.is_meta else tensor.to(device)
    weights.setdefault("head.weight", weights["embedding"])  # tied embeddings
    return weights


def packed(weights: Weights, recipe: BuildRecipe, device: str) -> Weights:
    """The same as the graphs read them: where the recipe has it so, each product's weights give way to their packed
    form. Memory need not hold all of both."""
    if not packs(recipe, device):
        return weights
    for owner in [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]:
        if blocks := pack(weights, owner):
            for kind in INT4:
                weights.pop(f"{owner}.{kind}", None)
            weights |= blocks
    return weights


def stored_bytes(recipe: BuildRecipe, config: ModelConfig, device: str) -> tuple[int, int]:
    """Bytes of the weights that an engine will have, and of those that a decode step leaves alone but for single rows.

    Counted, not estimated, by converting tensors that have a shape and no content."""
    shapes = expected_shapes(config).items()
    empty = ((name, torch.empty(shape, dtype=torch.float32, device="meta")) for name, shape in shapes)
    weights = packed(convert_weights(recipe, empty, config, device), recipe, device)
    rope = 2 * cache_length(recipe, device) * config.head_dim * compute_dtype(recipe, device).itemsize
    tables = rope + (0 if _head_is_embedding(weights) else weights["embedding"].nbytes)
    return sum(weight.nbytes for weight in _without_alias(weights).values()) + rope, tables


def save_weights(weights: Weights, recipe: BuildRecipe, config: ModelConfig, device: str, folder: Path) -> None:
    from safetensors.torch import save_file

    rope = rope_tables(config, cache_length(recipe, device), weights["norm"].dtype)
    save_file(_without_alias(weights) | rope, folder / WEIGHTS)


def read_weights(folder: Path, device: str) -> Weights:
    """What was saved, on the device."""
    with opened(folder / WEIGHTS, device) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a dict)
    if "head.weight.packed" not in weights:
        weights.setdefault("head.weight", weights["embedding"])
    return weights


def _without_alias(weights: Weights) -> Weights:
    """A head that is the embedding is kept once."""
    left_out = "head.weight" if _head_is_embedding(weights) else ""
    return {name: weight for name, weight in weights.items() if name != left_out}


def _head_is_embedding(weights: Weights) -> bool:
    return weights.get("head.weight") is weights["embedding"]
