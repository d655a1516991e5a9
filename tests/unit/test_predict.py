"""Guesses before a cell, results after it: shown beside each other, counted, and never a reason to fail."""

import asyncio
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers.course import learner
from helpers.course import predict as prediction
from helpers.course.predict import predict, reveal, summary
from helpers.errors import InputError


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A learner and a kernel that have done nothing yet."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(prediction, "_here", {})
    return tmp_path / "work"


def test_a_guess_stands_beside_the_result():
    assert "your guess is 3 times" in repr(predict("speed", times=3))
    shown = repr(reveal("speed", times=6.0))
    assert "you guessed 3 times" in shown and "is 6 times" in shown and "2 times too little" in shown


@pytest.mark.parametrize("guess", [6, "6", 6.0, Fraction(6), np.float32(6), torch.tensor(6), [6]])
@pytest.mark.parametrize("result", [6.1, np.float64(6.1), torch.tensor(6.1)])
def test_numbers_of_any_library(guess, result):
    predict("speed", times=guess)
    assert reveal("speed", times=result).distance[0] and "as it is" in repr(reveal("speed", times=result))


@pytest.mark.parametrize(
    ("guess", "result", "near"),
    [(3, 4.4, True), (3, 4.6, False), (6, 4.1, True), (7, 4.1, False), (0, 0, True), (0, 1, False), (-2, 2, False)],
)
def test_near_is_within_a_factor_of_one_and_a_half(guess, result, near):
    predict("bars", bars=guess)
    assert reveal("bars", bars=result).distance[0] is near


def test_choices():
    predict("who", choice="AOT", of=["pytorch", "aot"])
    assert reveal("who", choice="aot").distance[0] and "right" in repr(reveal("who", choice="aot"))
    predict("who is last", choice="aot", of=["pytorch", "aot"])
    assert not reveal("who is last", choice="pytorch").distance[0]


@pytest.mark.parametrize("guess", ["many", True, float("nan"), [1, 2], b"3", 3j])
def test_what_is_no_number_is_refused_in_words(guess):
    with pytest.raises(InputError, match="is not (a|one) number"):
        predict("speed", times=guess)


def test_what_is_no_option_is_refused_with_the_options():
    with pytest.raises(InputError, match="pytorch, aot"):
        predict("who", choice="vllm", of=["pytorch", "aot"])


@pytest.mark.parametrize(
    "call", [lambda: predict("x"), lambda: predict("x", a=1, b=2), lambda: predict("x", choice=None)]
)
def test_a_call_without_its_one_value_is_refused(call):
    with pytest.raises(InputError):
        call()


def test_a_run_without_a_person_shows_results_and_leaves_no_file(work):
    assert "no guess yet" in repr(predict("speed", times=None)) and "no guess yet" in repr(
        predict("w", choice=None, of="ab")
    )
    assert repr(reveal("speed", times=6.4)) == "speed: 6.4 times. Nobody guessed."
    assert "Nobody guessed" in repr(reveal("w", choice="a")) and "Nobody guessed" in repr(
        reveal("not asked", ms=1234.5)
    )
    table = summary("00")
    assert "Nothing was predicted" in table.caption and [row[1] for row in table.rows] == ["-"] * 3
    assert not work.exists()


@pytest.mark.parametrize("result", [None, float("nan"), "not here", [1, 2], object()])
def test_what_could_not_be_measured_fails_nothing(result):
    predict("speed", times=3)
    assert "your guess is 3 times" in repr(reveal("speed", times=result))
    assert summary("00").rows == []


def test_a_result_that_is_none_of_the_options_is_shown_as_it_is():
    predict("step", choice="compile", of=["compile", "verify"])
    assert not reveal("step", choice="time 1 and 2 threads").distance[0]


def test_a_guess_after_the_result_does_not_count():
    predict("speed", times=3)
    reveal("speed", times=6.4)
    predict("speed", times=3)  # the cell runs again as it was
    assert not reveal("speed", times=6.4).late
    assert "does not count" in repr(predict("speed", times=6))
    predict("seen before guessed", times=None)
    reveal("seen before guessed", times=2)
    assert predict("seen before guessed", times=2).late
    assert "Near" not in summary("00").caption and "too late" in str(summary("00"))


def test_the_summary_shows_how_the_sense_grows(work):
    for notebook, guesses in (("00", (1, 1, 6)), ("03", (6, 5, 1))):
        prediction._here.clear()  # a kernel of its own
        for at, guess in enumerate(guesses):
            predict(f"{notebook} {at}", times=guess)
            reveal(f"{notebook} {at}", times=6)
        caption = summary(notebook).caption
    assert "notebook 00: 1 of 3; notebook 03: 2 of 3" in caption
    assert json.loads((work / learner.FILE).read_text())["predictions"]["03"] == {
        "03 0": True,
        "03 1": True,
        "03 2": False,
    }
    prediction._here.clear()  # another day, another kernel, with one guess
    predict("03 1", times=1)
    reveal("03 1", times=6)
    assert "notebook 03: 1 of 3" in summary("03").caption
    prediction._here.clear()
    for at, guess in enumerate((6, 5, 1)):
        predict(f"03 {at}", times=guess)
        reveal(f"03 {at}", times=6)
    assert summary("03").rows[2] == ("03 2", "1 times", "6 times", "6 times too little")


@pytest.mark.parametrize("guess", [None, 3])
def test_where_nothing_can_be_written_the_table_is_still_shown(work, guess, capsys):
    work.write_text("a file, where a folder should be")
    predict("speed", times=guess)
    reveal("speed", times=3)
    assert ("notebook 00: 1 of 1" in summary("00").caption) is bool(guess)
    assert "COURSE_WORK" in capsys.readouterr().out


def test_a_unit_that_changed_is_told():
    predict("speed", times=3)
    with pytest.raises(InputError, match="predicted in times"):
        reveal("speed", ms=3)


def test_a_guess_by_the_control_counts_and_the_cell_run_again_keeps_it():
    pytest.importorskip("ipywidgets", reason="the notebook tools are not in this environment")
    control = prediction.GuessControl(predict("speed", times=None))
    control.field.value = "many"
    assert "is not a number" in control.errors.outputs[0]["text"] and control.output.value == ""
    control.field.value = "3"
    assert control.errors.outputs == () and "your guess is 3 times" in control.output.value
    assert "your guess is 3 times" in repr(predict("speed", times=None))
    buttons = prediction.GuessControl(predict("who", choice=None, of=["pytorch", "aot"]))
    buttons.field.value = "aot"
    assert reveal("who", choice="aot").distance[0] and "you guessed 3 times" in repr(reveal("speed", times=6))
    control.field.value = "6"
    assert "does not count" in control.output.value


def test_a_guess_by_the_control_comes_before_a_cell_that_waits():
    pytest.importorskip("ipywidgets", reason="the notebook tools are not in this environment")
    control = prediction.GuessControl(predict("speed", times=None))

    async def guess_and_run():  # a kernel that was busy takes both messages, one after the other
        control.field.value = "3"
        return repr(reveal("speed", times=6))

    assert "you guessed 3 times, the result is 6 times" in asyncio.run(guess_and_run())


def test_readers_without_a_kernel_see_what_was_asked():
    pytest.importorskip("ipywidgets", reason="the notebook tools are not in this environment")
    data, _ = predict("who", choice=None, of=["pytorch", "aot"])._repr_mimebundle_()
    assert "one of: pytorch, aot" in data["text/html"] and "application/vnd.jupyter.widget-view+json" in data
    assert set(predict("speed", times=3)._repr_mimebundle_()[0]) == {"text/plain"}
