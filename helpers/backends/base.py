"""The face that every engine shows: `generate`, `stream`, `close`; and the generation loop behind it, written once."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from helpers.backends.answers import NOT_A_TOKEN, AnswerText, Generation, RunningSequence, Token
from helpers.errors import InputError, LimitError, need, out_of_memory
from helpers.machine.plain_torch import is_plain, plain_torch
from helpers.model.prompts import as_list, is_id, no_prompt, plain_list
from helpers.model.sampling import Sampler, SamplingParams, checked
from helpers.model.tokenizer import Tokenizer
from helpers.recipe import BuildRecipe

if TYPE_CHECKING:
    from torch import Tensor

    Observer = Callable[[Tensor], None]


class Engine(ABC):
    """A loaded engine. Subclasses give the two phases; text, limits, sampling, stopping and timing are here.

    An engine has one KV cache, so it serves one request at a time: a lock makes other threads wait, and a stream that
    another request has overtaken is refused when it is read on. A forked process has a copy of the engine without the
    threads that work for it, so there it is refused; so is each engine in a fork of a process that had PyTorch.
    """

    recipe: BuildRecipe
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    vocab_size: int
    _forked = False  # this process is a fork of one that had PyTorch, with whatever that has started there

    def __init__(self, recipe: BuildRecipe, tokenizer: Tokenizer | None, end_ids: tuple[int, ...], vocab_size: int):
        self.recipe, self.tokenizer, self.vocab_size = recipe, tokenizer, vocab_size
        self.end_ids = tuple(dict.fromkeys([*end_ids, *(tokenizer.end_ids if tokenizer else ())]))
        self.closed = False
        self._lock = threading.RLock()
        self._request = 0  # the one whose keys and values are in the cache
        self._by_hand: list[int] = []  # cache entries of each sequence, where `prefill` was called from outside
        self._by_hand_thread = 0  # the one that called it
        self._check_usable()

    # What a backend gives.

    @abstractmethod
    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        """Read the prompts into an empty KV cache; logits [B, V] after each prompt's last token."""

    @abstractmethod
    def _decode(self, tokens: Tensor) -> Tensor:
        """Append one token [B] to each sequence; logits [B, V] after it."""

    def _argmax(self, logits: Tensor) -> Tensor:
        """The likeliest tokens [B] by the logits [B, V] that came last."""
        return logits.argmax(-1)

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
        batch = [self.tokenize(prompt) for prompt in as_list(prompts)]
        self._check_limits(batch, sampling.max_tokens)
        # Only a stop string needs an answer's text while it grows, which takes time.
        sequences = [RunningSequence(ids, text=self._text(ids, sampling) if sampling.stop else None) for ids in batch]
        with self._lock:
            for _ in self._run(sequences, sampling):
                pass
        texts = ["".join(s.pieces) if s.text else self.detokenize(s.output, s.prompt) for s in sequences]
        return [
            Generation(text, s.output, s.prompt, s.finish_reason, s.metrics())
            for text, s in zip(texts, sequences, strict=True)
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
        return TokenStream(self._stream(RunningSequence(ids, text=self._text(ids, sampling)), sampling, observe))

    def chat(self, messages: Sequence[Mapping[str, str]], sampling: SamplingParams | None = None) -> Generation:
        """Answer a conversation: [{"role": "user", "content": "Hello!"}, ...], by the model's own chat template."""
        return self.generate(self.tokenize_chat(messages), sampling)[0]

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], sampling: SamplingParams | None = None
    ) -> Iterator[Token]:
        """Answer a conversation token by token, each as soon as it is known."""
        return self.stream(self.tokenize_chat(messages), sampling)

    def logits(self, prompt: str | Sequence[int]) -> Tensor:
        """Logits [V] for the token after the prompt, in float32 on the CPU."""
        self._check_usable()
        with self.alone():
            logits = self.prefill([self.tokenize(prompt)])[0]
            return self._guarded(lambda: logits.float().cpu().clone())  # the caller's own, to change

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """The first phase by hand: read the prompts into an empty KV cache; logits [B, V] after each one's last token.

        It begins a request of its own, as `generate` does.
        """
        batch = [self.tokenize(prompt) for prompt in as_list(prompts)]
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
                raise _limit(
                    f"sequence has {longest + 1} tokens", f"max_seq_len={longest}", f"max_seq_len={longest + 1}"
                )
            # Until the step is done there is nothing to go on with: an interrupt leaves open what it has written.
            lengths, self._by_hand = self._by_hand, []
            # Cloned, because a GPU's next step writes into the same memory.
            logits = self._guarded(lambda: self._decode(torch.tensor(ids, device="cpu")).clone())
            self._by_hand = [length + 1 for length in lengths]
        return logits

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """For a function that calls `prefill` and `decode`: other threads wait meanwhile, and after it a `decode` of
        somebody who called `prefill` before is refused."""
        with self._lock:
            try:
                yield
            finally:
                self._by_hand = []

    def tokenize(self, prompt: str | Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt. Without add_special_tokens, the tokenizer puts no BOS token before a text."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("The prompt is empty.", fix="Give at least one word.")
            prompt = self._need_tokenizer().encode(prompt, add_special_tokens)
            if (largest := max(prompt, default=0)) >= self.vocab_size:
                raise InputError(
                    f"The text has token {largest}, and the model knows {self.vocab_size}, from 0 on.",
                    cause="It was added to the tokenizer, as [PAD] often is, and not to the model's embedding.",
                    fix="Leave it out of the text; or save the model anew after model.resize_token_embeddings.",
                )
        if not (ids := self._ids(prompt)):
            raise InputError("The prompt has no tokens.", fix="Give at least one token id.")
        return ids

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation up to where the answer begins. The model's chat template writes all special
        tokens, the first one of a text too."""
        tokenizer = self._need_tokenizer()
        if tokenizer.chat_template is None:
            raise InputError(
                "This model has no chat template.",
                cause="It goes on with a text, and was not trained on conversations; or the template was left behind "
                "when the checkpoint was copied: chat_template.jinja, or an entry of tokenizer_config.json.",
                fix="Use generate with a text; or take the model's instruction-tuned version.",
            )
        return self.tokenize(tokenizer.chat_template.render(messages), add_special_tokens=False)

    def _ids(self, values: Tensor | Sequence[int]) -> list[int]:
        """Token ids as plain ints of this vocabulary; InputError for whatever they are not."""
        ids = plain_list(values)
        if not all(map(is_id, ids)):
            raise no_prompt(values)
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
        if Engine._forked:  # what there is to give back is the first process's
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "An engine cannot be copied, or sent to another process.",
            cause="It has native code and one KV cache; a copy would spoil the answers of both.",
            fix="Load it a second time, or in the other process: load(name).",
        )

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
        sampler = Sampler(sampling, [s.prompt for s in sequences], self._argmax)
        logits = self._guarded(self._prefill, [s.prompt for s in sequences])  # [B, V]
        for step in range(sampling.max_tokens):
            if observe:
                observe(logits.clone())  # the token is chosen from these, whatever becomes of those
                self._check_not_overtaken(request)  # it may have used the engine
            tokens = self._guarded(sampler, logits)  # [B]
            ids, next_logits = self._guarded(self._take, tokens, logits, step + 1 == sampling.max_tokens)
            for sequence, token in zip(sequences, ids, strict=True):
                if not sequence.finish_reason:
                    sequence.accept(token, time.perf_counter() - start, sampling, self.end_ids)
            yield step
            if all(s.finish_reason for s in sequences):
                return
            self._check_not_overtaken(request)
            logits = self._guarded(next_logits)

    def _stream(
        self, sequence: RunningSequence, sampling: SamplingParams, observe: Observer | None
    ) -> Generator[Token, None, None]:
        steps = self._run([sequence], sampling, observe)
        given, text = 0, sequence.text
        while not sequence.finish_reason:
            self._check_usable()
            with self._lock:
                next(steps, None)
            # A token whose text is held back waits for the next: if it is the last, it brings what there is.
            waits = bool(not sequence.finish_reason and text and text.holds_back)
            for at in range(given, len(sequence.output) - waits):
                yield Token(sequence.output[at], sequence.pieces[at], sequence.times[at])
            given = max(given, len(sequence.output) - waits)

    def _text(self, prompt: list[int], sampling: SamplingParams) -> AnswerText:
        if sampling.stop:
            self._need_tokenizer()
        return AnswerText(self.tokenizer, prompt, sampling.stop)

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
        check_not_forked()

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "This model has no tokenizer.json, so it knows no text.",
                cause="Dummy weights of a bare configuration, or a checkpoint with a slow tokenizer only.",
                fix="Give the prompt as a list of token ids, and no stop strings.",
            )
        return self.tokenizer

    def _check_limits(self, batch: list[list[int]], max_tokens: int) -> None:
        recipe = self.recipe
        self._check_usable()
        if not batch:
            raise InputError("There are no prompts.", fix="Give at least one.")
        if (size := len(batch)) > (most := recipe.max_batch_size):
            raise _limit(f"batch has {size} prompts", f"max_batch_size={most}", f"max_batch_size={size}")
        longest = max(map(len, batch))
        total = f"max_seq_len={longest + max_tokens}" if longest + max_tokens > recipe.max_seq_len else ""
        if longest > (most := recipe.max_input_len):
            needed = f"max_input_len={longest}" + (f" and {total}" if total else "")
            raise _limit(f"longest prompt has {longest} tokens", f"max_input_len={most}", needed)
        if total:
            words = f"prompt ({longest}) plus max_tokens ({max_tokens}) makes {longest + max_tokens} tokens"
            raise _limit(words, f"max_seq_len={recipe.max_seq_len}", total)

    def _guarded(self, phase: Callable[..., Any], *arguments: Any) -> Any:
        """Run a phase, whatever settings of torch its caller has; where memory runs out, say so in our words."""
        try:
            with contextlib.nullcontext() if is_plain() else plain_torch():
                return phase(*arguments)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the former
            if explained := out_of_memory(error):
                raise explained from error
            raise


def check_not_forked() -> None:
    if Engine._forked:
        raise InputError(
            "This process is a fork of one that has PyTorch loaded: no engine runs here, and no module is exported.",
            cause="A fork has the memory of its parent, but not the threads and the GPU that it works with.",
            fix="Start processes with multiprocessing's method 'spawn', and load or build the engine there.",
        )


def _note_fork() -> None:
    Engine._forked = Engine._forked or "torch" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class TokenStream(Iterator[Token]):
    """The tokens of an answer. Threads that read it together take turns, and each gets other tokens."""

    def __init__(self, tokens: Generator[Token, None, None]):
        self._tokens, self._turn = tokens, threading.RLock()

    def __next__(self) -> Token:
        return self._in_turn(next)

    def close(self) -> None:
        self._in_turn(lambda tokens: tokens.close())

    def _in_turn(self, use: Callable[[Generator[Token, None, None]], Any]) -> Any:
        with self._turn:
            if inspect.getgeneratorstate(self._tokens) == inspect.GEN_RUNNING:
                raise InputError("This stream is read or closed inside of its own `observe`.", fix="Do it outside.")
            return use(self._tokens)


def need_engine(value: Any) -> None:
    """InputError for what is no engine, such as the folder that `build` returns."""
    need(value, Engine, "Give a loaded one: load(build(recipe)).")


def _limit(what: str, built_with: str, needed: str) -> LimitError:
    own = "" if needed.startswith("max_batch_size") else " A model has a longest sequence of its own; a build says it."
    return LimitError(
        f"The {what}; this engine was built with {built_with}.",
        cause="An engine's limits are fixed when it is built: its memory and kernels are sized for them.",
        fix=f"Ask for less, or build with {needed} or more.{own}",
    )
