"""The exercises: each check with right answers of every kind and with the mistakes that learners make; their frame."""

import math
import re
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers import BuildRecipe, CourseError, SamplingParams, load
from helpers.course import learner
from helpers.course.exercises import check, frame, freeze, hint, solution
from helpers.course.exercises.generate import FaultyEngine
from helpers.errors import InputError

RECIPE = BuildRecipe(backend="pytorch", device="cpu", max_batch_size=4, max_input_len=64, max_seq_len=256)
MINE = ["00", "03"]  # the notebooks whose exercises are tested here; the others have files of their own


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A learner who has done nothing yet."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(frame, "_given", {})
    return tmp_path / "work"


@pytest.fixture(scope="module")
def engine():
    with load(RECIPE) as engine:
        yield engine


def checked(number, answer, **given):
    """The outcome of a check, with what the notebook would have frozen."""
    freeze(number[:2], **given)
    return check(number, answer)


NARROW = "Once upon a time, there was a little"
HAD_A = "Once upon a time, there was a little girl named Mia. She lived in a small house by the river. She had a"


def namespace(notebook, engine):
    """What a notebook holds where its exercises begin, as names; freeze takes from it what checks ask for."""
    if notebook == "00":
        return {"engine": engine, "tokens": 64, "pytorch_s": 2.5583, "recipe": RECIPE, "SamplingParams": SamplingParams}
    if notebook == "03":
        times = {"ttft_s": 2.7413e-3, "tpot_s": 0.3689e-3}
        return {"engine": engine, "narrow": NARROW, "prompt": HAD_A, "faulty": FaultyEngine(engine), **times}
    raise AssertionError(notebook)


# ---- 00 -----------------------------------------------------------------------------------------------------


def drafts(engine, prompt, seeds):
    return [
        engine.generate(prompt, SamplingParams(temperature=0.8, max_tokens=16, seed=seed))[0].text for seed in seeds
    ]


def drafts_by_stream(engine, prompt, seeds):
    for seed in seeds:
        settings = SamplingParams(temperature=0.8, max_tokens=16, seed=seed)
        yield prompt + "".join(token.text for token in engine.stream(prompt, settings))


RIGHT = {
    "00.1": [6, 6.0, np.int64(6), torch.tensor(6), torch.tensor([6]), Fraction(6), Decimal(6), "6", " 6 ", (6,)],
    "00.2": [25.0, 64 / 2.56, 64 / 2.5583, 25, "25.02", np.float32(25), torch.tensor(25.0), Fraction(6400, 256)],
    "00.3": ["max_batch_size", "MAX_BATCH_SIZE", " max batch size", np.str_("max_batch_size")],
    "00.4": [
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(seed=0),
        SamplingParams(temperature=2.0, top_k=5, top_p=0.9, seed=2**40, max_tokens=1),
    ],
    "00.5": [RECIPE.replace(max_input_len=100, max_seq_len=220), RECIPE.replace(max_input_len=128, max_seq_len=512)],
    "00.6": [
        drafts,
        drafts_by_stream,
        lambda e, p, s: tuple(drafts(e, p, s)),
        lambda e, p, s: np.array(drafts(e, p, s)),
    ],
}
WRONG = {
    "00.1": [
        5,
        7,
        6.9,
        5.999,
        "six",
        math.nan,
        math.inf,
        True,
        6j,
        [6, 6],
        [1, 2, 3, 4, 5, 6],
        b"6",
        "Hello, my name is",
    ],
    "00.2": [2.5583 / 64, 0.04, 2.5583, 64, 24, 26, math.nan, "fast", 64 / 2.5583 * 1000],
    "00.3": ["max_input_len", "max_seq_len", "max_tokens", "batch", 5, "", ["max_batch_size", "max_input_len"]],
    "00.4": [
        SamplingParams(temperature=0, seed=1),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_k=1, seed=1),  # one token is kept: nothing is drawn
        SamplingParams(temperature=1e-4, seed=1),
        SamplingParams(temperature=0.8, top_p=1e-6, seed=1),
        {"temperature": 0.8, "seed": 1},
        7,
    ],
    "00.5": [
        RECIPE,
        RECIPE.replace(max_input_len=99, max_seq_len=220),
        RECIPE.replace(max_input_len=100, max_seq_len=219),
        RECIPE.replace(max_input_len=120, max_seq_len=160),
        (100, 220),
    ],
    "00.6": [
        lambda e, p, s: [e.generate(p, SamplingParams(temperature=0.8, max_tokens=16, seed=s[0]))[0].text for _ in s],
        lambda e, p, s: drafts(e, p, sorted(s))[:-1],
        lambda e, p, s: drafts(e, p, s[::-1]),
        lambda e, p, s: [e.generate(p, SamplingParams(temperature=0.8, max_tokens=17, seed=i))[0].text for i in s],
        lambda e, p, s: [e.generate(p, SamplingParams(temperature=0.8, max_tokens=16))[0].text for i in s],
        lambda e, p, s: [p for _ in s],
        lambda e, p, s: s,
        lambda e, p, s: drafts(e, p, s)[0],
        lambda e, p, s: None,
        drafts(None, "", []),
    ],
}

