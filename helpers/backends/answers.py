"""Answers: what a request gives back, and a prompt while it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from helpers.errors import not_finite
from helpers.model.sampling import SamplingParams
from helpers.model.tokenizer import IncrementalDetokenizer, Tokenizer


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
    """One prompt's answer. finish_reason is "stop" (end token or stop string) or "length" (max_tokens reached).

    The text ends before a stop string; token_ids hold what was generated, with the tokens that make up that string.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    metrics: Metrics


@dataclass(frozen=True)
class Token:
    """One streamed token: its id, the text it adds, seconds since the call. The text is "" while a character is
    incomplete, or while the answer ends with what may be the beginning of a stop string."""

    token_id: int
    text: str
    elapsed_s: float


NOT_A_TOKEN = -1  # in place of a token id, where it was chosen from scores that are not finite numbers


class AnswerText:
    """The text of an answer, token by token, up to the first stop string. What may yet be a part of one is held back,
    so that the text is the same wherever a token ends."""

    def __init__(self, tokenizer: Tokenizer | None, after: Sequence[int], stop: Sequence[str]):
        self._detokenizer, self._stop = IncrementalDetokenizer(tokenizer, after), stop
        self._held = ""
        self.stopped = False  # a stop string is complete

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        return self._certain(self._detokenizer.add(token))

    def end(self) -> str:
        """What was held back, when no token follows."""
        text = "" if self.stopped else self._certain(self._detokenizer.end())
        return text if self.stopped else text + self._held

    @property
    def holds_back(self) -> bool:
        return bool(self._held) or self._detokenizer.holds_back

    def _certain(self, new: str) -> str:
        text = self._held + new
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:  # of several, the one that was complete first counts
            self.stopped = True
            return text[: min(ends)[1]]
        longest = max(map(len, self._stop), default=0)
        starts = range(max(0, len(text) - longest + 1), len(text))
        held = next((at for at in starts if any(stop.startswith(text[at:]) for stop in self._stop)), len(text))
        self._held = text[held:]
        return text[:held]


@dataclass
class RunningSequence:
    """One prompt while it is answered."""

    prompt: list[int]
    output: list[int] = field(default_factory=list)
    finish_reason: str = ""
    times: list[float] = field(default_factory=list)  # of each output token, in seconds since the request
    text: AnswerText | None = None  # where it is needed while the answer grows
    pieces: list[str] = field(default_factory=list)  # of it, one for each output token

    def accept(self, token: int, seconds: float, sampling: SamplingParams, end_ids: tuple[int, ...]) -> None:
        """Take one token. An end token stops the answer and is not part of it. For NOT_A_TOKEN see `Engine._take`."""
        if token == NOT_A_TOKEN:
            raise not_finite(len(self.prompt) + len(self.output))
        if token in end_ids and not sampling.ignore_eos:
            self.end(seconds)
            return
        self.output.append(token)
        self.times.append(seconds)
        if self.text:
            self.pieces.append(self.text.add(token))
        if len(self.output) == sampling.max_tokens or (self.text and self.text.stopped):
            self._finish("length")

    def end(self, seconds: float) -> None:
        """The model stopped. Of an answer without a token, the only time there is, is that of its end."""
        self.times = self.times or [seconds]
        self._finish("stop")

    def _finish(self, reason: str) -> None:
        if self.text and self.pieces:
            self.pieces[-1] += self.text.end()
        self.finish_reason = "stop" if self.text and self.text.stopped else reason

    def metrics(self) -> Metrics:
        first, last = self.times[0], self.times[-1]
        gaps = tuple(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))
        return Metrics(first, (last - first) / len(gaps) if gaps else 0.0, last, gaps)
