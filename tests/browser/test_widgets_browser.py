"""The widgets in JupyterLab in a real browser: what a learner sees, moves and presses."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

ROOT = Path(__file__).resolve().parents[2]
CELL = """
from helpers import BuildRecipe, load
from helpers.course.widgets import sampling_explorer

engine = load(BuildRecipe(backend="pytorch", max_input_len=64, max_seq_len=256))
sampling_explorer(engine, max_tokens=12)
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


def a_browser(playwright):
    """Playwright's own chromium, or the system's."""
    own = Path(playwright.chromium.executable_path)
    chromium = str(own) if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no chromium: playwright install chromium")
    return playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port, on a folder with two notebooks of one cell; address(notebook)."""
    folder = tmp_path_factory.mktemp("lab")
    for name, cell in (("explorer", CELL), ("chat", CHAT)):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip())])
        nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else it asks
        nbformat.write(nb, folder / f"{name}.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=test"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api?token=test", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start")
        yield lambda name: f"{address}/lab/tree/{name}.ipynb?token=test&reset"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = a_browser(playwright)
        yield browser
        browser.close()


def opened(browser, address, button):
    """The page of a notebook whose cell has run, once its widget is there."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.locator(".jp-Cell .cm-content").first.click()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.keyboard.press("Shift+Enter")
    named(page, button).wait_for()
    return page


@pytest.fixture(scope="module")
def page(browser, lab):
    return opened(browser, lab("explorer"), "Run")


@pytest.fixture(scope="module")
def talk(browser, lab):
    return opened(browser, lab("chat"), "Send")


def named(page, text):
    return page.locator("button.jupyter-button", has_text=text)


def run_button(page):
    return named(page, "Run")


def output(page) -> str:
    return page.locator(".jp-Cell .jp-OutputArea").first.inner_text()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_the_widget_shows_its_distribution_not_its_picture(page):
    assert "The token after the prompt" in output(page)
    assert page.locator(".jp-Cell .jp-OutputArea img").count() == 0


def test_moving_the_temperature_moves_the_bars(page):
    before = output(page)
    handle = page.locator(".noUi-handle").first
    handle.focus()
    page.keyboard.press("Home")  # temperature 0
    wait_for(lambda: "100.0%" in output(page))
    assert output(page) != before
    wait_for(run_button(page).is_enabled)


def test_run_writes_a_text_with_the_controls_off(page):
    run_button(page).click()
    wait_for(lambda: not run_button(page).is_enabled(), 10)
    wait_for(run_button(page).is_enabled)
    assert "The last token was chosen from" in output(page)
    words = page.locator(".jp-Cell .jp-OutputArea p b").inner_text()
    assert len(words.split()) > 4


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
    named(talk, "Send").click()
    wait_for(lambda: output(talk).count("assistant:") == 2)
    wait_for(named(talk, "Stop").is_enabled)
    named(talk, "Stop").click()
    wait_for(named(talk, "Send").is_enabled)
    assert "user: And then" in output(talk)
    message(talk).fill("word " * 600)
    message(talk).press("Enter")
    wait_for(lambda: "LimitError" in output(talk) and "Fix:" in output(talk))
    assert message(talk).input_value().startswith("word word") and output(talk).count("user:") == 2
    named(talk, "New conversation").click()
    wait_for(lambda: "not begun" in output(talk) and "LimitError" not in output(talk))
