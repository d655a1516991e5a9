"""Notebook 03: generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import call, exercise, expect
from helpers.course.values import number, numbers, printed, span, whole, within

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine

STEPS = [step / 20 for step in range(1, 21)]  # of top_p


@exercise(
    "03.1",
    "The smallest top_p",
    "a number out of 0.05, 0.10, 0.15, ... 1.00: the smallest that leaves ' boy' a chance",
    "Look at the picture of section 12: how likely is the girl alone?",
    "Tokens are kept, likeliest first, until their probabilities add up to top_p. The one that reaches it is kept.",
    "The boy is needed as soon as the girl's probability is less than top_p.",
)
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


@exercise(
    "03.2",
    "When is the tenth token there?",
    "milliseconds from the request to the tenth token, from the TTFT and TPOT that section 9 printed",
    "The first token has a time of its own.",
    "After the first token, how many more are there up to the tenth?",
)
def tenth_token(answer: Any, ttft_s: float, tpot_s: float) -> str:
    ttft, tpot = ttft_s * 1e3, tpot_s * 1e3
    mistakes = {
        "That is one token too many: the first comes with the TTFT, and then nine more.": ttft + 10 * tpot,
        "That is one token too few: after the first come nine more.": ttft + 8 * tpot,
        "The first token is not one of TPOT: it waits for the prompt to be read.": 10 * tpot,
        "That is in seconds.": ttft_s + 9 * tpot_s,
    }
    within(answer, span(lambda first, each: first + 9 * each, printed(ttft, 2), printed(tpot, 2)), mistakes)
    return f"{ttft:.2f} + 9 x {tpot:.2f} = {ttft + 9 * tpot:.2f} ms."


@exercise(
    "03.3",
    "A temperature that is nearly sure",
    "a temperature above 0 at which the likeliest token has a probability of at least 0.9",
    "Compare the pictures at 0.3 and at 1: which way does the favourite grow?",
    "Below 1, the differences between the scores grow. So go on below 0.3.",
)
def sure_temperature(answer: Any, engine: Engine, prompt: str) -> str:
    from helpers.model.sampling import SamplingParams, next_token_distribution

    temperature = number(answer)
    expect(temperature > 0, "temperature=0 takes the likeliest token without a draw. Find one above 0.")
    params = SamplingParams(temperature=temperature)
    favourite = float(next_token_distribution(engine.logits(prompt), params, engine.tokenize(prompt)).max())
    expect(favourite >= 0.9, f"At temperature {temperature:g} the favourite has a probability of {favourite:.2f}.")
    return f"The favourite has a probability of {favourite:.2f} there."


@exercise(
    "03.4",
    "A step of sampling",
    "a function that returns a probability for each token, those that are dropped with 0",
    "The order matters: the temperature first, then top_p.",
    "Sort the probabilities, largest first. A token stays if those before it add up to less than top_p.",
    "What stays is divided by its sum, so that it adds to 1 again; and it goes back to where it was before sorting.",
    points=3,
)
def step_of_sampling(answer: Any) -> str:
    import torch

    from helpers.model.sampling import SamplingParams, next_token_distribution

    generator = torch.Generator().manual_seed(3)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.3), (0.7, 0.9), (1.5, 0.05)):
        logits = 3 * torch.randn(12, generator=generator)
        right = next_token_distribution(logits, SamplingParams(temperature=temperature, top_p=top_p), [])
        result = numbers(call(answer, logits.clone(), temperature, top_p))
        case = f"For 12 scores, temperature={temperature}, top_p={top_p}"
        expect(len(result) == 12, f"{case}: it gives {len(result)} numbers, one for each score is asked for.")
        worst = max(range(12), key=lambda i: abs(result[i] - right[i].item()))
        near = abs(result[worst] - right[worst].item()) < 1e-3
        expect(near, f"{case}: token {worst} gets {result[worst]:.4f}; right is {right[worst]:.4f}.")
    return "Right for six pairs of settings: that is what the engine draws from."


@exercise(
    "03.5",
    "The second best token",
    "a function that returns a list of `count` token ids",
    "It is the loop of section 9; only the choice of the token differs.",
    "logits.topk(2).indices has a row for each sequence: the best token first, then the second.",
    "Column 1 is a tensor with one id for each sequence, just what engine.decode takes.",
    points=3,
)
def second_best(answer: Any, engine: Engine) -> str:
    for prompt, count in (("Once upon a time", 8), ("Hello, my name is", 1)):
        ids = engine.tokenize(prompt)
        right: list[int] = []
        for _ in range(count):
            right.append(int(engine.logits(ids + right).topk(2).indices[1]))
        result = [whole(token) for token in numbers(call(answer, engine, prompt, count))]
        expect(result == right, f"For {prompt!r} and {count} tokens it gives {result}. Right is {right}.")
    return "Your loop takes the second best token at every step."


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


@exercise(
    "03.6",
    "An engine with a fault",
    "a whole number: the first token, counted from 1, that is chosen from wrong scores",
    "The text looks right. So compare the scores themselves, after each token.",
    "Prefill is right. Prefill of the prompt and the tokens so far must give the scores that decode gives.",
    "Token 1 is chosen from the prompt's prefill, token 2 from the first decode. Count until they differ.",
    points=3,
)
def faulty_engine(answer: Any) -> str:
    token = whole(answer)
    one_off = "Near: is the token of the prompt's prefill number 1, and that of the first decode number 2?"
    expect(abs(token - FaultyEngine.FIRST_WRONG) != 1, one_off)
    expect(token == FaultyEngine.FIRST_WRONG, "The first wrong scores are elsewhere.")
    return "Greedy text had hidden it: the scores were all too small by the same share."
