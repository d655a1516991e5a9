"""TensorRT engines from a torch module or an ONNX file, on a machine with or without a GPU.

    import torch
    from torch import nn
    from helpers import inspect
    from helpers.tensorrt_builder import build_module, build_onnx, load_plan

    block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU())
    folder = build_module(block, (torch.randn(8, 256),), precision="fp16", name="block")
    report = inspect(folder)                  # the report that every backend has
    len(report.operations), len(report.kernels)       # 11 network layers before, 2 engine layers after
    for kernel in report.kernels:
        kernel.name, kernel.kind, kernel.dtype        # TensorRT's name and type of the layer
        kernel.fused                          # the network layers in it: names of report.operations
        kernel.details["steps"]               # what it does, spelled out of its name: Fc, Add, Erf, ...
        kernel.details["nodes"]               # the ONNX nodes in it
        kernel.details["constants"]           # weights: name, shape, dtype, format (memory layout)
    report.operations[4].source               # the module's line: "cell:3" or "model.py:12"
    report.removed                            # computed while building, or turned into a view
    report.sizes["module.plan"]               # bytes
    store.read_manifest(folder)["details"]    # provider, version, runs_on (compute capabilities), inputs, outputs
    load_plan(folder)                         # loads it; without a fitting GPU: TensorRT's own words, cause and fix

precision is fp32, fp16, bf16, int8, int4 (both weights only) or fp8. Options, all by name: tensorrt_options.py.

What TensorRT for RTX is: NVIDIA's TensorRT for GeForce and RTX cards. It builds ahead of time without a GPU and
finishes its kernels when the engine first runs. TensorRT itself, which TensorRT-LLM uses, measures kernels on the GPU
while it builds: it needs one, takes minutes, and names its layers differently.

The language models go the usual way: build(BuildRecipe(backend="tensorrt", precision="fp16")).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import layers, store
from .backends.worker import Worker
from .errors import BackendUnavailable, BuildError
from .inspection import EngineReport, Kernel, Operation, write_report
from .progress import Progress, say
from .recipe import BuildRecipe
from .tensorrt_api import explain
from .tensorrt_options import Options, make_options

if TYPE_CHECKING:
    import onnx
    from torch import nn

API = "helpers.tensorrt_api"
MODULE = "module"  # the one graph of an engine that was built from a module or an ONNX file
TIME_LIMIT = 1800.0  # seconds
# Where an engine runs that was built without targets, in TensorRT for RTX 1.7.1's own words at loading.
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0", "12.1", "newer than 12.0")


def build_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    precision: str = "fp32",
    *,
    name: str = "",
    force: bool = False,
    quiet: bool = False,
    time_limit: float = TIME_LIMIT,
    **options: Any,
) -> Path:
    """A TensorRT engine from a torch module, in a folder under engines/; an equal one is returned at once.

    example_inputs: what forward takes; sizes that no profile opens are fixed. options: see tensorrt_options.py.
    Raises BuildError, RecipeError, BackendUnavailable, WorkerError.
    """
    settings = make_options(options)
    varying = {
        name: [
            axis for axis, (least, greatest) in enumerate(zip(shapes[0], shapes[2], strict=True)) if least != greatest
        ]
        for profile in settings.profiles
        for name, shapes in profile.items()
    }

    def export(path: Path) -> None:
        from . import onnx_export

        onnx_export.export(module, example_inputs, path, precision=precision, varying=varying)

    label = name or type(module).__name__.lower()
    content = content_of(module, example_inputs, precision)
    return _build(label, export, content, precision, settings, force, quiet, time_limit, example_inputs)


def build_onnx(
    file: Path | str,
    precision: str = "",
    *,
    name: str = "",
    force: bool = False,
    quiet: bool = False,
    time_limit: float = TIME_LIMIT,
    **options: Any,
) -> Path:
    """A TensorRT engine from an ONNX file. precision: "" takes the graph's own types, else they are rewritten."""
    from . import onnx_export

    source = Path(file)

    def export(path: Path) -> None:
        model = onnx_export.read(source)
        if precision:
            onnx_export.retype(model, precision)
        onnx_export.save(model, path)

    label = name or source.stem
    return _build(label, export, "", precision or "fp32", make_options(options), force, quiet, time_limit, ())


