"""An engine that answers in a worker process, under another environment's Python: what TensorRT-LLM and vLLM share.

The worker's module serves these calls (see worker.py):

    generate(prompts, sampling)   yields, after each step, a list of [sequence, token id, seconds since the request];
                                  returns {"seconds": [of each sequence, from the request to its end]}
    logits(prompt)                scores [V] after the prompt, as a list; refuses if the library gives none
    memory()                      {"host": bytes, "device": bytes}: the most that its process has held
    profile(on)                   where `traces` is given: begin a trace, or end it and write it into that folder

Tokens, text, limits, stopping and metrics are those of base.py, so they mean the same for every backend.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.backends.answers import RunningSequence
from helpers.backends.base import Engine
from helpers.errors import CourseError, InputError, WorkerError
from helpers.machine.gpu_time import GpuTime, read_from
from helpers.machine.worker import Worker
from helpers.model.sampling import SamplingParams
from helpers.model.tokenizer import Tokenizer
from helpers.progress import Progress, shown_if_slow
from helpers.recipe import BuildRecipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from helpers.backends.base import Observer

TIME_LIMIT_S = 3600.0  # of one request


def start(worker: Worker, library: str, call: str, time_limit: float, **arguments: Any) -> Any:
    """The worker's answer to the call that loads a model. It can take minutes, so it is shown; where it fails, the
    worker ends."""
    try:
        with Progress(f"Starting {library}, which can take minutes") as progress, progress.phase(f"start {library}"):
            return worker.call(call, time_limit=time_limit, **arguments)
    except BaseException:
        worker.kill()
        raise


class RemoteEngine(Engine):
    """The face over a worker that generates by itself. It owns the worker, and ends it when it is closed."""

    device = "cuda"  # TensorRT-LLM and vLLM run on nothing else
    versions: dict[str, str] | None = None  # of the libraries in the worker, where it says so
    traces: Path | None = None  # where the worker writes traces of its GPU's work, if its library can

    def __init__(
        self,
        recipe: BuildRecipe,
        tokenizer: Tokenizer | None,
        end_ids: tuple[int, ...],
        vocab_size: int,
        worker: Worker,
    ):
        super().__init__(recipe, tokenizer, end_ids, vocab_size)
        self.worker = worker
        self._events: Iterator[Any] = iter(())  # of the request that the worker is busy with

    def logits(self, prompt: str | Sequence[int]) -> Tensor:
        import torch

        ids = self.tokenize(prompt)
        self._check_limits([ids], 1)
        with self._lock:
            self._claim()
            scores = self.worker.call("logits", time_limit=TIME_LIMIT_S, prompt=ids)
        with self._checked(scores):
            return self._guarded(lambda: torch.tensor(scores, dtype=torch.float32).reshape(self.vocab_size))

    def memory(self) -> dict[str, int]:
        """The most bytes that the worker has held so far, on the host and on the GPU."""
        self._check_usable()
        with self._lock:
            self._claim()
            return self.worker.call("memory")

    def traced(self, call: Callable[[], Any]) -> GpuTime:
        """What the GPU does while the engine answers the call. InputError where the library cannot tell."""
        if self.traces is None:
            raise InputError(f"Backend {self.recipe.backend!r} takes no trace of its GPU's work.")
        with self._lock:
            self._claim()
            self.worker.call("profile", on=True)
            try:
                call()
            finally:
                self.worker.call("profile", on=False)
        return read_from(self.traces)

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        raise self._no_steps()

    def _decode(self, tokens: Tensor) -> Tensor:
        raise self._no_steps()

    def _release(self) -> None:
        self.worker.close()
        if self.traces:
            shutil.rmtree(self.traces, ignore_errors=True)

    def _run(
        self, sequences: list[RunningSequence], sampling: SamplingParams, observe: Observer | None = None
    ) -> Iterator[int]:
        """As in base.py, but the loop runs in the worker: each step's tokens arrive as one event."""
        if observe:
            raise self._no_steps()
        request = self._claim()
        settings = asdict(sampling)
        settings.pop("stop")  # the worker knows no text: it goes on, and what follows a stop string is left out here
        events = self._events = self.worker.stream(
            "generate",
            time_limit=TIME_LIMIT_S,
            prompts=[s.prompt for s in sequences],
            sampling={**settings, "end_ids": list(self.end_ids)},
        )
        for step in itertools.count():
            try:
                tokens = next(events)
            except StopIteration as end:
                self._end_sequences(sequences, end.value)
                return
            with self._checked(tokens):
                for index, token, seconds in tokens:
                    if not sequences[index].finish_reason:
                        sequences[index].accept(int(token), float(seconds), sampling, self.end_ids)
            yield step
            if all(s.finish_reason for s in sequences):
                return
            self._check_not_overtaken(request)

    def _end_sequences(self, sequences: list[RunningSequence], ended: dict[str, Any]) -> None:
        """A sequence that the worker ended before max_tokens met an end token that it did not hand out."""
        with self._checked(ended):
            for sequence, seconds in zip(sequences, ended["seconds"], strict=True):
                if not sequence.finish_reason:
                    sequence.end(float(seconds))

    def _claim(self) -> int:
        """As in base.py, for whatever the worker is asked; first wait until it has answered the request that it is busy
        with: a stream that nobody reads on still runs there, and its errors are nobody's."""
        with suppress(CourseError), shown_if_slow("The request before is still answered, to its last token", "wait"):
            for _ in self._events:
                pass
        return super()._claim()

    @contextmanager
    def _checked(self, answer: Any) -> Iterator[None]:
        """WorkerError, and the end of the worker, where its answer is not what was asked for."""
        try:
            yield
        except (TypeError, ValueError, LookupError, RuntimeError, OverflowError):
            self.worker.kill("it answered nonsense")
            raise WorkerError(
                f"{self.worker.name} answered {answer!r:.200}, which is no answer of an engine; it was ended.",
                cause="The library in its environment is of another version than the course is made for.",
                fix="`helpers doctor` names the versions and how to make the environment anew.",
            ) from None

    def _no_steps(self) -> InputError:
        return InputError(
            f"Backend {self.recipe.backend!r} hands out no single steps.",
            cause="Its library runs prefill, decode and sampling itself, and batches as it sees fit.",
            fix="Use generate or stream; for prefill and decode one by one, an engine of backend 'aot'.",
        )
