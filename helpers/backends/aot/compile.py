"""What a build does in a worker process: convert the weights, then export, compile and check one graph at a time.

It runs in a process of its own because a compiler takes gigabytes, can crash, and obeys settings of its process, such
as torch's default type, that belong to the notebook. The functions yield the name of each step as it begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from helpers.backends.aot.graphs import Part, empty_cache, graph_module, packs, parts_of, prefill_width, sequences
from helpers.backends.aot.phase import Phase
from helpers.backends.aot.products import Decode, Prefill
from helpers.backends.aot.recorder import TIMED, InductorRecorder, kernels_apart, whole_stack_traces
from helpers.backends.aot.stored import convert_weights, packed, read_weights, save_weights
from helpers.backends.aot.verify import check_graph
from helpers.backends.report import Kernel, Operation
from helpers.errors import BuildError, CourseError, OutOfMemory, out_of_memory, why_refused
from helpers.machine import hardware
from helpers.machine.commands import complaint
from helpers.machine.inductor import prepare_inductor
from helpers.model import llama
from helpers.model.checkpoint import find_checkpoint, read_tensors
from helpers.model.config import load_config
from helpers.model.weights import Weights
from helpers.recipe import BuildRecipe, from_dict

TURNS = 7  # at most, of each number of threads
TURN_SECONDS = 0.1  # at least, of each turn
TRIAL_SECONDS = 15.0  # after so many there is no further turn: steps are slow, or other work disturbs them


def prepare_weights(recipe: dict[str, Any], device: str, folder: str, plain: str, graphs: list[str]) -> Any:
    """Save the checkpoint's tensors as the graphs read them, and where these are packed, in a folder `plain` as they
    were, to verify the graphs with. Returns what loading has to know of each graph."""
    asked, config = from_dict(recipe), load_config(Path(folder))
    yield "load weights"
    weights = convert_weights(asked, read_tensors(find_checkpoint(asked.model), config), config, device)
    yield "save weights"
    if packs(asked, device):
        Path(plain).mkdir()
        save_weights(weights, asked, config, device, Path(plain))
    save_weights(packed(weights, asked, device), asked, config, device, Path(folder))
    entries = {}
    for name in graphs:
        parts, _ = _parts_of(name, asked, device, folder)
        entries[name] = {"parts": {part.file: part.calls for part in parts}}
    return entries


def compile_part(
    name: str,
    file: str,
    recipe: dict[str, Any],
    device: str,
    folder: str,
    into: str,
    threads: int,
    scratch: str,
    compile_threads: int,
) -> Any:
    """Compile one part of a graph into a folder. Yields each step; returns the report on it.

    threads: of the generated code on a CPU. compile_threads: processes that the compiler may start.
    """
    _use_private_folder(scratch)
    asked = from_dict(recipe)
    parts, module = _parts_of(name, asked, device, folder)
    (part,) = (part for part in parts if part.file == file)
    what = file if into == folder else f"{file} for {threads}"
    yield f"export {what}"
    timed = device == "cpu" and asked.options.get("time_kernels", False)  # a profiler sees a GPU's kernels anyway
    # A timed library copies the traces of each kernel whenever it is launched: whole ones take milliseconds a step.
    with contextlib.nullcontext() if timed else whole_stack_traces():
        program = part.export(_weights(folder, device))
    yield f"compile {what}"
    recorder = InductorRecorder(name, program.graph)
    options = _inductor_options(asked, device, threads, module) | recorder.options()
    Path(into).mkdir(exist_ok=True)
    with kernels_apart() if timed else contextlib.nullcontext():
        options |= TIMED if timed else {}
        _compile(program, Path(into) / f"{file}.pt2", options, device, compile_threads)
    report = recorder.report(len(part.calls), file.removeprefix(name))
    if part is parts[0] is not parts[-1]:
        dtype = str(part.inputs[0].dtype).removeprefix("torch.")
        report.operations.insert(0, Operation(name, "embedding", "embedding", dtype))
        report.kernels.insert(
            0, Kernel(name, "embedding", "library", ("embedding",), dtype, {"bytes": 0, "outside": {}})
        )
    return report.to_dict()


def time_threads(
    name: str,
    entry: dict[str, Any],
    trials: list[tuple[int, str]],
    recipe: dict[str, Any],
    device: str,
    folder: str,
) -> Any:
    """Seconds of one decode step for each number of threads, of the graph that was compiled for it into a folder.

    They take turns, so that whatever else this machine does meets all of them.
    """
    yield f"time {' and '.join(str(threads) for threads, _ in trials)} threads"
    asked, config, weights = from_dict(recipe), load_config(Path(folder)), _weights(folder, device)
    graphs = [Phase(Path(place), name, entry, config, weights) for _, place in trials]
    span = torch.arange(max(2, asked.max_seq_len // 2))
    token = torch.zeros(1, dtype=torch.long)
    inputs = token, token + len(span) - 1, span, empty_cache(asked, config, device, weights["norm"].dtype, 1)
    seconds: list[list[float]] = [[] for _ in trials]
    begin = time.perf_counter()
    while len(seconds[-1]) < TURNS and time.perf_counter() - begin < TRIAL_SECONDS:
        for (threads, _), graph, took in zip(trials, graphs, seconds, strict=True):
            torch.set_num_threads(threads)
            for _ in range(2):  # threads start, caches fill
                graph.run(*inputs)
            steps, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < TURN_SECONDS or not steps:
                graph.run(*inputs)
                steps += 1
            took.append(passed / steps)
    for graph in graphs:
        graph.close()
    return [statistics.median(took) for took in seconds]


def verify_graph(
    name: str, entry: dict[str, Any], recipe: dict[str, Any], device: str, folder: str, plain: str
) -> Iterator[str]:
    """BuildError unless the graph, compiled, computes what the decoder says."""
    yield f"verify {name}"
    asked, config, weights = from_dict(recipe), load_config(Path(folder)), _weights(folder, device)
    prefill = name.startswith("prefill")
    reference = (llama.Prefill if prefill else llama.Decode)(config)
    limit = prefill_width(asked, device, asked.max_input_len) if prefill else asked.max_seq_len
    right = _weights(plain, device) if packs(asked, device) else weights
    graph = Phase(Path(folder), name, entry, config, weights)
    kv_cache = empty_cache(asked, config, device, weights["norm"].dtype, sequences(name))
    with torch.no_grad():
        check_graph(name, graph.run, reference, right, kv_cache, limit)
    graph.close()


CALLS = {"weights": prepare_weights, "compile": compile_part, "time": time_threads, "verify": verify_graph}


def _parts_of(name: str, recipe: BuildRecipe, device: str, folder: str) -> tuple[list[Part], Prefill | Decode]:
    """The parts of a graph, and the module that they are taken from."""
    config, weights = load_config(Path(folder)), _weights(folder, device)
    kv_cache = empty_cache(recipe, config, device, weights["norm"].dtype, sequences(name))
    return parts_of(name, recipe, config, weights, kv_cache), graph_module(name, recipe, config, device)


@cache
def _weights(folder: str, device: str) -> Weights:
    """The same for all graphs that this process compiles."""
    return read_weights(Path(folder), device)


def _use_private_folder(scratch: str) -> None:
    """Have all that the compilers write, and would leave behind, in a folder that goes with the build."""
    os.environ |= {"TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": scratch, "TRITON_CACHE_DIR": scratch}
    tempfile.tempdir = scratch
    prepare_inductor()


def _inductor_options(recipe: BuildRecipe, device: str, threads: int, module: Prefill | Decode) -> dict[str, Any]:
    """Settings of Inductor for one graph: what the recipe's fusion options and optimization level mean to it."""
    options: dict[str, Any] = {"cpp.cxx": (None, hardware.compiler())}
    options["aot_inductor.precompile_headers"] = False  # 280 MB that only pay off in a later build, if they are kept
    if device == "cpu":
        options["cpp.threads"] = threads
        options["cpp.enable_floating_point_contract_flag"] = "fast"  # a product and a sum in one instruction
    if not recipe.fusion.kernels:
        # One kernel an operation: nothing is inlined into its consumer, nothing merged by the scheduler.
        options |= {
            "max_fusion_size": 1,
            "epilogue_fusion": False,
            "realize_reads_threshold": 0,
            "realize_opcount_threshold": 0,
            "realize_acc_reads_threshold": 0,
        }
    elif recipe.precision == "int4":
        options["realize_opcount_threshold"] = 1000  # else a product's words are widened into memory before it
    generated = module.product == "rows" and (type(module) is Decode or recipe.precision == "int4")
    if device == "cuda" and generated and recipe.optimization_level >= 2:
        options["coordinate_descent_tuning"] = True  # tries block sizes of the generated products on this GPU
    return options