# ---- 03 -----------------------------------------------------------------------------------------------------


def numpy_step(logits, temperature, top_p):
    """Another right way: from the smallest token up, what may go without leaving less than top_p."""
    scores = logits.numpy().astype(np.float64) / temperature
    p = np.exp(scores - scores.max())
    p /= p.sum()
    for i in np.argsort(p)[:-1]:
        if p[p > p[i]].sum() >= top_p:
            p[i] = 0
    return p / p.sum()


def step(logits, temperature, top_p, scale=True, strict=False, late=False):
    """The right way, and with the switches, usual wrong ones."""
    p, order = (logits if late else logits / temperature).softmax(-1).sort(descending=True)
    gone = (p.cumsum(-1) if strict else p.cumsum(-1) - p) >= top_p
    p = p.masked_fill(gone, 0)
    if late:
        p = p ** (1 / temperature)
    return torch.zeros_like(logits).scatter(0, order, p / p.sum() if scale else p)


def second_best(engine, prompt, count):
    logits = engine.prefill([engine.tokenize(prompt)])
    chosen = []
    while len(chosen) < count:
        token = logits.topk(2).indices[:, 1]
        chosen.append(token)
        logits = engine.decode(token)
    return torch.cat(chosen)


def second_best_anew(engine, prompt, count):
    ids = engine.tokenize(prompt)
    for _ in range(count):
        ids = [*ids, engine.logits(ids).argsort()[-2].item()]
    return ids[-count:]


def best(engine, prompt, count):
    return engine.generate(prompt, SamplingParams(temperature=0, max_tokens=count))[0].token_ids


TENTH = 2.7413 + 9 * 0.3689
RIGHT |= {
    "03.1": [0.55, "0.55", Fraction(11, 20), np.float32(0.55), torch.tensor(0.55), Decimal("0.55"), 0.1 + 0.45, [0.55]],
    "03.2": [TENTH, 6.06, 6.1, round(2.74 + 9 * 0.37, 2), np.float64(TENTH), torch.tensor(TENTH), "6.06"],
    "03.3": [0.1, 0.01, "0.05", np.float32(0.1), torch.tensor([0.1]), Fraction(1, 10), 1e-9],
    "03.4": [step, numpy_step, lambda *a: step(*a).tolist(), lambda *a: step(*a).double(), lambda *a: tuple(step(*a))],
    "03.5": [
        second_best,
        second_best_anew,
        lambda *a: np.array(second_best_anew(*a)),
        lambda *a: map(int, second_best(*a)),
    ],
    "03.6": [7, 7.0, "7", torch.tensor(7), np.int32(7)],
}
WRONG |= {
    "03.1": [0.5, 0.6, 0.53, 0.54, 55, 1.0, 0.05, math.nan, "boy", True],
    "03.2": [
        2.7413 + 10 * 0.3689,
        2.7413 + 8 * 0.3689,
        10 * 0.3689,
        TENTH / 1000,
        10 * (2.7413 + 0.3689),
        2.7413,
        math.nan,
        "6 ms",
    ],
    "03.3": [0, -0.1, 0.3, 1, 50, math.nan, math.inf, "cold"],
    "03.4": [
        lambda x, t, p: step(x, t, p, scale=False),
        lambda x, t, p: step(x, t, p, strict=True),  # without the token that reaches top_p
        lambda x, t, p: step(x, t, p, late=True),  # top_p before the temperature
        lambda x, t, p: step(x, 1 / t, p),
        lambda x, t, p: (x / t).softmax(-1),  # no top_p
        lambda x, t, p: step(x, t, p).sort(descending=True).values,  # not put back
        lambda x, t, p: step(x, t, p)[:-1],
        lambda x, t, p: x,
        lambda x, t, p: step(x, t, p) * math.nan,
        lambda x, t, p: print(step(x, t, p).sum()),
        lambda x, t, p: 1 / 0,
        lambda x: x,
        0.5,
    ],
    "03.5": [
        best,
        lambda e, p, n: second_best_anew(e, p, n + 1),
        lambda e, p, n: second_best_anew(e, p, n)[:-1] if n > 1 else [],
        lambda e, p, n: e.tokenize(p) + second_best_anew(e, p, n),
        lambda e, p, n: [e.logits(p).argsort()[-2].item()] * n,
        lambda e, p, n: e.detokenize(second_best_anew(e, p, n)),
        lambda e, p, n: None,
        [1, 2],
    ],
    "03.6": [6, 8, 1, 12, 7.5, math.nan, "none"],
}

