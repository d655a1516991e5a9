"""The `aot` backend: an ahead-of-time engine by PyTorch's AOTInductor.

Build: the decoder is exported once a phase and batch size and compiled to native code, a shared library in each
.pt2 file (compile.py). Run: engine.py.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from helpers.backends.aot.compile import (
    PACKED,
    WEIGHTS,
    alias_head,
    compile_graph,
    compute_dtype,
    graph_names,
    product_form,
)
from helpers.backends.aot.engine import AotEngine
from helpers.backends.aot.products import pack
from helpers.backends.base import source_digest
from helpers.backends.report import EngineReport, write_report
from helpers.errors import EngineMismatch, WorkerError
from helpers.machine import hardware
from helpers.machine.worker import Worker
from helpers.model.checkpoint import Checkpoint, ModelConfig, read_tensors
from helpers.model.weights import Weights, convert, rope_tables
from helpers.paths import PROJECT
from helpers.progress import Progress
from helpers.recipe import BuildRecipe

# A change in these files, or in this folder, changes what is compiled, so it makes earlier engines another engine's.
MODEL_SOURCES = [PROJECT / "helpers" / "model" / f"{name}.py" for name in ("checkpoint", "llama", "weights")]
COMPILER = "helpers.backends.aot.compile"
COMPILE_LIMIT = 3600.0  # seconds for one graph


def check_available() -> None:
    """It runs wherever PyTorch does."""


def identity(recipe: BuildRecipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """Native code depends on the processor or GPU, its vector instructions, and the versions of its libraries."""
    machine = hardware.describe(recipe.device)
    return {
        "recipe": {"device": machine.device, "decode_batch_sizes": list(recipe.all_decode_batch_sizes)},
        "architecture": machine.architecture,
        "device_name": machine.name if machine.device == "cuda" else "",
        "instructions": " ".join(machine.instructions),
        "versions": hardware.versions(),
        "source": source_digest(Path(__file__).parent, *MODEL_SOURCES),
    }


def check_machine(name: str, identity: dict[str, Any]) -> None:
    """EngineMismatch where the engine's native code cannot run."""
    machine = hardware.describe(identity["recipe"]["device"])
    missing = set(identity["instructions"].split()) - set(machine.instructions)
    if machine.device == "cpu" and missing:
        raise EngineMismatch(
            f"Engine {name!r} may use the instructions {', '.join(sorted(missing))}; this processor has none.",
            cause="It was compiled for all that the processor of its build could do.",
            fix="Build the recipe again here: build(recipe).",
        )
    built_for = {"architecture": identity["architecture"], **identity["versions"]}
    here = {"architecture": machine.architecture, **hardware.versions()}
    for key in ("architecture", "torch", "cuda"):
        if built_for.get(key) != here.get(key):
            raise EngineMismatch(
                f"Engine {name!r} was built for {key} {built_for.get(key)}; this machine has {here.get(key)}.",
                cause="An engine is compiled for one architecture and one version of its libraries.",
                fix="Build the recipe again here: build(recipe).",
            )


def load(recipe: BuildRecipe, folder: Path, manifest: dict[str, Any]) -> AotEngine:
    return AotEngine(recipe, folder, manifest)


def estimate(recipe: BuildRecipe, config: ModelConfig, device: str) -> tuple[float, int]:
    """About how many seconds a build takes, and how many bytes the engine: told to the user before it starts."""
    graphs = len(graph_names(recipe, device))
    bytes_per_weight = 1 if recipe.precision == "int8" else compute_dtype(recipe, device).itemsize
    copies = 2 if any(product_form(recipe, device, b) == "packed" for b in recipe.all_decode_batch_sizes) else 1
    size = copies * config.parameter_count() * bytes_per_weight
    rounds = math.ceil(graphs / _jobs(graphs, size, device))
    return rounds * (8 + 2.2 * config.num_hidden_layers), size + graphs * 3_000_000


