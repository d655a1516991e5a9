"""TensorRT engines from a torch module or an ONNX file, on a machine with or without a GPU.

    import torch
    from torch import nn
    from helpers import inspect
    from helpers.engine import build_module, build_onnx, load_plan

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

precision is fp32, fp16, bf16, int8, int4 (both weights only) or fp8. Options, all by name: helpers/recipe/tensorrt.py.

What TensorRT for RTX is: NVIDIA's TensorRT for GeForce and RTX cards. It builds ahead of time without a GPU and
finishes its kernels when the engine first runs. TensorRT itself, which TensorRT-LLM uses, measures kernels on the GPU
while it builds: it needs one, takes minutes, and names its layers differently.

The language models go the usual way: build(BuildRecipe(backend="tensorrt", precision="fp16")).
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from helpers.backends.job import BuildJob, source_digest
from helpers.backends.report import EngineReport, write_report
from helpers.backends.tensorrt import builder, onnx_export, onnx_quantize
from helpers.errors import BuildError, RecipeError, shown
from helpers.paths import named
from helpers.progress import Progress
from helpers.recipe.fields import PRECISIONS, safe_name
from helpers.recipe.tensorrt import Options, make_options

GRAPH = "module"  # the one graph of such an engine


def from_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    precision: str,
    *,
    name: str,
    time_limit: float,
    options: dict[str, Any],
) -> BuildJob:
    """What engine.build_module builds. A module of torch's own parts is exported when it is compiled; what a class of
    one's own computes is only known from its export, so that comes first."""
    if not isinstance(module, nn.Module) or not isinstance(example_inputs, (list, tuple)):
        what = f"{shown(module)} with {shown(example_inputs)}"
        raise BuildError(f"{what} is no module with inputs.", fix="Give a torch.nn.Module and a tuple of its inputs.")
    settings = _settings(precision, name, time_limit, options)
    asked: dict[str, list[Sequence[int]]] = {}  # the shapes of each input, of all profiles
    for profile in settings.profiles:
        for input_, shapes in profile.items():
            asked.setdefault(input_, []).extend(shapes)
    varying = {
        input_: [axis for axis, lengths in enumerate(zip(*shapes, strict=True)) if len(set(lengths)) > 1]
        for input_, shapes in asked.items()
    }

    @cache
    def export() -> onnx.ModelProto:
        return onnx_export.export(module, example_inputs, precision=precision, varying=varying, asked=asked)

    label = name or type(module).__name__.lower()
    content = content_of(module, example_inputs, precision)
    if not content:
        calibrated = precision == "fp8"  # then the scales rest on the inputs
        feeds = onnx_quantize.example_feeds(export(), example_inputs) if calibrated else {}
        content = _content_of_graph(export(), feeds)
    return _job(label, precision, settings, content, export, time_limit, example_inputs)


def from_onnx(file: Path | str, precision: str, *, name: str, time_limit: float, options: dict[str, Any]) -> BuildJob:
    """What engine.build_onnx builds."""
    as_it_is = isinstance(precision, str) and not precision
    settings = _settings("fp32" if as_it_is else precision, name, time_limit, options)
    if not isinstance(file, (str, Path)):
        raise BuildError(f"An ONNX file is given by its path, not as {shown(file)}.", fix="Give the path.")
    file = named(file)
    model = onnx_export.read(file)
    if as_it_is:
        precision = onnx_export.float_type(model)
    else:
        onnx_export.retype(model, precision)
    content = _content_of_graph(model, {})
    return _job(name or file.stem, precision, settings, content, lambda: model, time_limit, ())


