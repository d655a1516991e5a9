"""The calls into TensorRT itself. They run in a worker process (machine/worker.py), never in the notebook.

One Python API, two providers: `tensorrt_rtx` (TensorRT for RTX, which builds without a GPU) and `tensorrt` (which
needs one). Neither torch nor onnx is imported here, so that a worker starts in a fraction of a second, and another
environment's Python can serve as the worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

from helpers.backends.tensorrt import INSTALL, WHY_MISSING
from helpers.errors import BackendUnavailable, BuildError, CourseError
from helpers.messages import matches, read_cards

KNOWN = read_cards(Path(__file__).with_name("errors.json"))


def load_provider(provider: str) -> ModuleType:
    try:
        return importlib.import_module(provider)
    except ImportError as error:
        raise BackendUnavailable(
            f"TensorRT is not here: the Python package {provider!r} cannot be imported ({error}).",
            cause=WHY_MISSING,
            fix=f"On Linux or Windows: {INSTALL[provider]}. Recorded engines can be looked at anywhere.",
        ) from error


def version(provider: str) -> str:
    return load_provider(provider).__version__


def explain(words: list[str], what: str) -> CourseError:
    """Our error for TensorRT's messages: its own words, and where they are known, cause and fix."""
    lines = "\n".join(words).strip().splitlines()
    # Without a driver, most complaints about a graph are followed by one that CUDA is not there.
    text = "\n".join([line for line in lines if "catchCudaError" not in line] or lines) or "TensorRT gave no reason."
    for card, _, line in matches(text, KNOWN):
        return card.as_error(f"{what} TensorRT says: {line}")
    return BuildError(f"{what} TensorRT says: {text:.1500}", fix="Look at the node or option that it names.")


def build(
    onnx: str, plan: str, provider: str, options: dict[str, Any]
) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """Build the ONNX file into a plan file. Yields the phase it is in; returns what the report is made of."""
    trt = load_provider(provider)
    log = _log(trt)
    seconds: dict[str, float] = {}
    yield {"phase": "parse"}
    start = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(_typing(trt, options))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(onnx):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = [e.node_name() for e in errors if e.node_name()]
        operators = [e.node_operator() for e in errors if e.node_operator()]
        # The host side adds the module's line: it knows the ONNX file's metadata.
        return {"refused": [str(e) for e in errors] or log.errors(), "nodes": nodes, "operators": operators}
    if network.num_layers == 0:
        return {"refused": ["The file holds no operations."], "nodes": [], "operators": []}
    seconds["parse"] = time.perf_counter() - start
    if options.get("mark_outputs"):
        _mark_outputs(trt, network, options["mark_outputs"])
    layers = [_describe(trt, network.get_layer(i)) for i in range(network.num_layers)]
    config = _configure(trt, builder, network, options, log)
    yield {"phase": "compile"}
    start = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise explain(log.errors(), "The build failed.")
    Path(plan).write_bytes(serialized)
    if cache := options.get("timing_cache"):
        part = Path(f"{cache}.{os.getpid()}")  # whole or not at all: another build may read it at any time
        part.write_bytes(config.get_timing_cache().serialize())
        part.replace(cache)
    seconds["compile"] = time.perf_counter() - start
    inspected = ""
    if _has_driver():
        with contextlib.suppress(CourseError):  # it cannot be loaded here
            inspected = inspect(plan, provider)["inspector"]
    return {
        "version": trt.__version__,
        "network": layers,
        "inspector": inspected,
        "message": log.layers(),
        "seconds": seconds,
        "inputs": [_tensor(trt, network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(trt, network.get_output(i)) for i in range(network.num_outputs)],
    }


def load(plan: str, name: str, provider: str) -> dict[str, Any]:
    """Load a plan file as a check, and give it back at once. Raises our error with TensorRT's own words."""
    trt = load_provider(provider)
    engine = deserialize(trt, plan, name)
    return {"layers": engine.num_layers, "profiles": engine.num_optimization_profiles, "version": trt.__version__}


def inspect(plan: str, provider: str, plugins: str = "") -> dict[str, Any]:
    """EngineInspector's JSON of a plan file, and its number of layers. Needs a GPU that the engine runs on.

    plugins: a package whose import registers the plugins in the plan; TensorRT cannot read it without them.
    Importing tensorrt_llm loads libnvinfer_plugin_tensorrt_llm.so and calls its initTrtLlmPlugins (plugin/plugin.py).
    """
    trt = load_provider(provider)
    if plugins:
        load_provider(plugins)
    engine = deserialize(trt, plan, Path(plan).name)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"inspector": text, "layers": engine.num_layers}


