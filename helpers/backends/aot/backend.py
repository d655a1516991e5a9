"""The `aot` backend: an ahead-of-time engine by PyTorch's AOTInductor.

Build: the decoder is exported once a phase and batch size and compiled to native code, a shared library in each .pt2
file (graphs.py, compile.py). The decode step is compiled for several numbers of CPU threads, and the fastest is kept.
Each graph is compared with the decoder run by PyTorch (verify.py). Run: phase.py, engine.py.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from helpers.backends.aot.engine import AotEngine
from helpers.backends.aot.graphs import compute_dtype, graph_module, graph_names, layers_of_a_run, packs
from helpers.backends.aot.stored import stored_bytes
from helpers.backends.job import COMPILER_BYTES, WORK, source_digest
from helpers.backends.report import EngineReport, write_report
from helpers.errors import BackendUnavailable, BuildError, EngineMismatch, RecipeError, WorkerError, is_full
from helpers.machine import doctor, hardware
from helpers.machine.worker import Worker
from helpers.model.checkpoint import Checkpoint
from helpers.model.config import ModelConfig
from helpers.paths import compilers_folder, owned_folder
from helpers.progress import Progress
from helpers.recipe import BuildRecipe

# A change in these changes what is compiled, so it makes earlier engines another engine's.
SOURCES = (
    *("backends/aot", "recipe/fields.py"),
    *("model/checkpoint.py", "model/config.py", "model/llama.py", "model/weights.py"),
)
COMPILER = "helpers.backends.aot.compile"
# How the names of variables begin that would change what PyTorch and Triton compile, and are in no recipe. All of
# "TRITON_" would be too many: some say where Triton finds its programs.
SWITCHES = tuple(
    "TORCHINDUCTOR_ INDUCTOR_ TORCHDYNAMO_ TORCH_DYNAMO_ TORCH_COMPILE TORCH_CACHING_ TORCH_STRICT_ TORCH_FAKE_TENSOR_"
    " TORCHEXPORT_ AOT_INDUCTOR_ AOTINDUCTOR_ DUMP_AOTI_ TRITON_F32_ TRITON_DEFAULT_FP_ TRITON_INTERPRET CUTLASS_"
    " CUTEDSL_ ENABLE_TMA_ ENABLE_PERSISTENT_ ENABLE_TEMPLATE_ ATEN_CPU_CAPABILITY".split()
)
COMPILE_LIMIT = 3600.0  # seconds for one graph
STEP = "decode_b1"  # the graph that numbers of threads are tried with


def check_available() -> None:
    """It runs wherever PyTorch does."""


def identity(recipe: BuildRecipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """Native code depends on the processor or GPU, its vector instructions, and the versions of its libraries."""
    machine = hardware.describe(recipe.device)
    counts = thread_counts(recipe, machine.device)
    return {
        "recipe": {
            "device": machine.device,
            "decode_batch_sizes": list(recipe.all_decode_batch_sizes),
            "num_threads": counts[0] if len(counts) == 1 else f"the fastest of {', '.join(map(str, counts))}",
        },
        "architecture": machine.architecture,
        "device_name": machine.name if machine.device == "cuda" else "",
        "instructions": " ".join(machine.instructions),
        "versions": {**hardware.versions(), "compiler": hardware.compiler_version()},
        "source": source_digest(*SOURCES),
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


def estimate(recipe: BuildRecipe, config: ModelConfig, device: str) -> tuple[float, int, float]:
    """About how many seconds a build takes, how many bytes the engine, and how many more the build meanwhile: packed
    weights are verified with the plain ones."""
    names = graph_names(recipe, device)
    weights, _ = stored_bytes(recipe, config, device)
    compiled = [*names, *[STEP] * (len(thread_counts(recipe, device)) - 1)]
    seconds = sum(_compile_seconds(name, recipe, config, device) for name in compiled)
    size = weights + len(names) * 2_500_000
    return 8 + seconds / _jobs(len(names), weights, device), size, size * (1.2 if packs(recipe, device) else 0.2)


def _compile_seconds(name: str, recipe: BuildRecipe, config: ModelConfig, device: str) -> float:
    """As measured on one core of an AMD EPYC."""
    if device == "cuda":
        return 8 + 1.6 * config.num_hidden_layers
    module = graph_module(name, recipe, config, device)
    layers = layers_of_a_run(module, device, {})
    seconds = 12 + 2.5 * layers if module.product == "packed" else 8 + 1.6 * layers
    return seconds + (8 if layers < config.num_hidden_layers else 0)


def build(recipe: BuildRecipe, checkpoint: Checkpoint, folder: Path, progress: Progress) -> dict[str, Any]:
    """Compile into `folder`, in worker processes; returns what the manifest keeps for loading. Raises BuildError."""
    hardware.compiler()
    device = hardware.resolve_device(recipe.device)
    names, counts = graph_names(recipe, device), thread_counts(recipe, device)
    jobs = _jobs(len(names), stored_bytes(recipe, checkpoint.config, device)[0], device)
    given, plain = {**recipe.to_dict(), "model": checkpoint.name}, folder / "plain"
    with _scratch_folder(folder) as scratch, _Compilers(jobs) as compilers:
        common = {"recipe": given, "device": device, "folder": str(folder)}
        own = {"scratch": scratch, "compile_threads": max(1, hardware.free_cores() // jobs)}

        def compile_all(what: str, todo: list[tuple[str, int, str]]) -> dict[tuple[str, int], dict[str, Any]]:
            """Compile graphs, each given with its threads and a folder. The reports, by file and threads."""
            keys = [(file, threads) for name, threads, _ in todo for file in graphs[name]["parts"]]
            calls = [
                {"name": name, "file": file, "threads": threads, "into": into, **common, **own}
                for name, threads, into in todo
                for file in graphs[name]["parts"]
            ]
            with _shown(progress, f"compile {what}", jobs) as show:
                try:
                    return dict(zip(keys, compilers.run("compile", calls, show), strict=True))
                except (WorkerError, BuildError) as error:
                    raise doctor.named_cause(error) from error

        try:
            (graphs,) = compilers.run("weights", [{**common, "graphs": names, "plain": str(plain)}], progress.phase)
            threads, step_seconds, reports, rest = counts[0], [], {}, names
            if len(counts) > 1:
                trials = [(STEP, count, f"{scratch}/{count}-threads") for count in counts]
                reports = compile_all(f"{STEP} for {' and '.join(map(str, counts))} threads", trials)
                timed = {"name": STEP, "entry": graphs[STEP], "trials": [trial[1:] for trial in trials], **common}
                (step_seconds,) = compilers.run("time", [timed], progress.phase)
                threads = fastest(counts, step_seconds)
                for file in graphs[STEP]["parts"]:
                    shutil.move(f"{scratch}/{threads}-threads/{file}.pt2", folder)
                rest = [name for name in names if name != STEP]
            reports |= compile_all(f"{len(rest)} graphs", [(name, threads, str(folder)) for name in rest])
            for name in names:  # one after the other: side by side, threads would spin while others need their cores
                call = {"name": name, "entry": graphs[name], "plain": str(plain), **common}
                compilers.run("verify", [call], progress.phase)
        except (WorkerError, BuildError, BackendUnavailable) as error:
            places = {place: shutil.disk_usage(place).free for place in (folder, Path(scratch).parent)}
            fullest = min(places, key=places.__getitem__)
            # A compiler that lacks room does not say so.
            if is_full(error) or places[fullest] < 10e6:
                raise OSError(errno.ENOSPC, "No space left on device", str(fullest)) from error
            raise
    if plain.is_dir():
        shutil.rmtree(plain)
    report = EngineReport("aot", [], [])
    for file in (file for name in names for file in graphs[name]["parts"]):
        part = EngineReport.from_dict(reports[file, threads])
        report.operations.extend(part.operations)
        report.kernels.extend(part.kernels)
        report.removed.update(part.removed)
    write_report(report, folder)
    return {
        "graphs": graphs,
        "num_threads": threads,
        "step_seconds": dict(zip(counts, step_seconds, strict=False)),
        "compute_dtype": str(compute_dtype(recipe, device)).removeprefix("torch."),
    }


@contextlib.contextmanager
def _shown(progress: Progress, what: str, jobs: int) -> Iterator[Callable[[str], Any]]:
    """Each step as a phase of its own; where steps run side by side, as parts of one phase."""
    if jobs == 1:
        yield progress.phase
    else:
        with progress.phase(f"{what}, {jobs} at a time"):
            yield progress.part


def thread_counts(recipe: BuildRecipe, device: str) -> list[int]:
    """How many CPU threads the generated loops and the library's products may get: the build keeps the fastest."""
    if device != "cpu":
        if recipe.num_threads:
            raise RecipeError(
                f"num_threads is for CPUs, and device {recipe.device!r} is a GPU on this machine.",
                fix="Leave num_threads out, or use device='cpu'.",
            )
        return [0]
    if recipe.num_threads:
        return [recipe.num_threads]
    if recipe.optimization_level == 0:
        return [1]  # each count to be tried would be compiled for
    most = hardware.free_threads()
    return sorted({most, *(2**power for power in range(most.bit_length()))})


