"""The backends `tensorrt_llm` and `tensorrt_llm_pytorch`: TensorRT-LLM 1.2.1, with TensorRT engines and without.

This side runs in the notebook and imports nothing of TensorRT-LLM. It starts tensorrt_llm_worker.py under the Python
that environments.python_of("trtllm") names, tells it what the recipe means in TensorRT-LLM's words, and writes the
manifest. No machine of ours could install TensorRT-LLM: this was tested by contract (tests/contract), and not run.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from helpers.backends.job import source_digest
from helpers.backends.remote import RemoteEngine, start
from helpers.backends.report import EngineReport, write_report
from helpers.backends.tensorrt import layers
from helpers.digests import file_digest
from helpers.errors import BackendUnavailable, BuildError, CourseError, EngineMismatch, InputError, ModelError
from helpers.machine import environments
from helpers.machine.worker import Worker
from helpers.model.checkpoint import Checkpoint, find_checkpoint
from helpers.model.config import ModelConfig, load_config, read_config, read_fields
from helpers.model.sampling import SamplingParams, checked
from helpers.model.tokenizer import load_tokenizer
from helpers.progress import Progress, say, shown_if_slow
from helpers.recipe import BuildRecipe
from helpers.recipe.tensorrt_llm import (
    CALIBRATED,
    CALIBRATION_FILE,
    CALIBRATION_NAME,
    calibrated,
    check_calibration,
    plugins,
    settings,
)

# A change in these changes what is built.
SOURCES = (
    *("backends/tensorrt_llm", "model/checkpoint.py", "model/config.py"),
    *("recipe/fields.py", "recipe/tensorrt_llm.py"),
)
WORKER = "helpers.backends.tensorrt_llm.worker"
FOLDER = "tensorrt_llm"  # TensorRT-LLM's own engine folder, inside ours: config.json and rank0.engine
PLAN = f"{FOLDER}/rank0.engine"
START_LIMIT_S = 300.0
BUILD_LIMIT_S = 4 * 3600.0
LOAD_LIMIT_S = 1800.0
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# llm-api examples of 1.2.1 (llm_quantization.py): FP8 goes with a KV cache in FP8.
QUANTIZATION = {
    "fp8": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    "int8": {"quant_algo": "W8A16"},
    "int4": {"quant_algo": "W4A16_AWQ"},
}


def start_worker(module: str = WORKER) -> Worker:
    """A worker in TensorRT-LLM's environment; BackendUnavailable where there is none. Nothing is imported yet."""
    return Worker(module, python=environments.need_python("trtllm"), start_limit=START_LIMIT_S)


def machine() -> dict[str, Any]:
    """Versions and GPU as TensorRT-LLM's environment sees them; asked once a session, for the import takes a while.

    Raises BackendUnavailable with cause and fix where it cannot be used.
    """
    return _machine(str(environments.python_of("trtllm")))


@cache
def _machine(python: str) -> dict[str, Any]:
    with shown_if_slow("Asking TensorRT-LLM, once in a process", "import"), start_worker() as worker:
        return worker.call("describe", time_limit=START_LIMIT_S)


def check_available() -> None:
    """Raises BackendUnavailable with cause and fix where TensorRT-LLM cannot be used: it is started once, to ask."""
    machine()


