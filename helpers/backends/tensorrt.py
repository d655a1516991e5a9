"""The `tensorrt` backend: a language model as two TensorRT engines, one for each phase.

Build: prefill and decode as ONNX graphs (llama_onnx.py), compiled in a worker process (tensorrt_builder.py). That
works on any Linux or Windows machine. Each plan file holds the weights, laid out for its phase: twice the bytes.

Run: torch's CUDA tensors hold the KV cache, inputs and outputs; one execution context a profile; decode is recorded
as a CUDA graph. TensorRT for RTX runs on compute capabilities 8.0, 8.6, 8.9 and 12.x, and none of these was at hand:
the side of the GPU is written against TensorRT's interface and was not run by us. Its host side is tested with a
stand-in for the execution context.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import llama_onnx, models, onnx_export, store, tensorrt_api, tensorrt_builder
from ..errors import BackendUnavailable, EngineMismatch, LimitError, RecipeError, WorkerError
from ..inspection import EngineReport, write_report
from ..progress import Progress
from ..recipe import BuildRecipe
from ..tensorrt_options import Options, make_options
from .base import Engine, load_tokenizer

GRAPHS = (llama_onnx.PREFILL, llama_onnx.DECODE)
CALIBRATION = 32  # prompt tokens that fp8's scales are measured with


def options_of(recipe: BuildRecipe) -> Options:
    """The builder's settings from a recipe; RecipeError for what a language model fixes itself."""
    for name in ("profiles", "mark_outputs", "precision_flags"):
        if name in recipe.options:
            raise RecipeError(
                f"Recipe option {name!r} is for single modules: a language model settles it itself.",
                fix="Leave it out, or use tensorrt_builder.build_module.",
            )
    off = [name for name, on in vars(recipe.fusion).items() if not on]
    if off:
        raise RecipeError(
            f"TensorRT has no switch for fusion.{off[0]}: it decides by itself what it merges.",
            fix="Leave the fusion options on, or see mark_outputs of tensorrt_builder.build_module.",
        )
    return make_options({"optimization_level": recipe.optimization_level, **recipe.options})


def estimate(recipe: BuildRecipe, config: models.ModelConfig, device: str) -> tuple[float, int]:
    """About how many seconds a build takes, and how many bytes the engine: two plans, each with the weights."""
    weights = {"int8": 1.0, "int4": 0.6, "fp8": 1.0}.get(recipe.precision)
    size = weights or onnx_export.compute_dtype(recipe.precision).itemsize
    total = 2 * config.parameter_count() * size + 2_000_000
    return 3 + 14 * total / 1e9, int(total)  # on 2 cores: 4 s for the bundled model, 65 s for TinyLlama's shape


def build(recipe: BuildRecipe, checkpoint: models.Checkpoint, folder: Path, progress: Progress) -> dict[str, Any]:
    """Compile both phases into `folder`; returns what the manifest keeps for loading. Raises BuildError."""
    settings = options_of(recipe)
    version = tensorrt_builder.provider_version(settings.provider)
    config = checkpoint.config
    report = EngineReport("tensorrt", [], [])
    graphs: dict[str, Any] = {}
    sizes = recipe.decode_batch_sizes
    with (
        tempfile.TemporaryDirectory(prefix=".onnx-", dir=store.root()) as temporary,
        tensorrt_builder.start_worker() as worker,
    ):
        work = Path(temporary)
        limits: dict[str, Any] = {"cache_length": recipe.max_seq_len, "batch_sizes": sizes}
        if recipe.precision == "fp8":
            with progress.phase("calibrate"):
                limits["largest"] = _calibrate(checkpoint, recipe, work, limits)
        with progress.phase("write weights"):
            weights = llama_onnx.write_weights(checkpoint, recipe.precision, recipe.max_seq_len, work)
        for graph in GRAPHS:
            with progress.phase(f"write {graph}"):
                file = llama_onnx.write(graph, config, weights, work, precision=recipe.precision, **limits)
                model = onnx_export.read(file, weights=False)
            shapes = llama_onnx.profiles(graph, config, recipe.max_input_len, recipe.max_seq_len, sizes)
            chosen = make_options({**vars(settings), "profiles": shapes})
            plan = folder / f"{graph}.plan"
            parts, graphs[graph] = tensorrt_builder.plan_from_onnx(worker, model, file, plan, chosen, progress)
            report.operations.extend(parts[0])
            report.kernels.extend(parts[1])
            report.removed.extend(parts[2])
        memory = worker.call("memory")
    write_report(report, folder)
    return {
        "kind": "language model",
        "provider": settings.provider,
        "version": version,
        "runs_on": tensorrt_builder.runs_on(settings),
        "compute_dtype": str(onnx_export.compute_dtype(recipe.precision)).removeprefix("torch."),
        "builder_peak_bytes": int(memory),
        "graphs": graphs,
    }


