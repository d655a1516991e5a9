"""The widgets in a real browser: what a learner sees, moves and presses. In JupyterLab; in `make nightly` in
Notebook 7 too."""

import json
import time

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.promise("widgets do in a browser what a learner asks", 1, 1)]
pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from jupyter_pages import browser, jupyter, picture, run_all, visit, wait_for  # noqa: F401 (three are fixtures)
from promises import NIGHTLY

CELL = """
from helpers import BuildRecipe, load
from helpers.course.widgets import sampling_explorer

engine = load(BuildRecipe(backend="pytorch", max_input_len=64, max_seq_len=256))
sampling_explorer(engine, max_tokens=12)
"""
AGAIN = """
import gc
from helpers import BuildRecipe, load
from helpers.backends.base import Engine
from helpers.course.widgets import sampling_explorer

engine = load(BuildRecipe(backend="pytorch", max_input_len=64, max_seq_len=256))
gc.collect()
print("engines:", sum(isinstance(thing, Engine) for thing in gc.get_objects()))
sampling_explorer(engine, max_tokens=4)
"""
CHAT = """
import shutil, tempfile, time
from pathlib import Path
from helpers import BuildRecipe, SamplingParams, load
from helpers.course.widgets import chat
from helpers.model.checkpoint import BUNDLED

folder = shutil.copytree(BUNDLED, Path(tempfile.mkdtemp()) / "talker")
template = "{% for message in messages %}{{ message.content }} {% endfor %}"
(folder / "chat_template.jinja").write_text(template)
engine = load(BuildRecipe(model=str(folder), backend="pytorch", max_input_len=256, max_seq_len=512))
decode = engine._decode
engine._decode = lambda tokens: (time.sleep(0.03), decode(tokens))[1]  # or a quick machine is done before Stop
chat(engine, sampling=SamplingParams(temperature=0, max_tokens=256, ignore_eos=True))
"""
EXPERIMENT = """
import time
from helpers.course.predict import predict
from helpers.course.widgets import experiment_runner

def measure(batch, precision):
    time.sleep(0.6)
    return {"ms": batch * 1.5}

experiment_runner(measure, {"batch": [1, 2, 4], "precision": ["fp32", "int8"]}, "grid.json", "ms")
"""
MORE = [
    "from helpers.course.widgets import batching_simulator, build_explorer, memory_calculator\nmemory_calculator()",
    "batching_simulator()",
    "build_explorer(max_batch_size=1, max_input_len=16, max_seq_len=48)",
    EXPERIMENT,
    "predict('speed', times=None)",
    "predict('who', choice=None, of=['pytorch', 'aot'])",
]


