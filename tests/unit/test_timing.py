"""The notebooks' own comparisons: what they say has the sign of what was measured."""

import random

import pytest

from helpers.course import timing
from helpers.errors import InputError

WORDS = {"faster": "It is quick.", "equal": "It is alike.", "slower": "It is slow."}


def said(mine: list[float], other: list[float]) -> str:
    sentence = timing.compare({"engine": mine, "pytorch": other}, "engine", "pytorch", **WORDS)
    begins = {"faster": "engine is ", "slower": "engine takes ", "equal": "There is no difference"}
    outcomes = [name for name, words in WORDS.items() if sentence.endswith(words)]
    if not outcomes:
        assert sentence.startswith("These runs differ too much") and sentence.endswith("Run this cell again.")
        return "open"
    assert sentence.startswith(begins[outcomes[0]])
    return outcomes[0]


@pytest.mark.parametrize(
    ("mine", "other", "outcome"),
    [
        ([1.0, 1.1, 1.0], [2.0, 2.1, 2.0], "faster"),
        ([2.0, 2.1, 2.0], [1.0, 1.1, 1.0], "slower"),
        ([1.0, 1.1, 1.0], [1.0, 1.0, 1.1], "equal"),
        ([1.0, 1.0, 3.0], [2.0, 2.0, 2.0], "open"),  # one round says the opposite
        ([1.0, 9.0, 1.0], [2.0, 18.0, 2.0], "faster"),  # a round that was slow for both
        ([1.0, 1.0, 1.0], [1.02, 1.02, 1.02], "equal"),  # too little to have the explained cause
    ],
)
def test_the_words_follow_what_was_measured(mine, other, outcome):
    assert said(mine, other) == outcome


def test_the_words_never_have_the_wrong_sign():
    """Whatever the samples: exchanged contenders exchange the words, and where every round agrees, so do they."""
    rng, seen = random.Random(0), set()
    opposite = {"faster": "slower", "slower": "faster", "equal": "equal", "open": "open"}
    for _ in range(500):
        scale, noise = rng.choice([0.3, 0.9, 1.0, 1.1, 3.0]), rng.choice([0.01, 0.1, 0.3])
        mine = [rng.lognormvariate(0, noise) for _ in range(7)]
        other = [scale * rng.lognormvariate(0, noise) for _ in range(7)]
        outcome = said(mine, other)
        seen.add(outcome)
        assert said(other, mine) == opposite[outcome]
        ratios = [b / a for a, b in zip(mine, other, strict=True)]
        assert outcome != "faster" or min(ratios) > 1
        assert outcome != "slower" or max(ratios) < 1
        assert outcome in ("equal", "open") or not min(ratios) <= 1 <= max(ratios)
        assert outcome != "equal" or max(max(ratios), 1 / min(ratios)) < 1.3
    assert seen == {"faster", "slower", "equal", "open"}


def test_figures_are_those_of_the_rounds():
    samples = {"engine": [1.0, 1.0, 1.0], "pytorch": [2.0, 2.5, 3.0]}
    assert timing.compare(samples, "engine", "pytorch") == "engine is 2.0 to 3.0 times as fast as pytorch."
    assert timing.compare(samples, "pytorch", "engine") == "pytorch takes 2.0 to 3.0 times as long as engine."


def test_what_has_no_time_is_not_compared():
    """An answer of one token has a time per token of 0."""
    for samples in ({"a": [1.0] * 3, "b": [0.0] * 3}, {"a": [1.0] * 3}, {"a": [1.0], "b": []}):
        with pytest.raises(InputError, match="no times of 'b'"):
            timing.compare(samples, "a", "b")


def test_what_returns_its_answer_in_place_of_its_seconds_is_refused_before_the_rounds():
    with pytest.raises(InputError, match="'engine' returns 'a text', and no seconds"):
        timing.take_turns({"engine": lambda: "a text"})


def test_contenders_take_turns_and_the_first_round_does_not_count():
    order = []

    def contender(name):
        return lambda: float(order.append(name) or len(order))

    samples = timing.take_turns({name: contender(name) for name in "ab"}, rounds=3)
    assert order == list("abababab")
    assert samples == {"a": [3, 5, 7], "b": [4, 6, 8]}


@pytest.mark.parametrize(("other_work", "words"), [(1.5, "Busy: other work kept 1.5 of 2 cores"), (0.0, "")])
def test_a_busy_machine_is_said(monkeypatch, capsys, other_work, words):
    monkeypatch.setattr(timing.OtherWork, "cores", lambda self: other_work)
    monkeypatch.setattr(timing.hardware, "free_cores", lambda: 2)
    timing.take_turns({"a": lambda: 1.0}, rounds=1)
    assert capsys.readouterr().out.startswith(words) and bool(words) == (other_work > 0)
