"""Notebook 06: your own model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, expect, judge
from helpers.course.values import alone, choice, number, printed, span, whole, within

if TYPE_CHECKING:
    from helpers.bench.quality import Precision, Scores
    from helpers.model.config import ModelConfig

Messages = Sequence[Mapping[str, str]]
FIRST_WRONG = 40  # of each passage's rows, counted from 0


@judge("06.1")
def cache_per_token(answer: Any, config: ModelConfig) -> str:
    size, heads = config.kv_cache_bytes(1, 1, 4), config.num_key_value_heads
    mistakes = {
        "That is only one of the two: there are a key and a value.": size // 2,
        "That is with the heads that ask. Only KV heads are kept.": size * config.num_attention_heads // heads,
        "That is in bits.": 8 * size,
        "That counts numbers, not bytes.": size // 4,
    }
    value = whole(answer)
    wrong = next((words for words, usual in mistakes.items() if value == usual != size), "That is not it.")
    expect(value == size, wrong)
    product = f"2 x {config.num_hidden_layers} layers x {heads} heads x {config.head_dim} numbers x 4 bytes"
    return f"{size:,} bytes: {product}."


@judge("06.2")
def least_time(answer: Any, int8_bytes: int) -> str:
    mistakes = {"A GB is 10^9 bytes here, not 2^30.": int8_bytes / (60 * 2**30) * 1e3}
    within(answer, span(lambda mb: mb / 60, printed(int8_bytes / 1e6, 0)), mistakes)
    return f"{int8_bytes / 60e9 * 1e3:.2f} ms: no engine with these weights gives a token sooner there."


@judge("06.3")
def fastest_good_enough(answer: Any, results: Sequence[Precision]) -> str:
    by_name = {result.name: result for result in results}
    short = f"aot {str(alone(answer)).strip().casefold()}"
    result = by_name[short if short in by_name else choice(answer, list(by_name))]
    expect(round(result.kl, 5) <= 0.01, f"Its KL divergence is {result.kl:.5f}.")
    least = min(other.tpot_s for other in results if other.kl <= 0.01)
    expect(round(result.tpot_s * 1e3, 2) <= round(least * 1e3, 2), "Another that is good enough has a lower TPOT.")
    return f"{result.tpot_s * 1e3:.2f} ms a token, with a KL divergence of {max(0.0, result.kl):.5f}."


@judge("06.4")
def kl_divergence(answer: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(6)
    for tokens, vocabulary in ((4, 10), (7, 30), (1, 5)):
        reference, logits = (torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
        theirs, mine = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
        right = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
        reverse = (mine.exp() * (mine - theirs)).sum(-1).mean().item()
        value = number(call(answer, reference, logits))
        mistakes = {
            "That is weighed with the other side's probabilities.": reverse,
            "The mean is taken over the tokens; over the vocabulary it is a sum.": right / vocabulary,
            "That is the sum over the tokens, not their mean.": right * tokens,
            "Those are bits: the logarithm is the natural one.": right / math.log(2),
        }
        for words, usual in mistakes.items():
            expect(abs(value - usual) > 1e-3 * usual or abs(value - right) <= 1e-3 * right, words)
        case = f"For {tokens} tokens and a vocabulary of {vocabulary}"
        expect(abs(value - right) <= 1e-3 * right, f"{case} it gives {value:.4f}; right is {right:.4f}.")


@judge("06.5")
def shorten(answer: Any) -> None:
    roles = ["system", *["user", "assistant"] * 3, "user"]
    lengths = (3, 5, 9, 4, 8, 2, 6, 7)
    talk = [{"role": role, "content": "word " * length} for role, length in zip(roles, lengths, strict=True)]

    def count(messages: Messages) -> int:
        # As chat templates do: what stands before all messages counts once, and more where there is no system message.
        start = 3 if messages and messages[0]["role"] == "system" else 20
        return start + sum(len(message["content"].split()) + 2 for message in messages)

    # With room for 35, a message further back would fit where the one before it does not.
    for messages, room in ((talk, 1000), (talk, count(talk)), (talk, count(talk) - 1), (talk, 35), (talk[:2], 15)):
        right = list(messages)
        while count(right) > room:
            del right[1]
        result = call(answer, messages, count, room)
        expect(isinstance(result, (list, tuple)), "It gives no list of messages.")
        kept = [dict(message) for message in result]
        told = f"Of {len(messages)} messages with room for {room} tokens it keeps {len(kept)}, {count(kept)} tokens."
        expect(kept == right, f"{told} Right are the first and the last {len(right) - 1}, {count(right)} tokens.")


@judge("06.6")
def another_precision(answer: Any, scores: Mapping[str, Scores]) -> str:
    from helpers.bench.quality import Scores

    expect(isinstance(answer, Scores), "These are no scores.")
    reference = scores["aot fp32"]
    distances = [answer.kl(other) for other in scores.values()]
    expect(min(map(abs, distances)) > 1e-7, "These scores are in the table already.")
    expect(min(distances) < 1, "These scores are another model's.")
    change, margin = answer.change(reference)
    return f"Loss {change:+.4f} against fp32, chance {margin:.4f}; KL {answer.kl(reference):.5f}."


def suspect(scores: Scores, lengths: Sequence[int]) -> Scores:
    """The scores of an engine with a fault, to be diagnosed: from some row of each passage on, it has lost its place.
    lengths: how many rows each passage has."""
    import torch

    from helpers.bench.quality import Scores

    rounded = scores.log_probs.bfloat16().float().log_softmax(-1)
    lost = 0.9 * rounded.exp() + 0.1 / rounded.shape[-1]  # the likeliest token stays the likeliest
    row = torch.cat([torch.arange(length) for length in lengths])
    return Scores(scores.targets, torch.where((row >= FIRST_WRONG)[:, None], lost.log(), rounded))


@judge("06.7")
def lost_place(answer: Any) -> None:
    row = whole(answer)
    expect(abs(row - FIRST_WRONG) != 1, "Near: the first row of a passage is row 0.")
    expect(row == FIRST_WRONG, "The first wrong row is another.")
