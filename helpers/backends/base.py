"""The face that every backend shows: `generate`, `stream`, `close`; and the loop behind it, written once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, LimitError, OutOfMemory
from ..recipe import BuildRecipe
from ..sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Seconds of one request, as trtllm-bench and vLLM define them.

    ttft_s  from the request to its first token (time to first token)
    tpot_s  (e2e_s - ttft_s) / (output tokens - 1), time per output token; 0.0 for a single token
    e2e_s   from the request to its last token
    gaps_s  between each token and the one before it, as the caller sees them (inter-token latency)
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


@dataclass
class _Sequence:
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""
    times: list[float] = field(default_factory=list)  # of each token, in seconds since the request

    def accept(self, token: int, at: float, sampling: SamplingParams, end_ids: tuple[int, ...]) -> None:
        """Take one token. An end token stops the answer and is not part of it."""
        self.times.append(at)
        if token in end_ids and not sampling.ignore_eos:
            self.finish_reason = "stop"
            return
        self.output.append(token)
        if len(self.output) == sampling.max_tokens:
            self.finish_reason = "length"

    def metrics(self) -> Metrics:
        first, last = self.times[0], self.times[-1]
        gaps = tuple(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))
        return Metrics(first, (last - first) / max(1, len(self.times) - 1), last, gaps)


class Engine(ABC):
    """A loaded engine. Subclasses give the two phases; text, limits, sampling, stopping and timing are here."""

    recipe: BuildRecipe
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    vocab_size: int
    asynchronous = False  # True where `decode` returns before the device has done the work

    def __init__(self, recipe: BuildRecipe, tokenizer: Tokenizer | None, end_ids: tuple[int, ...], vocab_size: int):
        self.recipe, self.tokenizer, self.end_ids, self.vocab_size = recipe, tokenizer, end_ids, vocab_size
        self.closed = False
        self._request = 0  # the one whose keys and values are in the cache

    @abstractmethod
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Read the prompts into an empty KV cache; logits [B, V] after each prompt's last token."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token [B] to each sequence; logits [B, V] after it."""

    def release(self) -> None:
        """Give back memory; called once by `close`."""

    def generate(
        self, prompts: str | Sequence[int] | Sequence[str | Sequence[int]], sampling: SamplingParams | None = None
    ) -> list[Generation]:
        """Answer all prompts as one batch. A prompt is a text or a list of token ids.

        Raises InputError for a bad prompt and LimitError for what the engine was not built for, before any work.
        """
        sampling = sampling or SamplingParams()
        batch = [self.tokenize(prompt) for prompt in _as_list(prompts)]
        self._check_limits(batch, sampling)
        sequences = [_Sequence(ids) for ids in batch]
        for _ in self._run(sequences, sampling):
            pass
        return [
            Generation(self.detokenize(s.output), s.output, s.prompt, s.finish_reason, s.metrics()) for s in sequences
        ]

    def stream(self, prompt: str | Sequence[int], sampling: SamplingParams | None = None) -> Iterator[Token]:
        """Answer one prompt token by token, each as soon as it is known."""
        sampling = sampling or SamplingParams()
        ids = self.tokenize(prompt)
        self._check_limits([ids], sampling)
        return self._stream(ids, sampling)

    def logits(self, prompt: str | Sequence[int]) -> Tensor:
        """Logits [V] for the token after the prompt, in float32 on the CPU."""
        ids = self.tokenize(prompt)
        self._check_limits([ids], SamplingParams(max_tokens=1))
        self._request += 1
        return self._guarded(self.prefill, [ids])[0].float().cpu()

    def tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("The prompt is empty.", fix="Give at least one word.")
            ids = list(self._need_tokenizer().encode(prompt).ids)
        elif isinstance(prompt, Sequence) and all(type(i) is int for i in prompt):
            ids = [int(i) for i in prompt]
        else:
            raise InputError(f"A prompt is a text or a list of token ids, not {prompt!r:.80}.")
        if not ids:
            raise InputError("The prompt has no tokens.", fix="Give at least one token id.")
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise InputError(
                f"Token id {wrong[0]} is outside the model's vocabulary of {self.vocab_size}.",
                cause="The ids come from another model's tokenizer.",
                fix="Tokenize with this engine: engine.tokenize(text).",
            )
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True) if self.tokenizer else ""

    def close(self) -> None:
        """Give back the engine's memory. Closing twice is fine; using a closed engine is refused."""
        if not self.closed:
            self.closed = True
            self.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.recipe.short_name}{' (closed)' if self.closed else ''}>"

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "This model has no tokenizer.json, so it takes no text.",
                cause="Dummy weights of a bare configuration, or a checkpoint with a slow tokenizer only.",
                fix="Give the prompt as a list of token ids.",
            )
        return self.tokenizer

    def _check_limits(self, batch: list[list[int]], sampling: SamplingParams) -> None:
        recipe = self.recipe
        if self.closed:
            raise InputError("This engine is closed.", fix="Load it again: load(name).")
        if not batch:
            raise InputError("There are no prompts.", fix="Give at least one.")
        if len(batch) > recipe.max_batch_size:
            raise _limit("batch has", len(batch), "prompts", "max_batch_size", recipe.max_batch_size)
        longest = max(map(len, batch))
        if longest > recipe.max_input_len:
            raise _limit("longest prompt has", longest, "tokens", "max_input_len", recipe.max_input_len)
        if longest + sampling.max_tokens > recipe.max_seq_len:
            words = f"({longest}) plus max_tokens ({sampling.max_tokens}) makes"
            raise _limit(f"prompt {words}", longest + sampling.max_tokens, "tokens", "max_seq_len", recipe.max_seq_len)

    def _run(self, sequences: list[_Sequence], sampling: SamplingParams) -> Iterator[int]:
        """The generation loop: prefill, then one decode step a token until every sequence has finished.

        Yields after each step, so that a stream can hand out its token before the next one is computed.
        """
        start = time.perf_counter()
        self._request += 1
        mine = self._request
        sampler = Sampler(sampling, len(sequences))
        logits = self._guarded(self.prefill, [s.prompt for s in sequences])
        for step in range(sampling.max_tokens):
            tokens = sampler(logits, [s.prompt + s.output for s in sequences])
            ids = self.fetch(tokens)
            # A GPU starts on the next step before the host looks at this one's tokens; if they end the answer,
            # one step was for nothing.
            early = self.asynchronous and step + 1 < sampling.max_tokens
            if early:
                logits = self._guarded(self.decode, tokens)
            for sequence, token in zip(sequences, ids(), strict=True):
                if not sequence.finish_reason:
                    sequence.accept(token, time.perf_counter() - start, sampling, self.end_ids)
            yield step
            if all(s.finish_reason for s in sequences):
                return
            if self.closed or self._request != mine:  # only a stream can be overtaken
                raise self._overtaken()
            if not early:
                logits = self._guarded(self.decode, tokens)

    def _overtaken(self) -> InputError:
        return InputError(
            f"This stream cannot go on: its engine {'is closed' if self.closed else 'answers another prompt'}.",
            cause="An engine has one KV cache; each request starts it anew.",
            fix="Read a stream to its end before the next request, or give all prompts to generate at once.",
        )

    def fetch(self, tokens: Tensor) -> Callable[[], list[int]]:
        """Begin to bring token ids [B] to the host; call the result to wait for them."""
        return tokens.tolist

    def _stream(self, ids: list[int], sampling: SamplingParams) -> Iterator[Token]:
        sequence = _Sequence(ids)
        shown = ""
        for _ in self._run([sequence], sampling):
            if len(sequence.output) < len(sequence.times):
                return  # the end token came
            text = self.detokenize(sequence.output)
            # A character of several bytes may span tokens: it is held back until it is whole or nothing follows.
            complete = bool(sequence.finish_reason) or not text.endswith("\ufffd")
            yield Token(sequence.output[-1], text[len(shown) :] if complete else "", sequence.times[-1])
            shown = text if complete else shown

    def _guarded(self, phase: Any, argument: Any) -> Any:
        try:
            return phase(argument)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
                raise
            raise OutOfMemory(
                f"Out of memory while generating: {str(error).splitlines()[0]}",
                cause=f"Weights, KV cache and intermediate results of max_batch_size={self.recipe.max_batch_size} and "
                f"max_seq_len={self.recipe.max_seq_len} do not fit beside what else is in memory.",
                fix="Close other engines, send fewer or shorter prompts, or build with smaller limits.",
            ) from error


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint or engine folder, by the tokenizers library alone; None if it has none."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.exists() else None


def _as_list(prompts: Any) -> list[Any]:
    """One prompt, or several: a text, a list of ids, a list of texts, a list of lists of ids."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InputError(f"Prompts are texts or lists of token ids, not {prompts!r:.80}.")
    prompts = list(prompts)
    return [prompts] if prompts and all(isinstance(p, int) for p in prompts) else prompts


def _limit(what: str, value: int, unit: str, limit: str, allowed: int) -> LimitError:
    return LimitError(
        f"The {what} {value} {unit}; this engine was built with {limit}={allowed}.",
        cause="An engine's limits are fixed when it is built: its memory and kernels are sized for them.",
        fix=f"Ask for less, or build with {limit}={value} or more.",
    )
