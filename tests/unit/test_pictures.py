"""Pictures and texts of whatever a model may write: formulas for matplotlib, escape sequences for a terminal."""

import pytest
import torch

from helpers import SamplingParams
from helpers.backends.base import Engine
from helpers.course import pictures
from helpers.errors import printable

HOSTILE = ["$\\frac$", "$", "\\$", "$$", "a\x1b]0;title\x07", "\x9b31m", " ", "\n", "", " a", "a"]
ESCAPES = ["\x1b", "\x07", "\x9b"]


class Writer(Engine):
    """An engine whose tokens are these texts, all equally likely."""

    _prefill = _decode = None

    def __init__(self):
        """There is nothing to load."""

    def logits(self, prompt):
        return torch.zeros(len(HOSTILE))

    def tokenize(self, prompt):
        return [0]

    def detokenize(self, ids, after=()):
        return "".join(HOSTILE[i] for i in ids)

    def generate(self, prompt, sampling):
        class Answer:
            text = "".join(HOSTILE)

        return [Answer]


@pytest.mark.parametrize("panels", [1, 2])
def test_any_token_has_a_bar_of_its_own(panels):
    settings = {f"$\\bad{i}$": SamplingParams() for i in range(panels)}
    picture = pictures.distributions(Writer(), "x", settings, count=len(HOSTILE))
    assert picture.png().startswith(b"\x89PNG")
    for axes in picture.figure.axes:
        assert len({bar.get_y() for bar in axes.patches}) == len(HOSTILE)
        assert axes.yaxis_inverted()  # the likeliest token is on top
    assert not any(escape in repr(picture) for escape in ESCAPES)


def test_an_empty_token_is_the_end_and_a_space_is_not():
    assert pictures._label("") == "(end)" and pictures._label("\n") == repr("\n")


def test_a_picture_of_a_text_shows_any_text():
    picture = pictures.sampled_text(Writer(), "$\\frac$ \x1b[2J", SamplingParams())
    assert picture.png().startswith(b"\x89PNG")
    assert not any(escape in picture.alt for escape in ESCAPES)


def test_names_that_a_learner_gives_are_no_formulas():
    for picture in (pictures.timings({"$\\frac$": [1.0]}), pictures.phases({"$\\frac$": 1.0}, "$\\frac$")):
        assert picture.png().startswith(b"\x89PNG")
        assert "$\\frac$" in picture.alt


def test_a_text_is_shown_without_what_steers_a_terminal(capsys):
    pictures.show_text("".join(HOSTILE) + " the end")
    out = capsys.readouterr().out
    assert out.endswith("the end\n") and not any(escape in out for escape in ESCAPES)


def test_printable_keeps_what_people_write():
    text = "naïve 文字 \U0001f469\u200d\U0001f4bb می\u200cخواهم\n"
    assert printable(text) == text


def test_a_package_that_is_not_there_has_no_version(capsys):
    pictures.versions("torch", "tensorflow-2x")
    assert f"torch {torch.__version__}, tensorflow-2x is not installed\n" in capsys.readouterr().out
