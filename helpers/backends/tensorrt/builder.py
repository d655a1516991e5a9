"""TensorRT's builder, driven from the notebook's side: a worker compiles an ONNX file, and its layers are read."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.backends.report import Kernel, Operation
from helpers.backends.tensorrt import INSTALL, WHY_MISSING, layers
from helpers.backends.tensorrt.api import explain
from helpers.errors import BackendUnavailable, BuildError, CourseError, EngineMismatch, RecipeError
from helpers.machine.environments import named_python
from helpers.machine.hardware import describe, resolve_device
from helpers.machine.worker import Worker
from helpers.paths import engines_folder
from helpers.progress import Progress, shown_if_slow
from helpers.recipe.tensorrt import Options

if TYPE_CHECKING:
    import onnx

API = "helpers.backends.tensorrt.api"
TIME_LIMIT = 1800.0  # seconds
# Where an engine runs that was built without targets, in TensorRT for RTX 1.7.1's own words at loading.
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0", "12.1", "newer than 12.0")


def check_plans(name: str, manifest: dict[str, Any]) -> None:
    """BackendUnavailable for a record of an engine, whose plan files stayed where it was built; EngineMismatch for an
    engine of another backend."""
    if "recorded" in manifest:
        raise BackendUnavailable(
            f"Engine {name!r} is a record of one that was built elsewhere, without its plan file.",
            cause="TensorRT cannot build on this machine, so it could not load a plan either.",
            fix=f"Build it on a Linux or Windows machine: {INSTALL['tensorrt_rtx']}.",
        )
    if not plans(manifest):
        raise EngineMismatch(
            f"Engine {name!r} holds no plan of the TensorRT builder.",
            cause=f"It was built by backend {manifest['recipe'].get('backend')!r}.",
            fix="Load it: load(folder).",
        )


def plans(manifest: dict[str, Any]) -> list[str]:
    """The plan files that the manifest lists."""
    return [name for name in manifest["files"] if name.endswith(".plan")]


def load_plans(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Load each plan of a verified folder in a worker, and give it back: TensorRT's word on whether it runs here."""
    provider, answer = manifest["details"]["provider"], {}
    with shown_if_slow(f"Loading {folder.name} to try it", "load"), start_worker() as worker:
        for plan in plans(manifest):
            answer = worker.call("load", plan=str(folder / plan), name=folder.name, provider=provider)
    return answer


def start_worker() -> Worker:
    """A worker with TensorRT in it, under the Python that COURSE_TENSORRT_PYTHON names if it is set."""
    return Worker(API, python=named_python("tensorrt"))


def missing(provider: str = "tensorrt_rtx") -> str:
    """Why nothing can be built here, in one line; "" where it can."""
    try:
        provider_version(provider)
    except BackendUnavailable as error:
        return f"{error.what} {error.cause}"
    return ""


def provider_version(provider: str) -> str:
    """The installed version; BackendUnavailable, in one line, where there is none (macOS)."""
    if python := named_python("tensorrt"):
        return _version_under(python, provider)
    try:
        return importlib.metadata.version(provider)
    except importlib.metadata.PackageNotFoundError:
        raise BackendUnavailable(
            f"TensorRT cannot build here: the package {provider.replace('_', '-')!r} is not installed.",
            cause=WHY_MISSING,
            fix=f"Look at the recorded engines, or on Linux or Windows: {INSTALL[provider]}.",
        ) from None


@cache
def _version_under(python: str, provider: str) -> str:
    with shown_if_slow(f"Asking {python} for its TensorRT", "ask"), start_worker() as worker:
        return worker.call("version", provider=provider)


def machine_facts(provider: str) -> dict[str, Any]:
    """What a plan depends on: TensorRT's version and the operating system, not this machine's processor; and of
    TensorRT itself, which measures kernels while it builds, the GPU."""
    system, gpu = f"{platform.system().lower()} {platform.machine().lower()}", None
    if provider == "tensorrt" and resolve_device() == "cuda":
        gpu = describe("cuda")
    return {
        "architecture": f"{system} {gpu.architecture}" if gpu else system,
        "device_name": gpu.name if gpu else "",
        "instructions": "",
        "versions": {provider: provider_version(provider)},
    }