def _settings(precision: str, name: str, time_limit: float, options: dict[str, Any]) -> Options:
    """The builder's settings, once the arguments beside them are checked too."""
    precisions = PRECISIONS["tensorrt"]
    if not isinstance(precision, str) or precision not in precisions:
        raise RecipeError(f"precision is {shown(precision)}.", fix=f"Give one of {', '.join(precisions)}.")
    if not isinstance(name, str):
        raise RecipeError(f"name is {shown(name)}.", fix="Give a text: the engine's folder begins with it.")
    if isinstance(time_limit, bool) or not isinstance(time_limit, (int, float)) or not 0 < time_limit <= 1e6:
        raise RecipeError(f"time_limit is {shown(time_limit)}.", fix="Give a number of seconds, more than 0.")
    settings = make_options(options)
    builder.provider_version(settings.provider)
    return settings


def _job(
    label: str,
    precision: str,
    settings: Options,
    content: str,
    export: Callable[[], onnx.ModelProto],
    time_limit: float,
    example_inputs: Sequence[Any],
) -> BuildJob:
    """Export, quantize, compile. content: a hash of what is built."""

    def compile_into(folder: Path, progress: Progress) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as work, builder.start_worker() as worker:
            file = Path(work) / "module.onnx"
            with progress.phase("export to ONNX"):
                model = export()
            if precision in onnx_export.COMPUTE:
                with progress.phase(f"quantize to {precision}"):
                    largest = None
                    onnx_quantize.fold(model.graph)
                    if precision == "fp8":
                        likely = {name: shapes[1] for name, shapes in next(iter(settings.profiles), {}).items()}
                        feeds = onnx_quantize.example_feeds(model, example_inputs, likely)
                        largest = onnx_quantize.calibrate(model, feeds)
                    onnx_quantize.quantize(model, precision, largest)
            onnx_export.save(model, file)
            plan = folder / f"{GRAPH}.plan"
            parts, details = builder.plan_from_onnx(worker, model, file, plan, settings, progress, time_limit)
        write_report(EngineReport("tensorrt", *parts), folder)
        return {**builder.details(settings), **details}

    label = safe_name(label)
    changed = {k: v for k, v in asdict(settings).items() if v != getattr(Options(), k)}
    recipe = {"model": label, "backend": "tensorrt", "precision": precision, "device": "cpu"}
    recipe["options"] = json.loads(json.dumps(changed))
    identity = {
        "kind": "module",
        "recipe": recipe,
        "checkpoint": content,
        **builder.machine_facts(settings.provider),
        "source": source_digest("backends/tensorrt", "recipe/tensorrt.py"),
    }
    return BuildJob(f"{label}-tensorrt-{precision}", identity, recipe, compile_into, lambda: (2.0, 5_000_000, 5e6))


def _content_of_graph(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> str:
    """A hash of a graph and of the inputs that it is calibrated with. Of the nodes' metadata only the module's lines
    count: the rest names files that lie elsewhere in every session."""
    bare = copy.deepcopy(model)
    weights = hashlib.sha256(b"".join(values.tobytes() for values in feeds.values()))
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
    bookkeeping = vars(torch.nn.Module())
    total = hashlib.sha256(torch.__version__.encode())
    for name, part in module.named_modules(remove_duplicate=False):  # one that is used in two places counts in both
        settings = {key: value for key, value in vars(part).items() if key not in bookkeeping}
        hooks = any(vars(part)[key] for key in bookkeeping if key.endswith("hooks"))
        if not type(part).__module__.startswith("torch.nn.modules.") or hooks or not _is_plain([*settings.values()]):
            return ""
        total.update(repr((name, type(part).__name__, sorted(settings.items()))).encode())
    inputs = [(str(index), value) for index, value in enumerate(example_inputs)]
    if not all(isinstance(value, torch.Tensor) for _, value in inputs):
        return ""
    parameters, buffers = (every(remove_duplicate=False) for every in (module.named_parameters, module.named_buffers))
    for key, tensor in (*parameters, *buffers, *inputs):
        if tensor.is_meta or tensor.layout != torch.strided:  # no bytes to hash
            return ""
        total.update(repr((key, tensor.dtype, tuple(tensor.shape))).encode())
        if not key.isdigit() or precision == "fp8":  # of inputs only the shape counts, but fp8's scales rest on them
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total.update(raw.numpy().tobytes())
    return total.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
