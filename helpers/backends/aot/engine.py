"""An `aot` engine that runs: the compiled libraries, one set of weights, one KV cache; no Python model, no compiler."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.backends.answers import NOT_A_TOKEN
from helpers.backends.aot.early_start import CAPABILITY, start_early
from helpers.backends.aot.graphs import empty_cache, prefill_batch, prefill_width
from helpers.backends.aot.phase import Phase
from helpers.backends.aot.stored import read_weights
from helpers.backends.base import Engine
from helpers.model.config import load_config
from helpers.model.tokenizer import load_tokenizer
from helpers.progress import shown_if_slow
from helpers.recipe import BuildRecipe

PIECE = 256  # logits that one of a GPU's processors looks at
SHORT = 1024  # so many tokens take a GPU hardly longer to read than few: starting its kernels is what takes the time
_counting = threading.Lock()
_at_work: set[object] = set()  # one for each engine, of all threads
_before = 0  # torch's threads without them


class AotEngine(Engine):
    """The compiled graphs, one set of weights, one KV cache for max_batch_size sequences."""

    def __init__(self, recipe: BuildRecipe, folder: Path, manifest: dict[str, Any]):
        config = load_config(folder)
        super().__init__(recipe, load_tokenizer(folder), config.eos_token_ids, config.vocab_size)
        details = manifest["details"]
        self.device = manifest["identity"]["recipe"]["device"]
        self.num_threads: int = details["num_threads"]  # 0 on a GPU
        self.lengths: list[int] = []
        dtype = getattr(torch, details["compute_dtype"])
        step = CudaGraphStep if self.device == "cuda" else DecodeStep
        with shown_if_slow(f"Loading {folder.name}", "weights and graphs"):
            self.weights = read_weights(folder, self.device)
            self.cache = empty_cache(recipe, config, self.device, dtype, recipe.max_batch_size)
            self.span = torch.arange(recipe.max_seq_len, device=self.device)
            self.graphs = {
                name: Phase(folder, name, entry, config, self.weights) for name, entry in details["graphs"].items()
            }
            self.steps: dict[int, DecodeStep] = {size: step(self, size) for size in recipe.all_decode_batch_sizes}
        self.step = self.steps[1]  # of the batch that is answered

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        self.lengths = [len(p) for p in prompts]
        with self._own_threads():
            logits = torch.cat(list(self._read(prompts)))
        self.step = self.steps[min(size for size in self.steps if size >= len(prompts))]
        self.step.start(self.lengths, logits)
        return logits

    def _read(self, prompts: list[list[int]]) -> Iterator[Tensor]:
        """Logits [n, V] of so many prompts at a time, until all are read."""
        size = prefill_batch(self.recipe, self.device)
        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            # Eight prompts of 128 tokens take an H200 6.1 ms and one takes 4.4: short ones are worth reading together
            # even with others that are not there.
            short = size * max(map(len, group)) <= SHORT * len(group)
            if len(group) == 1 or (len(group) <= size // 2 and not short):
                yield from (self._read_group("prefill", first + at, [prompt]) for at, prompt in enumerate(group))
                continue
            # The graph writes to `size` slots. Where fewer follow, it begins earlier and reads some prompts again.
            slot = min(first, self.recipe.max_batch_size - size)
            group = prompts[slot : slot + size]
            unused: list[list[int]] = [[0]] * (size - len(group))
            yield self._read_group(f"prefill_b{size}", slot, group + unused)[first - slot : len(group)]

    def _read_group(self, graph: str, slot: int, prompts: list[list[int]]) -> Tensor:
        """Logits [B, V]; keys and values go to the slots from `slot` on."""
        lengths = [len(prompt) for prompt in prompts]
        width = prefill_width(self.recipe, self.device, max(lengths))
        # Filled up with a token of its own: another one's numbers could be too large, and NaN passes any mask.
        tokens = torch.tensor([prompt + prompt[-1:] * (width - len(prompt)) for prompt in prompts], device=self.device)
        ends = torch.tensor(lengths, device=self.device)
        return self.graphs[graph].run(tokens, ends, self._slots(slot, slot + len(prompts)))

    @contextlib.contextmanager
    def _own_threads(self) -> Iterator[None]:
        """The library's products use as many threads as the generated code was compiled for. torch has one number for
        the threads to come: it is put back as the first of the engines at work met it."""
        global _before
        me = object()
        try:
            with _counting:
                _before = _before if _at_work else torch.get_num_threads()
                _at_work.add(me)
            torch.set_num_threads(self.num_threads or _before)
            yield
        finally:
            if me in _at_work:  # not where an interrupt came before
                torch.set_num_threads(_before)
                _at_work.discard(me)

    def _decode(self, tokens: Tensor) -> Tensor:
        self.step.tokens[: len(tokens)].copy_(tokens)
        return self._advance()

    def _advance(self) -> Tensor:
        """One step with the tokens that are in its buffer."""
        with self._own_threads():
            logits = self.step.run(max(self.lengths))
        self.lengths = [length + 1 for length in self.lengths]
        return logits[: len(self.lengths)]

    def _argmax(self, logits: Tensor) -> Tensor:
        """A GPU has found them while it made the logits."""
        return self.step.tokens[: len(logits)] if isinstance(self.step, CudaGraphStep) else super()._argmax(logits)

    def _take(self, tokens: Tensor, logits: Tensor, last: bool) -> tuple[list[int], Callable[[], Tensor]]:
        """A GPU starts on the next step before the host has seen this one's tokens. If these end the answer, that
        step was for nothing."""
        if last or not isinstance(self.step, CudaGraphStep):
            return super()._take(tokens, logits, last)
        if tokens.data_ptr() != self.step.tokens.data_ptr():
            self.step.put(tokens)
        host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
        host.copy_(self.step.tokens[: len(tokens)], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        following = self._advance()
        copied.synchronize()
        return host.tolist(), lambda: following

    def _release(self) -> None:
        for graph in self.graphs.values():
            graph.close()
        self.steps, self.graphs, self.weights, self.cache = {}, {}, {}, []
        del self.step
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _slots(self, first: int, end: int) -> list[Tensor]:
        return [c[first:end] for c in self.cache]


class DecodeStep:
    """One decode graph on a CPU: attention reads as many cache entries as the longest sequence has."""

    def __init__(self, engine: AotEngine, size: int):
        self.graph, self.span = engine.graphs[f"decode_b{size}"], engine.span
        self.cache = engine._slots(0, size)
        self.tokens = torch.zeros(size, dtype=torch.long, device=engine.device)
        self.positions = torch.zeros(size, dtype=torch.long, device=engine.device)

    def start(self, lengths: list[int], logits: Tensor) -> None:
        """A new batch, whose prompts gave these logits: the next token of sequence b goes to position lengths[b]; rows
        without one start over."""
        self.positions.zero_()
        self.positions[: len(lengths)] = torch.tensor(lengths, device=self.positions.device)

    def run(self, longest: int) -> Tensor:
        """Logits [size, V] after the tokens in the buffer; the longest sequence had so many entries before them."""
        span = self.span[: max(2, longest + 1)]
        logits = self.graph.run(self.tokens, self.positions, span, self.cache)
        self.positions += 1
        return logits


class CudaGraphStep(DecodeStep):
    """The same recorded as one CUDA graph: a step is a single launch. Its shapes are fixed, so attention reads
    the whole cache and masks what is not there yet. Each launch more would show in the time per token, so the recording
    also looks whether the logits are finite, and puts the likeliest tokens where the next step reads its own from."""

    def __init__(self, engine: AotEngine, size: int):
        super().__init__(engine, size)
        self.finite = torch.ones_like(self.tokens, dtype=torch.bool)
        self.no_tokens = torch.full_like(self.tokens, NOT_A_TOKEN)
        # Once outside the recording, so that lazy initialization is not in it.
        self._look_at(self.graph.run(self.tokens, self.positions, self.span, self.cache))
        self.recording = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.recording):
            self.logits = self.graph.run(self.tokens, self.positions, self.span, self.cache)
            with _aside():
                self.positions += 1
            self._look_at(self.logits)
        if torch.cuda.get_device_capability() >= CAPABILITY:
            start_early(self.recording.raw_cuda_graph())
        self.recording.instantiate()

    def start(self, lengths: list[int], logits: Tensor) -> None:
        super().start(lengths, logits)
        self._look_at(logits)

    def _look_at(self, logits: Tensor) -> None:
        """The likeliest tokens, and which rows are finite: in any other, the sum is NaN or infinite. logits: [B, V].

        A GPU gives a short row to each of many processors, and one long row to a single one: so rows are cut in pieces.
        """
        count, entries = logits.shape
        width = math.gcd(entries, PIECE)
        pieces = logits.unflatten(-1, (-1, width))  # [B, P, W]
        with _aside() as side:
            totals = pieces.sum(-1).sum(-1)
            torch.eq(totals - totals, 0, out=self.finite[:count])
        top, at = pieces.max(-1)  # [B, P]; the first of equal ones, as argmax has it
        piece = top.argmax(-1, keepdim=True)
        likeliest = torch.add(at.gather(-1, piece), piece, alpha=width)[:, 0]
        torch.cuda.current_stream().wait_stream(side)
        self.put(likeliest)

    def put(self, tokens: Tensor) -> None:
        """The tokens [B] that were chosen from the last logits; NOT_A_TOKEN where these were not finite."""
        count = len(tokens)
        torch.where(self.finite[:count], tokens, self.no_tokens[:count], out=self.tokens[:count])

    def run(self, longest: int) -> Tensor:
        self.recording.replay()
        return self.logits


@contextlib.contextmanager
def _aside() -> Iterator[torch.cuda.Stream]:
    """What is launched here runs beside what is launched next. Who needs it waits for the stream."""
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield side


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all engines."""
    return torch.cuda.Stream()
