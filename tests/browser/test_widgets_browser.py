"""The sampling widget in JupyterLab in a real browser: what a learner sees, moves and presses."""

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


def a_browser(playwright):
    """Playwright's own chromium, or the system's."""
    own = Path(playwright.chromium.executable_path)
    chromium = str(own) if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no chromium: playwright install chromium")
    return playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port, on a folder with one notebook; its address."""
    folder = tmp_path_factory.mktemp("lab")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else it asks
    nbformat.write(nb, folder / "widget.ipynb")
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
        yield f"{address}/lab/tree/widget.ipynb?token=test&reset"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def page(lab):
    with sync_api.sync_playwright() as playwright:
        browser = a_browser(playwright)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(lab)
        page.locator(".jp-Cell .cm-content").first.click()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.keyboard.press("Shift+Enter")
        run_button(page).wait_for()
        yield page
        browser.close()


def run_button(page):
    return page.locator("button.jupyter-button", has_text="Run")


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