def load(folder: Path, manifest: dict[str, Any]) -> TensorRTEngine:
    """The engine, ready to run, or the error that TensorRT refuses it with, in its own words.

    It is loaded in a worker first: what native code cannot bear, the notebook does not see.
    """
    details = manifest["details"]
    if details["kind"] != "language model":
        raise EngineMismatch(
            f"Engine {folder.name!r} holds a module, not a language model, so it answers no prompts.",
            fix="Look inside with inspect(folder), or try it with tensorrt_builder.load_plan(folder).",
        )
    tensorrt_builder.load_plan(folder)
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "TensorRT can load this engine here, and this PyTorch cannot reach the GPU.",
            cause="It is a build of PyTorch for CPUs.",
            fix="Install PyTorch for CUDA: the engine's inputs and outputs are its tensors.",
        )
    return TensorRTEngine(folder, manifest, _contexts(folder, manifest), "cuda")


class TensorRTEngine(Engine):
    """Both engines' execution contexts and one KV cache for max_batch_size sequences.

    contexts: "prefill" and "decode_b1", "decode_b4", ... with TensorRT's IExecutionContext interface. device: where
    the tensors lie; the tests' stand-in reads them from the CPU.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], contexts: dict[str, Any], device: str):
        recipe = store.recipe_of(folder)
        checkpoint = models.Checkpoint(folder.name, folder, dummy=False)
        config = checkpoint.config
        super().__init__(recipe, load_tokenizer(folder), checkpoint.eos_token_ids(), config.vocab_size)
        self.config, self.device, self.contexts = config, device, contexts
        dtype = getattr(torch, manifest["details"]["compute_dtype"])
        shape = (recipe.max_batch_size, config.num_key_value_heads, recipe.max_seq_len, config.head_dim)
        self.cache = {name: torch.zeros(shape, dtype=dtype, device=device) for name in llama_onnx.cache_names(config)}
        self.batch = 0
        self.steps = {size: DecodeStep(self, size) for size in recipe.decode_batch_sizes}

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.batch = len(prompts)
        rows = []
        for slot, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt], device=self.device)
            made = self.new_outputs(1, len(prompt))
            self.execute("prefill", {"tokens": tokens}, made)
            for name, entries in self.cache.items():
                entries[slot, :, : len(prompt)] = made[f"new_{name}"][0]
            rows.append(made["logits"][0])
        for step in self.steps.values():
            step.start([len(p) for p in prompts])
        return torch.stack(rows)

    def decode(self, tokens: Tensor) -> Tensor:
        size = min(size for size in self.steps if size >= self.batch)
        return self.steps[size](tokens)[: self.batch]

    def new_outputs(self, batch: int, length: int) -> dict[str, Tensor]:
        """Buffers for the logits [B, V] and the new cache entries [B, G, length, D]."""
        shape = (batch, self.config.num_key_value_heads, length, self.config.head_dim)
        made = {"logits": torch.empty(batch, self.vocab_size, device=self.device)}
        return made | {f"new_{name}": entries.new_empty(shape) for name, entries in self.cache.items()}

    def execute(self, context: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Tell a context its shapes and addresses, and start it on torch's stream."""
        running = self.contexts[context]
        for name, tensor in inputs.items():
            if not running.set_input_shape(name, tuple(tensor.shape)):
                raise LimitError(
                    f"TensorRT refuses the shape {tuple(tensor.shape)} for {name!r}: it lies outside the profile.",
                    cause="Kernels and memory were chosen for the shapes between the profile's least and greatest.",
                    fix="Ask for less, or build with larger limits.",
                )
        for name, tensor in (inputs | outputs).items():
            running.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        if not running.execute_async_v3(stream):
            raise WorkerError(
                f"TensorRT could not start {context!r}.", cause="See the messages above.", fix="Load the engine again."
            )

    def release(self) -> None:
        self.steps, self.contexts, self.cache = {}, {}, {}
        if self.device == "cuda":
            torch.cuda.empty_cache()


