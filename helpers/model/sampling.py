"""Choosing the next token: one implementation for every backend that hands out logits."""

from __future__ import annotations

import math
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.errors import InputError, not_finite, shown
from helpers.model.prompts import is_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor


COOLEST = 1e-5  # below it even equal-looking scores are far apart; dividing by less would overflow to infinity


@dataclass(frozen=True)
class SamplingParams:
    """The settings that TensorRT-LLM and vLLM share, under their names.

    temperature         0 is greedy: always the likeliest token; 1 samples from the model's own distribution
    top_k               keep the k likeliest tokens; 0 keeps all
    top_p               keep the likeliest tokens whose probabilities sum to top_p; 1 keeps all
    repetition_penalty  divides the score of tokens that are already there (Keskar et al. 2019); 1 is off
    seed                same seed, same text; None takes a new one each time
    max_tokens          most new tokens
    ignore_eos          go on after the end token (benchmarks need equal lengths)
    stop                texts that end the answer, one or several: its text ends before the first of them, while its
                        token_ids are all that were generated. An end token is no text; it ends an answer by itself
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 64
    ignore_eos: bool = False
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, lambda v: v >= 0, "0 or more (0 is greedy)")
        _number("top_p", self.top_p, lambda v: 0 < v <= 1, "more than 0, at most 1 (1 keeps all tokens)")
        _number("repetition_penalty", self.repetition_penalty, lambda v: 1e-6 <= v <= 1e6, "1e-6 to 1e6 (1 is off)")
        _whole("top_k", self.top_k, 0)
        _whole("max_tokens", self.max_tokens, 1)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.ignore_eos, bool):  # a text such as "no" would count as yes
            raise InputError(f"SamplingParams.ignore_eos is {shown(self.ignore_eos)}.", fix="Give True or False.")
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"SamplingParams.stop is {shown(self.stop)}.", fix="Give a text, or a list of texts.")
        object.__setattr__(self, "stop", tuple(stop))  # of one form, whatever was given

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def checked(sampling: SamplingParams | None) -> SamplingParams:
    """What a caller gave as settings; None stands for the defaults, and nothing else does."""
    if sampling is None:
        return SamplingParams()
    if not isinstance(sampling, SamplingParams):
        raise InputError(
            f"Sampling settings are a SamplingParams, not {shown(sampling)}.", fix="Give SamplingParams()."
        )
    return sampling


def _number(name: str, value: float, allowed: Callable[[float], bool], words: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not number or not allowed(value):
        raise InputError(f"SamplingParams.{name} is {shown(value)}.", fix=f"Give a number, {words}.")


def _whole(name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        words = f"at least {low}" + (f", at most {high}" if high is not None else "")
        raise InputError(f"SamplingParams.{name} is {shown(value)}.", fix=f"Give a whole number, {words}.")


def tokens_seen(sequences: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Which tokens each sequence holds, true or false as [B, V], beside logits [B, V]."""
    import torch

    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in zip(seen, sequences, strict=True):
        row[torch.tensor(ids, dtype=torch.long, device=row.device)] = True
    return seen


def filter_logits(logits: Tensor, params: SamplingParams, seen: Tensor) -> Tensor:
    """logits [B, V] as sampling sees them: penalty, temperature, top_k, top_p in transformers' order.

    seen [B, V]: the tokens so far, prompt included (`tokens_seen`). Removed tokens become -inf.
    """
    import torch

    logits = logits.float()
    if (penalty := params.repetition_penalty) != 1.0:
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if params.greedy:
        return logits
    logits = logits / max(float(params.temperature), COOLEST)  # torch takes no int of 64 bits and more
    logits = logits.clamp_max(torch.finfo(torch.float32).max)  # infinity less infinity is no probability
    if 0 < params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if params.top_p < 1.0:
        ascending, order = logits.sort(descending=False, stable=True)
        below = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        below[:, -1] = False  # the likeliest token always stays
        logits = logits.masked_fill(torch.zeros_like(below).scatter(1, order, below), -math.inf)
    return logits


class Sampler:
    """Draws the next tokens of a batch. Each sequence has random numbers of its own, so that it gets the same text
    alone and in a batch, on every backend and device."""

    def __init__(
        self,
        params: SamplingParams,
        prompts: list[list[int]],
        argmax: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
    ):
        """argmax: logits [B, V] to the likeliest tokens [B], for who knows them already."""
        import torch

        self.params, self.prompts, self.argmax = params, prompts, argmax
        self.seen = torch.empty(0)  # [B, V], for the repetition penalty alone
        self.generators: list[torch.Generator] = []
        if not params.greedy:
            for _ in prompts:
                seed = params.seed if params.seed is not None else secrets.randbits(63)
                self.generators.append(torch.Generator("cpu").manual_seed(seed))

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, V] to token ids [B], on the logits' device."""
        if self.params.repetition_penalty == 1.0:
            return self._choose(logits)
        if not len(self.seen):
            self.seen = tokens_seen(self.prompts, logits)
        tokens = self._choose(logits)
        self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _choose(self, logits: Tensor) -> Tensor:
        import torch

        if self.params.greedy and self.params.repetition_penalty == 1.0:
            return self.argmax(logits)
        filtered = filter_logits(logits, self.params, self.seen)
        if self.params.greedy:
            return filtered.argmax(-1)
        # Type and device are named, because a notebook may have set others as torch's defaults.
        numbers = [torch.rand(1, generator=g, dtype=torch.float32, device="cpu") for g in self.generators]
        draws = torch.cat(numbers).to(logits.device)
        cumulative = filtered.softmax(-1).cumsum(-1)
        # Inverse transform: the first token at which the cumulative probability passes the draw.
        point = draws[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def next_token_distribution(logits: Tensor, params: SamplingParams, seen: list[int]) -> Tensor:
    """Probabilities [V] that the next token would be drawn from, for logits [V]; greedy puts all on one token.
    Raises NumericsError for logits that are not finite: there is no likeliest token among them."""
    import torch

    params, fix = checked(params), "Give engine.logits(prompt) and engine.tokenize(prompt)."
    if not isinstance(logits, torch.Tensor) or not logits.dim():
        raise InputError(f"Scores are a tensor [V], not {shown(logits)}.", fix=fix)
    if not isinstance(seen, (list, tuple)) or not all(is_id(i) and 0 <= i < logits.shape[-1] for i in seen):
        raise InputError(f"What was seen is a list of token ids of this vocabulary, not {shown(seen)}.", fix=fix)
    if logits.dim() != 1:
        raise InputError(f"Scores of one sequence are asked for, not {[*logits.shape]}.", fix="Give one: logits[0].")
    if not bool(logits.isfinite().all()):
        raise not_finite(len(seen))
    filtered = filter_logits(logits[None], params, tokens_seen([seen], logits[None]))[0]
    if params.greedy:
        return torch.zeros_like(filtered).index_fill(0, filtered.argmax(), 1.0)
    return filtered.softmax(-1)
