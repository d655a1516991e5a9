"""One graph of an `aot` engine: what it computes, how it is compiled, and whether the result agrees.

A worker process can serve this module: then the graphs of an engine are compiled side by side.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from helpers.backends.aot.products import Decode, Prefill
from helpers.backends.aot.recorder import InductorRecorder
from helpers.backends.report import EngineReport
from helpers.errors import BuildError, EngineCorrupt
from helpers.machine import hardware
from helpers.model import llama
from helpers.model.checkpoint import Checkpoint, ModelConfig
from helpers.model.weights import Weights
from helpers.progress import Progress
from helpers.recipe import BuildRecipe, from_dict

WEIGHTS = "weights.safetensors"
PACKED = "packed.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative difference between a compiled graph's logits and the same graph run by PyTorch, one step.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
PREFILL_BATCH = 8  # prompts that a GPU reads at once, if they have no more than MAX_NUM_TOKENS tokens together
MAX_NUM_TOKENS = 8192  # TensorRT-LLM's default
SMALL_BATCH = 4  # up to here a generated product reads the weights as fast as a library's, and fuses


def compute_dtype(recipe: BuildRecipe, device: str) -> torch.dtype:
    """The type of activations and KV cache: the recipe's; for int8 weights fp32 on a CPU, bf16 on a GPU."""
    if recipe.precision == "int8":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return DTYPES[recipe.precision]


def product_form(recipe: BuildRecipe, device: str, batch: int) -> str:
    """Which form of the matrix product a decode graph gets (see products.matmul)."""
    if recipe.optimization_level == 0 or not recipe.fusion.kernels:
        return "library"
    if device == "cuda":
        return "rows" if batch == 1 else "library"
    if batch > SMALL_BATCH:
        return "library"
    return "rows" if recipe.optimization_level == 1 else "packed"


def prefill_batch(recipe: BuildRecipe, device: str) -> int:
    """How many prompts are read at once, beside single ones. One fills a CPU; a GPU takes little longer for several."""
    if device == "cpu":
        return 1
    return max(1, min(PREFILL_BATCH, recipe.max_batch_size, MAX_NUM_TOKENS // recipe.max_input_len))


def decode_class(recipe: BuildRecipe, config: ModelConfig, device: str, batch: int) -> type[Decode]:
    """Level 3 takes kernels of our own on a GPU, where the model's sizes are such that they fit (gpu_kernels.py)."""
    power_of_two = config.head_dim >= 16 and config.head_dim & (config.head_dim - 1) == 0
    words = config.hidden_size % 4 == 0 and config.intermediate_size % 4 == 0
    if device == "cpu" or recipe.optimization_level < 3 or not recipe.fusion.kernels or not (power_of_two and words):
        return Decode
    from helpers.backends.aot import gpu_decoder as llama_gpu

    return llama_gpu.GpuDecodeOne if batch == 1 else llama_gpu.GpuDecode


def inductor_options(recipe: BuildRecipe, device: str, threads: int, module: Prefill | Decode) -> dict[str, Any]:
    """Settings of Inductor for one graph: what the recipe's fusion options and optimization level mean to it."""
    options: dict[str, Any] = {"cpp.cxx": (None, hardware.compiler())}
    if device == "cpu":
        options["cpp.threads"] = threads
    if not recipe.fusion.kernels:
        # One kernel an operation: nothing is inlined into its consumer, nothing merged by the scheduler.
        options |= {
            "max_fusion_size": 1,
            "epilogue_fusion": False,
            "realize_reads_threshold": 0,
            "realize_opcount_threshold": 0,
            "realize_acc_reads_threshold": 0,
        }
    generated = type(module) is Decode and module.product == "rows"
    if device == "cuda" and generated and recipe.optimization_level >= 2:
        options["coordinate_descent_tuning"] = True  # tries block sizes of the generated products on this GPU
    return options


def graph_names(recipe: BuildRecipe, device: str) -> list[str]:
    """All graphs of the engine. The number after _b is how many sequences the graph takes."""
    together = prefill_batch(recipe, device)
    reads = ["prefill", f"prefill_b{together}"] if together > 1 else ["prefill"]
    return [*reads, *(f"decode_b{size}" for size in recipe.all_decode_batch_sizes)]


def empty_cache(
    recipe: BuildRecipe, config: ModelConfig, device: str, dtype: torch.dtype, sequences: int
) -> llama.Cache:
    """One entry more than max_seq_len: slices of it then never cover it whole, which export would special-case."""
    shape = (sequences, config.num_key_value_heads, recipe.max_seq_len + 1, config.head_dim)
    return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]


def read_weights(folder: Path, device: str) -> Weights:
    """All that a build saved, on the device."""
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS, device=device)
    if (folder / PACKED).exists():
        weights |= load_file(folder / PACKED, device=device)
    alias_head(weights)
    return weights


def alias_head(weights: Weights) -> None:
    weights.setdefault("head.weight", weights["embedding"])  # tied embeddings


