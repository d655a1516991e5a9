"""Instant checks of the learner's answers. Each says right or not yet in a sentence, with a hint where it helps.

An answer that is still None is "open": a notebook runs from top to bottom before anybody has answered.
Checks compute the right answer from what the learner holds (engine, report, recipe), so they fit every machine.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from helpers.errors import CourseError, EngineNotFound

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine
    from helpers.backends.report import EngineReport
    from helpers.bench.quality import Precision, Scores
    from helpers.bench.records import Record
    from helpers.model.config import ModelConfig
    from helpers.model.sampling import SamplingParams
    from helpers.recipe import BuildRecipe


@dataclass(frozen=True)
class Outcome:
    """What a check found. `state` is "right", "wrong" or "open" (not answered yet)."""

    state: str
    message: str
    hint: str = ""

    def __bool__(self) -> bool:
        return self.state == "right"

    def __str__(self) -> str:
        opening = {"right": "Right.", "wrong": "Not yet.", "open": "Open."}[self.state]
        hint = f"\nHint: {self.hint}" if self.hint else ""
        return f"{opening} {self.message}{hint}"

    __repr__ = __str__  # the last line of a cell shows it


OPEN = "Put your answer in place of None and run the cell again."


class _Unanswered(Exception):
    """The learner's function returns None, as the one that the notebook starts with."""


def check_answer(answer: Any, is_right: Callable[[Any], bool], right: str, wrong: str, hint: str = "") -> Outcome:
    """The frame of every check: None is open, and whatever an answer makes go wrong is the answer's, never ours."""
    try:
        if answer is None:
            raise _Unanswered
        return Outcome("right", right) if is_right(answer) else Outcome("wrong", wrong, hint)
    except _Unanswered:
        return Outcome("open", OPEN)  # the hint is for who has tried
    except CourseError as error:
        return Outcome("wrong", str(error), hint)
    except Exception as error:  # an answer may be anything, and do anything when it is compared
        return Outcome("wrong", f"This answer cannot be checked ({type(error).__name__}: {str(error):.200}).", hint)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the learner's function returns. An error in it is told as the learner's, with its line."""
    try:
        result = function(*arguments)
    except CourseError:
        raise
    except Exception as error:  # the learner's code, so any
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is this one
        where = f" in line {frames[0].lineno} of your cell" if frames else ""
        raise CourseError(f"Your function raises {type(error).__name__}{where}: {error}") from error
    if result is None:
        raise _Unanswered
    return result


def near(answer: Any, value: float, share: float = 0.05) -> bool:
    return abs(float(answer) - value) <= share * value


# 00_start_here


def check_token_count(engine: Engine, text: str, answer: int | None) -> Outcome:
    count = len(engine.tokenize(text))
    return check_answer(
        answer,
        lambda a: float(a) == count,
        f"{text!r} is {count} tokens for this model, its begin token included.",
        f"{answer} is not the number of tokens in {text!r}.",
        "engine.tokenize(text) gives the list of token ids.",
    )


def check_repeatable(engine: Engine, answer: SamplingParams | None) -> Outcome:
    """Settings that sample (temperature above 0) and still give the same text twice."""

    def same_twice(params: SamplingParams) -> bool:
        if params.greedy:
            raise CourseError("temperature=0 is greedy: nothing is drawn, so of course it repeats.")
        texts = {engine.generate("Once upon a time", params)[0].text for _ in range(2)}
        return len(texts) == 1 and params.seed is not None

    return check_answer(
        answer,
        same_twice,
        "Drawn at random, and the same text both times.",
        "Two calls gave different texts, or would have with other luck.",
        "One field of SamplingParams fixes the random numbers.",
    )


def check_fits(answer: BuildRecipe | None, prompt_tokens: int, new_tokens: int) -> Outcome:
    """A recipe whose engine takes such a request."""
    return check_answer(
        answer,
        lambda r: r.max_input_len >= prompt_tokens and r.max_seq_len >= prompt_tokens + new_tokens,
        f"An engine of this recipe takes {prompt_tokens} tokens and answers with {new_tokens}.",
        f"This recipe does not allow {prompt_tokens} tokens in and {new_tokens} out.",
        "max_input_len bounds the prompt; max_seq_len bounds the prompt and the answer together.",
    )


# 01_what_is_an_engine


def check_refused(answer: Iterable[str] | None, refused: Iterable[str]) -> Outcome:
    """Which of several engines this machine refuses, as a set of their letters."""
    return check_answer(
        answer,
        lambda a: {str(letter).upper() for letter in a} == set(refused),
        f"{' and '.join(sorted(refused))} would be refused.",
        "That is not the set of engines that would be refused.",
        "Compare architecture and versions with what this machine has. The recipe does not matter for loading.",
    )


def check_joined(answer: Tensor | None, engine_weight: Tensor) -> Outcome:
    """The tensor that the engine holds, made from the checkpoint's own tensors."""
    return check_answer(
        answer,
        lambda a: a.shape == engine_weight.shape and bool((a.float().cpu() == engine_weight.float().cpu()).all()),
        "The same numbers. The engine holds the three matrices as one.",
        f"Not the same numbers, or not the shape {tuple(engine_weight.shape)}.",
        "torch.cat([query, key, value]) stacks the three weights along their rows.",
    )


