"""Tables: a cell reaches a terminal, a page or a report as text and no more. Bars: the words beside them are whole."""

import pytest

from helpers.display import Table, sample_bars

NASTY = Table("cap\x1b[2J\ntion", ("a", "b|c"), [(" x<b>\n\x07", "1"), ("y", "-22.5")])


def test_plain_text_is_one_line_a_row_with_numbers_to_the_right():
    assert str(NASTY).split("\n") == ["cap\ufffd[2J tion", "a          b|c", " x<b> \ufffd      1", "y        -22.5"]
    assert str(Table("", ("a",), [("b",)])) == "a\nb"


def test_markdown_is_a_table_whatever_is_in_it():
    assert NASTY.markdown().split("\n")[2:] == [
        "| a | b\\|c |",
        "|---|---:|",
        "|  x&lt;b> \ufffd | 1 |",
        "| y | -22.5 |",
    ]


def test_html_has_a_caption_and_real_header_cells():
    page = NASTY._repr_html_()
    assert page.count('scope="col"') == page.count('scope="row"') == 2 and "<caption" in page
    assert "<b>" not in page and "x&lt;b&gt;" in page


@pytest.mark.parametrize("show", [str, Table.markdown, Table._repr_html_])
def test_no_control_character_gets_through(show):
    text = show(NASTY)
    assert not [c for c in text if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize("limits", [None, {"torch_compile bf16": 690.0}])
def test_the_words_beside_a_bar_are_whole(limits):
    """As in a record of a GPU: a long name, and one run that is far above the others."""
    figure = sample_bars({"torch_compile bf16": [1645.21, 2699.12, 3100.45]}, "TPOT", limits)
    figure.canvas.draw()
    (words,) = figure.axes[0].texts
    assert words.get_window_extent().x1 < figure.bbox.x1
