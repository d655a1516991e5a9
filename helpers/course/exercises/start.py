"""Notebook 00: start here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, expect, judge
from helpers.course.values import choice, plain, printed, span, whole, within

if TYPE_CHECKING:
    from helpers.backends.answers import Generation
    from helpers.backends.base import Engine
    from helpers.model.sampling import SamplingParams

TEXT = "Hello, my name is"
LIMITS = ("max_batch_size", "max_input_len", "max_seq_len", "max_tokens")
FAULTS = ("max_tokens", "seed", "temperature", "top_p")


@judge("00.1")
def count_tokens(answer: Any, engine: Engine) -> None:
    expect(whole(answer) == len(engine.tokenize(TEXT)), "That is not how many there are.")


@judge("00.2")
def tokens_per_second(answer: Any, tokens: int, pytorch_s: float) -> str:
    rate = tokens / pytorch_s
    within(answer, span(lambda seconds: tokens / seconds, printed(pytorch_s, 2)))
    return f"{rate:,.0f} tokens/s, the wait for the first token included."


@judge("00.3")
def which_limit(answer: Any) -> None:
    name = choice(answer, LIMITS)
    expect(name == "max_batch_size", f"{name} is kept: the prompts are short, and so may the answers be.")


@judge("00.4")
def repeatable(answer: Any, engine: Engine) -> None:
    from helpers.model.sampling import SamplingParams

    expect(isinstance(answer, SamplingParams), "This is no SamplingParams.")
    expect(not answer.greedy, "temperature=0 is greedy: nothing is drawn, so of course it repeats.")
    expect(answer.seed is not None, "Each call takes random numbers of its own, so two texts need not be the same.")
    settings = replace(answer, max_tokens=24, stop=())
    texts = (engine.generate("Once upon a time", replace(settings, seed=seed))[0].text for seed in range(8))
    first = next(texts)
    expect(any(text != first for text in texts), "Eight seeds gave one text, so with these settings nothing is drawn.")


@judge("00.5")
def recipe_that_fits(answer: Any) -> None:
    from helpers.model.checkpoint import find_checkpoint
    from helpers.recipe import BuildRecipe

    expect(isinstance(answer, BuildRecipe), "This is no recipe.")
    expect(answer.max_input_len >= 100, f"max_input_len={answer.max_input_len} refuses a prompt of 100 tokens.")
    expect(answer.max_seq_len >= 220, f"max_seq_len={answer.max_seq_len} ends before prompt and answer do.")
    longest = find_checkpoint(answer.model).config.max_position_embeddings
    expect(answer.max_seq_len <= longest, f"The model knows {longest} positions, so this cannot be built.")


@judge("00.6")
def drafts(answer: Any, engine: Engine) -> None:
    from helpers.model.sampling import SamplingParams

    for prompt, seeds in (("Once upon a time", [3, 1, 2]), (TEXT, [7, 8, 9, 10, 11])):
        texts = plain(call(answer, engine, prompt, seeds))
        settings = [SamplingParams(temperature=0.8, max_tokens=16, seed=seed) for seed in seeds]
        right = [engine.generate(prompt, one)[0].text for one in settings]
        if texts != [prompt + text for text in right]:  # with the prompt before each: the same drafts
            case = f"For {prompt!r} and the seeds {seeds}"
            expect(texts == right, f"{case} it gives {texts!r:.300}. Right is {right!r:.300}.")


class DeafEngine:
    """An engine with a fault, to be diagnosed: one of the settings does not reach the choice of the tokens."""

    def __init__(self, engine: Engine):
        self.tokenize, self._engine = engine.tokenize, engine

    def generate(self, prompts: str | Sequence[str], sampling: SamplingParams) -> list[Generation]:
        return self._engine.generate(prompts, replace(sampling, seed=1))


@judge("00.7")
def deaf_engine(answer: Any) -> None:
    name = choice(answer, FAULTS)
    expect(name != "temperature", "Greedy text and text at temperature 0.8 differ, so the temperature is heard.")
    expect(name == "seed", f"{name} is heard: change it alone, and the texts differ as they do with `engine`.")