def check_library_kernels(report: EngineReport, graph: str, answer: int | None) -> Outcome:
    count = sum(kernel.kind == "library" for kernel in report.of(graph).kernels)
    return check_answer(
        answer,
        lambda a: float(a) == count,
        f"{graph} calls a library {count} times; the compiler wrote the rest itself.",
        f"{answer} is not the number of library calls in {graph}.",
        'Every kernel of report.of(graph).kernels has a kind: "library" or "generated".',
    )


# 02_build_an_engine


def check_cache_hits(recipes: Mapping[str, BuildRecipe], answer: Iterable[str] | None) -> Outcome:
    """Which of these recipes have an engine already. Looks into the store; builds nothing."""
    from helpers.engine import locate

    hits = set()
    for name, recipe in recipes.items():
        try:
            locate(recipe)
            hits.add(name)
        except EngineNotFound:
            pass
    return check_answer(
        answer,
        lambda a: {str(name) for name in a} == hits,
        f"Hits: {', '.join(sorted(hits)) or 'none'}. Every other recipe would be built.",
        "That is not the set of recipes that hit.",
        "Each field is compared after 'auto' was resolved. locate(recipe) finds an engine, or says why not.",
    )


def check_least_time(weight_bytes: int, bandwidth: float, answer: float | None) -> Outcome:
    """The time that reading the weights once takes, in milliseconds."""
    least = weight_bytes / bandwidth * 1e3
    return check_answer(
        answer,
        lambda a: near(a, least),
        f"{least:.2f} ms: no engine with these weights gives a token sooner from memory at this bandwidth.",
        f"{answer} ms is not it.",
        "Bytes divided by bytes per second are seconds; a second has 1000 ms.",
    )


def check_smallest(
    sizes: Mapping[str, float], losses: Mapping[str, float], margin: float, answer: str | None
) -> Outcome:
    """The precision with the smallest engine among those whose loss is within `margin` of fp32's."""
    allowed = [name for name in sizes if losses[name] <= losses["fp32"] * (1 + margin)]
    best = min(allowed, key=lambda name: sizes[name])
    return check_answer(
        answer,
        lambda a: str(a) == best,
        f"{best}: the smallest of {', '.join(allowed)}.",
        f"{answer!r} is not the smallest engine within {margin:.0%} of fp32's loss.",
        "First leave out what loses too much, then compare sizes.",
    )


# 03_generate


def check_smallest_top_p(engine: Engine, prompt: str, token: str, answer: float | None) -> Outcome:
    """The smallest top_p in steps of 0.05 that leaves this token a chance."""
    from helpers.model.sampling import SamplingParams, next_token_distribution

    logits, ids = engine.logits(prompt), engine.tokenize(prompt)
    token_id = next(i for i in logits.argsort(descending=True).tolist() if engine.detokenize([i], ids) == token)
    steps = [round(0.05 * step, 2) for step in range(1, 21)]
    least = next(p for p in steps if next_token_distribution(logits, SamplingParams(top_p=p), ids)[token_id] > 0)
    return check_answer(
        answer,
        lambda a: abs(float(a) - least) < 1e-6,
        f"At top_p={least:g} the token {token!r} is kept, and at {least - 0.05:.2f} it is not.",
        f"{answer} is not the smallest step.",
        "Tokens are kept, likeliest first, until their probabilities add up to top_p.",
    )


def check_temperature(engine: Engine, prompt: str, least: float, answer: float | None) -> Outcome:
    """A temperature above 0 at which the likeliest next token has at least this probability."""
    from helpers.model.sampling import SamplingParams, next_token_distribution

    def probability(temperature: float) -> float:
        if temperature == 0:
            raise CourseError("temperature=0 takes the likeliest token without any draw. Find one above 0.")
        params = SamplingParams(temperature=float(temperature))
        return float(next_token_distribution(engine.logits(prompt), params, engine.tokenize(prompt)).max())

    return check_answer(
        answer,
        lambda a: probability(a) >= least,
        f"The favourite has a probability of at least {least:g} there.",
        f"At temperature {answer} the favourite stays below {least:g}.",
        "The lower the temperature, the larger the favourite's share.",
    )


