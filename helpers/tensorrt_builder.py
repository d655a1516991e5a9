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

precision is fp32, fp16, bf16, int8, int4 (both weights only) or fp8. Options, all by name:

    mark_outputs="all" or [names]     intermediates become outputs, so they must be written to memory: fusion is
                                      hindered (11 -> 5; TensorRT still computes the block in two of the five and
                                      writes the rest out of them; a varying batch or int8 weights split it, 11 -> 3)
    compute_capabilities=["8.6"]      targets; fp8 is refused for 8.6, and begins with 8.9
    profiles=[{"x": ((1, 256), (8, 256), (64, 256))}]   least, likely and greatest shape of an input that varies
    optimization_level=0 .. 5         accepted; in TensorRT for RTX without a GPU it changed nothing that we saw
    weight_streaming=True             weights may stay in host memory while the engine runs
    refit=True, strip_weights=True    weights to be exchanged or added later; needs an NVIDIA driver to build
    version_compatible=True           TensorRT: runs with later versions; TensorRT for RTX lacks what it needs
    hardware_compatibility="ampere_plus", timing_cache="file"      TensorRT only; TensorRT for RTX refuses them
    provider="tensorrt"               TensorRT itself, where it and a GPU are there; default "tensorrt_rtx"

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
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import layers, store
from .backends.worker import Worker
from .errors import BackendUnavailable, BuildError, RecipeError
from .inspection import EngineReport, Kernel, Operation, write_report
from .progress import Progress, say
from .recipe import BuildRecipe
from .tensorrt_api import explain

if TYPE_CHECKING:
    import onnx
    from torch import nn

PROVIDERS = ("tensorrt_rtx", "tensorrt")
API = "helpers.tensorrt_api"
MODULE = "module"  # the one graph of an engine that was built from a module or an ONNX file
TIME_LIMIT = 1800.0  # seconds
# Where an engine runs that was built without targets, in TensorRT for RTX 1.7.1's own words at loading.
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0", "12.1", "newer than 12.0")


@dataclass(frozen=True)
class Options:
    """The builder's settings; see the top of this file. Raises RecipeError for a wrong value."""

    provider: str = "tensorrt_rtx"
    optimization_level: int | None = None
    profiles: tuple[Mapping[str, Any], ...] | list[Mapping[str, Any]] = ()
    compute_capabilities: tuple[str, ...] | list[str] = ()
    mark_outputs: str | list[str] = ""
    refit: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatibility: str = ""
    timing_cache: str = ""

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise _wrong("provider", self.provider, f"one of {', '.join(PROVIDERS)}")
        level = self.optimization_level
        if level is not None and not (isinstance(level, int) and 0 <= level <= 5):
            raise _wrong("optimization_level", level, "a whole number from 0 to 5")
        for target in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", str(target)):
                raise _wrong("compute_capabilities", target, "texts such as '8.6'")
        if isinstance(self.mark_outputs, str) and self.mark_outputs not in ("", "all"):
            raise _wrong("mark_outputs", self.mark_outputs, "'all' or a list of tensor names")
        if self.hardware_compatibility not in ("", "ampere_plus", "same_compute_capability"):
            raise _wrong(
                "hardware_compatibility", self.hardware_compatibility, "ampere_plus or same_compute_capability"
            )
        for profile in self.profiles:
            for name, shapes in profile.items():
                _check_profile(name, shapes)
        if self.provider == "tensorrt_rtx":
            self._refuse_what_rtx_lacks()

    def _refuse_what_rtx_lacks(self) -> None:
        if self.timing_cache:
            raise BuildError(
                "TensorRT for RTX keeps no timing cache: it measures no kernels while it builds.",
                cause="TensorRT says: Timing cache operations are no-ops in TensorRT-RTX.",
                fix="Leave the option out, or use provider='tensorrt' on a machine with a GPU.",
            )
        if self.hardware_compatibility:
            raise BuildError(
                "TensorRT for RTX has no hardware compatibility level: its engines run on several GPUs anyway.",
                cause="TensorRT says: setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX.",
                fix="Name the targets instead: compute_capabilities=['8.6', '8.9'].",
            )


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

    example_inputs: what forward takes; sizes that no profile opens are fixed. options: see the top of this file.
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
    return _build(label, export, precision, settings, force, quiet, time_limit, example_inputs)


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
    return _build(label, export, precision or "fp32", make_options(options), force, quiet, time_limit, ())


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
        manifest = store.verify(folder)
        provider = provider or manifest["details"]["provider"]
        plan = next(folder.glob("*.plan"))
    with start_worker() as worker:
        return worker.call("load", plan=str(plan), provider=provider or "tensorrt_rtx")


