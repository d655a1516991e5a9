"""Which graphs an `aot` engine has, the module that each is compiled from, and the shapes that it is exported with."""

from __future__ import annotations

from typing import Any

import torch

from helpers.backends.aot.products import Decode, Prefill
from helpers.model import llama
from helpers.model.config import ModelConfig
from helpers.model.weights import Weights
from helpers.recipe import BuildRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREFILL_BATCH = 8  # prompts that a GPU reads at once, if they have no more than MAX_NUM_TOKENS tokens together
MAX_NUM_TOKENS = 8192  # TensorRT-LLM's default
SMALL_BATCH = 4  # up to here a generated product reads the weights as fast as a library's, and fuses


def compute_dtype(recipe: BuildRecipe, device: str) -> torch.dtype:
    """The type of activations and KV cache: the recipe's; for int8 weights fp32 on a CPU, bf16 on a GPU."""
    if recipe.precision == "int8":
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


def product_form(recipe: BuildRecipe, device: str, batch: int) -> str:
    """Which form of the matrix product a decode graph gets (see products.matmul)."""
    if recipe.optimization_level == 0 or not recipe.fusion.kernels:
        return "library"
    if device == "cuda":
        return "rows" if batch == 1 else "library"
    if batch > SMALL_BATCH:
        return "library"
    return "rows" if recipe.optimization_level == 1 else "packed"


def packs(recipe: BuildRecipe, device: str) -> bool:
    """Whether the engine keeps a packed copy of its weights."""
    return any(product_form(recipe, device, size) == "packed" for size in recipe.all_decode_batch_sizes)


def graph_module(name: str, recipe: BuildRecipe, config: ModelConfig, device: str) -> Prefill | Decode:
    size = sequences(name)
    if name.startswith("prefill"):
        return Prefill(config, "library", recipe.fusion.kernels)
    kind = _decode_class(recipe, config, device, size)
    return kind(config, product_form(recipe, device, size), recipe.fusion.kernels)


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


def weights_for(module: Prefill | Decode, weights: Weights) -> Weights:
    """The weights that this graph reads: the packed copy or the plain one, not both."""
    if module.product != "packed":
        return {k: v for k, v in weights.items() if not k.endswith(".packed")}
    return {k: v for k, v in weights.items() if not (k.endswith(".weight") and k[:-6] + "packed" in weights)}


def empty_cache(
    recipe: BuildRecipe, config: ModelConfig, device: str, dtype: torch.dtype, sequences: int
) -> llama.Cache:
    """One entry more than max_seq_len: slices of it then never cover it whole, which export would special-case."""
    shape = (sequences, config.num_key_value_heads, recipe.max_seq_len + 1, config.head_dim)
    return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]


def export(name: str, module: Prefill | Decode, recipe: BuildRecipe, needed: Weights, cache: llama.Cache) -> Any:
    """The graph as torch.export sees it. On a CPU, and in prefill, one length stays open.

    torch.export takes an open length's bounds literally and treats the lengths 0 and 1 as special, so an open length
    runs from 2 to at least 3, and the example lies between. A prefill that would run from 2 to 2 has a fixed length.
    """
    size, device = len(cache[0]), cache[0].device
    numbers = torch.zeros(size, dtype=torch.long, device=device)
    example: tuple[torch.Tensor, ...]
    varies: list[dict[int, Any] | None]
    if name.startswith("prefill"):
        length = max(2, min(5, recipe.max_input_len))
        example = numbers[:, None].repeat(1, length), numbers + 2
        most = recipe.max_input_len
        varies = [{1: torch.export.Dim("length", min=2, max=most)} if most > 2 else None, None]
    else:
        span = torch.arange(recipe.max_seq_len, device=device)
        example = numbers, numbers.clone(), span if device.type == "cuda" else span[:5]
        open_span = {0: torch.export.Dim("span", min=2, max=recipe.max_seq_len)}
        varies = [None, None, None if device.type == "cuda" else open_span]
    shapes = (dict.fromkeys(needed), *varies, [None] * len(cache))
    with torch.no_grad():
        return torch.export.export(module, (needed, *example, cache), dynamic_shapes=shapes, strict=False)