# ---- every check ---------------------------------------------------------------------------------------------


class Unequal:
    def __eq__(self, other):
        raise ArithmeticError("no comparison")

    __float__ = __iter__ = __hash__ = __repr__ = __eq__


STRANGE = [
    -1,
    10**400,
    b"x",
    [],
    [None],
    {},
    {1: 2},
    object(),
    Unequal(),
    print,
    torch.zeros(2),
    1j,
    frame,
    "",
    math.nan,
]
ALL = [number for notebook in MINE for number in frame.exercises_of(notebook)]


def given_for(number, engine):
    names = namespace(number[:2], engine)
    return {
        name: names[name]
        for name in ("engine", "tokens", "pytorch_s", "narrow", "prompt", "ttft_s", "tpot_s")
        if name in names
    }


@pytest.mark.parametrize("number", ALL)
def test_right_answers_are_right(engine, number):
    outcomes = [checked(number, answer, **given_for(number, engine)) for answer in RIGHT[number]]
    assert [(str(outcome), outcome.state) for outcome in outcomes] == [(str(o), "right") for o in outcomes]


@pytest.mark.parametrize("number", ALL)
def test_wrong_answers_are_wrong_and_told_beside_what_was_expected(engine, number):
    for answer in [*WRONG[number], *STRANGE]:
        outcome = checked(number, answer, **given_for(number, engine))
        assert (outcome.state, str(outcome)) == ("wrong", str(outcome)), answer
        assert frame.find(number).expects in str(outcome) and "yours: " in str(outcome)


@pytest.mark.parametrize("number", ALL)
def test_what_nobody_has_answered_is_open_and_leaves_no_file(engine, number, work):
    assert check(number).state == check(number, None).state == check(number, ...).state == "open"
    if callable(RIGHT[number][0]):
        stub = lambda *arguments: ...  # noqa: E731  (what the notebook comes with)
        assert checked(number, stub, **given_for(number, engine)).state == "open"
        forgotten = checked(number, lambda *arguments: None, **given_for(number, engine))
        assert forgotten.state == "wrong" and "`return` missing" in str(forgotten)
    else:
        assert not work.exists()


@pytest.mark.parametrize("notebook", MINE)
def test_the_solutions_are_right_and_no_hint_is_one(engine, notebook):
    names = namespace(notebook, engine)
    solutions = frame.read_solutions(notebook)
    assert list(solutions) == list(frame.exercises_of(notebook))
    for number, text in solutions.items():
        code, after = re.fullmatch(r"```python\n(.*)```\n(.*)", text, re.DOTALL).groups()
        exec(compile(code, f"solution {number}", "exec"), names)
        assert checked(number, names["answer"], **given_for(number, engine)), number
        assert after.strip()
        assert code.partition("answer = ")[2].strip() not in frame.find(number).hints


@pytest.mark.parametrize("notebook", list(frame.MODULES))
def test_every_notebook_has_five_exercises_that_rise(notebook):
    try:
        tasks = list(frame.exercises_of(notebook).values())
    except InputError:
        pytest.skip(f"notebook {notebook} has none yet")
    assert len(tasks) >= 5
    assert [task.number for task in tasks] == [f"{notebook}.{at}" for at in range(1, len(tasks) + 1)]
    assert [task.points for task in tasks] == sorted(task.points for task in tasks)
    assert all(len(task.hints) >= 2 and task.title and task.expects for task in tasks)
    assert set(frame.read_solutions(notebook)) == {task.number for task in tasks}


# ---- the frame -----------------------------------------------------------------------------------------------