def fastest(counts: list[int], seconds: list[float]) -> int:
    """The fewest threads that are as fast as any, but for a twentieth: a core left free serves whoever else works."""
    return next(count for count, took in zip(counts, seconds, strict=True) if took <= 1.05 * min(seconds))


def _jobs(graphs: int, weight_bytes: int, device: str) -> int:
    """How many graphs to compile at a time: each takes a core, the weights, and COMPILER_BYTES beside them."""
    most = min(graphs, hardware.free_cores(), int(hardware.free_memory() / (COMPILER_BYTES + weight_bytes)))
    if device == "cuda":
        most = min(most, int(torch.cuda.mem_get_info()[0] / (1e9 + weight_bytes)))
    return max(1, most)


@contextlib.contextmanager
def _scratch_folder(folder: Path) -> Iterator[str]:
    """A folder for what the compilers write, gone after the block. Its path must hold no space, and it must let
    programs run. The build's own folder comes first, since that is swept up even after a killed build."""
    place = compilers_folder(folder)
    if place is None:
        raise BuildError(
            f"The compiler has no folder to work in: {folder.parent} and {tempfile.gettempdir()} have a space or a "
            "quote in their path, cannot be written, or let no program run.",
            cause="torch hands paths to the C++ compiler in one line, which a space would cut.",
            fix="Set TMPDIR to a folder without a space in its path, such as /tmp.",
        )
    if (free := shutil.disk_usage(place).free) < WORK:
        raise BuildError(
            f"{place} has {free / 1e6:.0f} MB free; the compiler needs about {WORK / 1e6:.0f} MB there.",
            fix="Make room there, or set TMPDIR to a folder that has more.",
        )
    with owned_folder(".compile-", place) as scratch:
        yield str(scratch)


