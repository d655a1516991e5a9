"""The widgets without a browser: their plain functions, and their callbacks called directly."""

import asyncio
import base64
import gc
import weakref

import pytest
import torch

pytest.importorskip("ipywidgets", reason="the notebook tools are not in this environment")

from conftest import Scripted
from test_chat import TEMPLATES, model

from helpers import BuildRecipe, SamplingParams, load
from helpers.course import batching, widgets
from helpers.course.widgets import choices, panel
from helpers.course.widgets import sampling as explorers
from helpers.errors import BuildError, InputError, LimitError, ModelError, NumericsError
from helpers.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def engine():
    with load(BuildRecipe(backend="pytorch", max_batch_size=4, max_input_len=64, max_seq_len=256)) as engine:
        yield engine


@pytest.fixture
def explorer(engine):
    explorer = widgets.sampling_explorer(engine, max_tokens=8)
    explorer.pause.value = 0
    return explorer


@pytest.mark.parametrize("cell", ["the cell", ""], ids=["a cell with a name", "another front end"])
def test_a_cell_that_runs_again_gives_back_the_engine_that_it_showed(monkeypatch, cell):
    """ipywidgets keeps every widget: each run kept one more engine in memory. Where cells have no names, none may be
    taken for another."""
    run = [cell, ""]
    monkeypatch.setattr(panel, "_cell_and_run", lambda: tuple(run))
    kept, before = [], None
    for run[1] in ("first run", "second run"):
        engines = [Scripted([5, 6]), Scripted([5, 6])]
        explorers = [widgets.sampling_explorer(one, max_tokens=4) for one in engines]
        for explorer in explorers:
            explorer._repr_mimebundle_()
        kept.append([weakref.ref(one) for one in engines])
        before, engines = before or explorers, []  # as Out keeps them
    gc.collect()
    assert [[one() is None for one in run] for run in kept] == [[bool(cell)] * 2, [False, False]]
    assert all((part.comm is None) == bool(cell) for one in before for part in (one.view, *one.controls))


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


def first(engine, **settings):
    """What the first token is chosen from."""
    return next(widgets.stream_choices(engine, widgets.START, SamplingParams(seed=7, **settings))).candidates


def test_candidates_follow_the_settings(engine):
    assert first(engine, temperature=0)[0][1] == 1
    likeliest = [first(engine, temperature=temperature)[0][1] for temperature in (0.3, 1.0, 2.0)]
    assert likeliest[0] > likeliest[1] > likeliest[2]
    assert [p > 0 for _, p in first(engine, top_k=2)] == [True] * 2 + [False] * 6


def test_bars_escape_text_and_mark_the_chosen_token():
    page = widgets.bars([("<b>", 0.5), ("", 0.25)], chosen="<b>")
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert page.count("&#9654;") == 1 and "50.0%" in page and "(end)" in page


def test_run_writes_the_engines_text_and_gives_the_controls_back(engine, explorer):
    explorer.sides[0].temperature.value = 0.5
    explorer.button.click()
    expected = engine.generate(widgets.START, explorer.sampling())[0].text
    assert expected.strip() and expected in explorer.sides[0].text.value
    assert "chosen from" in explorer.sides[0].chart.value
    assert not any(control.disabled for control in explorer.controls)


def test_controls_are_off_while_it_runs(explorer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        explorer.sides[0], "show_text", lambda *_: seen.append(all(c.disabled for c in explorer.controls))
    )
    explorer.button.click()
    assert seen and all(seen)


def test_stop_ends_the_text_and_other_clicks_are_ignored_meanwhile(explorer, monkeypatch):
    shown = []
    monkeypatch.setattr(explorer.sides[0], "show_text", lambda _, answer: shown.append(answer))

    async def click():
        explorer.button.click()
        while len(shown) < 3:
            await asyncio.sleep(0)
        for _ in range(3):
            explorer.button.click()
        chart = explorer.sides[0].chart
        before = chart.value
        explorer.sides[0].temperature.value = 0.1  # a slider that was moved before it was off
        assert chart.value == before and not explorer.stop_button.disabled
        explorer.stop_button.click()
        assert explorer.stop_button.description == "Stopping" and explorer.stop_button.disabled  # seen at once
        await explorer.task

    asyncio.run(click())
    assert 3 <= len(shown) <= 5 and explorer.stop_button.disabled and not explorer.button.disabled
    assert explorer.stop_button.description == "Stop"


def test_moving_a_slider_moves_the_distribution(explorer):
    chart = explorer.sides[0].chart
    before = chart.value
    explorer.sides[0].temperature.value = 0
    assert chart.value != before and "100.0%" in chart.value


