"""The checks of the learner's answers: right ones pass, wrong ones do not, and none ends in a traceback of ours."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers import BuildRecipe, SamplingParams, load
from helpers.bench import quality, records
from helpers.bench.run import bytes_per_step
from helpers.course import exercises
from helpers.errors import InputError
from helpers.model.checkpoint import find_checkpoint
from helpers.paths import PROJECT

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


def kl(reference, logits):
    theirs, mine = reference.log_softmax(-1), logits.log_softmax(-1)
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


def shorten(messages, count, room):
    while count(messages) > room:
        messages = messages[:1] + messages[2:]
    return messages


CONFIG = find_checkpoint("stories").config
RESULTS = [
    quality.Precision("aot fp32", 100, 3e-3, 2.0, 0.0, 0.0, 1.0, 0.0),
    quality.Precision("aot int8", 50, 2e-3, 2.01, 0.01, 0.02, 0.97, 0.002),
    quality.Precision("aot int4", 30, 1e-3, 2.2, 0.2, 0.05, 0.8, 0.05),
]
LOGITS = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(20)
EXACT = quality.Scores(TARGETS, LOGITS.log_softmax(-1))
ROUNDED = quality.Scores(TARGETS, LOGITS.bfloat16().float().log_softmax(-1))


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
        "cache_per_token": (lambda a: x.check_cache_per_token(CONFIG, a), 4 * 2 * 6 * 2 * 64, 2 * 2 * 6 * 2 * 64),
        "fastest": (lambda a: x.check_fastest(RESULTS, 0.01, a), "aot int8", "aot int4"),
        "kl": (x.check_kl, kl, lambda reference, logits: kl(logits, reference)),
        "shorten": (x.check_shorten, shorten, lambda messages, count, room: messages[-2:]),
        "new_scores": (lambda a: x.check_new_scores({"aot fp32": EXACT}, "aot fp32", a), ROUNDED, EXACT),
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


# ---- 06: each check with other right answers, and with the mistakes that learners make ----------------------

F = torch.nn.functional


def shorten_by_suffix(messages, count, room):
    """Another right way: the longest end that fits."""
    for start in range(1, len(messages)):
        if count(kept := [messages[0], *messages[start:]]) <= room:
            return tuple(kept)
    return messages


def shorten_in_place(messages, count, room):
    while count(messages) > room:
        del messages[1]
    return messages


def shorten_by_pairs(messages, count, room):
    while count(messages) > room:
        messages = messages[:1] + messages[3:]
    return messages


OTHERS_RIGHT = {
    "cache_per_token": [6144.0, np.int64(6144), torch.tensor(6144), Fraction(6144), "6144"],
    "fastest": ["int8", "AOT int8", "aot:int8", RESULTS[1], np.str_("aot int8")],
    "kl": [
        lambda r, x: F.kl_div(x.log_softmax(-1), r.log_softmax(-1), log_target=True, reduction="batchmean"),
        lambda r, x: F.kl_div(x.log_softmax(-1), r.softmax(-1), reduction="batchmean").item(),
        lambda r, x: (F.cross_entropy(x, r.softmax(-1)) - F.cross_entropy(r, r.softmax(-1))).numpy(),
        lambda r, x: [kl(r, x)][0].double(),
    ],
    "shorten": [shorten_by_suffix, shorten_in_place],
    "new_scores": [quality.Scores(TARGETS, LOGITS.half().float().log_softmax(-1))],
}
OTHERS_WRONG = {
    "cache_per_token": [6145, 6143, 3072, 12288, 6144 * 8, 1536, 6.144],  # one of K and V, all heads, bits, numbers, kB
    "fastest": ["fp32", "aot fp32", RESULTS[2], "int", ""],
    "kl": [
        lambda r, x: kl(r, x) * len(x),  # the sum over the tokens
        lambda r, x: kl(r, x) / math.log(2),  # bits
        lambda r, x: kl(r, x) / x.shape[-1],  # kl_div's own mean
        lambda r, x: -kl(r, x),
        lambda r, x: (r.softmax(-1) - x.softmax(-1)).abs().sum(-1).mean(),
        lambda r, x: kl(r[:, :-1], x[:, :-1]),
        lambda r, x: 0,
        lambda r, x: r,
    ],
    "shorten": [
        shorten_by_pairs,
        lambda messages, count, room: messages,
        lambda messages, count, room: messages[:1] + messages[-1:],
        lambda messages, count, room: shorten(messages, count, room - 1),  # one token off
        lambda messages, count, room: shorten(messages[1:], count, room),  # the system message went first
        lambda messages, count, room: list(reversed(shorten(messages, count, room))),
    ],
    "new_scores": [
        LOGITS,
        quality.Scores(TARGETS, (LOGITS * 9).log_softmax(-1)),
        quality.Scores(TARGETS[:5], LOGITS[:5]),
    ],
}


@pytest.mark.parametrize("name", OTHERS_RIGHT)
def test_other_right_answers_are_right(engine, name):
    check = checks(engine)[name][0]
    assert [check(answer).state for answer in OTHERS_RIGHT[name]] == ["right"] * len(OTHERS_RIGHT[name])


@pytest.mark.parametrize("name", OTHERS_WRONG)
def test_usual_mistakes_are_wrong(engine, name):
    check = checks(engine)[name][0]
    assert [check(answer).state for answer in OTHERS_WRONG[name]] == ["wrong"] * len(OTHERS_WRONG[name])


def test_a_function_without_a_return_is_open(engine):
    for name in ("kl", "shorten", "second_best", "fit"):
        assert checks(engine)[name][0](lambda *_: None).state == "open"


def test_the_solutions_that_notebook_06_shows_are_right():
    nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")
    nb = nbformat.read(PROJECT / "notebooks" / "06_your_own_model.ipynb", as_version=4)
    (source,) = [cell.source for cell in nb.cells if cell.id == "own-solutions"]
    code = source.partition("```python\n")[2].partition("with load(")[0]  # what comes then takes a build
    workload = records.Workload(model="stories")
    names = {"config": CONFIG, "workload": workload, "bytes_per_step": bytes_per_step, "results": RESULTS, "most": 0.01}
    exec(compile(code, "solutions", "exec"), names)
    assert exercises.check_cache_per_token(CONFIG, names["answer_1"])
    assert exercises.check_least_time(bytes_per_step(workload, "int8", 1), 60e9, names["answer_2"])
    assert exercises.check_fastest(RESULTS, 0.01, names["answer_3"])
    assert exercises.check_kl(names["kl_divergence"]) and exercises.check_shorten(names["shorten"])
