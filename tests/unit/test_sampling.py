"""Sampling beside transformers' logits processors, and draws beside the distribution they are drawn from."""

import itertools
import math

import pytest
import torch

from helpers import SamplingParams
from helpers.errors import InputError, NumericsError
from helpers.model.sampling import Sampler, filter_logits, next_token_distribution, tokens_seen

V = 50
SEEN = [[1, 2, 3, 3], [7], list(range(V)), []]


def logits_of(kind: str) -> torch.Tensor:
    """[4, V] of one kind."""
    random = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    return {
        "random": random * 3,
        "ties": (random * 2).round(),
        "all equal": torch.full((4, V), 2.0),
        "huge": random * 1e4,
        "tiny": random * 1e-6,
        "one certain": torch.full((4, V), -1e4).index_fill(1, torch.tensor([7]), 1e4),
        "some impossible": random.masked_fill(random < 0, -math.inf),
    }[kind]


def transformers_way(logits: torch.Tensor, params: SamplingParams, seen: list[list[int]]) -> torch.Tensor:
    from transformers import generation as g

    rows = []
    for row, ids in zip(logits, seen, strict=True):
        row, ids = row[None].clone(), torch.tensor([ids], dtype=torch.long)
        if params.repetition_penalty != 1 and ids.numel():
            row = g.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, row)
        if params.temperature > 0:
            row = g.TemperatureLogitsWarper(params.temperature)(ids, row) if params.temperature != 1 else row
            row = g.TopKLogitsWarper(params.top_k)(ids, row) if params.top_k else row
            row = g.TopPLogitsWarper(params.top_p)(ids, row) if params.top_p < 1 else row
        rows.append(row)
    return torch.cat(rows)


SETTINGS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, repetition_penalty=r)
    for t, k, p, r in itertools.product((0.0, 0.3, 1.0, 2.5), (0, 1, 7, 1000), (1.0, 0.9, 0.2, 1e-6), (1.0, 1.3, 0.5))
]


@pytest.mark.parametrize(
    "kind", ["random", "ties", "all equal", "huge", "tiny", "one certain", "some impossible"], ids=str
)
def test_logits_are_filtered_as_transformers_filters_them(kind):
    logits = logits_of(kind)
    for params in SETTINGS:
        if kind in ("ties", "all equal") and params.top_p < 1 and params.temperature:
            continue  # which of equal tokens top_p keeps is an accident of sorting; the next test has the law
        before = logits.clone()
        torch.testing.assert_close(
            filter_logits(logits, params, tokens_seen(SEEN, logits)),
            transformers_way(logits, params, SEEN),
            msg=lambda m, p=params: f"{p}: {m}",
        )
        assert torch.equal(logits, before), "the caller's logits were changed"


@pytest.mark.parametrize("kind", ["random", "ties", "all equal"])
@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(kind, top_p):
    logits = logits_of(kind)
    kept = filter_logits(logits, SamplingParams(top_p=top_p), tokens_seen(SEEN, logits)).isfinite()
    for row, keep in zip(logits.softmax(-1), kept, strict=True):
        chosen = row[keep].sort().values
        assert chosen.sum() >= top_p - 1e-6
        assert chosen.sum() - chosen[0] < top_p + 1e-6  # without the least of them it falls short
        assert chosen[0] >= row[~keep].max() - 1e-7 if (~keep).any() else True


def draw(params: SamplingParams, logits: torch.Tensor, count: int) -> torch.Tensor:
    """count draws from one sampler for logits [V], each of them the first after the prompt."""
    sampler, tokens = Sampler(params, [[1, 2]]), []
    for _ in range(count):
        tokens.append(sampler(logits[None]))
        sampler.seen = torch.empty(0)
    return torch.cat(tokens)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.5, top_k=8),
        SamplingParams(seed=3, temperature=1.5, top_p=0.8, repetition_penalty=1.5),
    ],
)
def test_draws_follow_the_distribution(params):
    """Pearson's chi-square of 4,000 draws lies below its mean plus five standard deviations."""
    logits = logits_of("random")[0, :12]
    expected = 4000 * next_token_distribution(logits, params, [1, 2])
    counts = torch.bincount(draw(params, logits, 4000), minlength=12)
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    freedom = int(likely.sum()) - 1
    chi_square = ((counts - expected) ** 2 / expected)[likely].sum().item()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_first_draws_of_different_seeds_follow_the_distribution_too():
    logits = torch.zeros(4)
    counts = torch.bincount(torch.cat([draw(SamplingParams(seed=s), logits, 1) for s in range(2000)]), minlength=4)
    chi_square = ((counts - 500.0) ** 2 / 500).sum().item()
    assert chi_square < 3 + 5 * math.sqrt(6)


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    logits = logits_of("random")[0]
    first, again, other = (draw(SamplingParams(seed=s), logits, 20).tolist() for s in (5, 5, 6))
    assert first == again != other


