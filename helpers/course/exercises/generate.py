"""Notebook 03: generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, expect, judge, same_as
from helpers.course.values import number, numbers, printed, span, whole, within

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine

STEPS = [step / 20 for step in range(1, 21)]  # of top_p


@judge("03.1")
def smallest_top_p(answer: Any, engine: Engine, narrow: str) -> str:
    from helpers.model.sampling import SamplingParams, next_token_distribution

    logits, ids = engine.logits(narrow), engine.tokenize(narrow)
    boy = next(i for i in logits.argsort(descending=True).tolist() if engine.detokenize([i], ids) == " boy")
    least = next(p for p in STEPS if next_token_distribution(logits, SamplingParams(top_p=p), ids)[boy] > 0)
    value = number(answer)
    expect(any(abs(value - step) < 1e-6 for step in STEPS), f"{value:g} is none of these steps.")
    expect(value > least - 1e-6, f"At top_p={value:g} the boy has no chance yet.")
    expect(value < least + 1e-6, f"At top_p={value:g} the boy has a chance; but a smaller step leaves him one too.")
    return f"At top_p={least:g} the boy is kept, and at {least - 0.05:.2f} he is not."


@judge("03.2")
def tenth_token(answer: Any, ttft_s: float, tpot_s: float) -> str:
    ttft, tpot = ttft_s * 1e3, tpot_s * 1e3
    mistakes = {
        "That is one token too many: the first comes with the TTFT, and then nine more.": ttft + 10 * tpot,
        "That is one token too few: after the first come nine more.": ttft + 8 * tpot,
        "The first token is not one of TPOT: it waits for the prompt to be read.": 10 * tpot,
    }
    within(answer, span(lambda first, each: first + 9 * each, printed(ttft, 2), printed(tpot, 2)), mistakes)
    return f"{ttft:.2f} + 9 x {tpot:.2f} = {ttft + 9 * tpot:.2f} ms."


@judge("03.3")
def sure_temperature(answer: Any, engine: Engine, prompt: str) -> str:
    from helpers.model.sampling import SamplingParams, next_token_distribution

    temperature = number(answer)
    expect(temperature > 0, "temperature=0 takes the likeliest token without a draw. Find one above 0.")
    params = SamplingParams(temperature=temperature)
    favourite = float(next_token_distribution(engine.logits(prompt), params, engine.tokenize(prompt)).max())
    expect(favourite >= 0.9, f"At temperature {temperature:g} the favourite has a probability of {favourite:.3f}.")
    return f"The favourite has a probability of {favourite:.3f} there."


@judge("03.4")
def step_of_sampling(answer: Any) -> None:
    import torch

    from helpers.model.sampling import SamplingParams, next_token_distribution

    generator = torch.Generator().manual_seed(3)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.3), (0.7, 0.9), (1.5, 0.05)):
        logits = 3 * torch.randn(12, generator=generator)
        right = next_token_distribution(logits, SamplingParams(temperature=temperature, top_p=top_p), [])
        result = numbers(call(answer, logits, temperature, top_p))
        case = f"For 12 scores, temperature={temperature}, top_p={top_p}"
        expect(len(result) == 12, f"{case}: it gives {len(result)} numbers, one for each score is asked for.")
        worst = max(range(12), key=lambda i: abs(result[i] - right[i].item()))
        near = abs(result[worst] - right[worst].item()) < 1e-3
        expect(near, f"{case}: token {worst} gets {result[worst]:.4f}; right is {right[worst]:.4f}.")


@judge("03.5")
def second_best(answer: Any, engine: Engine) -> None:
    def right(engine: Engine, prompt: str, count: int) -> list[int]:
        ids = engine.tokenize(prompt)
        for _ in range(count):
            ids = [*ids, int(engine.logits(ids).topk(2).indices[1])]
        return ids[-count:]

    cases = [(engine, "Once upon a time", 8), (engine, "Hello, my name is", 1)]
    same_as(answer, right, cases, lambda tokens: numbers(tokens, whole))


class FaultyEngine:
    """An engine with a fault, to be diagnosed: from some step on, its decode phase gives other scores."""

    FIRST_WRONG = 7  # token, counted from 1

    def __init__(self, engine: Engine):
        self.tokenize, self.detokenize, self._engine = engine.tokenize, engine.detokenize, engine
        self._token = 0

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self._token = 1
        return self._engine.prefill(prompts)

    def decode(self, tokens: Tensor) -> Tensor:
        self._token += 1
        logits = self._engine.decode(tokens)
        return logits * (0.97 if self._token >= self.FIRST_WRONG else 1.0)  # greedy text does not change


@judge("03.6")
def faulty_engine(answer: Any) -> None:
    token = whole(answer)
    one_off = "Near: is the token of the prompt's prefill number 1, and that of the first decode number 2?"
    expect(abs(token - FaultyEngine.FIRST_WRONG) != 1, one_off)
    expect(token == FaultyEngine.FIRST_WRONG, "The first wrong scores are elsewhere.")