class DecodeStep:
    """One decode step for a batch size, its buffers at fixed addresses; on a GPU recorded as a CUDA graph."""

    def __init__(self, engine: TensorRTEngine, size: int):
        self.engine, self.size, self.name = engine, size, f"decode_b{size}"
        self.tokens = torch.zeros(size, dtype=torch.long, device=engine.device)
        self.positions = torch.zeros_like(self.tokens)
        self.rows = torch.arange(size, device=engine.device)
        self.cache = {name: entries[:size] for name, entries in engine.cache.items()}
        self.made = engine.new_outputs(size, 1)
        self.recording: Any = None
        if engine.device == "cuda":
            self._record()

    def start(self, lengths: list[int]) -> None:
        """A new batch: the next token of sequence b goes to position lengths[b]; rows without one start at 0."""
        self.positions.zero_()
        if len(lengths) <= self.size:
            self.positions[: len(lengths)] = torch.tensor(lengths, device=self.positions.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens[: len(tokens)].copy_(tokens)
        if self.recording is None:
            self._run()
        else:
            self.recording.replay()
        return self.made["logits"]

    def _run(self) -> None:
        self.engine.execute(self.name, {"tokens": self.tokens, "positions": self.positions, **self.cache}, self.made)
        for name, entries in self.cache.items():
            entries[self.rows, :, self.positions] = self.made[f"new_{name}"][:, :, 0]
        self.positions += 1

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside the recording: TensorRT finishes its kernels at the first run
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recording):
            self._run()


def _contexts(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """One execution context a profile. A context keeps its engine alive."""
    trt = tensorrt_api.load_provider(manifest["details"]["provider"])
    found: dict[str, Any] = {}
    for graph in GRAPHS:
        engine, log = tensorrt_api.deserialize(trt, folder / f"{graph}.plan")
        if engine is None:
            raise tensorrt_api.explain(log.errors(), f"Engine {folder.name!r} cannot be loaded.")
        sizes = store.recipe_of(folder).decode_batch_sizes
        names = ["prefill"] if graph == llama_onnx.PREFILL else [f"decode_b{size}" for size in sizes]
        for profile, name in enumerate(names):
            found[name] = engine.create_execution_context()
            found[name].set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return found


def _calibrate(
    checkpoint: models.Checkpoint, recipe: BuildRecipe, work: Path, limits: dict[str, Any]
) -> dict[str, float]:
    """fp8's scales of activations, from a fixed random prompt: they depend little on the text."""
    weights = llama_onnx.write_weights(checkpoint, "fp16", recipe.max_seq_len, work)
    file = llama_onnx.write(llama_onnx.PREFILL, checkpoint.config, weights, work, precision="fp16", **limits)
    generator = torch.Generator().manual_seed(0)
    length = min(CALIBRATION, recipe.max_input_len)
    tokens = torch.randint(checkpoint.config.vocab_size, (1, length), generator=generator).numpy()
    found = onnx_export.calibrate(onnx_export.read(file), {"tokens": tokens})
    return {**found, "head.weight": found.get("head.weight", found.get("embedding", 0.0))}  # a tied embedding
