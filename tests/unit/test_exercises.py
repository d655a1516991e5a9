"""The exercises: each check with right answers of every kind and with the mistakes that learners make; their frame."""

import copy
import dataclasses
import importlib
import inspect
import math
import re
import threading
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from answers_00 import RECIPE, drafts
from answers_04 import RECORD

from helpers import BuildRecipe, CourseError, SamplingParams, load
from helpers.course import learner
from helpers.course.exercises import check, frame, freeze, hint, solution
from helpers.errors import InputError

# By notebook: RIGHT and WRONG answers by exercise; names(engine), what the notebook holds where its exercises begin.
ANSWERS = {
    path.stem[-2:]: importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("answers_*.py"))
}


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


# ---- every check ---------------------------------------------------------------------------------------------


class Unequal:
    def __eq__(self, other):
        raise ArithmeticError("no comparison")

    __float__ = __iter__ = __hash__ = __repr__ = __eq__


STRANGE = [-1, 10**400, b"x", [], [None], {}, {1: 2}, object(), Unequal(), print, torch.zeros(2), 1j, frame, ""]
ALL = [number for notebook in ANSWERS for number in frame.exercises_of(notebook)]


def given_for(number, engine):
    """What the exercise's judge asks for, of what the notebook holds."""
    names = ANSWERS[number[:2]].names(engine)
    return {name: names[name] for name in list(inspect.signature(frame.find(number).judge).parameters)[1:]}


@pytest.mark.parametrize("number", ALL)
def test_right_answers_are_right(engine, number):
    outcomes = [checked(number, answer, **given_for(number, engine)) for answer in ANSWERS[number[:2]].RIGHT[number]]
    assert [(str(outcome), outcome.state) for outcome in outcomes] == [(str(o), "right") for o in outcomes]


@pytest.mark.parametrize("number", ["01.2", "05.5", "06.4", "07.4", "07.5"])
def test_what_a_notebook_sets_for_its_own_tensors_makes_no_right_answer_wrong(engine, number):
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")  # as "cuda", where there is one
    try:
        outcomes = [checked(number, answer) for answer in ANSWERS[number[:2]].RIGHT[number]]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(outcomes), outcomes


@pytest.mark.parametrize("number", ALL)
def test_wrong_answers_are_wrong_and_told_beside_what_was_expected(engine, number):
    for answer in [*ANSWERS[number[:2]].WRONG[number], *STRANGE]:
        outcome = checked(number, answer, **given_for(number, engine))
        assert (outcome.state, str(outcome)) == ("wrong", str(outcome)), answer
        assert frame.find(number).expects in str(outcome) and "yours: " in str(outcome)


@pytest.mark.parametrize("number", ALL)
def test_what_nobody_has_answered_is_open_and_leaves_no_file(engine, number, work):
    assert check(number).state == check(number, None).state == check(number, ...).state == "open"
    if callable(ANSWERS[number[:2]].RIGHT[number][0]):
        stub = lambda *arguments: ...  # noqa: E731  (what the notebook comes with)
        assert checked(number, stub, **given_for(number, engine)).state == "open"
        forgotten = checked(number, lambda *arguments: None, **given_for(number, engine))
        assert forgotten.state == "wrong" and "`return` missing" in str(forgotten)
    else:
        assert not work.exists()


@pytest.mark.parametrize("notebook", ANSWERS)
def test_the_solutions_are_right_and_no_hint_is_one(engine, notebook):
    names = ANSWERS[notebook].names(engine)
    for number, task in frame.exercises_of(notebook).items():
        code, reason = re.fullmatch(r"```python\n(.*)```\n(.*)", task.solution, re.DOTALL).groups()
        exec(compile(code, f"solution {number}", "exec"), names)
        assert checked(number, names["answer"], **given_for(number, engine)), number
        assert reason.split() == task.reason.split() != []
        assert code.partition("answer = ")[2].strip() not in task.hints


@pytest.mark.parametrize("notebook", list(frame.MODULES))
def test_every_notebook_has_five_exercises_that_rise(notebook):
    tasks = list(frame.exercises_of(notebook).values())
    assert len(tasks) >= 5
    assert [task.number for task in tasks] == [f"{notebook}.{at}" for at in range(1, len(tasks) + 1)]
    points = [task.points for task in tasks]
    assert points[0] == 1 == min(points) < max(points[len(points) // 2 :])
    assert all(len(task.hints) >= 2 and task.title and task.expects for task in tasks)
    assert {number for number in frame._judges if number[:2] == notebook} == {task.number for task in tasks}
    assert set(ANSWERS[notebook].RIGHT) == set(ANSWERS[notebook].WRONG) == {task.number for task in tasks}


# ---- the frame -----------------------------------------------------------------------------------------------


def test_hints_deepen_with_each_new_try_and_not_with_the_same_one():
    def level(answer):
        return re.search(r"hint (\d) of 2", str(check("00.3", answer)))[1]

    assert [level(answer) for answer in ("max_tokens", "max_tokens", "max_seq_len", "max_tokens", "x")] == list("11222")
    assert 'solution("00.3")' in str(check("00.3", "y"))


@pytest.mark.parametrize(
    ("number", "answer", "change"),
    [
        ("00.4", SamplingParams(temperature=0), {"stop": ("river",)}),
        ("00.5", BuildRecipe(max_input_len=64), {"num_threads": 2}),
        ("04.6", BuildRecipe(max_batch_size=4), {"decode_batch_sizes": (3,)}),
    ],
)
def test_settings_that_differ_anywhere_are_another_try_and_are_told(engine, number, answer, change):
    given, told = given_for(number, engine), "".join(f"{name}={value!r}" for name, value in change.items())
    first, second = (str(checked(number, each, **given)) for each in (answer, dataclasses.replace(answer, **change)))
    assert "hint 1 of" in first and "hint 2 of" in second
    assert told in second and told not in first


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

    def endless(*arguments):
        return endless(*arguments)

    assert "Your code raises RecursionError" in (text := str(check("03.4", endless)))
    assert 1 < text.count("in endless: return endless") < 10


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (1 / 6.06, "other way round"),
        (0.00606, "0.001 times"),
        (6060, "1000 times"),
        (48.5, "8 times"),
        (7, "too large"),
    ],
)
def test_a_usual_mistake_with_figures_is_named(answer, words):
    freeze("03", ttft_s=2.74e-3, tpot_s=0.369e-3)
    assert words in str(check("03.2", answer))


