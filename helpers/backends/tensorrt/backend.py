"""The `tensorrt` backend: a language model as two TensorRT engines, one for each phase.

Build: prefill and decode as ONNX graphs (llama_onnx.py), compiled in a worker process (builder.py). That works on any
Linux or Windows machine. Each plan file holds the weights, laid out for its phase: twice the bytes. Run: engine.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from helpers.backends.job import source_digest
from helpers.backends.report import EngineReport, write_report
from helpers.backends.tensorrt import builder, llama_onnx, onnx_export, onnx_quantize
from helpers.backends.tensorrt.engine import GRAPHS, TensorRTEngine, open_contexts
from helpers.errors import BackendUnavailable
from helpers.machine import hardware
from helpers.model.checkpoint import Checkpoint
from helpers.model.config import ModelConfig
from helpers.progress import Progress
from helpers.recipe import BuildRecipe
from helpers.recipe.tensorrt import from_recipe, make_options

CALIBRATION = 32  # prompt tokens that fp8's scales are measured with
# A change in these changes what is built.
SOURCES = (
    *("backends/tensorrt", "model/checkpoint.py", "model/config.py", "model/weights.py"),
    *("recipe/fields.py", "recipe/tensorrt.py"),
)


def check_available() -> None:
    """BackendUnavailable where TensorRT is not installed. Whether a GPU runs its engines, TensorRT says itself."""
    builder.provider_version("tensorrt_rtx")


def identity(recipe: BuildRecipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """A plan depends on TensorRT's version and the operating system, not on this machine's processor."""
    return {
        "recipe": {
            "device": hardware.resolve_device(recipe.device),
            "decode_batch_sizes": list(recipe.all_decode_batch_sizes),
        },
        **builder.machine_facts(from_recipe(recipe).provider),
        "source": source_digest(*SOURCES),
    }


def check_machine(name: str, identity: dict[str, Any]) -> None:
    """TensorRT itself judges, when it loads the engine."""


def estimate(recipe: BuildRecipe, config: ModelConfig, device: str) -> tuple[float, int, float]:
    """About how many seconds a build takes, how many bytes the engine (two plans, each with the weights), and how many
    more the build meanwhile: an ONNX model has them too."""
    weights = {"int8": 1.0, "int4": 0.6, "fp8": 1.0}.get(recipe.precision)
    size = weights or onnx_export.compute_dtype(recipe.precision).itemsize
    total = int(2 * config.parameter_count() * size) + 2_000_000
    return 3 + 14 * total / 1e9, total, total / 2  # on 2 cores: 4 s for the bundled model, 65 s for TinyLlama's shape


def build(recipe: BuildRecipe, checkpoint: Checkpoint, folder: Path, progress: Progress) -> dict[str, Any]:
    """Compile both phases into `folder`; returns what the manifest keeps for loading. Raises BuildError."""
    settings = from_recipe(recipe)
    config = checkpoint.config
    report = EngineReport("tensorrt", [], [])
    graphs: dict[str, Any] = {}
    sizes = recipe.all_decode_batch_sizes
    with (
        tempfile.TemporaryDirectory(dir=folder) as temporary,
        builder.start_worker() as worker,
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
            parts, graphs[graph] = builder.plan_from_onnx(worker, model, file, plan, chosen, progress)
            report.operations.extend(parts[0])
            report.kernels.extend(parts[1])
            report.removed.update(parts[2])
        memory = worker.call("memory")
    write_report(report, folder)
    return {
        **builder.details(settings),
        "compute_dtype": str(onnx_export.compute_dtype(recipe.precision)).removeprefix("torch."),
        "builder_peak_bytes": int(memory),
        "graphs": graphs,
    }


def load(recipe: BuildRecipe, folder: Path, manifest: dict[str, Any]) -> TensorRTEngine:
    """The engine, ready to run, or the error that TensorRT refuses it with, in its own words.

    It is loaded in a worker first: what native code cannot bear, the notebook does not see.
    """
    builder.load_plans(folder, manifest)
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "TensorRT can load this engine here, and this PyTorch cannot reach the GPU.",
            cause="It is a build of PyTorch for CPUs.",
            fix="Install PyTorch for CUDA: the engine's inputs and outputs are its tensors.",
        )
    return TensorRTEngine(recipe, folder, manifest, open_contexts(recipe, folder, manifest), "cuda")


def _calibrate(checkpoint: Checkpoint, recipe: BuildRecipe, work: Path, limits: dict[str, Any]) -> dict[str, float]:
    """fp8's scales of activations, from a fixed random prompt: they depend little on the text."""
    weights = llama_onnx.write_weights(checkpoint, "fp16", recipe.max_seq_len, work)
    file = llama_onnx.write(llama_onnx.PREFILL, checkpoint.config, weights, work, precision="fp16", **limits)
    generator = torch.Generator("cpu").manual_seed(0)
    size = 1, min(CALIBRATION, recipe.max_input_len)
    tokens = torch.randint(checkpoint.config.vocab_size, size, generator=generator, device="cpu").numpy()
    largest = onnx_quantize.calibrate(onnx_export.read(file), {"tokens": tokens})
    return {**largest, "head.weight": largest.get("head.weight", largest.get("embedding", 0.0))}  # a tied embedding