def opened(visit, cells, app, name, button, **look):
    """The page of a notebook whose cells have run, once its widget is there."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    page = visit(nb, app, name, **look)
    run_all(page)
    named(page, button).wait_for()
    return page


@pytest.fixture(scope="module", params=["lab", "notebook"] if NIGHTLY else ["lab"])
def page(visit, request):
    return opened(visit, [CELL], request.param, f"explorer-{request.param}", "Run")


@pytest.fixture(scope="module")
def talk(visit):
    return opened(visit, [CHAT], "lab", "chat", "Send")


@pytest.fixture(scope="module")
def more(visit):
    return opened(visit, MORE, "lab", "more", "Build")


@pytest.fixture(autouse=True)
def no_console_errors(request):
    yield
    for name in ("page", "talk", "more"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).problems == []


def named(page, text):
    return page.locator("button.widget-button", has_text=text)  # and not a token of this text, such as " trunk"


def handle(part, label):
    """What is dragged, of the slider with this label."""
    return part.locator(f".widget-slider:has(label:text-is('{label}'))").locator(".noUi-handle").first


def run_button(page):
    return named(page, "Run")


def output(page) -> str:
    return page.locator(".jp-Cell .jp-OutputArea").first.inner_text()


def test_the_widget_shows_its_distribution_not_its_picture(page):
    wait_for(lambda: "The token after the prompt" in output(page))
    assert page.locator(".jp-Cell .jp-OutputArea img").count() == 0


def test_moving_the_temperature_moves_the_bars(page):
    before = output(page)
    handle(page, "temperature").focus()
    page.keyboard.press("Home")  # temperature 0
    wait_for(lambda: "100.0%" in output(page))
    assert output(page) != before
    wait_for(run_button(page).is_enabled)


def test_run_writes_a_text_with_the_controls_off(page):
    run_button(page).click()
    wait_for(lambda: not run_button(page).is_enabled(), 10)
    wait_for(run_button(page).is_enabled)
    assert "was chosen from" in output(page)
    words = page.locator(".jp-Cell .jp-OutputArea p b").first.inner_text()
    assert len(words.split()) > 4


def test_a_click_on_a_token_shows_what_else_it_could_have_been(page):
    run_button(page).click()
    wait_for(lambda: not run_button(page).is_enabled(), 10)
    wait_for(run_button(page).is_enabled)
    page.locator(".widget-toggle-buttons button").nth(2).click()
    wait_for(lambda: "Token 3 was chosen from" in output(page))
    picture(page, page.name)


def test_stop_ends_a_text_and_clicks_meanwhile_do_not_queue(page):
    handle(page, "pause, ms").focus()
    page.keyboard.press("End")  # or the text is whole before Stop is clicked
    run_button(page).click()
    wait_for(named(page, "Stop").is_enabled)
    for _ in range(3):
        run_button(page).click(force=True)
    named(page, "Stop").click()
    wait_for(run_button(page).is_enabled)
    count = page.locator(".widget-toggle-buttons button").count()
    time.sleep(1)
    assert run_button(page).is_enabled() and page.locator(".widget-toggle-buttons button").count() == count < 12
    handle(page, "pause, ms").focus()
    for key in ("Home", *["ArrowRight"] * 3):
        page.keyboard.press(key)


def test_two_settings_stand_side_by_side(page):
    page.get_by_label("two settings side by side").check()
    wait_for(lambda: output(page).count("The token after the prompt") == 2)
    page.get_by_label("two settings side by side").uncheck()
    wait_for(lambda: output(page).count("The token after the prompt") == 1)


def test_an_error_is_visible_and_goes_away(page):
    prompt = page.locator(".widget-text input[type=text]").first
    prompt.fill("word " * 80)
    prompt.press("Enter")
    wait_for(lambda: "LimitError" in output(page))
    wait_for(run_button(page).is_enabled)
    prompt.fill("Long ago")
    prompt.press("Enter")
    wait_for(lambda: "LimitError" not in output(page) and "The token after the prompt" in output(page))


def message(page):
    return page.locator(".widget-text input[type=text]").first


def answer(page) -> str:
    return page.locator(".jp-OutputArea section p").last.inner_text()


def test_a_cell_that_runs_again_keeps_one_engine_more_and_not_one_a_run(visit):
    """Beside the new one the last run's, which its widget shows until the new one is there."""
    page = opened(visit, [AGAIN], "lab", "again", "Run")
    for count in (1, 2, 2, 2):
        wait_for(lambda: f"engines: {count}" in output(page) and run_button(page).is_enabled())  # noqa: B023
        before = page.locator(".jp-InputPrompt").first.inner_text()
        run_all(page)
        wait_for(lambda: page.locator(".jp-InputPrompt").first.inner_text() not in (before, "[*]:"))  # noqa: B023
    assert page.problems == []


def test_enter_sends_and_the_answer_comes_word_by_word_until_stop(talk):
    message(talk).press_sequentially("Once upon a time", delay=5)
    message(talk).press("Enter")
    wait_for(named(talk, "Stop").is_enabled)
    wait_for(lambda: len(answer(talk).split()) > 5)
    assert not named(talk, "Send").is_enabled()
    assert "user: Once upon a time" in output(talk) and message(talk).input_value() == ""
    before = answer(talk)
    wait_for(lambda: len(answer(talk)) > len(before))
    message(talk).press_sequentially("And then", delay=5)  # the next message, while this answer comes
    message(talk).press("Enter")  # is ignored
    named(talk, "Stop").click()
    wait_for(named(talk, "Send").is_enabled)
    ended = answer(talk)
    time.sleep(1)
    assert answer(talk) == ended and message(talk).input_value() == "And then"
    assert output(talk).count("user:") == 1


def test_send_goes_on_and_a_message_that_is_too_long_is_not_lost(talk):
    before = output(talk).count("user:")
    message(talk).fill("And then")
    named(talk, "Send").click()
    wait_for(lambda: output(talk).count("assistant:") == before + 1)
    wait_for(named(talk, "Stop").is_enabled)
    named(talk, "Stop").click()
    wait_for(named(talk, "Send").is_enabled)
    assert "user: And then" in output(talk)
    message(talk).fill("word " * 600)
    message(talk).press("Enter")
    wait_for(lambda: "LimitError" in output(talk) and "Fix:" in output(talk))
    assert message(talk).input_value().startswith("word word") and output(talk).count("user:") == before + 1
    named(talk, "New conversation").click()
    wait_for(lambda: "not begun" in output(talk) and "LimitError" not in output(talk))


