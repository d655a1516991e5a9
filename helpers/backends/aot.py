"""The `aot` backend: an ahead-of-time engine by PyTorch's AOTInductor.

Build: the decoder is exported once a phase and batch size and compiled to native code, a shared library in each
.pt2 file. Run: the libraries, one set of weights and one KV cache; no Python model, no compiler.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hardware, llama, models, store
from ..errors import BuildError, EngineCorrupt
from ..inspection import EngineReport, InductorRecorder, write_report
from ..progress import Progress
from ..recipe import BuildRecipe
from .base import Engine, load_tokenizer

WEIGHTS = "weights.safetensors"
PACKED = "packed.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative difference between a compiled graph's logits and the same graph run by PyTorch, one step.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
MAX_NUM_TOKENS = 8192  # that one prefill on a GPU takes from all prompts together: TensorRT-LLM's default
SMALL_BATCH = 4  # up to here a generated product reads the weights as fast as a library's, and fuses


def compute_dtype(recipe: BuildRecipe, device: str) -> torch.dtype:
    """The type of activations and KV cache: the recipe's; for int8 weights fp32 on a CPU, bf16 on a GPU."""
    if recipe.precision == "int8":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return DTYPES[recipe.precision]


def product_form(recipe: BuildRecipe, device: str, batch: int) -> str:
    """Which form of the matrix product a decode graph gets (see llama.matmul)."""
    if recipe.optimization_level == 0 or not recipe.fusion.kernels:
        return "library"
    if device == "cuda":
        return "rows" if batch == 1 else "library"
    if batch > SMALL_BATCH:
        return "library"
    return "rows" if recipe.optimization_level == 1 else "packed"


def prefills_batches(recipe: BuildRecipe, device: str) -> bool:
    """One prompt already fills a CPU; a GPU reads several in hardly more time than one, by a graph of their own."""
    return device == "cuda" and recipe.max_batch_size > 1


def decode_class(recipe: BuildRecipe, config: models.ModelConfig, device: str, batch: int) -> type[llama.Decode]:
    """Level 3 takes kernels of our own on a GPU, where the model's sizes are such that they fit (gpu_kernels.py)."""
    power_of_two = config.head_dim >= 16 and config.head_dim & (config.head_dim - 1) == 0
    words = config.hidden_size % 4 == 0 and config.intermediate_size % 4 == 0
    if device == "cpu" or recipe.optimization_level < 3 or not recipe.fusion.kernels or not (power_of_two and words):
        return llama.Decode
    from .. import llama_gpu

    return llama_gpu.GpuDecodeOne if batch == 1 else llama_gpu.GpuDecode


def inductor_options(recipe: BuildRecipe, device: str, threads: int, module: llama.Decoder) -> dict[str, Any]:
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
    generated = type(module) is llama.Decode and module.product == "rows"
    if device == "cuda" and generated and recipe.optimization_level >= 2:
        options["coordinate_descent_tuning"] = True  # tries block sizes of the generated products on this GPU
    return options


def estimate(recipe: BuildRecipe, config: models.ModelConfig, device: str) -> tuple[float, int]:
    """About how many seconds a build takes, and how many bytes the engine: told to the user before it starts."""
    graphs = len(recipe.decode_batch_sizes) + 1 + prefills_batches(recipe, device)
    per_graph = 8 + 2.2 * config.num_hidden_layers
    bytes_per_weight = 1 if recipe.precision == "int8" else compute_dtype(recipe, device).itemsize
    copies = 2 if any(product_form(recipe, device, b) == "packed" for b in recipe.decode_batch_sizes) else 1
    return graphs * per_graph, copies * config.parameter_count() * bytes_per_weight + graphs * 3_000_000