@pytest.mark.parametrize("answer", ["Never", "It never pays.", math.inf, torch.tensor([math.inf]), Decimal("Infinity")])
def test_never_is_right_where_a_token_saves_nothing_and_else_the_saving_is_shown(answer):
    record = copy.deepcopy(RECORD)
    assert "each saves something" in str(checked("04.4", answer, record=record))
    record.row("pytorch fp32").tpot_s = [5.001e-3]
    for engine_s in (5.5e-3, 4.999e-3, 4.994e-3):  # slower; printed as the same; apart by the last digit
        record.row("aot fp32").tpot_s = [engine_s]
        assert checked("04.4", answer, record=record)
    assert "What can win the build back?" in str(checked("04.4", -300, record=record))


def right(number, *arguments):
    return ANSWERS[number[:2]].RIGHT[number][0](*arguments)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        ("01.2", lambda q, k, v: (q, k, v), "one tensor"),
        ("01.5", lambda sizes: 0.3, "Right is 0.900"),
        ("00.1", [1, 434, 14], "a row of 3"),
        ("02.4", lambda *shape: 8 * right("02.4", *shape), "bits"),
        ("02.4", lambda *shape: right("02.4", *shape) / 2, "half"),
        ("02.5", lambda rows, columns: rows * columns + 4, "not only the matrix"),
        ("06.4", lambda reference, logits: right("06.4", logits, reference), "other side"),
        ("06.4", lambda reference, logits: len(logits) * right("06.4", reference, logits), "sum over the tokens"),
        ("06.4", lambda reference, logits: right("06.4", reference, logits) / logits.shape[1], "over the vocabulary"),
        ("06.4", lambda reference, logits: right("06.4", reference, logits) / math.log(2), "bits"),
        ("08.1", -11, "no sign"),
        ("08.3", 66, "10^6"),
        ("08.4", 10.5, "no half parts"),
    ],
)
def test_a_usual_mistake_is_told_as_what_it_is(engine, number, answer, words):
    assert words in str(checked(number, answer, **given_for(number, engine)))


def test_what_the_learners_function_does_to_its_arguments_changes_nothing(engine):
    def cut(ids, end_ids):
        end_ids.append(7)
        ids.clear()
        return [5]

    assert "[5, 7, 2, 9, 2], [2] it gives [5]. Right is [5, 7]" in str(check("05.3", cut))

    def sort(report, graph):
        report.kernels.sort(key=lambda kernel: kernel.name, reverse=True)
        report.kernels.pop()

    given = given_for("01.3", engine)
    before = copy.deepcopy(given["report"])
    checked("01.3", sort, **given)
    assert given["report"] == frame._given["01"]["report"] == before


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


@pytest.mark.parametrize(
    "content",
    ['{"exercises": [', '{"exercises": {"00.3": []}, "predictions": {}}', '{"exercises": {}, "predictions": []}'],
)
def test_a_damaged_file_is_put_aside(work, capsys, content):
    work.mkdir()
    (work / learner.FILE).write_text(content)
    assert check("00.3", "max_batch_size")
    (aside,) = work.glob("progress.damaged-*.json")
    assert aside.read_text() == content and aside.name in "".join(capsys.readouterr())
    assert learner.read()["exercises"]["00.3"]["state"] == "right"


def test_an_entry_that_lacks_something_is_completed(work):
    work.mkdir()
    (work / learner.FILE).write_text('{"exercises": {"00.3": {"state": "right"}}, "predictions": {}}')
    hint("00.3")
    assert learner.read()["exercises"]["00.3"]["hints"] == 1 and learner.read()["exercises"]["00.3"]["state"] == "right"


def test_another_answer_of_a_function_that_the_answer_calls_is_another_try():
    def fits(*arguments):
        return helper(*arguments)

    for tries, factor in enumerate((5, 6), 1):
        helper = lambda cache, columns: factor * cache  # noqa: B023, E731
        assert f"hint {tries} of" in str(check("07.3", fits))
    assert len(learner.read()["exercises"]["07.3"]["wrong"]) == 2


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


@pytest.mark.parametrize("place", ["", "~nobody-of-that-name/work"])
def test_where_nothing_can_be_written_the_answer_is_still_checked_and_helped(work, place, monkeypatch, capsys):
    work.write_text("a file, where a folder should be")
    monkeypatch.setenv("COURSE_WORK", place or str(work))
    outcome = check("00.3", "max_batch_size")
    assert outcome and " cannot be" in str(outcome) and "COURSE_WORK" in str(outcome)
    assert " cannot be" in str(check("00.3", "max_tokens"))
    hint("00.3")
    assert "00.3" in solution("00.3")
    words = capsys.readouterr().out
    assert "Hint 1 of 2" in words and words.count("Fix: Set COURSE_WORK") == 2


def test_a_temporary_folder_that_was_cleared_away_makes_no_answer_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert check("05.6", ANSWERS["05"].RIGHT["05.6"][0])