def test_a_sequence_draws_the_same_alone_and_in_a_batch():
    logits = logits_of("random")
    params = SamplingParams(seed=9, top_p=0.9, repetition_penalty=1.2)
    together, alone = Sampler(params, SEEN), [Sampler(params, [ids]) for ids in SEEN]
    for _ in range(10):
        batch = together(logits).tolist()
        assert batch == [one(row[None]).item() for one, row in zip(alone, logits, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_step_is_penalized_as_if_prompt_and_answer_were_joined_and_they_are_not(temperature):
    params = SamplingParams(temperature=temperature, seed=4, repetition_penalty=1.3)
    sampler, texts = Sampler(params, SEEN), [list(ids) for ids in SEEN]
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        logits = torch.randn(4, V, generator=generator)
        filtered = transformers_way(logits, params, texts)
        tokens = sampler(logits).tolist()
        if not temperature:
            assert tokens == filtered.argmax(-1).tolist()
        for ids, token in zip(texts, tokens, strict=True):
            ids.append(token)
        assert torch.equal(sampler.seen, tokens_seen(texts, logits))


def test_without_a_seed_equal_prompts_of_a_batch_get_different_draws_and_torchs_own_state_is_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sampler = Sampler(SamplingParams(), [[], []])
    draws = [sampler(torch.zeros(2, 1000)).tolist() for _ in range(20)]
    assert any(first != second for first, second in draws)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["random", "huge", "one certain", "some impossible"])
def test_the_coldest_temperatures_are_greedy(kind):
    logits = logits_of(kind)
    for temperature in (0.0, 1e-300, 1e-30, 1e-6):
        chosen = Sampler(SamplingParams(temperature=temperature, seed=0), SEEN)(logits)
        assert torch.equal(chosen, logits.argmax(-1)), temperature


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert set(draw(SamplingParams(seed=0), logits, 500).tolist()) == {1, 3}


@pytest.mark.parametrize("params", SETTINGS[::5], ids=str)
def test_the_shown_distribution_sums_to_one(params):
    p = next_token_distribution(logits_of("random")[0], params, [1])
    assert p.sum().item() == pytest.approx(1, abs=1e-5) and (p >= 0).all()


def test_the_scores_of_a_batch_are_no_distribution():
    with pytest.raises(InputError, match=r"one sequence are asked for, not \[1, 8\]"):
        next_token_distribution(torch.randn(1, 8), SamplingParams(), [1])
    for scores, seen in ((torch.randn(8), "a text"), (torch.randn(8), [8]), ([0.1, 0.2], [1])):
        with pytest.raises(InputError, match="not "):
            next_token_distribution(scores, SamplingParams(), seen)
    assert next_token_distribution(torch.randn(8), None, [1]).sum() == pytest.approx(1)


@pytest.mark.parametrize("largest", [1e30, 3e38])
@pytest.mark.parametrize("params", [{"temperature": 1e-9}, {"repetition_penalty": 1e-6}, {"temperature": 0.01}])
def test_the_largest_scores_still_have_a_distribution(largest, params):
    p = next_token_distribution(torch.tensor([0.0, largest, -largest, 1.0]), SamplingParams(**params), [1, 2])
    assert p.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_have_no_distribution(temperature, value):
    logits = torch.zeros(5)
    logits[3] = value
    with pytest.raises(NumericsError, match="Behind token 2 "):
        next_token_distribution(logits, SamplingParams(temperature=temperature), [0, 1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(
            ("temperature", "top_p", "repetition_penalty"), (math.nan, math.inf, -1, -0.1, "1", None, True)
        ),
        *itertools.product(("top_k", "max_tokens", "seed"), (-1, 1.5, "1", True, math.nan)),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-30),
        ("max_tokens", 0),
        ("top_k", None),
        ("seed", 2**64),
        ("ignore_eos", "no"),  # which would count as yes
        ("ignore_eos", 1),
    ],
)
def test_a_wrong_setting_is_refused_naming_it_and_its_value(name, value):
    with pytest.raises(InputError) as refused:
        SamplingParams(**{name: value})
    assert f"{name} is {value!r}" in refused.value.what
    assert refused.value.fix


# ---- stop strings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, ()), ((), ()), ([], ()), ("\n\n", ("\n\n",)), (["a", "b"], ("a", "b")), (("a",), ("a",))],
)
def test_stop_takes_one_text_or_several_and_keeps_them_in_one_form(given, kept):
    assert SamplingParams(stop=given).stop == kept
    assert hash(SamplingParams(stop=given)) == hash(SamplingParams(stop=kept))
    assert SamplingParams(stop=given) == SamplingParams(stop=kept)


@pytest.mark.parametrize(
    "stop",
    [
        [""],
        ["a", ""],
        7,
        [7],
        {"a": 1},
        [["a"]],
        b"a",
        {"a"},
        0,
        {},
        torch.zeros(2),
        pytest.param(iter("ab"), id="an iterator"),
    ],
    ids=repr,
)
def test_what_is_no_stop_string_is_refused(stop):
    with pytest.raises(InputError, match="stop"):
        SamplingParams(stop=stop)