def check_second_best(engine: Engine, prompt: str, answer: Callable[[Engine, str, int], list[int] | None]) -> Outcome:
    """A function that generates with the second best token at every step, compared with the engine's own loop."""
    ids, count = engine.tokenize(prompt), 8
    expected: list[int] = []
    for _ in range(count):
        expected.append(int(engine.logits(ids + expected).topk(2).indices[1]))
    return check_answer(
        answer,
        lambda function: [int(token) for token in call(function, engine, prompt, count)] == expected,
        f"Your loop writes: {engine.detokenize(expected, ids)!r}.",
        "These are not the ids of the second best tokens.",
        "logits.topk(2).indices has a row for each sequence: the best token first, then the second.",
    )


# 04_compare


def check_output_throughput(record: Record, name: str, answer: float | None) -> Outcome:
    """Output tokens per second at batch 1, from TTFT and TPOT; medians of each, so the last digit may differ."""
    row = record.row(name)
    tokens = record.workload.output_len
    expected = tokens / (row.median("ttft_s") + (tokens - 1) * row.median("tpot_s"))
    return check_answer(
        answer,
        lambda a: near(a, expected),
        f"{expected:,.0f} tokens/s; the table says {record.throughput(row):,.0f}.",
        f"{answer} tokens/s is more than 5 % away from it.",
        "E2E = TTFT + (tokens - 1) x TPOT, all in seconds.",
    )


def check_break_even(record: Record, answer: float | None) -> Outcome:
    """After how many tokens the engine has won back its build, against eager PyTorch."""
    eager, engine = record.row("pytorch fp32"), record.row("aot fp32")
    saved = eager.median("tpot_s") - engine.median("tpot_s")
    if saved <= 0:
        return Outcome("open", "In this record the engine saves nothing, so it never wins back its build.")
    expected = engine.build_s / saved
    return check_answer(
        answer,
        lambda a: near(a, expected),
        f"About {expected:,.0f} tokens, or {expected / record.workload.output_len:,.0f} answers of this length.",
        f"{answer} is more than 5 % away from it.",
        "Each token saves the difference of the two TPOTs. How many savings make up for the build?",
    )


def check_most_room(record: Record, answer: str | None) -> Outcome:
    """Whose TPOT is the most times its limit."""
    rows = record.measured(1)
    most = max(rows, key=lambda row: row.median("tpot_s") / row.limit_s)
    return check_answer(
        answer,
        lambda a: str(a) == most.name,
        f"{most.name}: its TPOT is {most.median('tpot_s') / most.limit_s:.0f} times its limit.",
        f"{answer!r} is not the one. The names are {', '.join(row.name for row in rows)}.",
        "The row limit / TPOT of the table: the smaller the share, the more room.",
    )


# 05_troubleshoot


def check_error_after_update(answer: str | None) -> Outcome:
    """What an engine says after its library was updated."""
    return check_answer(
        answer,
        lambda a: getattr(a, "__name__", str(a)) == "EngineMismatch",
        "EngineMismatch: the manifest names the version that it was built with.",
        f"{answer!r} is not it. The files are whole, and the engine is found.",
        "Look at section 5. What else does an engine depend on?",
    )


def check_fit(answer: Callable[[list[int], BuildRecipe, int], list[int] | None], recipe: BuildRecipe) -> Outcome:
    """A function that cuts prompts to an engine's limits, tried with short and long ones."""
    cases = [(5, 20), (recipe.max_input_len + 36, 20), (recipe.max_input_len, recipe.max_seq_len - 10)]

    def right_for_all(function: Callable[..., Any]) -> bool:
        for length, new_tokens in cases:
            ids = list(range(1, length + 1))
            room = min(recipe.max_input_len, recipe.max_seq_len - new_tokens)
            expected = ids if length <= room else [1, *ids[length - room + 1 :]]
            if list(call(function, list(ids), recipe, new_tokens)) != expected:
                raise CourseError(f"Not right for {length} tokens and {new_tokens} new ones.")
        return True

    return check_answer(
        answer,
        right_for_all,
        f"Right for all {len(cases)} cases: short, too long, and a long answer.",
        "",
        "Two limits count: max_input_len, and max_seq_len less new_tokens.",
    )


def check_largest_batch(config: ModelConfig, seq_len: int, budget: float, answer: int | None) -> Outcome:
    """How many sequences' keys and values fit into so many bytes, in fp32."""
    one = config.kv_cache_bytes(1, seq_len, 4)
    return check_answer(
        answer,
        lambda a: float(a) == budget // one,
        f"One sequence needs {one / 1e6:.2f} MB, so {int(budget // one)} fit.",
        f"{answer} is not the largest batch that fits.",
        "config.kv_cache_bytes(1, seq_len, 4) is the size for one sequence.",
    )


