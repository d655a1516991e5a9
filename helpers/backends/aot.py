"""The `aot` backend: an ahead-of-time engine by PyTorch's AOTInductor.

Build: the decoder is exported once a phase and batch size and compiled to native code, a shared library in each
.pt2 file (aot_compile.py). Run: the libraries, one set of weights and one KV cache; no Python model, no compiler.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hardware, llama, models, store
from ..errors import WorkerError
from ..inspection import EngineReport, write_report
from ..progress import Progress
from ..recipe import BuildRecipe
from .aot_compile import (
    PACKED,
    WEIGHTS,
    alias_head,
    compile_graph,
    compute_dtype,
    empty_cache,
    graph_names,
    load_graph,
    prefill_batch,
    product_form,
    read_weights,
)
from .base import Engine, load_tokenizer
from .worker import Worker

COMPILER = "helpers.backends.aot_compile"
COMPILE_LIMIT = 3600.0  # seconds for one graph
SHORT = 1024  # so many tokens take a GPU hardly longer to read than few: starting its kernels is what takes the time


def estimate(recipe: BuildRecipe, config: models.ModelConfig, device: str) -> tuple[float, int]:
    """About how many seconds a build takes, and how many bytes the engine: told to the user before it starts."""
    graphs = len(graph_names(recipe, device))
    bytes_per_weight = 1 if recipe.precision == "int8" else compute_dtype(recipe, device).itemsize
    copies = 2 if any(product_form(recipe, device, b) == "packed" for b in recipe.decode_batch_sizes) else 1
    size = copies * config.parameter_count() * bytes_per_weight
    rounds = math.ceil(graphs / _jobs(graphs, size, device))
    return rounds * (8 + 2.2 * config.num_hidden_layers), size + graphs * 3_000_000


def build(recipe: BuildRecipe, checkpoint: models.Checkpoint, folder: Path, progress: Progress) -> dict[str, Any]:
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


def load(folder: Path, manifest: dict[str, Any], tokenizer_folder: Path | None = None) -> AotEngine:
    return AotEngine(folder, manifest)


class AotEngine(Engine):
    """The compiled graphs, one set of weights, one KV cache for max_batch_size sequences."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        recipe = store.recipe_of(folder)
        checkpoint = models.Checkpoint(folder.name, folder, dummy=False)
        config = checkpoint.config
        super().__init__(recipe, load_tokenizer(folder), checkpoint.eos_token_ids(), config.vocab_size)
        details = manifest["details"]
        self.device = manifest["identity"]["recipe"]["device"]
        self.weights = read_weights(folder, self.device)
        dtype = getattr(torch, details["compute_dtype"])
        self.cache = empty_cache(recipe, config, self.device, dtype, recipe.max_batch_size)
        self.span = torch.arange(recipe.max_seq_len, device=self.device)
        self.graphs = {name: load_graph(folder / f"{name}.pt2") for name in details["graphs"]}
        self.graph_weights = {
            name: [self.weights[w] for w in graph["weights"]] for name, graph in details["graphs"].items()
        }
        self.num_threads = details["num_threads"]
        self.asynchronous = self.device == "cuda"
        self.lengths: list[int] = []
        self.steps: dict[int, DecodeStep] = {}
        if self.device == "cuda":
            self.steps = {size: CudaGraphStep(self, size) for size in recipe.decode_batch_sizes}
        else:
            self.steps = {size: DecodeStep(self, size) for size in recipe.decode_batch_sizes}

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.lengths = [len(p) for p in prompts]
        with self._own_threads():
            rows = list(self._read(prompts))
        for step in self.steps.values():
            step.start(self.lengths)
        return torch.cat(rows)

    def _read(self, prompts: list[list[int]]) -> Iterator[Tensor]:
        """Logits [n, V] of so many prompts at a time, until all are read."""
        size = prefill_batch(self.recipe, self.device)
        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            # Eight prompts of 128 tokens take an H200 6.1 ms and one takes 4.4: short ones are worth reading together
            # even with others that are not there.
            short = size * max(map(len, group)) <= SHORT * len(group)
            if len(group) == 1 or (len(group) <= size // 2 and not short):
                yield from (self._prefill("prefill", first + at, [prompt]) for at, prompt in enumerate(group))
                continue
            # The graph writes to `size` slots. Where fewer follow, it begins earlier and reads some prompts again.
            slot = min(first, self.recipe.max_batch_size - size)
            group = prompts[slot : slot + size]
            unused: list[list[int]] = [[0]] * (size - len(group))
            yield self._prefill(f"prefill_b{size}", slot, group + unused)[first - slot : len(group)]

    def _prefill(self, graph: str, slot: int, prompts: list[list[int]]) -> Tensor:
        """Logits [B, V]; keys and values go to the slots from `slot` on."""
        lengths = [len(prompt) for prompt in prompts]
        width = max(2, *lengths)  # the graphs take two tokens or more
        tokens = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=self.device)
        ends = torch.tensor(lengths, device=self.device)
        return self._execute(graph, [tokens, ends, *self._slots(slot, slot + len(prompts))])

    @contextlib.contextmanager
    def _own_threads(self) -> Iterator[None]:
        """The library products of prefill use as many threads as the generated code was compiled for."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads if self.device == "cpu" else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def decode(self, tokens: Tensor) -> Tensor:
        batch = len(self.lengths)
        step = self.steps[min(size for size in self.steps if size >= batch)]
        logits = step(tokens, self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:batch]

    def fetch(self, tokens: Tensor) -> Callable[[], list[int]]:
        if self.device != "cuda":
            return super().fetch(tokens)
        host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return wait

    def release(self) -> None:
        self.steps, self.graphs, self.graph_weights, self.weights, self.cache = {}, {}, {}, {}, []
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _slots(self, first: int, end: int) -> list[Tensor]:
        return [c[first:end] for c in self.cache]

    def _execute(self, graph: str, arguments: list[Tensor]) -> Tensor:
        return self.graphs[graph].run([*self.graph_weights[graph], *arguments])[0]


class DecodeStep:
    """One decode graph on a CPU: attention reads as many cache entries as the longest sequence has."""

    def __init__(self, engine: AotEngine, size: int):
        self.run, self.size, self.span = engine._execute, size, engine.span
        self.graph, self.cache = f"decode_b{size}", engine._slots(0, size)
        self.tokens = torch.zeros(size, dtype=torch.long, device=engine.device)
        self.positions = torch.zeros(size, dtype=torch.long, device=engine.device)

    def start(self, lengths: list[int]) -> None:
        """A new batch: the next token of sequence b goes to position lengths[b]; rows without one start over."""
        self.positions.zero_()
        if len(lengths) <= self.size:
            self.positions[: len(lengths)] = torch.tensor(lengths)

    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        self.tokens[: len(lengths)] = tokens
        span = self.span[: max(2, max(lengths) + 1)]
        logits = self.run(self.graph, [self.tokens, self.positions, span, *self.cache])
        self.positions += 1
        return logits


class CudaGraphStep(DecodeStep):
    """The same recorded as one CUDA graph: a step is a single launch. Its shapes are fixed, so attention reads
    the whole cache and masks what is not there yet."""

    def __init__(self, engine: AotEngine, size: int):
        super().__init__(engine, size)
        stream = _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside the recording, so that lazy initialization is not in it
            self.run(self.graph, [self.tokens, self.positions, self.span, *self.cache])
        torch.cuda.current_stream().wait_stream(stream)
        self.recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recording):
            self.logits = self.run(self.graph, [self.tokens, self.positions, self.span, *self.cache])
            self.positions += 1

    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        self.tokens[: len(lengths)].copy_(tokens)
        self.recording.replay()
        return self.logits


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all engines: cuBLAS keeps a workspace (32 MiB on Hopper) for every stream it has seen, for good."""
    return torch.cuda.Stream()


