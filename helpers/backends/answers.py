"""Answers: what a request gives back, and a prompt while it is answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from helpers.errors import NumericsError
from helpers.model.sampling import SamplingParams


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