def build(recipe: BuildRecipe, checkpoint: models.Checkpoint, folder: Path, progress: Progress) -> dict[str, Any]:
    """Compile into `folder`; returns what the manifest keeps for loading. Raises BuildError."""
    hardware.compiler()
    device = hardware.resolve_device(recipe.device)
    config = checkpoint.config
    dtype = compute_dtype(recipe, device)
    with progress.phase("load weights"):
        weights = _convert(recipe, checkpoint, device, dtype)
        threads = recipe.num_threads or hardware.default_threads(_bytes(weights))
    with progress.phase("save weights"):
        _save_weights(weights, folder)
    graphs: dict[str, dict[str, Any]] = {}
    report = EngineReport("aot", [], [])
    for name, module, arguments, varies in _graphs(recipe, config, device, dtype):
        needed = _weights_for(module, weights)
        recorder = InductorRecorder(name)
        with progress.phase(f"export {name}"), torch.no_grad():
            dims = (dict.fromkeys(needed), *varies[:-1], [varies[-1]] * (2 * config.num_hidden_layers))
            program = torch.export.export(module, (needed, *arguments), dynamic_shapes=dims, strict=False)
        with progress.phase(f"compile {name}"):
            options = inductor_options(recipe, device, threads, module) | {"_post_fusion_custom_pass": recorder}
            _compile(program, folder / f"{name}.pt2", options)
        with progress.phase(f"verify {name}"), torch.no_grad():
            _verify(folder / f"{name}.pt2", module, needed, arguments, dtype)
        graphs[name] = {"weights": list(needed), "product": module.product}
        report.operations.extend(recorder.operations)
        report.kernels.extend(recorder.kernels)
        report.removed.extend(recorder.removed())
    write_report(report, folder)
    return {"graphs": graphs, "num_threads": threads, "compute_dtype": str(dtype).removeprefix("torch.")}


def load(folder: Path, manifest: dict[str, Any], tokenizer_folder: Path | None = None) -> AotEngine:
    return AotEngine(folder, manifest)


class AotEngine(Engine):
    """The compiled graphs, one set of weights, one KV cache for max_batch_size sequences."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        from safetensors.torch import load_file

        recipe = store.recipe_of(folder)
        checkpoint = models.Checkpoint(folder.name, folder, dummy=False)
        config = checkpoint.config
        super().__init__(recipe, load_tokenizer(folder), checkpoint.eos_token_ids(), config.vocab_size)
        details = manifest["details"]
        self.device = manifest["identity"]["recipe"]["device"]
        self.weights = load_file(folder / WEIGHTS, device=self.device)
        if (folder / PACKED).exists():
            self.weights |= load_file(folder / PACKED, device=self.device)
        _alias_head(self.weights)
        dtype = getattr(torch, details["compute_dtype"])
        self.cache = _empty_cache(recipe, config, self.device, dtype)
        self.span = torch.arange(recipe.max_seq_len, device=self.device)
        self.graphs = {name: _load_graph(folder / f"{name}.pt2") for name in details["graphs"]}
        self.graph_weights = {
            name: [self.weights[w] for w in graph["weights"]] for name, graph in details["graphs"].items()
        }
        self.num_threads = details["num_threads"]
        self.asynchronous = self.device == "cuda"
        self.lengths: list[int] = []
        self.steps: dict[int, DecodeStep] = {}
        if self.device == "cuda":
            self.steps = {size: CudaGraphStep(self, size) for size in recipe.decode_batch_sizes}
        else:
            self.steps = {size: DecodeStep(self, size) for size in recipe.decode_batch_sizes}

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.lengths = [len(p) for p in prompts]
        with self._own_threads():
            rows = [self._prefill(slot, prompts[slot : slot + count]) for slot, count in self._groups(prompts)]
        for step in self.steps.values():
            step.start(self.lengths)
        return torch.cat(rows)

    def _groups(self, prompts: list[list[int]]) -> Iterator[tuple[int, int]]:
        """Which prompts one prefill takes, as their first and their number. Where they are neighbours of much the
        same length, little is spent on what fills the shorter ones up."""
        first = 0
        while first < len(prompts):
            count = longest = 0
            for prompt in prompts[first:]:
                longest = max(longest, len(prompt))
                if count and ("prefill_batch" not in self.graphs or (count + 1) * longest > MAX_NUM_TOKENS):
                    break
                count += 1
            yield first, count
            first += count

    def _prefill(self, slot: int, prompts: list[list[int]]) -> Tensor:
        """Logits [B, V]; keys and values go to the slots from `slot` on."""
        cache = self._slots(slot, slot + len(prompts))
        lengths = [len(prompt) for prompt in prompts]
        width = max(2, *lengths)  # the graphs take two tokens or more
        tokens = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=self.device)
        ends = torch.tensor(lengths, device=self.device)
        return self._execute("prefill" if len(prompts) == 1 else "prefill_batch", [tokens, ends, *cache])

    @contextlib.contextmanager
    def _own_threads(self) -> Iterator[None]:
        """The library products of prefill use as many threads as the generated code was compiled for."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads if self.device == "cpu" else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def decode(self, tokens: Tensor) -> Tensor:
        batch = len(self.lengths)
        step = self.steps[min(size for size in self.steps if size >= batch)]
        logits = step(tokens, self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:batch]

    def fetch(self, tokens: Tensor) -> Callable[[], list[int]]:
        if self.device != "cuda":
            return super().fetch(tokens)
        host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return wait

    def release(self) -> None:
        self.steps, self.graphs, self.graph_weights, self.weights, self.cache = {}, {}, {}, {}, []
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _slots(self, first: int, end: int) -> list[Tensor]:
        return [c[first:end] for c in self.cache]

    def _execute(self, graph: str, arguments: list[Tensor]) -> Tensor:
        return self.graphs[graph].run([*self.graph_weights[graph], *arguments])[0]


