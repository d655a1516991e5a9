"""Which graphs an `aot` engine has, the module that each is compiled from, and the shapes that it is exported with.

A graph of few layers is compiled whole. Of a deeper model's, a run of a few layers is compiled once and called once for
each such run, since its layers differ in nothing but their weights; what follows the layers is compiled beside it.
Where the products of prefill are generated too, which takes long, a run is one layer: of a prompt, calls do not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from helpers.backends.aot.products import TILE, Decode, Prefill
from helpers.model import llama
from helpers.model.config import ModelConfig
from helpers.model.weights import Weights
from helpers.recipe import BuildRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHT_BITS = {"int8": 8, "int4": 4}  # weight-only precisions
PREFILL_BATCH = 8  # prompts that a GPU reads at once, if they have no more than MAX_NUM_TOKENS tokens together
MAX_NUM_TOKENS = 8192  # TensorRT-LLM's default
SMALL_BATCH = 4  # up to here a product over weights as they are stored is as fast as a library's, and fuses
# On a CPU. Each layer more takes seconds to compile; each call more takes a decode step some microseconds.
LAYERS_OF_A_WHOLE_GRAPH = 8  # a model of up to so many layers is compiled whole
LAYERS_OF_A_RUN = 6  # a deeper one in runs of at most so many


def compute_dtype(recipe: BuildRecipe, device: str) -> torch.dtype:
    """The type of activations and KV cache: the recipe's; for int8 and int4 weights fp32 on a CPU, bf16 on a GPU."""
    if recipe.precision in WEIGHT_BITS:
        return torch.bfloat16 if device == "cuda" else torch.float32
    return DTYPES[recipe.precision]


def graph_names(recipe: BuildRecipe, device: str) -> list[str]:
    """All graphs of the engine. The number after _b is how many sequences the graph takes."""
    together = prefill_batch(recipe, device)
    reads = ["prefill", f"prefill_b{together}"] if together > 1 else ["prefill"]
    return [*reads, *(f"decode_b{size}" for size in recipe.all_decode_batch_sizes)]