def cell(page, number):
    return page.locator(".jp-Cell").nth(number)


def test_the_memory_calculator_follows_its_controls(more):
    calculator = cell(more, 0)
    wait_for(lambda: "H100 SXM" in calculator.inner_text())
    calculator.get_by_label("precision").select_option("int4")
    wait_for(lambda: "int4, batch 1," in calculator.inner_text())
    handle(calculator, "sequences").focus()
    for _ in range(30):  # faster than it is drawn
        more.keyboard.press("ArrowRight")
    wait_for(lambda: "batch 31, sequences of 1024 tokens" in calculator.inner_text(), 5)


def test_the_simulator_plays_stops_and_shows_the_moment_of_its_slider(more):
    simulator = cell(more, 1)
    image = simulator.locator("img")
    wait_for(lambda: image.count() == 1)
    whole = image.get_attribute("alt")
    simulator.locator("button", has_text="Play").click()
    wait_for(lambda: image.get_attribute("alt") != whole)
    simulator.locator("button", has_text="Stop").click()
    wait_for(simulator.locator("button", has_text="Play").is_enabled)
    simulator.get_by_label("batching", exact=True).select_option("static")
    wait_for(lambda: image.get_attribute("alt").startswith("static, paged"))
    picture(more, "simulator")


def test_a_build_is_started_and_cancelled(more):
    explorer = cell(more, 2)
    wait_for(lambda: "not built yet" in explorer.inner_text())
    named(more, "Build").click()
    wait_for(lambda: "Building stories" in explorer.inner_text())
    assert not named(more, "Build").is_enabled()
    explorer.locator("button", has_text="Stop").click()
    wait_for(lambda: "Nothing is left of this build" in explorer.inner_text())
    wait_for(named(more, "Build").is_enabled)
    assert "not built yet" in explorer.inner_text()


def test_an_experiment_is_stopped_resumed_and_not_repeated(more, jupyter):
    runner, file = cell(more, 3), jupyter[0] / "grid.json"
    run, stop = (runner.locator("button", has_text=text) for text in ("Run", "Stop"))
    wait_for(lambda: "0 of 6 settings" in runner.inner_text())
    run.click()
    wait_for(lambda: "1 of 6 settings" in runner.inner_text())
    for _ in range(3):
        run.click(force=True)  # is ignored
    stop.click()
    wait_for(run.is_enabled)
    rows = json.loads(file.read_text())
    assert 1 <= len(rows) < 6
    time.sleep(1.5)
    assert json.loads(file.read_text()) == rows  # Stop is an end
    rows[0]["ms"] = 77.0  # to be seen again, if it is not measured anew
    file.write_text(json.dumps(rows))
    run.click()
    wait_for(lambda: "6 of 6 settings" in runner.inner_text())
    assert json.loads(file.read_text())[0]["ms"] == 77.0
    wait_for(lambda: "batch=4, precision=int8 6" in (runner.locator("img").get_attribute("alt") or ""))
    assert len(file.with_suffix(".csv").read_text().splitlines()) == 7
    picture(more, "experiment")


def test_a_guess_is_given_by_a_control_with_the_keyboard(more):
    number, choices = cell(more, 4), cell(more, 5)
    field = number.get_by_label("your guess")
    field.fill("many")
    field.press("Enter")
    wait_for(lambda: "is not a number" in number.inner_text())
    field.fill("3")
    field.press("Tab")
    wait_for(lambda: "your guess is 3 times" in number.inner_text() and "not a number" not in number.inner_text())
    choices.get_by_role("button", name="aot").focus()
    more.keyboard.press("Space")
    wait_for(lambda: "your guess is aot" in choices.inner_text())


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_what_a_phone_and_a_dark_page_show(visit, width, scheme):
    """Pictures for people; and no control or line of words is wider than its place."""
    page = opened(visit, [*MORE, CELL], "notebook", f"widgets-{width}-{scheme}", "Run", width=width, scheme=scheme)
    for number in range(7):
        wait_for(lambda n=number: cell(page, n).locator(".widget-vbox").count() > 0)
        cell(page, number).scroll_into_view_if_needed()
        time.sleep(0.3)
        picture(page, f"{page.name}-{number}")
        too_wide = """cell => [...cell.querySelectorAll('.widget-inline-hbox, .widget-html-content p')].filter(
            part => part.getBoundingClientRect().right > innerWidth + 1).length"""
        assert cell(page, number).evaluate(too_wide) == 0
    assert cell(page, 1).locator("img").bounding_box()["width"] > 400  # its words are legible, and the page scrolls it
    assert page.problems == []
