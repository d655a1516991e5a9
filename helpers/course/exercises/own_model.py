"""Notebook 06: your own model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import choice, number, printed, span, whole, within

if TYPE_CHECKING:
    from helpers.bench.quality import Precision, Scores
    from helpers.model.config import ModelConfig


@exercise(
    "06.1",
    "What a token costs in the KV cache",
    "a whole number of bytes: what one more token adds, in fp32",
    "Section 2 has the formula. Which heads are kept: those that ask, or those with keys and values?",
    "For each layer a key and a value of each KV head: head_dim numbers of 4 bytes.",
)
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
    return (
        f"{size:,} bytes: 2 x {config.num_hidden_layers} layers x {heads} heads x {config.head_dim} numbers x 4 bytes."
    )


@exercise(
    "06.2",
    "The least time on another machine",
    "milliseconds: the least that a token takes in int8 where memory is read at 60 GB/s",
    "The table of section 2 has the MB that are read for a token in int8.",
    "Bytes divided by bytes per second are seconds; a second has 1000 ms.",
)
def least_time(answer: Any, int8_bytes: int) -> str:
    least = int8_bytes / 60e9 * 1e3
    mistakes = {
        "That is in seconds.": least / 1e3,
        "That is the other way round: tokens per second.": 1e3 / least,
        "A GB is 10^9 bytes here, not 2^30.": int8_bytes / (60 * 2**30) * 1e3,
        "A byte is read as one, not as 8 bits.": 8 * least,
    }
    within(answer, span(lambda mb: mb / 60, printed(int8_bytes / 1e6, 0)), mistakes)
    return f"{least:.2f} ms: no engine with these weights gives a token sooner there."


@exercise(
    "06.3",
    "The fastest that is good enough",
    "the name of a contender of section 8: the least TPOT among those with a KL divergence of at most 0.01",
    "First leave out what moves the distribution too far.",
    "Of the rows with KL up to 0.01, the one with the least TPOT.",
)
def fastest_good_enough(answer: Any, results: Sequence[Precision]) -> str:
    by_name = {result.name: result for result in results}
    short = {name.removeprefix("aot "): name for name in by_name}
    name = choice(answer, [*by_name, *short])
    result = by_name[short.get(name, name)]
    expect(round(result.kl, 5) <= 0.01, f"Its KL divergence is {result.kl:.5f}.")
    least = min(other.tpot_s for other in results if other.kl <= 0.01)
    expect(round(result.tpot_s * 1e3, 2) <= round(least * 1e3, 2), "Another that is good enough has a lower TPOT.")
    return f"{result.tpot_s * 1e3:.2f} ms a token, with a KL divergence of {max(0.0, result.kl):.5f}."


@exercise(
    "06.4",
    "The KL divergence",
    "a function of two tables of logits [tokens, vocabulary] that returns one number, in nats",
    "It begins with log_softmax(-1) of each table.",
    "At each token: the reference's probabilities times the difference of the logarithms, added up.",
    "Reference less the other; the sum over the vocabulary; then the mean over the tokens.",
    points=2,
)
def kl_divergence(answer: Any) -> str:
    import torch

    generator = torch.Generator().manual_seed(6)
    for tokens, vocabulary in ((4, 10), (7, 30), (1, 5)):
        reference, logits = (torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
        theirs, mine = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
        right = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
        value = number(call(answer, reference.clone(), logits.clone()))
        case = f"For {tokens} tokens and a vocabulary of {vocabulary}"
        expect(abs(value - right) <= 1e-3 * right, f"{case} it gives {value:.4f}; right is {right:.4f}.")
    return "The mean over the tokens, in nats, and from the reference's side."


Messages = Sequence[Mapping[str, str]]


@exercise(
    "06.5",
    "A conversation that fits",
    "a function that returns the messages that are kept: the first, and as many of the last as there is room for",
    "The system message stays. Which is the oldest after it?",
    "As long as count(messages) is more than room, one message goes; then count again.",
    points=2,
)
def shorten(answer: Any) -> str:
    roles = ["system", *["user", "assistant"] * 3, "user"]
    lengths = (3, 5, 9, 4, 8, 2, 6, 7)
    talk = [{"role": role, "content": "word " * length} for role, length in zip(roles, lengths, strict=True)]

    def count(messages: Messages) -> int:
        return sum(len(message["content"].split()) + 2 for message in messages)

    for messages, room in ((talk, 1000), (talk, count(talk)), (talk, count(talk) - 1), (talk, 30), (talk[:2], 12)):
        right = list(messages)
        while count(right) > room:
            del right[1]
        result = call(answer, [dict(message) for message in messages], count, room)
        expect(isinstance(result, (list, tuple)), "It gives no list of messages.")
        kept = [dict(message) for message in result]
        expect(
            kept == right,
            f"Of {len(messages)} messages with room for {room} tokens it keeps {len(kept)}, {count(kept)} tokens. "
            f"Right are the first and the last {len(right) - 1}, {count(right)} tokens.",
        )
    return "Right for short conversations and long ones."


@exercise(
    "06.6",
    "Another precision",
    "the scores of a precision that the table does not have yet, on the same text",
    "Section 6 builds a precision, and section 8 scores it: the same calls, with another word.",
    "quality.score(engine, text) gives the scores; `with load(build(...)) as own:` gives an engine, and closes it.",
    points=3,
)
def another_precision(answer: Any, scores: Mapping[str, Scores]) -> str:
    from helpers.bench.quality import Scores

    expect(isinstance(answer, Scores), "These are no scores.")
    reference = scores["aot fp32"]
    distances = [answer.kl(other) for other in scores.values()]
    expect(0 not in distances, "These scores are in the table already.")
    expect(min(distances) < 1, "These scores are another model's.")
    change, margin = answer.change(reference)
    return f"Loss {change:+.4f} against fp32, chance {margin:.4f}; KL {answer.kl(reference):.5f}."