def deserialize(trt: ModuleType, plan: str | Path, name: str) -> Any:
    """The engine of a plan file. Raises our error with TensorRT's own words. name: what the error calls it."""
    log = _log(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(Path(plan).read_bytes())
    if engine is None:
        raise explain(log.errors(), f"Engine {name!r} cannot be loaded.")
    return engine


def _log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[name-defined]
        """Keeps TensorRT's messages of one task instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[int, str]] = []  # severity: 0 internal error, 1 error, 2 warning, ...

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((int(severity), message))

        def errors(self) -> list[str]:
            return [message for severity, message in self.messages if severity <= 1]

        def layers(self) -> str:
            return next((message for _, message in self.messages if message.startswith("Layers:")), "")

    return Log()


def _typing(trt: ModuleType, options: dict[str, Any]) -> int:
    """The network's creation flags. TensorRT 10 takes each tensor's type from the graph only when told so (strong
    typing), or chooses among the precisions that are flagged (weak typing); 11 and TensorRT for RTX know only the
    first. BuilderFlag.FP16 and the like are gone from 11: see NVIDIA's list of APIs removed from 10.x to 11.x."""
    ten = int(trt.__version__.split(".")[0]) == 10
    if not options.get("precision_flags"):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if ten else 0
    if not ten:
        raise BuildError(
            f"TensorRT {trt.__version__} has no precision flags: its networks are strongly typed.",
            cause="Weak typing ended with TensorRT 10.",
            fix="Leave precision_flags out, and set the type in the graph: precision='fp16'.",
        )
    return 0


def _configure(trt: ModuleType, builder: Any, network: Any, options: dict[str, Any], log: Any) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the layers have names only
    before = len(log.errors())
    if options.get("optimization_level") is not None:
        config.builder_optimization_level = options["optimization_level"]
    for option, flag in (
        ("refit", "REFIT"),
        ("strip_weights", "STRIP_PLAN"),
        ("weight_streaming", "WEIGHT_STREAMING"),
        ("version_compatible", "VERSION_COMPATIBLE"),
    ):
        if options.get(option):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    for flag in options.get("precision_flags", ()):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if level := options.get("hardware_compatibility"):
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level.upper())
    if targets := options.get("compute_capabilities"):
        _target(trt, config, targets)
    if cache := options.get("timing_cache"):
        known = Path(cache).read_bytes() if Path(cache).exists() else b""
        timings = config.create_timing_cache(known)
        if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
            raise BuildError(
                f"The timing cache {Path(cache).name!r} is not taken.",
                cause="It is damaged, or another GPU or version of TensorRT wrote it.",
                fix="Delete that file in the engines' folder, or name another one.",
            )
    for profile in options.get("profiles") or [{}]:
        _add_profile(builder, network, config, profile)
    if len(log.errors()) > before:
        raise explain(log.errors()[before:], "This provider refuses an option.")
    return config


def _target(trt: ModuleType, config: Any, targets: list[str]) -> None:
    if not hasattr(trt, "ComputeCapability"):
        raise BuildError(
            "This provider takes no compute_capabilities.",
            cause="TensorRT measures kernels on the GPU that it builds on, so it builds for that GPU.",
            fix="Leave the option out, or use provider 'tensorrt_rtx'.",
        )
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        name = f"SM{target.replace('.', '')}"
        if name not in known:
            have = sorted(float(k[2:]) / 10 for k in known if k.startswith("SM"))
            raise BuildError(
                f"TensorRT for RTX builds nothing for compute capability {target}.",
                cause="It is made for GeForce and RTX cards; data-centre GPUs such as 9.0 need TensorRT itself.",
                fix=f"Targets are {', '.join(map(str, have))}.",
            )
        config.set_compute_capability(known[name], index)


def _add_profile(builder: Any, network: Any, config: Any, shapes: dict[str, Any]) -> None:
    """A profile: for each input whose shape varies, the least, the most likely and the greatest shape."""
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    profile = builder.create_optimization_profile()
    for name in shapes:
        if name not in inputs:
            raise BuildError(f"The profile names an input {name!r}.", fix=f"Inputs are {', '.join(inputs)}.")
    for name, shape in inputs.items():
        if name in shapes:
            profile.set_shape(name, *map(tuple, shapes[name]))
        elif -1 in shape:
            raise BuildError(
                f"Input {name!r} has the shape {shape}, where -1 varies, and no profile says within which limits.",
                cause="TensorRT sizes memory and chooses kernels for a least, a likely and a greatest shape.",
                fix=f"Give profiles=[{{{name!r}: (least, likely, greatest)}}].",
            )
    config.add_optimization_profile(profile)


def _mark_outputs(trt: ModuleType, network: Any, names: str | list[str]) -> None:
    """Make intermediate tensors outputs of the engine: each must then be written to memory, so it ends a fusion."""
    tensors = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_outputs):
            tensor = layer.get_output(j)
            if layer.type != trt.LayerType.CONSTANT and not tensor.is_network_output and not tensor.is_shape_tensor:
                tensors[tensor.name] = tensor
    if unknown := [name for name in names if name not in tensors] if isinstance(names, list) else []:
        raise BuildError(f"No intermediate tensor is called {unknown[0]!r}.", fix=f"There are {', '.join(tensors)}.")
    for name in tensors if names == "all" else names:
        network.mark_output(tensors[name])


def _describe(trt: ModuleType, layer: Any) -> dict[str, Any]:
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    first = _tensor(trt, outputs[0]) if outputs else {"dtype": "", "shape": []}
    node = layer.metadata.partition("[ONNX Layer: ")[2].partition("]")[0]
    return {
        "name": layer.name,
        "op": layer.type.name.lower(),
        "node": node,
        "dtype": first["dtype"],
        "shape": first["shape"],
        "inputs": [t.name for t in inputs if t is not None],
        "outputs": [t.name for t in outputs],
    }


def _tensor(trt: ModuleType, tensor: Any) -> dict[str, Any]:
    from helpers.backends.tensorrt.layers import DTYPES

    dtype = tensor.dtype.name.lower()
    try:
        shape = [int(d) if d >= 0 else "?" for d in tensor.shape]
    except ValueError:  # rank unknown until run time
        shape = ["?"]
    return {"name": tensor.name, "dtype": DTYPES.get(dtype, dtype), "shape": shape}


def _has_driver() -> bool:
    """By loading it: ctypes.util.find_library would ask gcc, which leaves files where it is killed meanwhile."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def memory() -> float:
    """The most memory that this process has held so far, in bytes."""
    from helpers.machine.hardware import peak_host_bytes

    return float(peak_host_bytes())


warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT's own notes to its maintainers
CALLS = {"build": build, "inspect": inspect, "load": load, "version": version, "memory": memory}