def prefill_batch(recipe: BuildRecipe, device: str) -> int:
    """How many prompts are read at once, beside single ones. One fills a CPU; a GPU takes little longer for several."""
    if device == "cpu":
        return 1
    return max(1, min(PREFILL_BATCH, recipe.max_batch_size, MAX_NUM_TOKENS // recipe.max_input_len))


def packs(recipe: BuildRecipe, device: str) -> bool:
    """Whether the engine's weights are packed: then all of its graphs read them so (see products.matmul)."""
    return device == "cpu" and recipe.optimization_level >= 2 and recipe.fusion.kernels


def prefill_width(recipe: BuildRecipe, device: str, longest: int) -> int:
    """How many tokens a prompt is filled up to: whole tiles, and two of them at least."""
    tile = prefill_tile(recipe, device)
    return tile * max(2, math.ceil(longest / tile))


def prefill_tile(recipe: BuildRecipe, device: str) -> int:
    """How many tokens of a prompt a product takes at once."""
    return TILE if packs(recipe, device) else 1


def cache_length(recipe: BuildRecipe, device: str) -> int:
    """How many positions an engine has: max_seq_len, or more where the longest prompt is filled up to more."""
    return max(recipe.max_seq_len, prefill_width(recipe, device, recipe.max_input_len))


def graph_module(name: str, recipe: BuildRecipe, config: ModelConfig, device: str) -> Prefill | Decode:
    fused, size = recipe.fusion.kernels, sequences(name)
    product = "packed" if packs(recipe, device) else "library"
    if name.startswith("prefill"):
        return Prefill(config, product, fused)
    if product == "library" and recipe.optimization_level > 0 and fused:
        product = "rows" if size <= (1 if device == "cuda" else SMALL_BATCH) else "library"
    return _decode_class(recipe, config, device, size)(config, product, fused)


def sequences(name: str) -> int:
    """How many sequences a graph takes."""
    return int(name.partition("_b")[2] or 1)


def _decode_class(recipe: BuildRecipe, config: ModelConfig, device: str, batch: int) -> type[Decode]:
    """Level 3 takes kernels of our own on a GPU, where the model's sizes are such that they fit (gpu_kernels.py)."""
    power_of_two = config.head_dim >= 16 and config.head_dim & (config.head_dim - 1) == 0
    words = config.hidden_size % 4 == 0 and config.intermediate_size % 4 == 0
    if device == "cpu" or recipe.optimization_level < 3 or not recipe.fusion.kernels or not (power_of_two and words):
        return Decode
    from helpers.backends.aot import gpu_decoder

    return gpu_decoder.GpuDecodeOne if batch == 1 else gpu_decoder.GpuDecode


def empty_cache(
    recipe: BuildRecipe, config: ModelConfig, device: str, dtype: torch.dtype, sequences: int
) -> llama.Cache:
    """One entry more than needed: slices of it then never cover it whole, which export would special-case."""
    shape = (sequences, config.num_key_value_heads, cache_length(recipe, device) + 1, config.head_dim)
    return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]


@dataclass(frozen=True)
class Part:
    """What becomes one compiled library: a graph, or a part of it that may be called several times in one step.

    calls   for each call, the names of the weights that it reads, in the order of the library's inputs
    inputs  examples of what it takes after the weights
    varies  which of their lengths stay open, as torch.export's dynamic_shapes has it
    """

    file: str
    module: nn.Module
    calls: list[list[str]]
    inputs: tuple[Any, ...]
    varies: tuple[Any, ...]

    def export(self, weights: Weights) -> Any:
        """The first call as torch.export sees it."""
        needed = {name: weights[name] for name in self.calls[0]}
        shapes = (dict.fromkeys(needed), *self.varies)
        with torch.no_grad():
            return torch.export.export(self.module, (needed, *self.inputs), dynamic_shapes=shapes, strict=False)


class Run(nn.Module):
    """A run of layers: x [B, T, E] in prefill, [B, E] in decode, to the same."""

    def __init__(self, phase: Prefill | Decode):
        super().__init__()
        self.phase: Any = phase

    def forward(self, weights: Weights, x: Tensor, numbers: list[Tensor], cache: llama.Cache) -> Tensor:
        return self.phase.through(weights, x.flatten(0, -2), *numbers, cache).view_as(x)


class End(nn.Module):
    """What follows the layers: x to logits [B, V]."""

    def __init__(self, phase: Prefill | Decode):
        super().__init__()
        self.phase: Any = phase

    def forward(self, weights: Weights, x: Tensor, numbers: list[Tensor]) -> Tensor:
        return self.phase.end(weights, x, *numbers)


def parts_of(name: str, recipe: BuildRecipe, config: ModelConfig, weights: Weights, cache: llama.Cache) -> list[Part]:
    """The whole graph, or two parts: a run of layers, called once for each run, and what follows the last one."""
    device = cache[0].device.type
    module = graph_module(name, recipe, config, device)
    (tokens, *numbers), (of_tokens, *of_numbers) = _example(name, recipe, cache)
    layers = layers_of_a_run(module, device, weights)
    if layers == config.num_hidden_layers:
        varies = (of_tokens, *of_numbers, [None] * len(cache))
        return [Part(name, module, [list(weights)], (tokens, *numbers, cache), varies)]
    run = graph_module(name, recipe, replace(config, num_hidden_layers=layers), device)
    behind = [key for key in weights if key == "norm" or key.startswith("head.")]
    rope = [key for key in weights if key.startswith("rope.")]
    calls = [
        rope + [_in_layer(at + _layer(key), key) for key in weights if -1 < _layer(key) < layers]
        for at in range(0, config.num_hidden_layers, layers)
    ]
    x = module.embed(weights, tokens)
    positions, of_positions = (numbers, of_numbers) if isinstance(module, Decode) else ([], [])
    lengths, of_lengths = ([], []) if isinstance(module, Decode) else (numbers, of_numbers)
    own = cache[: 2 * layers]
    return [
        Part(name, Run(run), calls, (x, positions, own), (of_tokens, of_positions, [None] * len(own))),
        Part(f"{name}.end", End(module), [behind], (x, lengths), (of_tokens, of_lengths)),
    ]


def layers_of_a_run(module: Prefill | Decode, device: str, weights: Weights) -> int:
    """All, unless compiling one run for several saves time, and they differ in nothing but the numbers."""
    count = module.config.num_hidden_layers
    single = isinstance(module, Prefill) and module.product == "packed"
    whole, most = (1, 1) if single else (LAYERS_OF_A_WHOLE_GRAPH, LAYERS_OF_A_RUN)
    if device == "cuda" or count <= whole:
        return count
    kinds: list[list[tuple]] = [[] for _ in range(count)]
    for key, weight in weights.items():
        if (layer := _layer(key)) >= 0:
            kinds[layer].append((_in_layer(0, key), weight.shape, weight.dtype))
    if any(kind != kinds[0] for kind in kinds):
        return count
    return max(size for size in range(1, most + 1) if count % size == 0)


def _layer(weight: str) -> int:
    """Which layer a weight belongs to, by its name; -1 for those of none."""
    return int(weight.split(".")[1]) if weight.startswith("layers.") else -1


def _in_layer(layer: int, weight: str) -> str:
    """The name of the same weight in another layer."""
    return f"layers.{layer}.{weight.split('.', 2)[2]}"


def _example(name: str, recipe: BuildRecipe, cache: llama.Cache) -> tuple[list[Tensor], list[Any]]:
    """What a graph takes between its weights and its cache, and which lengths of it stay open: on a CPU, and in
    prefill, one.

    torch.export takes an open length's bounds literally and treats the lengths 0 and 1 as special, so an open length
    runs from 2 to at least 3, and the example lies between. A prefill that would run from 2 to 2 has a fixed length.
    """
    size, device = len(cache[0]), cache[0].device
    numbers = torch.zeros(size, dtype=torch.long, device=device)
    if name.startswith("prefill"):
        tile = prefill_tile(recipe, device.type)
        most = prefill_width(recipe, device.type, recipe.max_input_len) // tile
        length = torch.export.Dim("tiles", min=2, max=most) if most > 2 else None
        if length and tile > 1:
            length = tile * length
        return [numbers[:, None].repeat(1, tile * min(5, most)), numbers + 2], [{1: length} if length else None, None]
    span = torch.arange(recipe.max_seq_len, device=device)
    if device.type == "cuda":
        return [numbers, numbers.clone(), span], [None, None, None]
    return [numbers, numbers.clone(), span[:5]], [
        None,
        None,
        {0: torch.export.Dim("span", min=2, max=recipe.max_seq_len)},
    ]
