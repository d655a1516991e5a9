"""Notebook 00: start here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import choice, plain, printed, span, whole, within

if TYPE_CHECKING:
    from helpers.backends.base import Engine

TEXT = "Hello, my name is"


@exercise(
    "00.1",
    "Count the tokens of a text",
    f"a whole number: how many tokens this model sees for {TEXT!r}",
    "A comma is no part of the word before it. And a model is told where a text begins.",
    "The engine has a method that turns a text into token ids.",
    "The length of engine.tokenize(text).",
)
def count_tokens(answer: Any, engine: Engine) -> str:
    tokens = len(engine.tokenize(TEXT))
    expect(whole(answer) == tokens, "That is not how many there are.")
    return f"{TEXT!r} is {tokens} tokens for this model, its begin token included."


@exercise(
    "00.2",
    "Tokens per second",
    "tokens per second, from the tokens and the seconds that section 5 printed",
    "It is more than one: section 5 printed how many tokens, and in how many seconds.",
    "What is asked for is tokens for each second, so seconds stand below the line.",
)
def tokens_per_second(answer: Any, tokens: int, pytorch_s: float) -> str:
    rate = tokens / pytorch_s
    mistakes = {"That is seconds per token: the other way round.": 1 / rate}
    within(answer, span(lambda seconds: tokens / seconds, printed(pytorch_s, 2)), mistakes)
    return f"{rate:,.0f} tokens/s, the wait for the first token included."


LIMITS = ("max_batch_size", "max_input_len", "max_seq_len", "max_tokens")


@exercise(
    "00.3",
    "Which limit refuses it?",
    f"one name out of: {', '.join(LIMITS)}",
    "Run the call. An error of this course says what happened and names its cause.",
    "Count what goes in: how many prompts, and how long is each?",
)
def which_limit(answer: Any) -> str:
    name = choice(answer, LIMITS)
    expect(name == "max_batch_size", f"{name} is kept: the prompts are short, and so may the answers be.")
    return "Five prompts at a time, and the engine was built for four."


@exercise(
    "00.4",
    "Drawn at random, and still the same",
    "a SamplingParams with which tokens are really drawn, and the same ones each time",
    "Two things: there must be something to draw from, and the draw must be repeatable.",
    "Temperature 0 takes the likeliest token, and top_k=1 leaves one: then nothing is drawn.",
    "One field of SamplingParams fixes the random numbers.",
    points=2,
)
def repeatable(answer: Any, engine: Engine) -> str:
    from helpers.model.sampling import SamplingParams

    expect(isinstance(answer, SamplingParams), "This is no SamplingParams.")
    expect(not answer.greedy, "temperature=0 is greedy: nothing is drawn, so of course it repeats.")
    expect(answer.seed is not None, "Each call takes random numbers of its own, so two texts need not be the same.")
    settings = replace(answer, max_tokens=24, stop=())
    texts = (engine.generate("Once upon a time", replace(settings, seed=seed))[0].text for seed in range(8))
    first = next(texts)
    expect(any(text != first for text in texts), "Eight seeds gave one text, so with these settings nothing is drawn.")
    return "Drawn at random, and the same text each time."


@exercise(
    "00.5",
    "A recipe that fits",
    "a recipe whose engine takes 100 tokens in and gives 120 out",
    "Two limits of the recipe are too small for such a request.",
    "One of them bounds the prompt; the other bounds prompt and answer together.",
    "recipe.replace(max_input_len=..., max_seq_len=...) is a changed copy.",
    points=2,
)
def recipe_that_fits(answer: Any) -> str:
    from helpers.recipe import BuildRecipe

    expect(isinstance(answer, BuildRecipe), "This is no recipe.")
    expect(answer.max_input_len >= 100, f"max_input_len={answer.max_input_len} refuses a prompt of 100 tokens.")
    expect(answer.max_seq_len >= 220, f"max_seq_len={answer.max_seq_len} ends before prompt and answer do.")
    return "An engine of this recipe takes 100 tokens and answers with 120."


@exercise(
    "00.6",
    "Several drafts of a text",
    "a function that returns a list of texts, one for each seed, in the order of the seeds",
    "One SamplingParams has one seed. So how many calls of engine.generate does it take?",
    "The limits of an answer are settings too: temperature 0.8, and max_tokens 16.",
    "For each seed: engine.generate(prompt, SamplingParams(temperature=0.8, max_tokens=16, seed=seed))[0].text",
    points=3,
)
def drafts(answer: Any, engine: Engine) -> str:
    from helpers.model.sampling import SamplingParams

    for prompt, seeds in (("Once upon a time", [3, 1, 2]), (TEXT, [7, 8, 9, 10, 11])):
        texts = plain(call(answer, engine, prompt, list(seeds)))
        settings = [SamplingParams(temperature=0.8, max_tokens=16, seed=seed) for seed in seeds]
        right = [engine.generate(prompt, one)[0].text for one in settings]
        if texts == [prompt + text for text in right]:
            continue  # with the prompt before each: the same drafts
        expect(
            texts == right, f"For {prompt!r} and the seeds {seeds} it gives {texts!r:.300}. Right is {right!r:.300}."
        )
    return "The same drafts each time, and another for each seed."
