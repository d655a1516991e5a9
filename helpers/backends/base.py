"""The face that every engine shows: `generate`, `stream`, `close`; and the generation loop behind it, written once."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import InputError, LimitError, NumericsError, out_of_memory, shown
from helpers.model.sampling import Sampler, SamplingParams, checked
from helpers.model.tokenizer import IncrementalDetokenizer, Tokenizer
from helpers.progress import Progress
from helpers.recipe import BuildRecipe

if TYPE_CHECKING:
    from torch import Tensor

    Observer = Callable[[Tensor], None]


@dataclass(frozen=True)
class BuildJob:
    """Something to build and publish.

    short_name    readable part of the folder's name
    identity      all that the engine depends on; its hash is the other part
    recipe        what was asked for, as plain values
    compile_into  (folder, progress): writes the engine's files; returns what the manifest keeps for loading
    estimate      about how many seconds it takes and how many bytes the engine becomes; asked only before a build, so
                  it is where what cannot be built is refused
    """

    short_name: str
    identity: dict[str, Any]
    recipe: dict[str, Any]
    compile_into: Callable[[Path, Progress], dict[str, Any]]
    estimate: Callable[[], tuple[float, int]]


@dataclass(frozen=True)
class Metrics:
    """Seconds of one request, as trtllm-bench and vLLM define them.

    ttft_s  from the request to its first token (time to first token)
    tpot_s  (e2e_s - ttft_s) / (output tokens - 1), time per output token; 0.0 for fewer than two tokens
    e2e_s   from the request to its last token
    gaps_s  between each token and the one before it, as the caller sees them (inter-token latency)

    An end token is no part of the answer, so it does not count as an output token on any backend.
    """

    ttft_s: float
    tpot_s: float
    e2e_s: float
    gaps_s: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Generation:
    """One prompt's answer. finish_reason is "stop" (end token) or "length" (max_tokens reached)."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    metrics: Metrics


@dataclass(frozen=True)
class Token:
    """One streamed token: its id, the text it adds ("" while a character is incomplete), seconds since the call."""

    token_id: int
    text: str
    elapsed_s: float


NOT_A_TOKEN = -1  # in place of a token id, where it was chosen from scores that are not finite numbers


@dataclass
class RunningSequence:
    """One prompt while it is answered."""

    prompt: list[int]
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""
    times: list[float] = field(default_factory=list)  # of each output token, in seconds since the request

    def accept(self, token: int, seconds: float, sampling: SamplingParams, end_ids: tuple[int, ...]) -> None:
        """Take one token. An end token stops the answer and is not part of it. For NOT_A_TOKEN see `Engine._take`."""
        if token == NOT_A_TOKEN:
            raise NumericsError(
                f"Behind token {len(self.prompt) + len(self.output)} the model's scores are not finite numbers.",
                cause="An intermediate result was too large for the precision; fp16 holds no more than 65504.",
                fix="Build with precision='bf16' or 'fp32'; if it stays, the checkpoint's weights are damaged.",
            )
        if token in end_ids and not sampling.ignore_eos:
            self.end(seconds)
            return
        self.output.append(token)
        self.times.append(seconds)
        if len(self.output) == sampling.max_tokens:
            self.finish_reason = "length"

    def end(self, seconds: float) -> None:
        """The model stopped. Of an answer without a token, the only time there is, is that of its end."""
        self.finish_reason = "stop"
        self.times = self.times or [seconds]

    def metrics(self) -> Metrics:
        first, last = self.times[0], self.times[-1]
        gaps = tuple(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))
        return Metrics(first, (last - first) / len(gaps) if gaps else 0.0, last, gaps)