def identity(recipe: BuildRecipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """TensorRT-LLM's config.json holds its own version and no more; a plan depends on the GPU and on TensorRT too."""
    here = machine()
    texts = ""
    with contextlib.suppress(OSError, RuntimeError):  # what cannot be read is refused by the build
        file = Path(settings(recipe)["calib_dataset"]).expanduser() / CALIBRATION_FILE
        texts = file_digest(file) if calibrated(recipe) and file.is_file() else ""
    return {
        "recipe": {"device": "cuda", "decode_batch_sizes": []},
        "calibration": texts,
        "architecture": architecture(here),
        "device_name": here["gpu"],
        "versions": here["versions"],
        "source": source_digest(*SOURCES),
    }


def architecture(machine: dict[str, Any]) -> str:
    return f"sm_{machine['compute_capability'].replace('.', '')}"


def check_machine(name: str, identity: dict[str, Any]) -> None:
    """EngineMismatch, in our words, for what TensorRT would only find when it reads the plan."""
    here = machine()
    pairs = {"GPU architecture": (identity["architecture"], architecture(here))}
    for library in ("tensorrt_llm", "tensorrt"):
        pairs[library] = (identity["versions"][library], here["versions"][library])
    for what, (built_for, present) in pairs.items():
        if built_for != present:
            raise EngineMismatch(
                f"Engine {name!r} was built for {what} {built_for}; this machine has {present}.",
                cause="A plan is native code for one GPU architecture and one version of TensorRT.",
                fix="Build the recipe again here: build(recipe).",
            )
    if identity["device_name"] != here["gpu"]:
        say(f"This engine was built on {identity['device_name']}, and tuned for it; here is {here['gpu']}.")


def estimate(recipe: BuildRecipe, config: ModelConfig, device: str) -> tuple[float, int, float]:
    """About how many seconds a build takes, how many bytes the engine, and how many more the build meanwhile.

    From one report for version 0.16: 7.6 billion parameters on an H100, 9.7 s to load and 112.6 s to build (issue 2702
    of NVIDIA/TensorRT-LLM); added is half a minute for the imports.
    """
    weights = {"fp32": 4.0, "int8": 1.0, "int4": 0.55, "fp8": 1.0}.get(recipe.precision, 2.0)
    seconds = 30 + 16e-9 * config.parameter_count()
    size = int(config.parameter_count() * weights + 20e6)
    return seconds * (3 if recipe.precision in CALIBRATED else 1), size, size / 2


def build(recipe: BuildRecipe, checkpoint: Checkpoint, folder: Path, progress: Progress) -> dict[str, Any]:
    """Let TensorRT-LLM build into `folder`/tensorrt_llm; returns what the manifest keeps."""
    _check_reading(checkpoint)
    here = machine()
    _check_gpu(recipe, here["compute_capability"])
    check_calibration(recipe, checkpoint.folder)
    chosen = settings(recipe)
    engine_dir = folder / FOLDER
    with start_worker() as worker, tempfile.TemporaryDirectory(dir=folder) as workspace:
        arguments = {
            "checkpoint": str(checkpoint.folder),
            "engine_dir": str(engine_dir),
            "workspace": workspace,
            "limits": limits(recipe),
            "dtype": dtype_of(recipe),
            "quantization": _quantization(recipe),
            "calibration": _calibration(recipe),
            "plugins": plugins(recipe),
            "dummy": checkpoint.dummy,
            "fast": recipe.optimization_level == 0,
            "gather_logits": chosen["gather_generation_logits"],
            "memory_fraction": chosen["free_gpu_memory_fraction"],
        }
        seconds = _with_phases(worker, arguments, progress)
    _check_written(engine_dir)
    with progress.phase("read the layers"):
        report, inspected = layer_report(folder)
    write_report(report, folder)
    return {
        "version": here["versions"]["tensorrt_llm"],
        "dtype": dtype_of(recipe),
        "plugins": plugins(recipe),
        "layers": inspected,
        "library_seconds": seconds,
        "hardware": {
            "device": "cuda",
            "name": here["gpu"],
            "architecture": architecture(here),
            "cores": here["multiprocessors"],
            "memory_bytes": here["memory_bytes"],
        },
    }


def load(recipe: BuildRecipe, folder: Path | None = None, manifest: dict[str, Any] | None = None) -> RemoteEngine:
    """A built engine from its folder; for `tensorrt_llm_pytorch`, a recipe's model."""
    if folder is None:
        return _load_pytorch(recipe)
    chosen = settings(recipe)
    return _loaded(
        recipe,
        folder,
        load_config(folder),
        "load",
        engine_dir=str(folder / FOLDER),
        memory_fraction=chosen["free_gpu_memory_fraction"],
        gives_logits=chosen["gather_generation_logits"],
    )


def model_runner(
    recipe: BuildRecipe,
    folder: Path,
    prompts: list[list[int]],
    sampling: SamplingParams | None = None,
    *,
    cpp: bool = False,
) -> list[list[int]]:
    """TensorRT-LLM's older interface on an engine of ours: ModelRunner, or ModelRunnerCpp. Returns the answers' ids.

    In a worker of its own: close a loaded engine before, for two of them on one GPU can hang.
    """
    fraction = settings(recipe)["free_gpu_memory_fraction"]
    sampling = checked(sampling)
    if sampling.stop:
        raise InputError("ModelRunner takes no stop strings here.", fix="Use generate, or leave `stop` out.")
    fields = {**vars(sampling), "end_ids": list(load_config(folder).eos_token_ids)}
    with start_worker() as worker:
        arguments = {"prompts": prompts, "sampling": fields, "cpp": cpp, "memory_fraction": fraction}
        return worker.call("walk", time_limit=LOAD_LIMIT_S, engine_dir=str(folder / FOLDER), **arguments)


def layer_report(folder: Path) -> tuple[EngineReport, int | str]:
    """The engine's layers by TensorRT's own inspector, and how many there are; or why they could not be read.

    TensorRT-LLM's plugins are layers of their own in it, such as .../attention/qkv/PLUGIN_V2_Gemm_0. What TensorRT
    merged stands in a layer's name, its parts joined by " + "; what it removed cannot be seen from here.
    """
    try:
        with start_worker("helpers.backends.tensorrt.api") as worker:
            arguments = {"plan": str(folder / PLAN), "provider": "tensorrt", "plugins": "tensorrt_llm"}
            answer = worker.call("inspect", time_limit=LOAD_LIMIT_S, **arguments)
        engine_layers = layers.parse_inspector(answer["inspector"])
    except CourseError as error:  # the engine is fine without: minutes of building are not thrown away for a report
        say(f"The engine is built, but its layers cannot be shown: {error.what}")
        return EngineReport("tensorrt_llm", [], []), error.what
    operations, kernels = layers.by_name("engine", engine_layers)
    return EngineReport("tensorrt_llm", operations, kernels), answer["layers"]


def limits(recipe: BuildRecipe) -> dict[str, int]:
    """The fields of BuildConfig that bound an engine."""
    return {
        "max_batch_size": recipe.max_batch_size,
        "max_input_len": recipe.max_input_len,
        "max_seq_len": recipe.max_seq_len,
        "max_num_tokens": settings(recipe)["max_num_tokens"],
        "opt_batch_size": min(8, recipe.max_batch_size),  # what TensorRT tunes for; TensorRT-LLM's default is 8
    }


def dtype_of(recipe: BuildRecipe) -> str:
    """The type of the arithmetic; quantized weights meet bfloat16."""
    return DTYPES.get(recipe.precision, "bfloat16")


def _load_pytorch(recipe: BuildRecipe) -> RemoteEngine:
    checkpoint = find_checkpoint(recipe.model)
    checkpoint.check(recipe.max_seq_len)
    _check_reading(checkpoint)
    _check_gpu(recipe, machine()["compute_capability"])
    chosen = settings(recipe)
    bounds = limits(recipe)
    return _loaded(
        recipe,
        checkpoint.folder,
        checkpoint.config,
        "load_pytorch",
        checkpoint=str(checkpoint.folder),
        limits={name: bounds[name] for name in ("max_batch_size", "max_seq_len", "max_num_tokens")},
        dtype=dtype_of(recipe),
        dummy=checkpoint.dummy,
        memory_fraction=chosen["free_gpu_memory_fraction"],
        cuda_graphs=chosen["cuda_graphs"],
    )


def _loaded(recipe: BuildRecipe, folder: Path, config: ModelConfig, call: str, **arguments: Any) -> RemoteEngine:
    tokenizer = load_tokenizer(folder)
    worker = start_worker()
    start(worker, "TensorRT-LLM", call, LOAD_LIMIT_S, **arguments)
    engine = RemoteEngine(recipe, tokenizer, config.eos_token_ids, config.vocab_size, worker)
    engine.versions = machine()["versions"]
    return engine


def _with_phases(worker: Worker, arguments: dict[str, Any], progress: Progress) -> dict[str, float]:
    """Run the worker's build, its phases shown as they come."""
    steps = worker.stream("build", time_limit=BUILD_LIMIT_S, **arguments)
    name = "start TensorRT-LLM"
    while True:
        with progress.phase(name):
            try:
                step = next(steps)
            except StopIteration as done:
                return done.value
        name = step["phase"]


def _check_written(engine_dir: Path) -> None:
    """TensorRT-LLM's folder holds what it should, and config.json is an engine's."""
    try:
        config = json.loads((engine_dir / "config.json").read_text(encoding="utf-8"))
        missing = {"version", "pretrained_config", "build_config"} - config.keys()
    except (OSError, ValueError) as error:
        raise BuildError(f"TensorRT-LLM left no readable config.json: {error}.", fix="Build again.") from error
    if missing or not (engine_dir / "rank0.engine").is_file():
        lacks = ", ".join(sorted(missing)) or "rank0.engine"
        raise BuildError(f"TensorRT-LLM's engine folder is incomplete: it lacks {lacks}.", fix="Build again.")


def _check_gpu(recipe: BuildRecipe, capability: str) -> None:
    """What is known before the build: TensorRT-LLM itself finds it only after minutes."""
    level = tuple(int(part) for part in capability.split("."))
    if level < (8, 0):
        raise BackendUnavailable(
            f"TensorRT-LLM 1.2.1 has no kernels for this GPU: its compute capability is {capability}.",
            cause="It begins with 8.0 (Ampere).",
            fix="Use backend='aot' on this GPU.",
        )
    if recipe.precision == "fp8" and level < (8, 9):
        raise BuildError(
            f"Precision 'fp8' needs compute capability 8.9; this GPU has {capability}.",
            cause="FP8 arithmetic begins with Ada (8.9) and Hopper (9.0).",
            fix="Use precision='int8' or 'int4'.",
        )
    if recipe.precision in ("int8", "int4") and (10, 0) <= level < (12, 0):
        raise BuildError(
            f"TensorRT-LLM 1.2.1 has no INT8 and INT4 weights for compute capability {capability}.",
            cause="On Blackwell data-centre GPUs it supports FP8 and NVFP4 only.",
            fix="Use precision='fp8' or 'bf16'.",
        )
    if recipe.options.get("gemm_swiglu_plugin") == "fp8" and level[0] != 9:
        raise BuildError(
            f"Option gemm_swiglu_plugin is for Hopper GPUs (9.0); this GPU has {capability}.", fix="Leave it out."
        )


def _check_reading(checkpoint: Checkpoint) -> None:
    """ModelError where TensorRT-LLM, which reads the folder by itself with transformers 4, would compute otherwise."""
    checkpoint.check_sole_weights("TensorRT-LLM")
    given, rope = read_fields(checkpoint.folder), checkpoint.config.rope
    scaling = given.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theirs = {**scaling, "rope_type": kind, "rope_theta": given.get("rope_theta") or 10000.0}
    if rope != {name: theirs.get(name) for name in rope}:
        raise ModelError(
            f"TensorRT-LLM 1.2.1 would not see the position encoding of {checkpoint.name!r}.",
            cause="transformers 5 saved it as rope_parameters in config.json, and version 4 reads other fields.",
            fix="Write into config.json: rope_theta, and for a scaled encoding rope_scaling, as in rope_parameters.",
        )
    if read_config(checkpoint.folder).tie_word_embeddings != checkpoint.config.tie_word_embeddings:
        raise ModelError(
            f"TensorRT-LLM would leave out the output head of {checkpoint.name!r}.",
            cause="config.json says that the embedding is the head (tie_word_embeddings), and the files hold another.",
            fix="Set tie_word_embeddings to false in config.json, or remove lm_head.weight if it was not trained.",
        )


def _quantization(recipe: BuildRecipe) -> dict[str, str]:
    chosen = dict(QUANTIZATION.get(recipe.precision, {}))
    if algorithm := settings(recipe)["kv_cache_quant_algo"]:
        chosen["kv_cache_quant_algo"] = algorithm
    elif "kv_cache_quant_algo" in recipe.options:  # "": the cache keeps the type of the activations
        chosen.pop("kv_cache_quant_algo", None)
    return chosen


def _calibration(recipe: BuildRecipe) -> dict[str, Any]:
    if not calibrated(recipe):
        return {}
    chosen = settings(recipe)
    dataset = chosen["calib_dataset"]
    if dataset != CALIBRATION_NAME:
        dataset = str(Path(dataset).expanduser().resolve())
    say(f"Calibrating with {dataset}{', fetched from the Hub' if dataset == CALIBRATION_NAME else ''}.")
    return {"calib_dataset": dataset} | {name: chosen[name] for name in ("calib_batches", "calib_max_seq_length")}