def build(recipe: BuildRecipe, checkpoint: Checkpoint, folder: Path, progress: Progress) -> dict[str, Any]:
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
    names = graph_names(recipe, device)
    jobs = _jobs(len(names), _bytes(weights), device)
    if jobs == 1:
        compiled = [compile_graph(n, recipe, config, device, threads, weights, folder, progress) for n in names]
    else:
        with progress.phase(f"compile {len(names)} graphs, {jobs} at a time"):
            asked = {"recipe": recipe.to_dict(), "device": device, "threads": threads, "folder": str(folder)}
            asked["compile_threads"] = max(1, hardware.free_cores() // jobs)
            compiled = _compile_side_by_side(names, jobs, asked)
    report = EngineReport("aot", [], [])
    for _, part in compiled:
        report.operations.extend(part.operations)
        report.kernels.extend(part.kernels)
        report.removed.extend(part.removed)
    write_report(report, folder)
    graphs = {name: entry for name, (entry, _) in zip(names, compiled, strict=True)}
    return {"graphs": graphs, "num_threads": threads, "compute_dtype": str(dtype).removeprefix("torch.")}


def _jobs(graphs: int, weight_bytes: int, device: str) -> int:
    """How many graphs to compile at a time: each takes a core and more, the weights, and about 1.5 GB beside them."""
    most = min(graphs, hardware.free_cores() // 2, int(hardware.free_memory() / (1.5e9 + weight_bytes)))
    if device == "cuda":
        most = min(most, int(torch.cuda.mem_get_info()[0] / (1e9 + weight_bytes)))
    return max(1, most)


def _compile_side_by_side(
    names: list[str], jobs: int, asked: dict[str, Any]
) -> list[tuple[dict[str, Any], EngineReport]]:
    """Each graph in a process of its own, since the compiler is a single thread of Python for most of its time."""
    running: list[Worker] = []
    stopped = threading.Event()

    def one(name: str) -> tuple[dict[str, Any], EngineReport]:
        with Worker(COMPILER) as worker:
            running.append(worker)
            if stopped.is_set():
                raise WorkerError("The build was stopped.")
            answer = worker.call("compile", name=name, time_limit=COMPILE_LIMIT, **asked)
        return answer["entry"], EngineReport.from_dict(answer["report"])

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(one, names))
        except BaseException:  # the user's interrupt too: nothing may go on compiling
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in running:
                worker.kill()
            raise


def _convert(recipe: BuildRecipe, checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Weights:
    config = checkpoint.config
    weights: Weights = {}
    joined = {"qkv": recipe.fusion.qkv, "gate_up": recipe.fusion.gate_up}
    int8 = recipe.precision == "int8"
    for name, tensor in convert(read_tensors(checkpoint), config, dtype, int8=int8, **joined):
        weights[name] = tensor.to(device)
    weights |= {k: v.to(device) for k, v in rope_tables(config, recipe.max_seq_len, dtype).items()}
    alias_head(weights)
    if any(product_form(recipe, device, size) == "packed" for size in recipe.all_decode_batch_sizes):
        for name in [n for n in weights if n.endswith(".weight")]:
            packed = pack(weights[name])
            if packed is not None:
                weights[name.removesuffix("weight") + "packed"] = packed
    return weights


def _save_weights(weights: Weights, folder: Path) -> None:
    from safetensors.torch import save_file

    packed = {k: v for k, v in weights.items() if k.endswith(".packed")}
    tied = weights["head.weight"] is weights["embedding"]
    left_out = {*packed, "head.weight"} if tied else {*packed}
    save_file({k: v for k, v in weights.items() if k not in left_out}, folder / WEIGHTS)
    if packed:
        save_file(packed, folder / PACKED)


def _bytes(weights: Weights) -> int:
    return sum(w.numel() * w.element_size() for name, w in weights.items() if not name.endswith(".packed"))