def compile_graph(
    name: str,
    recipe: BuildRecipe,
    config: ModelConfig,
    device: str,
    threads: int,
    weights: Weights,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Any], EngineReport]:
    """Compile into `folder`: what loading has to know of the graph, and the report on it. Raises BuildError."""
    dtype = compute_dtype(recipe, device)
    module, arguments, varies = _graph(name, recipe, config, device, dtype)
    needed = _weights_for(module, weights)
    recorder = InductorRecorder(name)
    with progress.phase(f"export {name}"), torch.no_grad():
        dims = (dict.fromkeys(needed), *varies, [None] * (2 * config.num_hidden_layers))
        program = torch.export.export(module, (needed, *arguments), dynamic_shapes=dims, strict=False)
    with progress.phase(f"compile {name}"):
        options = inductor_options(recipe, device, threads, module) | {"_post_fusion_custom_pass": recorder}
        _compile(program, folder / f"{name}.pt2", options)
    with progress.phase(f"verify {name}"), torch.no_grad():
        _verify(folder / f"{name}.pt2", module, needed, arguments, dtype)
    report = EngineReport("aot", recorder.operations, recorder.kernels, recorder.removed())
    return {"weights": list(needed), "product": module.product}, report


def _compile_in_worker(
    name: str, recipe: dict[str, Any], device: str, threads: int, folder: str, compile_threads: int
) -> dict[str, Any]:
    import torch._inductor.config as inductor

    inductor.compile_threads = compile_threads  # its helper processes; it would take one for every core
    if device == "cuda":
        # Which vectors the CPU has decides nothing here. Up to PyTorch 2.12, finding out starts one Python after
        # another, each of which imports torch, in every process that compiles.
        inductor.cpp.vec_isa_ok = False
    config = Checkpoint(Path(folder).name, Path(folder), dummy=False).config
    weights = read_weights(Path(folder), device)
    with Progress("", quiet=True) as progress:
        entry, report = compile_graph(name, from_dict(recipe), config, device, threads, weights, Path(folder), progress)
    return {"entry": entry, "report": report.to_dict()}


CALLS = {"compile": _compile_in_worker}


def _graph(
    name: str, recipe: BuildRecipe, config: ModelConfig, device: str, dtype: torch.dtype
) -> tuple[Prefill | Decode, tuple[Any, ...], tuple[Any, ...]]:
    """The module, example arguments after the weights, and which of their lengths vary."""
    phase, _, number = name.partition("_b")
    size = int(number or 1)
    cache = empty_cache(recipe, config, device, dtype, size)
    if phase == "prefill":
        length = torch.export.Dim("length", min=2, max=max(3, recipe.max_input_len))
        tokens = torch.ones(size, min(5, recipe.max_seq_len - 1), dtype=torch.long, device=device)
        prefill = Prefill(config, "library", recipe.fusion.kernels)
        return prefill, (tokens, torch.full_like(tokens[:, 0], 2), cache), ({1: length}, None)
    chosen = decode_class(recipe, config, device, size)
    decode = chosen(config, product_form(recipe, device, size), recipe.fusion.kernels)
    tokens = torch.ones(size, dtype=torch.long, device=device)
    span = torch.arange(recipe.max_seq_len, device=device)
    if device == "cuda":
        return decode, (tokens, torch.zeros_like(tokens), span, cache), (None, None, None)
    varies = {0: torch.export.Dim("span", min=2, max=recipe.max_seq_len)}
    return decode, (tokens, torch.zeros_like(tokens), span[:5], cache), (None, None, varies)


def _weights_for(module: Prefill | Decode, weights: Weights) -> Weights:
    """The weights that this graph reads: the packed copy or the plain one, not both."""
    if module.product != "packed":
        return {k: v for k, v in weights.items() if not k.endswith(".packed")}
    return {k: v for k, v in weights.items() if not (k.endswith(".weight") and k[:-6] + "packed" in weights)}


def _compile(program: Any, path: Path, options: dict[str, Any]) -> None:
    from torch._inductor.exc import CppCompileError, InductorError

    try:
        with warnings.catch_warnings():
            # torch copies its own tree specs in a way that its own newer code calls outdated
            warnings.filterwarnings("ignore", message=".*treespec", category=FutureWarning)
            # it advises rounding fp32 products to TensorFloat32; here fp32 means fp32
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except (CppCompileError, InductorError) as error:
        raise BuildError(
            f"Compiling {path.stem} failed: {str(error).strip().splitlines()[0]:.300}",
            cause="The C++ compiler is too old or lacks headers, or memory ran out.",
            fix="Run 'python -m helpers doctor': it compiles something small and says what is missing.",
        ) from error


def load_graph(path: Path) -> Any:
    """The compiled library itself, without importing the compiler (that alone would take seconds and 100 MB)."""
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    except RuntimeError as error:
        raise EngineCorrupt(
            f"The compiled graph {path.name} cannot be loaded: {str(error).splitlines()[0]}",
            cause="It was built with another version of torch, or on another machine.",
            fix="Remove the engine and build it again.",
        ) from error


def _verify(path: Path, module: torch.nn.Module, needed: Weights, arguments: tuple, dtype: torch.dtype) -> None:
    """Run the compiled graph beside the same graph in PyTorch: its logits must agree within the type's rounding."""
    cache = arguments[-1]
    expected = module(needed, *arguments)
    got = load_graph(path).run([*needed.values(), *arguments[:-1], *cache])[0]
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[dtype]:
        raise BuildError(
            f"The compiled graph {path.stem} computes something else: logits are off by {error:.2g} of their largest.",
            cause="A fault of the compiler, or weights that are not finite numbers.",
            fix="Build with optimization_level=0, and check the checkpoint's weights.",
        )