class _Compilers:
    """Worker processes that take calls side by side, each one after the other. All end with the block, whatever ends
    it: after the user's interrupt too, nothing goes on compiling."""

    def __init__(self, jobs: int):
        self._threads = ThreadPoolExecutor(jobs)
        self._own = threading.local()  # .worker: the one of this thread
        self._workers: list[Worker] = []
        self._stopped = False

    def run(self, function: str, calls: list[dict[str, Any]], show: Callable[[str], Any]) -> list[Any]:
        """The answer to each call. show: makes a context manager of a step's name, entered while the step runs."""
        return list(self._threads.map(lambda call: self._call(function, call, show), calls))

    def _call(self, function: str, call: dict[str, Any], show: Callable[[str], Any]) -> Any:
        if not hasattr(self._own, "worker"):
            with show("start a process"):
                self._own.worker = Worker(COMPILER, without=SWITCHES)
            self._workers.append(self._own.worker)
        if self._stopped:
            self._own.worker.kill()
        steps = self._own.worker.stream(function, time_limit=COMPILE_LIMIT, **call)
        step: str | None = next(steps)
        answer = None
        while step is not None:
            with show(step):
                try:
                    step = next(steps)
                except StopIteration as end:
                    step, answer = None, end.value
        return answer

    def __enter__(self) -> _Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        stopping = threading.Thread(target=self._stop)  # where no second interrupt can reach it
        try:
            stopping.start()
        except RuntimeError:  # a limit on threads
            self._stop()
        else:
            stopping.join()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