class Engine(ABC):
    """A loaded engine. Subclasses give the two phases; text, limits, sampling, stopping and timing are here.

    An engine has one KV cache, so it serves one request at a time: a lock makes other threads wait, and a stream that
    another request has overtaken is refused when it is read on. A forked process has a copy of the engine without the
    threads that work for it, so there it is refused.
    """

    recipe: BuildRecipe
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    vocab_size: int
    _first_process = 0  # where the first engine was loaded; what it started there works for all later ones too

    def __init__(self, recipe: BuildRecipe, tokenizer: Tokenizer | None, end_ids: tuple[int, ...], vocab_size: int):
        self.recipe, self.tokenizer, self.end_ids, self.vocab_size = recipe, tokenizer, end_ids, vocab_size
        self.closed = False
        self._lock = threading.RLock()
        self._request = 0  # the one whose keys and values are in the cache
        self._by_hand: list[int] = []  # cache entries of each sequence, where `prefill` was called from outside
        self._by_hand_thread = 0  # the one that called it
        Engine._first_process = self._process = Engine._first_process or os.getpid()
        self._check_usable()

    # What a backend gives.

    @abstractmethod
    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        """Read the prompts into an empty KV cache; logits [B, V] after each prompt's last token."""

    @abstractmethod
    def _decode(self, tokens: Tensor) -> Tensor:
        """Append one token [B] to each sequence; logits [B, V] after it."""

    def _take(self, tokens: Tensor, logits: Tensor, last: bool) -> tuple[list[int], Callable[[], Tensor]]:
        """The token ids [B] on the host, and the call that gives the logits [B, V] of the next step.

        An id is NOT_A_TOKEN where the logits that it was chosen from are not finite: NaN or infinity in a row adds up
        to NaN or infinity. A backend whose device works by itself overrides this, and starts the next step before it
        waits for the ids. last: no step follows.
        """
        totals = logits.sum(-1)  # [B]
        ids = zip(tokens.tolist(), totals.tolist(), strict=True)
        return [i if math.isfinite(total) else NOT_A_TOKEN for i, total in ids], partial(self._decode, tokens)

    def _release(self) -> None:
        """Give back memory; called once by `close`."""

    # What a user calls.

    def generate(
        self, prompts: str | Sequence[int] | Sequence[str | Sequence[int]], sampling: SamplingParams | None = None
    ) -> list[Generation]:
        """Answer all prompts as one batch. A prompt is a text or a list of token ids.

        Raises InputError for a bad prompt and LimitError for what the engine was not built for, before any work.
        """
        sampling = checked(sampling)
        batch = [self.tokenize(prompt) for prompt in _as_list(prompts)]
        self._check_limits(batch, sampling.max_tokens)
        sequences = [RunningSequence(ids) for ids in batch]
        with self._lock:
            for _ in self._run(sequences, sampling):
                pass
        return [
            Generation(self.detokenize(s.output, s.prompt), s.output, s.prompt, s.finish_reason, s.metrics())
            for s in sequences
        ]

    def stream(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None = None, *, observe: Observer | None = None
    ) -> Iterator[Token]:
        """Answer one prompt token by token, each as soon as it is known.

        observe: called with the logits [1, V] that each token is chosen from, just before it is.
        """
        sampling = checked(sampling)
        ids = self.tokenize(prompt)
        self._check_limits([ids], sampling.max_tokens)
        return self._stream(ids, sampling, observe)

    def logits(self, prompt: str | Sequence[int]) -> Tensor:
        """Logits [V] for the token after the prompt, in float32 on the CPU."""
        self._check_usable()
        with self._lock:
            logits = self.prefill([self.tokenize(prompt)])[0].float().cpu().clone()  # the caller's own, to change
            self._by_hand = []  # so that a `decode` of somebody who called `prefill` before is refused
        return logits

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """The first phase by hand: read the prompts into an empty KV cache; logits [B, V] after each one's last token.

        It begins a request of its own, as `generate` does.
        """
        batch = [self.tokenize(prompt) for prompt in _as_list(prompts)]
        self._check_limits(batch, 1)
        with self._lock:
            self._claim()
            logits = self._guarded(self._prefill, batch)
            self._by_hand, self._by_hand_thread = [len(ids) for ids in batch], threading.get_ident()
        return logits

    def decode(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """The second phase by hand: append one token [B] to each sequence of `prefill`; logits [B, V] after it."""
        import torch

        self._check_usable()
        ids = self._ids(tokens)
        with self._lock:
            self._check_usable()
            if not self._by_hand or self._by_hand_thread != threading.get_ident():
                raise InputError(
                    "There is nothing to append a token to.",
                    cause="`decode` goes on after a `prefill`, and another request has begun since, or none has yet.",
                    fix="Call engine.prefill([ids]) first, and let nothing else use the engine in between.",
                )
            if len(ids) != len(self._by_hand):
                raise InputError(
                    f"`decode` appends one token to each of the {len(self._by_hand)} prompts, not {len(ids)}."
                )
            if (longest := max(self._by_hand)) == self.recipe.max_seq_len:
                raise _limit("sequence has", longest + 1, "tokens", "max_seq_len", longest)
            self._by_hand = [length + 1 for length in self._by_hand]
            logits = self._guarded(self._decode, torch.tensor(ids, device="cpu"))
            return logits.clone()  # a GPU's next step writes into the same memory

    def tokenize(self, prompt: str | Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt. Without add_special_tokens, the tokenizer puts no BOS token before a text."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("The prompt is empty.", fix="Give at least one word.")
            prompt = self._need_tokenizer().encode(prompt, add_special_tokens)
        if not (ids := self._ids(prompt)):
            raise InputError("The prompt has no tokens.", fix="Give at least one token id.")
        return ids

    def _ids(self, values: Tensor | Sequence[int]) -> list[int]:
        """Token ids as plain ints of this vocabulary; InputError for whatever they are not."""
        ids = _plain_list(values)
        if not all(map(_is_id, ids)):
            raise _no_prompt(values)
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise InputError(
                f"Token id {outside[0]} is outside the model's vocabulary of {self.vocab_size}.",
                cause="The ids come from another model's tokenizer.",
                fix="Tokenize with this engine: engine.tokenize(text).",
            )
        return ids

    def detokenize(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of token ids as it reads after those of `after`, such as the prompt's; alone without them."""
        ids, after = self._ids(ids), self._ids(after)
        return self.tokenizer.decode(ids, after) if self.tokenizer else ""

    def close(self) -> None:
        """Give back the engine's memory. Closing twice is fine; using a closed engine is refused."""
        if os.getpid() != self._process:  # what there is to give back is the first process's
            self.closed = True
            return
        with self._lock:
            if not self.closed:
                self.closed = True
                self._release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.recipe.short_name}{' (closed)' if self.closed else ''}>"

    # The loop.

    def _run(
        self, sequences: list[RunningSequence], sampling: SamplingParams, observe: Observer | None = None
    ) -> Iterator[int]:
        """The generation loop: prefill, then one decode step a token until every sequence has finished.

        Yields after each step, so that a stream can hand out its token before the next one is computed.
        """
        start = time.perf_counter()
        request = self._claim()
        sampler = Sampler(sampling, [s.prompt for s in sequences])
        logits = self._guarded(self._prefill, [s.prompt for s in sequences])  # [B, V]
        for step in range(sampling.max_tokens):
            if observe:
                observe(logits)
                self._check_not_overtaken(request)  # it may have used the engine
            tokens = sampler(logits)  # [B]
            ids, next_logits = self._guarded(self._take, tokens, logits, step + 1 == sampling.max_tokens)
            for sequence, token in zip(sequences, ids, strict=True):
                if not sequence.finish_reason:
                    sequence.accept(token, time.perf_counter() - start, sampling, self.end_ids)
            yield step
            if all(s.finish_reason for s in sequences):
                return
            self._check_not_overtaken(request)
            logits = self._guarded(next_logits)

    def _stream(self, ids: list[int], sampling: SamplingParams, observe: Observer | None) -> Iterator[Token]:
        sequence = RunningSequence(ids)
        steps = self._run([sequence], sampling, observe)
        detokenizer = IncrementalDetokenizer(self.tokenizer, ids)
        held: Token | None = None  # ends inside a character; if it is the last, it brings what there is of that one
        while True:
            if not sequence.finish_reason:
                self._check_usable()
            with self._lock:
                ended = next(steps, None) is None or sequence.finish_reason == "stop"
            if held:
                yield replace(held, text=held.text + detokenizer.end()) if ended else held
            if ended:
                return
            token = Token(sequence.output[-1], detokenizer.add(sequence.output[-1]), sequence.times[-1])
            held = token if detokenizer.holds_back else None
            if not held:
                yield token

    def _claim(self) -> int:
        """Begin a request: the cache is its own from here on. Call it with the lock held."""
        self._check_usable()
        self._request += 1
        self._by_hand = []
        return self._request

    def _check_not_overtaken(self, request: int) -> None:
        """Only a stream can be overtaken: between two of its tokens, somebody else may use the engine."""
        self._check_usable()
        if self._request != request:
            raise InputError(
                "This stream cannot go on: its engine answers another prompt.",
                cause="An engine has one KV cache; each request starts it anew.",
                fix="Read a stream to its end before the next request, or give all prompts to generate at once.",
            )

    def _check_usable(self) -> None:
        """InputError where the engine is closed, or is a forked process's copy. Needs no lock: a copied one may be
        held by a thread that the copy does not have."""
        if self.closed:
            raise InputError("This engine is closed.", fix="Load it again: load(name).")
        if os.getpid() != self._process:
            raise InputError(
                "This process is a fork of one that has loaded an engine: neither that one nor another runs here.",
                cause="A fork has the memory of its parent, but not the threads and the GPU that it works with.",
                fix="Start processes with multiprocessing's method 'spawn', and load the engine there.",
            )

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "This model has no tokenizer.json, so it takes no text.",
                cause="Dummy weights of a bare configuration, or a checkpoint with a slow tokenizer only.",
                fix="Give the prompt as a list of token ids.",
            )
        return self.tokenizer

    def _check_limits(self, batch: list[list[int]], max_tokens: int) -> None:
        recipe = self.recipe
        self._check_usable()
        if not batch:
            raise InputError("There are no prompts.", fix="Give at least one.")
        if len(batch) > recipe.max_batch_size:
            raise _limit("batch has", len(batch), "prompts", "max_batch_size", recipe.max_batch_size)
        longest = max(map(len, batch))
        if longest > recipe.max_input_len:
            raise _limit("longest prompt has", longest, "tokens", "max_input_len", recipe.max_input_len)
        if longest + max_tokens > recipe.max_seq_len:
            words = f"({longest}) plus max_tokens ({max_tokens}) makes"
            raise _limit(f"prompt {words}", longest + max_tokens, "tokens", "max_seq_len", recipe.max_seq_len)

    def _guarded(self, phase: Callable[..., Any], *arguments: Any) -> Any:
        """Run a phase, whatever settings of torch its caller has; where memory runs out, say so in our words."""
        try:
            with contextlib.nullcontext() if _is_plain() else plain_torch():
                return phase(*arguments)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the former
            if explained := out_of_memory(error):
                raise explained from error
            raise


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it starts: no autocast, no inference mode, float32 and the CPU by default. What a notebook sets for its
    own tensors must not change an engine's."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _is_plain() -> bool:
    """Whether the settings that can change from step to step are as torch starts. Takes a quarter of a microsecond."""
    import torch

    cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return not cast and torch.get_default_dtype() == torch.float32


def source_digest(*paths: Path) -> str:
    """A hash of the course's code that decides what a backend compiles: of these files, and the Python files of these
    folders."""
    files = [file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _as_list(prompts: Any) -> list[Any]:
    """One prompt, or several: a text, a list of ids, a list of texts, a list of lists of ids."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = _plain_list(prompts)
    return [prompts] if prompts and all(map(_is_id, prompts)) else prompts


def _plain_list(values: Any) -> list[Any]:
    """A list, a tuple or an array (numpy, torch) as a list. Nothing else is taken, because the keys of a dict or the
    bytes of a text would pass for prompts."""
    if hasattr(values, "dtype") and hasattr(values, "tolist"):
        with contextlib.suppress(RuntimeError, TypeError):  # a tensor without data, or no plain one
            values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise _no_prompt(values)
    return list(values)


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _no_prompt(value: Any) -> InputError:
    fix = "Give a str, or a list of ints such as engine.tokenize(text) returns."
    if isinstance(value, Mapping) and "input_ids" in value:
        fix = "Give its ids alone: prompt['input_ids']."
    elif isinstance(value, (bytes, bytearray)):
        fix = "Give it as text: prompt.decode()."
    what = "These are no token ids, but" if isinstance(value, str) else "A prompt is a text or a list of token ids, not"
    return InputError(f"{what} {type(value).__name__}: {shown(value)}.", fix=fix)


def _limit(what: str, value: int, unit: str, limit: str, allowed: int) -> LimitError:
    return LimitError(
        f"The {what} {value} {unit}; this engine was built with {limit}={allowed}.",
        cause="An engine's limits are fixed when it is built: its memory and kernels are sized for them.",
        fix=f"Ask for less, or build with {limit}={value} or more.",
    )