# 06_your_own_model


def check_cache_per_token(config: ModelConfig, answer: float | None) -> Outcome:
    """Bytes of keys and values that one more token adds, in fp32."""
    size = config.kv_cache_bytes(1, 1, 4)
    return check_answer(
        answer,
        lambda a: float(a) == size,
        f"{size:,} bytes: 2 x {config.num_hidden_layers} layers x {config.num_key_value_heads} heads x "
        f"{config.head_dim} numbers x 4 bytes.",
        f"{answer} is not the number of bytes.",
        "Each layer keeps a key and a value for each KV head: head_dim numbers of 4 bytes.",
    )


def check_fastest(results: Sequence[Precision], most: float, answer: str | None) -> Outcome:
    """The contender with the least TPOT among those whose KL divergence is at most `most`."""
    allowed = [result for result in results if result.kl <= most]
    best = min(allowed, key=lambda result: result.tpot_s).name
    return check_answer(
        answer,
        lambda a: _words(getattr(a, "name", a)) in (_words(best), _words(best.removeprefix("aot "))),
        f"{best}: the fastest of {', '.join(result.name for result in allowed)}.",
        f"{answer!r} is not the fastest whose KL is at most {most:g}.",
        "First leave out what moves the distribution too far, then compare TPOT.",
    )


def _words(name: Any) -> list[str]:
    return str(name).lower().replace(":", " ").split()


def check_kl(answer: Callable[[Tensor, Tensor], Any] | None) -> Outcome:
    """A function of two tables of logits [N, V], tried with some of different sizes; one number comes back."""
    import torch

    generator = torch.Generator().manual_seed(6)

    def right_for_all(function: Callable[..., Any]) -> bool:
        for count, vocabulary in ((4, 10), (7, 30)):
            reference, logits = (torch.randn(count, vocabulary, generator=generator) for _ in range(2))
            theirs, mine = reference.log_softmax(-1), logits.log_softmax(-1)
            expected = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
            value = float(call(function, reference.clone(), logits.clone()))
            if not near(value, expected, 1e-3):
                raise CourseError(f"For {count} tokens it gives {value:.4f}; right is {expected:.4f}.")
        return True

    return check_answer(
        answer,
        right_for_all,
        "The mean over the tokens, in nats, and from the reference's side.",
        "",
        "log_softmax(-1) of each. Then the reference's probabilities times the difference, summed; and the mean.",
    )


def check_shorten(answer: Callable[..., Any] | None) -> Outcome:
    """A function that leaves out the oldest turns of a conversation, tried with several conversations."""
    roles = ["system", *["user", "assistant"] * 3, "user"]
    talk = [
        {"role": role, "content": "word " * length}
        for role, length in zip(roles, (3, 5, 9, 4, 8, 2, 6, 7), strict=True)
    ]

    def count(messages: Sequence[Mapping[str, str]]) -> int:
        return sum(len(message["content"].split()) + 2 for message in messages)

    def right_for_all(function: Callable[..., Any]) -> bool:
        for messages, room in ((talk, 1000), (talk, count(talk) - 1), (talk, 30), (talk[:2], 12), (talk, 14)):
            kept = messages
            while count(kept) > room:  # the system message, and the longest end that fits
                kept = [kept[0], *kept[2:]]
            result = [dict(m) for m in call(function, [dict(m) for m in messages], count, room)]
            if result != kept:
                raise CourseError(
                    f"Of {len(messages)} messages with room for {room} tokens it keeps {len(result)}: "
                    f"{count(result)} tokens. Right are the first and the last {len(kept) - 1}, {count(kept)} tokens."
                )
        return True

    return check_answer(
        answer,
        right_for_all,
        "Right for short conversations and long ones.",
        "",
        "As long as count(messages) is more than room, take out the message after the first.",
    )


def check_new_scores(known: Mapping[str, Scores], reference: str, answer: Scores | None) -> Outcome:
    """Scores of a precision that is not in the table yet."""
    line = ""

    def is_new(scores: Scores) -> bool:
        nonlocal line
        distances = [scores.kl(other) for other in known.values()]
        if 0 in distances:
            raise CourseError("These scores are in the table already.")
        change, margin = scores.change(known[reference])
        line = f"Loss {change:+.4f} against {reference}, chance {margin:.4f}; KL {scores.kl(known[reference]):.5f}."
        return min(distances) < 1

    outcome = check_answer(
        answer,
        is_new,
        "Scored.",
        "These scores are another model's.",
        "build(recipe.replace(precision=...)), load it, and quality.score(engine, quality.evaluation_text()).",
    )
    return replace(outcome, message=f"{outcome.message} {line}") if outcome else outcome
