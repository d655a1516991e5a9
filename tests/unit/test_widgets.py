"""The widgets without a browser: their plain functions, and their callbacks called directly."""

import base64

import pytest
import torch

pytest.importorskip("ipywidgets", reason="the notebook tools are not in this environment")

from helpers import BuildRecipe, SamplingParams, load
from helpers.course import widgets
from helpers.errors import InputError, LimitError, NumericsError


@pytest.fixture(scope="module")
def engine():
    with load(BuildRecipe(backend="pytorch", max_batch_size=4, max_input_len=64, max_seq_len=256)) as engine:
        yield engine


@pytest.fixture
def explorer(engine):
    explorer = widgets.sampling_explorer(engine, max_tokens=8)
    explorer.pause.value = 0
    return explorer


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 3},
        {"repetition_penalty": 1.2},
        {"ignore_eos": True},
        {"temperature": 5.0},
        {"top_p": 0.01},
        {"seed": 2**40},
    ],
    ids=str,
)
def test_the_explorer_refuses_settings_that_it_would_ignore(engine, settings):
    with pytest.raises(InputError, match="cannot show"):
        widgets.sampling_explorer(engine, **settings)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.5])
def test_stream_choices_gives_the_text_of_stream(engine, temperature):
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=24)
    streamed = "".join(token.text for token in engine.stream(widgets.START, params))
    steps = list(widgets.stream_choices(engine, widgets.START, params))
    assert steps[-1].text == streamed
    assert "".join(step.chosen for step in steps) == streamed
    for step in steps:
        assert dict(step.candidates)[step.chosen] > 0
        assert sum(probability for _, probability in step.candidates) <= 1.0001


def test_stream_choices_stops_at_the_end_token(engine):
    params = SamplingParams(temperature=0, max_tokens=230)
    assert 100 < len(list(widgets.stream_choices(engine, "Once upon a time", params))) < 230


def test_stream_choices_refuses_what_the_engine_cannot_serve_before_any_work(engine):
    with pytest.raises(LimitError):
        next(widgets.stream_choices(engine, "word " * 80, SamplingParams()))


def test_next_tokens_follow_the_settings(engine):
    def first(**settings):
        return widgets.next_tokens(engine, widgets.START, SamplingParams(**settings))

    assert first(temperature=0)[0][1] == 1
    assert first(temperature=0.3)[0][1] > first()[0][1] > first(temperature=2.0)[0][1]
    assert [p > 0 for _, p in first(top_k=2)] == [True] * 2 + [False] * 6


def test_bars_escape_text_and_mark_the_chosen_token():
    page = widgets.bars([("<b>", 0.5), ("", 0.25)], chosen="<b>")
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert page.count("&#9654;") == 1 and "50.0%" in page and "(end)" in page


def test_run_writes_the_engines_text_and_gives_the_controls_back(engine, explorer):
    explorer.temperature.value = 0.5
    explorer.button.click()
    expected = engine.generate(widgets.START, explorer.sampling())[0].text
    assert expected.strip() and expected in explorer.text.value
    assert "chosen from" in explorer.chart.value
    assert not any(control.disabled for control in explorer.controls)


def test_controls_are_off_while_it_runs(explorer, monkeypatch):
    seen = []
    monkeypatch.setattr(explorer, "_show_text", lambda _: seen.append(all(c.disabled for c in explorer.controls)))
    explorer.button.click()
    assert seen and all(seen)


def test_moving_a_slider_moves_the_distribution(explorer):
    before = explorer.chart.value
    explorer.temperature.value = 0
    assert explorer.chart.value != before and "100.0%" in explorer.chart.value


def test_errors_are_shown_and_go_away(explorer):
    explorer.prompt.value = "word " * 80
    assert "LimitError" in explorer.messages.outputs[0]["text"]
    assert explorer.chart.value == "" and not explorer.button.disabled
    explorer.prompt.value = "Long ago"
    assert explorer.messages.outputs == ()


def test_a_fault_of_ours_is_shown_too(explorer, monkeypatch):
    monkeypatch.setattr(widgets, "stream_choices", lambda *_: 1 / 0)
    explorer.button.click()
    assert "ZeroDivisionError" in explorer.messages.outputs[0]["text"]


def test_a_prompt_is_text_and_nothing_else(explorer):
    explorer.prompt.value = "<img src=x onerror=alert(1)>"
    assert "<img" not in explorer.text.value and "&lt;img" in explorer.text.value


def test_there_is_a_picture_for_readers_without_a_kernel(explorer):
    data, about = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert widgets.START in data["text/plain"] and about["image/png"]["alt"] == data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_a_stream_that_choices_have_overtaken_is_refused(engine):
    stream = engine.stream("Long ago", GREEDY)
    next(stream)
    assert len(list(widgets.stream_choices(engine, widgets.START, GREEDY))) == 12
    with pytest.raises(InputError):
        next(stream)


@pytest.mark.parametrize("other", [lambda e: e.generate("Long ago", GREEDY), lambda e: e.logits("Long ago")])
def test_choices_that_another_request_has_overtaken_are_refused(engine, other):
    choices = widgets.stream_choices(engine, widgets.START, GREEDY)
    next(choices)
    other(engine)
    with pytest.raises(InputError):
        next(choices)


def test_scores_that_are_no_numbers_are_refused(engine, monkeypatch):
    monkeypatch.setattr(engine, "_prefill", lambda prompts: torch.full((1, engine.vocab_size), torch.nan))
    with pytest.raises(NumericsError):
        next(widgets.stream_choices(engine, widgets.START, GREEDY))


def test_two_that_show_choices_do_not_mix(engine):
    first, second = (widgets.stream_choices(engine, prompt, GREEDY) for prompt in (widgets.START, "Long ago"))
    next(first)
    next(second)
    with pytest.raises(InputError):
        next(first)
    assert len(list(second)) == 11