def load_plan(engine: Path | str, *, provider: str = "") -> dict[str, Any]:
    """Load an engine (a folder, a name, or a plan file) in a worker and give it back: can it run here?

    Returns its numbers of layers and profiles. Raises EngineMismatch (another GPU), BackendUnavailable (no driver)
    or EngineCorrupt, each with TensorRT's own words.
    """
    path = Path(engine)
    if path.is_file():
        plan = path
    else:
        folder = store.locate(engine)
        manifest = store.read_manifest(folder)
        if "recorded" in manifest:
            raise BackendUnavailable(
                f"Engine {folder.name!r} is a record of one that was built elsewhere, without its plan file.",
                cause="TensorRT cannot build on this machine, so it could not load a plan either.",
                fix="Build it on a Linux or Windows machine: pip install tensorrt-rtx==1.7.1.116.",
            )
        store.verify(folder)
        provider = provider or manifest["details"]["provider"]
        plan = next(folder.glob("*.plan"))
    with start_worker() as worker:
        return worker.call("load", plan=str(plan), name=path.name, provider=provider or "tensorrt_rtx")


def start_worker() -> Worker:
    """A worker with TensorRT in it, under the Python that COURSE_TENSORRT_PYTHON names if it is set."""
    return Worker(API, python=os.environ.get("COURSE_TENSORRT_PYTHON", ""))


def missing(provider: str = "tensorrt_rtx") -> str:
    """Why nothing can be built here, in one line; "" where it can."""
    try:
        provider_version(provider)
    except BackendUnavailable as error:
        return f"{error.what} {error.cause}"
    return ""


@cache
def provider_version(provider: str) -> str:
    """The installed version; BackendUnavailable, in one line, where there is none (macOS)."""
    if os.environ.get("COURSE_TENSORRT_PYTHON"):
        with start_worker() as worker:
            return worker.call("version", provider=provider)
    try:
        return importlib.metadata.version(provider)
    except importlib.metadata.PackageNotFoundError:
        raise BackendUnavailable(
            f"TensorRT cannot build here: the package {provider.replace('_', '-')!r} is not installed.",
            cause="NVIDIA makes no TensorRT for macOS."
            if sys.platform == "darwin"
            else "It comes with the course on Linux and Windows.",
            fix="Look at the recorded engines, or on Linux or Windows: pip install tensorrt-rtx==1.7.1.116.",
        ) from None


def machine_facts(provider: str) -> dict[str, Any]:
    """What a plan depends on: TensorRT's version and the operating system, not this machine's processor."""
    return {
        "architecture": f"{platform.system().lower()} {platform.machine().lower()}",
        "device_name": "",
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
) -> tuple[tuple[list[Operation], list[Kernel], list[str]], dict[str, Any]]:
    """One plan file from one ONNX file: its part of the report, and what the manifest says of it.

    model is the file's content (its weights are not looked at); the graph is named for the plan file.
    """
    from . import onnx_export

    graph = plan.stem
    nodes = onnx_export.sources(model)
    with progress.phase(f"build {graph}"):
        arguments = {"onnx": str(file), "plan": str(plan), "provider": settings.provider, "options": asdict(settings)}
        built = worker.call("build", time_limit=time_limit, **arguments)
    if "refused" in built:
        raise _refused(built, nodes)
    if built["inspector"]:
        found = layers.parse_inspector(built["inspector"])
    elif built["message"]:
        found = layers.parse_message(built["message"])
    else:
        raise BuildError(
            "TensorRT built the engine and described none of its layers.",
            cause="This version writes its layers elsewhere, and no GPU here can load the engine to ask it.",
            fix="Use the version that the course names: pip install tensorrt-rtx==1.7.1.116.",
        )
    parts = layers.account(graph, built["network"], found, nodes)
    counts = {"nodes": len(nodes), "network_layers": len(built["network"]), "engine_layers": len(found)}
    return parts, {"inputs": built["inputs"], "outputs": built["outputs"], "seconds": built["seconds"], **counts}


def runs_on(settings: Options) -> list[str]:
    """Compute capabilities that an engine with these settings can run on."""
    if settings.compute_capabilities:
        return list(settings.compute_capabilities)
    if settings.provider == "tensorrt_rtx":
        return list(RTX_TARGETS)
    import torch

    return [".".join(map(str, torch.cuda.get_device_capability()))]