def start_worker() -> Worker:
    """A worker with TensorRT in it, under the Python that COURSE_TENSORRT_PYTHON names if it is set."""
    return Worker(API, python=os.environ.get("COURSE_TENSORRT_PYTHON", ""))


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
    precision: str,
    settings: Options,
    force: bool,
    quiet: bool,
    time_limit: float,
    example_inputs: Sequence[Any],
) -> Path:
    """Export, quantize, compile, publish: what build_module and build_onnx share."""
    start = time.perf_counter()
    version = provider_version(settings.provider)
    chosen = {k: v for k, v in asdict(settings).items() if v != getattr(Options(), k)}
    recipe = BuildRecipe(model=label, backend="tensorrt", precision=precision, options=json.loads(json.dumps(chosen)))
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
        facts = _identity(recipe, model)
        name = store.name_of(recipe, facts)
        with store.building(name) as folder:
            if not force and (store.root() / name / store.MANIFEST).exists():
                if not quiet:
                    say(f"Cache hit: {name} is built already ({time.perf_counter() - start:.2f} s).")
                return store.root() / name
            with start_worker() as worker:
                plan = folder / f"{MODULE}.plan"
                parts, details = plan_from_onnx(worker, model, file, plan, settings, progress, time_limit)
            write_report(EngineReport("tensorrt", *parts), folder)
            common = {"kind": MODULE, "provider": settings.provider, "version": version, "runs_on": runs_on(settings)}
            store.write_manifest(folder, facts, progress.seconds, {**common, **details})
        return store.root() / name


def _identity(recipe: BuildRecipe, model: onnx.ModelProto) -> dict[str, Any]:
    """As store.identity, with the graph in the checkpoint's place. Of the nodes' metadata only the module's lines
    count: the rest names files that lie elsewhere in every session."""
    from . import onnx_export

    bare = copy.deepcopy(model)
    weights = hashlib.sha256()
    for tensor in bare.graph.initializer:
        weights.update(tensor.raw_data)
        tensor.ClearField("raw_data")
    for thing in (*bare.graph.node, *bare.graph.input, *bare.graph.output, *bare.graph.value_info, bare.graph, bare):
        del thing.metadata_props[:]
    lines = json.dumps(onnx_export.sources(model))
    graph = hashlib.sha256(bare.SerializeToString(deterministic=True) + lines.encode() + weights.digest())
    return {
        "schema": store.SCHEMA,
        "recipe": {**recipe.to_dict(), "device": "cpu"},
        "checkpoint": graph.hexdigest(),
        "tokenizer": "",
        "source": "",
        **machine_facts(recipe.options.get("provider", "tensorrt_rtx")),
    }


def make_options(options: dict[str, Any]) -> Options:
    """Checked settings from plain values, as a recipe or a call gives them."""
    known = [f.name for f in fields(Options)]
    for option in options:
        if option not in known:
            raise RecipeError(
                f"The TensorRT builder has no option {option!r}.", fix=f"Options are: {', '.join(known)}."
            )
    return Options(**options)


def _check_profile(name: str, shapes: Any) -> None:
    try:
        least, likely, greatest = (tuple(s) for s in shapes)
        ordered = all(0 < a <= b <= c for a, b, c in zip(least, likely, greatest, strict=True))
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise _wrong(f"profile of {name}", shapes, "three shapes, each size of one at least that of the one before")


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


def _wrong(name: str, value: Any, allowed: str) -> RecipeError:
    return RecipeError(f"TensorRT option {name} is {value!r}, which is not allowed.", fix=f"Give {allowed}.")
