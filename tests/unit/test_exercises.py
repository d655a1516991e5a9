"""The checks of the learner's answers: right ones pass, wrong ones do not, and none ends in a traceback of ours."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import BuildRecipe, SamplingParams, load
from helpers.bench import records
from helpers.course import exercises
from helpers.errors import InputError

RECIPE = BuildRecipe(backend="pytorch", max_batch_size=1, max_input_len=64, max_seq_len=256)
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engine():
    with load(RECIPE) as engine:
        yield engine


def second_best(engine, prompt, count):
    logits = engine.prefill([engine.tokenize(prompt)])
    chosen = []
    while len(chosen) < count:
        token = logits.topk(2).indices[:, 1]
        chosen.append(token.item())
        if len(chosen) < count:
            logits = engine.decode(token)
    return chosen


def best(engine, prompt, count):
    return engine.generate(prompt, SamplingParams(temperature=0, max_tokens=count))[0].token_ids


def fit(ids, recipe, new_tokens):
    room = min(recipe.max_input_len, recipe.max_seq_len - new_tokens)
    return ids if len(ids) <= room else ids[:1] + ids[len(ids) - (room - 1) :]


class Unequal:
    def __eq__(self, other):
        raise ArithmeticError("no comparison")

    __float__ = __iter__ = __hash__ = __eq__


def checks(engine):
    """Every check of a value, as a function of the answer alone, with a right answer and a wrong one."""
    record = records.read(records.REFERENCES / "h100-stories.json")
    eager, aot = record.row("pytorch fp32"), record.row("aot fp32")
    work = record.workload.output_len
    seeded = SamplingParams(temperature=0.8, seed=1)
    config = RECIPE
    long = RECIPE.replace(max_input_len=100, max_seq_len=220)
    weight = torch.arange(6.0).reshape(2, 3)
    most = max(record.measured(1), key=lambda row: row.median("tpot_s") / row.limit_s).name
    x = exercises
    return {
        "token_count": (lambda a: x.check_token_count(engine, "Hello, my name is", a), 6, 5.5),
        "repeatable": (lambda a: x.check_repeatable(engine, a), seeded, replace(seeded, seed=None)),
        "fits": (lambda a: x.check_fits(a, 100, 120), long, config),
        "refused": (lambda a: x.check_refused(a, {"B", "C"}), {"b", "C"}, {"A"}),
        "joined": (lambda a: x.check_joined(a, weight), weight.clone(), weight + 1),
        "cache_hits": (lambda a: x.check_cache_hits({"a": RECIPE.replace(backend="aot")}, a), set(), {"a"}),
        "least_time": (lambda a: x.check_least_time(10**9, 1e9, a), 1000, 1.0),
        "smallest": (
            lambda a: x.check_smallest({"fp32": 2, "int8": 1}, {"fp32": 1, "int8": 9}, 0.1, a),
            "fp32",
            "int8",
        ),
        "top_p": (
            lambda a: x.check_smallest_top_p(engine, "Once upon a time, there was a little", " boy", a),
            0.55,
            0.5,
        ),
        "temperature": (lambda a: x.check_temperature(engine, PROMPT + ", there was a", 0.5, a), 0.01, 50),
        "throughput": (
            lambda a: x.check_output_throughput(record, "aot fp32", a),
            work / (aot.median("ttft_s") + (work - 1) * aot.median("tpot_s")),
            1,
        ),
        "break_even": (
            lambda a: x.check_break_even(record, a),
            aot.build_s / (eager.median("tpot_s") - aot.median("tpot_s")),
            1,
        ),
        "most_room": (lambda a: x.check_most_room(record, a), most, "nobody"),
        "update": (x.check_error_after_update, "EngineMismatch", "EngineCorrupt"),
        "second_best": (lambda a: x.check_second_best(engine, PROMPT, a), second_best, best),
        "fit": (lambda a: x.check_fit(a, RECIPE), fit, lambda ids, recipe, new_tokens: ids[: recipe.max_input_len]),
    }


@pytest.fixture(autouse=True)
def nothing_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))


def test_right_answers_are_right_wrong_ones_wrong_and_none_is_open(engine):
    for name, (check, right, wrong) in checks(engine).items():
        assert (name, check(right).state, check(wrong).state, check(None).state) == (name, "right", "wrong", "open")
        assert check(right).message and check(wrong).message


STRANGE = [
    math.nan,
    math.inf,
    -1,
    10**400,
    "x",
    "",
    b"x",
    [],
    [None],
    {},
    {1: 2},
    object(),
    Unequal(),
    print,
    torch.zeros(2),
]
STRANGE += [1j, lambda: None, exercises]


def test_no_answer_ends_in_a_traceback(engine):
    for name, (check, _, _) in checks(engine).items():
        for answer in STRANGE:
            nothing = isinstance(answer, (list, dict, str, bytes)) and not answer
            if name != "cache_hits" or not nothing:  # there, no name is the right answer
                assert (name, check(answer).state) in [(name, "wrong"), (name, "open")], answer


@pytest.mark.parametrize(
    "error", [IndexError("list index out of range"), ZeroDivisionError(), OSError(5, "x"), StopIteration()]
)
def test_an_error_in_the_learners_function_is_told_as_theirs(engine, error):
    def broken(*_):
        raise error

    line = broken.__code__.co_firstlineno + 1
    for check in (lambda f: exercises.check_fit(f, RECIPE), lambda f: exercises.check_second_best(engine, PROMPT, f)):
        outcome = check(broken)
        assert outcome.state == "wrong"
        assert f"Your function raises {type(error).__name__} in line {line} of your cell" in outcome.message


def test_a_function_that_takes_something_else_is_told_so(engine):
    assert "Your function raises TypeError: " in exercises.check_fit(lambda ids: ids, RECIPE).message
    assert (
        "nothing to append" in exercises.check_second_best(engine, PROMPT, lambda e, *_: e.decode([1])).message.lower()
    )


@pytest.mark.parametrize("function", [lambda *_: None, lambda *_: 5, lambda *_: iter([1, 2])])
def test_what_is_returned_may_be_anything(engine, function):
    expected = "open" if function() is None else "wrong"
    assert exercises.check_fit(function, RECIPE).state == expected
    assert exercises.check_second_best(engine, PROMPT, function).state == expected


def test_the_first_wrong_case_is_named():
    outcome = exercises.check_fit(lambda ids, recipe, _: ids[:1] + ids[1 - recipe.max_input_len :], RECIPE)
    assert "Not right for 5 tokens" in outcome.message


def test_a_stream_that_a_check_has_overtaken_is_refused(engine):
    stream = engine.stream(PROMPT, SamplingParams(temperature=0, max_tokens=8))
    next(stream)
    assert exercises.check_second_best(engine, PROMPT, second_best)
    with pytest.raises(InputError):
        next(stream)


def test_an_engine_that_saves_nothing_has_no_break_even():
    record = records.read(records.REFERENCES / "h100-stories.json")
    record.row("aot fp32").tpot_s = record.row("pytorch fp32").tpot_s
    outcome = exercises.check_break_even(record, 5)
    assert outcome.state == "open" and "saves nothing" in outcome.message