def test_errors_are_shown_and_go_away(explorer):
    explorer.prompt.value = "word " * 80
    assert "LimitError" in explorer.errors.outputs[0]["text"]
    assert explorer.sides[0].chart.value == "" and not explorer.button.disabled
    explorer.prompt.value = "Long ago"
    assert explorer.errors.outputs == ()


def test_a_fault_of_ours_is_shown_too(explorer, monkeypatch):
    monkeypatch.setattr(explorers, "stream_choices", lambda *_: 1 / 0)
    explorer.button.click()
    assert "ZeroDivisionError" in explorer.errors.outputs[0]["text"]


def test_a_prompt_is_text_and_nothing_else(explorer):
    explorer.prompt.value = "<img src=x onerror=alert(1)>"
    text = explorer.sides[0].text.value
    assert "<img" not in text and "&lt;img" in text


def test_there_is_a_picture_for_readers_without_a_kernel(explorer):
    data, about = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert widgets.START in data["text/plain"] and about["image/png"]["alt"] == data["text/plain"]
    assert about["image/png"]["unconfined"]  # JupyterLab then scrolls it on a phone, where its words would be too small
    assert "application/vnd.jupyter.widget-view+json" in data


def test_what_ends_a_text_is_one_row_and_other_tokens_without_text_are_told_by_their_id(engine):
    """At temperature 0 all but one have no chance: the ids 0 to 2 came next, three rows called "(end)"."""
    for choice in widgets.stream_choices(engine, widgets.START, SamplingParams(temperature=0)):
        names = [choices.visible(text) for text, _ in choice.candidates]
        assert len(set(names)) == len(names) and 8 <= len(names) <= 9 and names.count("(end)") <= 1
    uniform = torch.full((engine.vocab_size,), 1 / engine.vocab_size)
    rows = dict(widgets.candidates(engine, uniform, engine.vocab_size))
    assert rows[""] == pytest.approx(len(engine.end_ids) / engine.vocab_size)
    assert sum(rows.values()) == pytest.approx(1, abs=1e-4) and any(name.startswith("(token ") for name in rows)


def test_tokens_without_a_chance_stand_in_the_order_of_their_scores(engine):
    names = [[text for text, _ in first(engine, temperature=temperature)] for temperature in (0, 0.5)]
    assert names[0] == names[1]  # so the bars stay where they are while the slider moves


def test_a_token_of_the_text_can_be_opened(explorer):
    explorer.button.click()
    side = explorer.sides[0]
    assert len(side.tokens.options) == len(side.choices) == 8 and side.tokens.layout.display == ""
    for at in (0, 5):
        side.tokens.index = at
        assert (
            f"Token {at + 1} was" in side.chart.value
            and widgets.bars(side.choices[at].candidates, side.choices[at].chosen) in side.chart.value
        )
    side.temperature.value = 0.3
    assert side.choices == [] and side.tokens.layout.display == "none"  # they belong to other settings


def test_two_settings_stand_side_by_side(engine, explorer):
    one, other = explorer.sides
    assert other.view.layout.display == "none"
    explorer.button.click()
    assert len(one.choices) == 8 and other.choices == []
    explorer.two.value = True
    assert other.view.layout.display == "" and "100.0%" in other.chart.value and "100.0%" not in one.chart.value
    explorer.button.click()
    for at, side in enumerate(explorer.sides):
        assert side.choices[-1].text == engine.generate(widgets.START, explorer.sampling(at))[0].text
    given = widgets.sampling_explorer(engine, beside=SamplingParams(temperature=0.5, seed=7, max_tokens=40))
    assert given.two.value and given.sampling(1).temperature == 0.5
    without_seed = widgets.sampling_explorer(engine, seed=3, beside=SamplingParams(temperature=0.5))
    assert without_seed.sampling(1).seed == 3  # each text is drawn with the seed that the widget shows
    with pytest.raises(InputError, match="cannot show"):
        widgets.sampling_explorer(engine, beside=SamplingParams(temperature=0.5, seed=8))


def test_stop_ends_both_sides(explorer):
    explorer.two.value = True

    async def click():
        explorer.button.click()
        while len(explorer.sides[0].choices) < 2:
            await asyncio.sleep(0)
        explorer.stop_button.click()
        await explorer.task

    asyncio.run(click())
    assert 2 <= len(explorer.sides[0].choices) <= 4 and explorer.sides[1].choices == []
    assert len(explorer.sides[0].tokens.options) == len(explorer.sides[0].choices)


def test_a_fast_drag_is_drawn_once_where_it_stops(explorer, monkeypatch):
    drawn = []
    monkeypatch.setattr(explorer, "_shown_sides", lambda: drawn.append(explorer.sampling().temperature) or [])

    async def drag():
        for tenth in range(20):
            explorer.sides[0].temperature.value = tenth / 10
        await asyncio.sleep(panel.REDRAW * 5)

    asyncio.run(drag())
    assert drawn == [1.9]