def _compile(program: Any, path: Path, options: dict[str, Any], device: str, compile_threads: int) -> None:
    import torch._inductor.config as inductor

    inductor.compile_threads = compile_threads
    if device == "cuda":
        # Which vectors the CPU has decides nothing here. Up to PyTorch 2.12, finding out starts one Python after
        # another, each of which imports torch, in every process that compiles.
        inductor.cpp.vec_isa_ok = False
    with compiling(path.stem), warnings.catch_warnings():
        # torch copies its own tree specs in a way that its own newer code calls outdated
        warnings.filterwarnings("ignore", message=".*treespec", category=FutureWarning)
        # it advises rounding fp32 products to TensorFloat32; here fp32 means fp32
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


@contextlib.contextmanager
def compiling(graph: str) -> Iterator[None]:
    """What torch's compiler raises, in our words."""
    from torch._inductor.exc import CppCompileError, InductorError

    try:
        yield
    except (CppCompileError, InductorError) as error:
        raise _explained(graph, getattr(error, "inner_exception", error)) from error


def _explained(graph: str, error: Exception) -> CourseError:
    """Why a graph could not be compiled. Where memory runs out, the system may kill just one of the compilers."""
    from torch._inductor.exc import CppCompileError

    words = f"{complaint(str(error)) or type(error).__name__:.300}"
    if out_of_memory(error) or re.search(r"\bKilled\b", str(error)):
        return OutOfMemory(
            f"Memory ran out while {graph} was compiled: {words}",
            cause="A compiler takes up to 2 GiB beside what else is in memory.",
            fix="Close other programs and engines, or build something smaller.",
        )
    refused = why_refused(error)
    cause = refused or "PyTorch's compiler fails."
    fix = "Build it with another version of PyTorch, 2.9 to 2.13."
    fix = "`helpers doctor` looks at memory, disk and limits." if refused else fix
    if isinstance(error, CppCompileError):
        cause = "The C++ compiler refuses what PyTorch has written for it."
        fix = "Try another compiler: export CXX=clang++, or g++."
    return BuildError(f"Compiling {graph} failed: {words}", cause=cause, fix=fix)