class DecodeStep:
    """One decode graph on a CPU: attention reads as many cache entries as the longest sequence has."""

    def __init__(self, engine: AotEngine, size: int):
        self.run, self.size, self.span = engine._execute, size, engine.span
        self.graph, self.cache = f"decode_b{size}", engine._slots(0, size)
        self.tokens = torch.zeros(size, dtype=torch.long, device=engine.device)
        self.positions = torch.zeros(size, dtype=torch.long, device=engine.device)

    def start(self, lengths: list[int]) -> None:
        """A new batch: the next token of sequence b goes to position lengths[b]; rows without one start over."""
        self.positions.zero_()
        if len(lengths) <= self.size:
            self.positions[: len(lengths)] = torch.tensor(lengths)

    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        self.tokens[: len(lengths)] = tokens
        span = self.span[: max(2, max(lengths) + 1)]
        logits = self.run(self.graph, [self.tokens, self.positions, span, *self.cache])
        self.positions += 1
        return logits


class CudaGraphStep(DecodeStep):
    """The same recorded as one CUDA graph: a step is a single launch. Its shapes are fixed, so attention reads
    the whole cache and masks what is not there yet."""

    def __init__(self, engine: AotEngine, size: int):
        super().__init__(engine, size)
        stream = _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside the recording, so that lazy initialization is not in it
            self.run(self.graph, [self.tokens, self.positions, self.span, *self.cache])
        torch.cuda.current_stream().wait_stream(stream)
        self.recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recording):
            self.logits = self.run(self.graph, [self.tokens, self.positions, self.span, *self.cache])
            self.positions += 1

    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        self.tokens[: len(lengths)].copy_(tokens)
        self.recording.replay()
        return self.logits


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all engines: cuBLAS keeps a workspace (32 MiB on Hopper) for every stream it has seen, for good."""
    return torch.cuda.Stream()


def _convert(recipe: BuildRecipe, checkpoint: models.Checkpoint, device: str, dtype: torch.dtype) -> llama.Weights:
    config = checkpoint.config
    weights: llama.Weights = {}
    joined = {"qkv": recipe.fusion.qkv, "gate_up": recipe.fusion.gate_up}
    int8 = recipe.precision == "int8"
    for name, tensor in llama.convert(models.tensors(checkpoint), config, dtype, int8=int8, **joined):
        weights[name] = tensor.to(device)
    weights |= {k: v.to(device) for k, v in llama.rope_tables(config, recipe.max_seq_len, dtype).items()}
    _alias_head(weights)
    if any(product_form(recipe, device, size) == "packed" for size in recipe.decode_batch_sizes):
        for name in [n for n in weights if n.endswith(".weight")]:
            packed = llama.pack(weights[name])
            if packed is not None:
                weights[name.removesuffix("weight") + "packed"] = packed
    return weights


def _alias_head(weights: llama.Weights) -> None:
    weights.setdefault("head.weight", weights["embedding"])  # tied embeddings


def _weights_for(module: llama.Decoder, weights: llama.Weights) -> llama.Weights:
    """The weights that this graph reads: the packed copy or the plain one, not both."""
    if module.product != "packed":
        return {k: v for k, v in weights.items() if not k.endswith(".packed")}
    return {k: v for k, v in weights.items() if not (k.endswith(".weight") and k[:-6] + "packed" in weights)}


def _save_weights(weights: llama.Weights, folder: Path) -> None:
    from safetensors.torch import save_file

    packed = {k: v for k, v in weights.items() if k.endswith(".packed")}
    tied = weights["head.weight"] is weights["embedding"]
    left_out = {*packed, "head.weight"} if tied else {*packed}
    save_file({k: v for k, v in weights.items() if k not in left_out}, folder / WEIGHTS)
    if packed:
        save_file(packed, folder / PACKED)


def _empty_cache(recipe: BuildRecipe, config: models.ModelConfig, device: str, dtype: torch.dtype) -> llama.Cache:
    """One entry more than max_seq_len: slices of it then never cover it whole, which export would special-case."""
    shape = (recipe.max_batch_size, config.num_key_value_heads, recipe.max_seq_len + 1, config.head_dim)
    return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]


def _graphs(
    recipe: BuildRecipe, config: models.ModelConfig, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, llama.Decoder, tuple[Any, ...], tuple[Any, ...]]]:
    """Each graph to compile: name, module, example arguments after the weights, and which of their lengths vary."""
    cache = _empty_cache(recipe, config, device, dtype)
    writes = recipe.fusion.kernels
    length = torch.export.Dim("length", min=2, max=max(3, recipe.max_input_len))
    prefill = llama.Prefill(config, "library", writes)
    tokens = torch.ones(2, min(5, recipe.max_seq_len - 1), dtype=torch.long, device=device)
    ends = torch.tensor([tokens.shape[1], 2], device=device)
    yield "prefill", prefill, (tokens[:1], ends[:1], [c[:1] for c in cache]), ({1: length}, None, None)
    if prefills_batches(recipe, device):
        batch = {0: torch.export.Dim("batch", min=2, max=max(3, recipe.max_batch_size))}
        yield "prefill_batch", prefill, (tokens, ends, [c[:2] for c in cache]), (batch | {1: length}, batch, batch)
    span = torch.arange(recipe.max_seq_len, device=device)
    for size in recipe.decode_batch_sizes:
        phase = decode_class(recipe, config, device, size)
        module = phase(config, product_form(recipe, device, size), writes)
        tokens = torch.ones(size, dtype=torch.long, device=device)
        if device == "cuda":
            reads, varies = span, None
        else:
            reads = span[: min(5, recipe.max_seq_len)]
            varies = {0: torch.export.Dim("span", min=2, max=recipe.max_seq_len)}
        arguments = (tokens, torch.zeros_like(tokens), reads, [c[:size] for c in cache])
        yield f"decode_b{size}", module, arguments, (None, None, varies, None)


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
            fix="Run 'python -m helpers doctor'; the full message is in this error's __cause__.",
        ) from error


def _load_graph(path: Path) -> Any:
    """The compiled library itself, without importing the compiler (that alone would take seconds and 100 MB)."""
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    except RuntimeError as error:
        raise EngineCorrupt(
            f"The compiled graph {path.name} cannot be loaded: {str(error).splitlines()[0]}",
            cause="It was built with another version of torch, or on another machine.",
            fix="Remove the engine and build it again.",
        ) from error


def _verify(path: Path, module: torch.nn.Module, needed: llama.Weights, arguments: tuple, dtype: torch.dtype) -> None:
    """Run the compiled graph beside the same graph in PyTorch: its logits must agree within the type's rounding."""
    cache = arguments[-1]
    expected = module(needed, *arguments)
    got = _load_graph(path).run([*needed.values(), *arguments[:-1], *cache])[0]
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[dtype]:
        raise BuildError(
            f"The compiled graph {path.stem} computes something else: logits are off by {error:.2g} of their largest.",
            cause="A fault of the compiler, or weights that are not finite numbers.",
            fix="Build with optimization_level=0, and check the checkpoint's weights.",
        )


def _bytes(weights: llama.Weights) -> int:
    return sum(w.numel() * w.element_size() for name, w in weights.items() if not name.endswith(".packed"))