def test_two_drawings_in_one_moment_are_both_drawn():
    simulator = widgets.batching_simulator()

    async def move():
        simulator.time.value = 20
        simulator.batching.value = False  # another drawing, before the first is there
        await asyncio.sleep(panel.REDRAW * 5)

    asyncio.run(move())
    assert "static, paged, up to" in simulator.output.value


# ---- memory, batching, build ------------------------------------------------------------------------------


def test_the_memory_calculator_shows_its_table_and_follows_its_controls():
    calculator = widgets.memory_calculator()
    before = calculator.output.value
    for name, value in {"precision": "int4", "max_batch_size": 64, "max_seq_len": 4096}.items():
        calculator.fields[name].value = value
    assert calculator.output.value != before and "int4, batch 64, sequences of 4096 tokens" in calculator.output.value
    assert calculator.recipe() == BuildRecipe(
        model="dummy:llama-3.2-1b", precision="int4", max_batch_size=64, max_input_len=1, max_seq_len=4096
    )
    data, _ = calculator._repr_mimebundle_()
    assert "H100" in data["text/html"] and "H100" in data["text/plain"]


@pytest.mark.parametrize("explore", [widgets.build_explorer, widgets.memory_calculator])
@pytest.mark.parametrize(
    "fields",
    [{"max_batch_size": 1024, "max_input_len": 4096, "max_seq_len": 8192}, {"max_input_len": 1, "max_seq_len": 64}],
    ids=["large", "small"],
)
def test_no_control_changes_the_recipe_that_was_given(explore, fields):
    shown = vars(explore(**fields).recipe())
    names = fields if explore is widgets.build_explorer else {**fields, "max_input_len": 1}
    assert {name: shown[name] for name in names} == names
    assert widgets.memory_calculator(max_seq_len=64).recipe().max_seq_len == 64  # shorter than a recipe's usual prompt
    with pytest.raises(ModelError, match="nowhere"):
        explore(model="./nowhere")


def test_an_explorer_of_a_backend_that_builds_nothing_is_refused_as_that():
    with pytest.raises(BuildError, match="compiles nothing ahead of time"):
        widgets.build_explorer(backend="pytorch")


def test_what_the_calculator_cannot_count_is_told_and_goes_away(tmp_path):
    calculator = widgets.memory_calculator()
    calculator.fields["model"].options = [*calculator.fields["model"].options, str(tmp_path)]
    calculator.fields["model"].value = str(tmp_path)
    assert "ModelError" in calculator.errors.outputs[0]["text"] and "Fix:" in calculator.errors.outputs[0]["text"]
    assert calculator.output.value == ""
    calculator.fields["model"].value = "stories"
    assert calculator.errors.outputs == () and "stories" in calculator.output.value


def test_the_simulator_takes_this_machines_step_times_and_shows_any_moment():
    times = batching.StepTimes({1: 0.001, 2: 0.0015}, 1e-5, "my machine")
    simulator = widgets.batching_simulator(times)
    assert simulator.source.value == "yours: my machine" and simulator.batch.max == 2
    assert "in-flight, paged" in simulator.output.value and "static, contiguous" in simulator.table.value
    before = simulator.output.value
    simulator.time.value = 20
    assert simulator.output.value != before
    simulator.batching.value = False
    assert "static, paged, up to" in simulator.output.value
    data, _ = simulator._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and "tokens per second" in data["text/plain"]

    async def in_a_notebook():  # where drawing waits for its turn
        return widgets.batching_simulator(times)._repr_mimebundle_()

    assert "tokens per second" in asyncio.run(in_a_notebook())[0]["text/plain"]


def test_a_simulation_plays_until_stop(monkeypatch):
    simulator = widgets.batching_simulator()
    seen = []
    monkeypatch.setattr(simulator, "show", lambda: seen.append(simulator.time.value))

    async def click():
        simulator.play.click()
        while len(seen) < 3:
            await asyncio.sleep(0.01)
        simulator.play.click()
        simulator.stop_button.click()
        await simulator.task

    asyncio.run(click())
    assert seen == sorted(seen) and 3 <= len(seen) <= 5 and not simulator.play.disabled


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


# ---- chat -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(model(tmp_path_factory.mktemp("chat"), TEMPLATES["gemma"]))


@pytest.fixture
def talker(tokenizer):
    """An engine that answers every question with the same words."""
    return Scripted([*tokenizer.encode("By the <b>river</b>.", False), 2], tokenizer=tokenizer)


@pytest.fixture
def talk(talker):
    return widgets.chat(talker, sampling=SamplingParams(temperature=0, max_tokens=60))


def pressed_enter(talk, text):
    talk.question.value = text
    talk.question._handle_custom_msg({"event": "submit"}, [])