def _build(
    label: str,
    export: Callable[[Path], None],
    content: str,
    precision: str,
    settings: Options,
    force: bool,
    quiet: bool,
    time_limit: float,
    example_inputs: Sequence[Any],
) -> Path:
    """Export, quantize, compile, publish: what build_module and build_onnx share. content: a hash of what is built;
    where it is "", the hash of the exported graph takes its place."""
    start = time.perf_counter()
    version = provider_version(settings.provider)
    chosen = {k: v for k, v in asdict(settings).items() if v != getattr(Options(), k)}
    recipe = BuildRecipe(model=label, backend="tensorrt", precision=precision, options=json.loads(json.dumps(chosen)))

    def stored(content: str) -> Path | None:
        folder = store.root() / store.name_of(recipe, _identity(recipe, content))
        if force or not (folder / store.MANIFEST).exists():
            return None
        if not quiet:
            say(f"Cache hit: {folder.name} is built already ({time.perf_counter() - start:.2f} s).")
        return folder

    if content and (hit := stored(content)):
        return hit
    from . import onnx_export

    title = f"Building {label} with {settings.provider} {version} in {precision}"
    with (
        tempfile.TemporaryDirectory(prefix=".onnx-", dir=store.root()) as work,
        Progress(title, quiet=quiet) as progress,
    ):
        file = Path(work) / "module.onnx"
        with progress.phase("export to ONNX"):
            export(file)
            model = onnx_export.read(file)
        if precision in onnx_export.COMPUTE:
            with progress.phase(f"quantize to {precision}"):
                largest = None
                if precision == "fp8":
                    largest = onnx_export.calibrate(model, onnx_export.example_feeds(model, example_inputs))
                onnx_export.quantize(model, precision, largest)
                onnx_export.save(model, file)
        content = content or _content_of_graph(model)
        facts = _identity(recipe, content)
        name = store.name_of(recipe, facts)
        with store.building(name) as folder:
            if hit := stored(content):  # an equal graph, or another process built it while this one waited
                return hit
            with start_worker() as worker:
                plan = folder / f"{MODULE}.plan"
                parts, details = plan_from_onnx(worker, model, file, plan, settings, progress, time_limit)
            write_report(EngineReport("tensorrt", *parts), folder)
            common = {"kind": MODULE, "provider": settings.provider, "version": version, "runs_on": runs_on(settings)}
            store.write_manifest(folder, facts, progress.seconds, {**common, **details})
        return store.root() / name


def _identity(recipe: BuildRecipe, content: str) -> dict[str, Any]:
    """As store.identity, with what is built, and the code that builds it, in the checkpoint's place."""
    both = hashlib.sha256(f"{content} {store.source_digest('tensorrt')}".encode())
    return {
        "schema": store.SCHEMA,
        "recipe": {**recipe.to_dict(), "device": "cpu"},
        "checkpoint": both.hexdigest(),
        "tokenizer": "",
        "source": "",
        **machine_facts(recipe.options.get("provider", "tensorrt_rtx")),
    }


def _content_of_graph(model: onnx.ModelProto) -> str:
    """A hash of a graph. Of the nodes' metadata only the module's lines count: the rest names files that lie
    elsewhere in every session."""
    from . import onnx_export

    bare = copy.deepcopy(model)
    weights = hashlib.sha256()
    for tensor in bare.graph.initializer:
        weights.update(tensor.raw_data)
        tensor.ClearField("raw_data")
    for thing in (*bare.graph.node, *bare.graph.input, *bare.graph.output, *bare.graph.value_info, bare.graph, bare):
        del thing.metadata_props[:]
    lines = json.dumps(onnx_export.sources(model))
    return hashlib.sha256(bare.SerializeToString(deterministic=True) + lines.encode() + weights.digest()).hexdigest()


def content_of(module: nn.Module, example_inputs: Sequence[Any], precision: str) -> str:
    """A hash of a module that consists of torch's own modules, so that an equal one is found without an export.

    "" for any other: what a class of one's own computes is only known when it is exported.
    """
    import torch

    bookkeeping = vars(torch.nn.Module())
    total = hashlib.sha256(torch.__version__.encode())
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if key not in bookkeeping}
        hooks = any(vars(part)[key] for key in bookkeeping if key.endswith("hooks"))
        if not type(part).__module__.startswith("torch.nn.modules.") or hooks or not _is_plain([*settings.values()]):
            return ""
        total.update(repr((name, type(part).__name__, sorted(settings.items()))).encode())
    inputs = [(str(index), value) for index, value in enumerate(example_inputs)]
    if not all(isinstance(value, torch.Tensor) for _, value in inputs):
        return ""
    for key, tensor in (*module.named_parameters(), *module.named_buffers(), *inputs):
        total.update(repr((key, tensor.dtype, tuple(tensor.shape))).encode())
        if not key.isdigit() or precision == "fp8":  # of inputs only the shape counts, but fp8's scales rest on them
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total.update(raw.numpy().tobytes())
    return total.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _refused(built: dict[str, Any], nodes: dict[str, str]) -> BuildError:
    """The parser's message, with the module's line of the node that it names."""
    error = explain(built["refused"], "The graph is refused.")
    named = zip(built["nodes"], built["operators"], strict=False)
    places = [f"{node} ({op}), from {nodes.get(node) or 'an unknown line'}" for node, op in named]
    return BuildError(
        error.what,
        cause=f"TensorRT has no such operation, or not with these types: {'; '.join(places)}."
        if places
        else "The file is no network that TensorRT knows.",
        fix="Write that line of the module with other operations.",
    )