def plan_from_onnx(
    worker: Worker,
    model: onnx.ModelProto,
    file: Path,
    plan: Path,
    settings: Options,
    progress: Progress,
    time_limit: float = TIME_LIMIT,
) -> tuple[tuple[list[Operation], list[Kernel], dict[str, str]], dict[str, Any]]:
    """One plan file from one ONNX file: its part of the report, and what the manifest says of it.

    model is the file's content (its weights are not looked at); the graph is named for the plan file.
    """
    from helpers.backends.tensorrt import onnx_export

    graph = plan.stem
    nodes = onnx_export.sources(model)
    with progress.phase(f"build {graph}"):
        options = {**asdict(settings), "timing_cache": timing_cache(settings)}
        arguments = {"onnx": str(file), "plan": str(plan), "provider": settings.provider, "options": options}
        built = worker.call("build", time_limit=time_limit, **arguments)
    if "refused" in built:
        raise _refused(built, model, nodes)
    if built["inspector"]:
        engine_layers = layers.parse_inspector(built["inspector"])
    elif built["message"]:
        engine_layers = layers.parse_message(built["message"])
    else:
        raise BuildError(
            "TensorRT built the engine and described none of its layers.",
            cause="This version writes its layers elsewhere, and no GPU here can load the engine to ask it.",
            fix=f"Use the version that the course names: {INSTALL[settings.provider]}.",
        )
    parts = layers.account(graph, built["network"], engine_layers, nodes)
    counts = {"nodes": len(nodes), "network_layers": len(built["network"]), "engine_layers": len(engine_layers)}
    return parts, {"inputs": built["inputs"], "outputs": built["outputs"], "seconds": built["seconds"], **counts}


def timing_cache(settings: Options) -> str:
    """The path of the timing cache, or "" for none: a file in the engines' folder, and never a folder there."""
    path = engines_folder() / settings.timing_cache
    if settings.timing_cache and path.is_dir():
        raise RecipeError(f"timing_cache is {path.name!r}, which is a folder.", fix="Name another file.")
    return str(path) if settings.timing_cache else ""


def runs_on(settings: Options) -> list[str]:
    """Compute capabilities that an engine with these settings can run on."""
    if settings.compute_capabilities:
        return list(settings.compute_capabilities)
    if settings.provider == "tensorrt_rtx":
        return list(RTX_TARGETS)
    import torch

    return [".".join(map(str, torch.cuda.get_device_capability()))]


def details(settings: Options) -> dict[str, Any]:
    """What the manifest keeps of the builder."""
    version = provider_version(settings.provider)
    return {"provider": settings.provider, "version": version, "runs_on": runs_on(settings)}


def _refused(built: dict[str, Any], model: onnx.ModelProto, nodes: dict[str, str]) -> CourseError:
    """The parser's message: what it means, where that is known, else the module's line of the node that it names."""
    from helpers.backends.tensorrt.onnx_export import is_plugin

    error = explain(built["refused"], "The graph is refused.")
    named = zip(built["nodes"], built["operators"], strict=False)
    # What TensorRT has no operation for, it takes for a plugin, ONNX's own operations too.
    own = {node.name for node in model.graph.node if not is_plugin(node)}
    if error.cause and not ("Plugin not found" in error.what and own.issuperset(built["nodes"])):
        return error
    places = [f"{node} ({op}), from {nodes.get(node) or 'an unknown line'}" for node, op in named]
    return BuildError(
        error.what,
        cause=f"TensorRT has no such operation, or not with these types or shapes: {'; '.join(places)}."
        if places
        else "The file is no network that TensorRT knows.",
        fix="Mend that line of the module, or write it with other operations.",
    )