ANSWER = {"role": "assistant", "content": "By the <b>river</b>."}


def test_enter_and_send_answer_with_all_that_was_said(talk, talker, monkeypatch):
    asked = []
    tokenize = talker.tokenize_chat
    monkeypatch.setattr(talker, "tokenize_chat", lambda messages: asked.append(messages) or tokenize(messages))
    pressed_enter(talk, "Where?")
    assert talk.messages == [{"role": "user", "content": "Where?"}, ANSWER] and talk.question.value == ""
    talk.question.value = "Who?"
    talk.button.click()
    assert asked == [talk.messages[:1], talk.messages[:3]] and talk.messages[3] == ANSWER
    assert "&lt;b&gt;river" in talk.text.value and "<b>river" not in talk.text.value
    pressed_enter(talk, "  ")  # nothing to send
    assert len(talk.messages) == 4 and talk.question.value == "  "
    talk.anew.click()
    assert talk.messages == [] and "has not begun" in talk.text.value


def test_an_answer_can_be_stopped_and_what_is_clicked_meanwhile_does_not_queue(talk):
    async def click():
        pressed_enter(talk, "Where?")
        while "By" not in talk.text.value:
            await asyncio.sleep(0)
        pressed_enter(talk, "Who?")
        talk.button.click()
        talk.anew.click()
        assert talk.button.disabled and talk.anew.disabled and not talk.question.disabled
        talk.stop_button.click()
        await talk.task

    asyncio.run(click())
    question, answer = talk.messages
    assert ANSWER["content"].startswith(answer["content"]) and "By" in answer["content"] != ANSWER["content"]
    assert talk.question.value == "Who?" and not talk.button.disabled and talk.stop_button.disabled


def test_the_last_letters_may_come_after_enter(talk):
    async def click():
        pressed_enter(talk, "Wh")
        await asyncio.sleep(0)
        talk.question.value = "Where?"
        await talk.task

    asyncio.run(click())
    assert talk.messages[0]["content"] == "Where?"


def test_settings_are_those_of_the_controls_and_the_rest_as_given(talker):
    talk = widgets.chat(talker, sampling=SamplingParams(temperature=0.5, top_p=0.8, stop="x", seed=3, max_tokens=9))
    assert talk.sampling() == SamplingParams(temperature=0.5, top_p=0.8, stop="x", seed=3, max_tokens=9)
    talk.temperature.value, talk.max_tokens.value = 0, 3
    pressed_enter(talk, "Where?")
    assert len(talker.tokenizer.encode(talk.messages[1]["content"], False)) <= 3
    with pytest.raises(InputError, match="cannot show"):
        widgets.chat(talker, sampling=SamplingParams(temperature=2.5))
    with pytest.raises(InputError, match="SamplingParams"):
        widgets.chat(talker, sampling=0.7)


def test_errors_are_shown_with_cause_and_fix_and_the_message_is_not_lost(talk):
    pressed_enter(talk, "word " * 80)
    assert "LimitError" in talk.errors.outputs[0]["text"] and "Fix:" in talk.errors.outputs[0]["text"]
    assert talk.messages == [] and talk.question.value == "word " * 80 and "word" not in talk.text.value
    pressed_enter(talk, "Where?")
    assert talk.errors.outputs == () and len(talk.messages) == 2


def test_an_answer_that_another_request_overtakes_says_so(talk, talker):
    async def click():
        pressed_enter(talk, "Where?")
        while "By" not in talk.text.value:
            await asyncio.sleep(0)
        talker.generate([5])
        await talk.task

    asyncio.run(click())
    assert "answers another prompt" in talk.errors.outputs[0]["text"] and talk.question.value == "Where?"


def test_a_model_that_cannot_chat_is_refused_at_once(engine, talker):
    with pytest.raises(InputError, match="no chat template"):
        widgets.chat(engine)
    with pytest.raises(InputError, match="System role not supported"):
        widgets.chat(talker, system="Be brief.")


def test_every_control_has_a_label(talk, explorer):
    every = [talk, explorer, widgets.memory_calculator(), widgets.batching_simulator(), widgets.build_explorer()]
    for widget in every:
        for control in [*widget.controls, widget.stop_button]:
            assert control.description, widget
    assert talk.question.description


def test_what_was_said_is_there_for_readers_without_a_kernel(talker):
    talk = widgets.chat(talker, "Where?", sampling=SamplingParams(temperature=0, max_tokens=60))
    data, _ = talk._repr_mimebundle_()
    assert "By the &lt;b&gt;river&lt;/b&gt;." in data["text/html"] and "Where?" in data["text/html"]
    assert data["text/plain"] == "user: Where?\nassistant: By the <b>river</b>."
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "not begun" in widgets.chat(talker)._repr_mimebundle_()[0]["text/plain"]