def _convert(recipe: BuildRecipe, checkpoint: models.Checkpoint, device: str, dtype: torch.dtype) -> llama.Weights:
    config = checkpoint.config
    weights: llama.Weights = {}
    joined = {"qkv": recipe.fusion.qkv, "gate_up": recipe.fusion.gate_up}
    int8 = recipe.precision == "int8"
    for name, tensor in llama.convert(models.tensors(checkpoint), config, dtype, int8=int8, **joined):
        weights[name] = tensor.to(device)
    weights |= {k: v.to(device) for k, v in llama.rope_tables(config, recipe.max_seq_len, dtype).items()}
    alias_head(weights)
    if any(product_form(recipe, device, size) == "packed" for size in recipe.decode_batch_sizes):
        for name in [n for n in weights if n.endswith(".weight")]:
            packed = llama.pack(weights[name])
            if packed is not None:
                weights[name.removesuffix("weight") + "packed"] = packed
    return weights


def _save_weights(weights: llama.Weights, folder: Path) -> None:
    from safetensors.torch import save_file

    packed = {k: v for k, v in weights.items() if k.endswith(".packed")}
    tied = weights["head.weight"] is weights["embedding"]
    left_out = {*packed, "head.weight"} if tied else {*packed}
    save_file({k: v for k, v in weights.items() if k not in left_out}, folder / WEIGHTS)
    if packed:
        save_file(packed, folder / PACKED)


def _bytes(weights: llama.Weights) -> int:
    return sum(w.numel() * w.element_size() for name, w in weights.items() if not name.endswith(".packed"))