def test_hints_deepen_with_each_new_try_and_not_with_the_same_one():
    def level(answer):
        return re.search(r"hint (\d) of 2", str(check("00.3", answer)))[1]

    assert [level(answer) for answer in ("max_tokens", "max_tokens", "max_seq_len", "max_tokens", "x")] == list("11222")
    assert 'solution("00.3")' in str(check("00.3", "y"))


def test_hints_can_be_asked_for(capsys):
    for _ in range(4):
        hint("03.1")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in lines] == ["Hint 1 of 3", "Hint 2 of 3", "Hint 3 of 3", "Hint 3 of 3"]


def test_a_function_given_again_is_the_same_try_and_a_changed_one_another():
    source = "def f(logits, temperature, top_p):\n    return [{}] * 12"
    levels = []
    for value in (1, 1, 2):
        names = {}
        exec(source.format(value), names)
        levels.append(re.search(r"hint (\d)", str(check("03.4", names["f"])))[1])
    assert levels == ["1", "1", "2"]


def test_a_mistake_in_the_learners_function_is_shown_down_to_their_own_line_and_no_further():
    def inner(logits):
        return torch.zeros(3)[torch.zeros(3, 4, dtype=torch.long), 0, 0]  # torch raises, below this line

    def outer(logits, temperature, top_p):
        return inner(logits)

    text = str(check("03.4", outer))
    assert "Your code raises IndexError" in text
    assert "in outer: return inner(logits)" in text and "in inner: return torch.zeros(3)" in text
    assert "frame.py" not in text and "in call" not in text


def test_an_interrupt_goes_through():
    def endless(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("03.4", endless)


def test_a_closed_engine_opens_by_itself():
    with load(RECIPE) as closed:
        freeze("00", engine=closed)
    assert closed.closed and check("00.1", 6) and check("00.6", drafts)


def test_what_was_frozen_does_not_move_with_the_notebook():
    times = [1.0, 2.0]
    freeze("03", ttft_s=times, tpot_s={"a": times})
    times.clear()
    assert frame._given["03"] == {"ttft_s": [1.0, 2.0], "tpot_s": {"a": [1.0, 2.0]}}
    freeze("03", ttft_s=1e-3, tpot_s=1e-3)
    assert check("03.2", 10.0)
    freeze("03", ttft_s=2e-3, tpot_s=2e-3)  # measured again, and the table with it
    assert check("03.2", 20.0) and not check("03.2", 10.0)


def test_without_a_measurement_it_says_which_cell_to_run():
    with pytest.raises(InputError, match=r"nothing to check against yet: ttft_s, tpot_s[\s\S]*freeze"):
        check("03.2", 6.0)


@pytest.mark.parametrize("number", ["", "3", "99.1", "03.99", None, 3.1])
def test_an_exercise_that_is_not_there(number):
    with pytest.raises(CourseError, match="no exercise"):
        check(number, 1)


def test_solutions_are_shown_when_asked_for_and_noted():
    assert "topk(2)" in str(solution("03.5"))
    assert learner.read()["exercises"]["03.5"]["solution"] is True


def test_a_right_answer_stays_right(engine):
    checked("00.1", 6, engine=engine)
    checked("00.1", 7, engine=engine)
    assert learner.read()["exercises"]["00.1"]["state"] == "right"


# ---- the learner's file --------------------------------------------------------------------------------------


def test_a_damaged_file_is_put_aside(work, capsys):
    work.mkdir()
    (work / learner.FILE).write_text('{"exercises": [')
    assert check("00.3", "max_batch_size")
    (aside,) = work.glob("progress.damaged-*.json")
    assert aside.read_text() == '{"exercises": [' and aside.name in "".join(capsys.readouterr())
    assert learner.read()["exercises"]["00.3"]["state"] == "right"


def test_two_notebooks_write_at_once(work):
    def answer(number):
        for at in range(10):
            learner.record_answer(number, "wrong", str(at))

    threads = [threading.Thread(target=answer, args=(number,)) for number in ("00.1", "03.1", "03.2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: len(entry["wrong"]) for number, entry in learner.read()["exercises"].items()} == {
        "00.1": 10,
        "03.1": 10,
        "03.2": 10,
    }
    assert sorted(path.name for path in work.iterdir()) == [".progress.json.lock", "progress.json"]


def test_where_nothing_can_be_written_the_answer_is_still_checked(work):
    work.write_text("a file, where a folder should be")
    outcome = check("00.3", "max_batch_size")
    assert outcome and "cannot be written" in str(outcome) and "COURSE_WORK" in str(outcome)
    assert "cannot be written" in str(check("00.3", "max_tokens"))
