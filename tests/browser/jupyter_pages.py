"""JupyterLab and Notebook 7 on one server, and a browser that opens a notebook in either of them."""

import json
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

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "build" / "browser"
TOKEN = "test"


def a_browser(playwright):
    """Playwright's own chromium, or the system's."""
    own = Path(playwright.chromium.executable_path)
    chromium = str(own) if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no chromium: make chromium, or playwright install chromium")
    return playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """The folder that a server shows, and its address."""
    pytest.importorskip("notebook", reason="needs notebook: pip install -e '.[browser]'")
    folder, own = tmp_path_factory.mktemp("shown"), tmp_path_factory.mktemp("settings")
    themes = own / "lab" / "@jupyterlab" / "apputils-extension" / "themes.jupyterlab-settings"
    themes.parent.mkdir(parents=True)
    themes.write_text('{"adaptive-theme": true}', encoding="utf-8")  # light and dark as the browser asks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    server = subprocess.Popen(
        [sys.executable, "-m", "notebook", *options],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "JUPYTER_CONFIG_DIR": str(own),
            "JUPYTERLAB_SETTINGS_DIR": str(own / "lab"),
            "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail("the Jupyter server did not start")
        yield folder, address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    with sync_api.sync_playwright() as playwright:
        browser = a_browser(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visit(jupyter, browser):
    """visit(notebook, app, name, width, scheme): the page of a notebook in "lab" or "notebook", its kernel idle. What a
    page complains of is in page.problems."""
    import nbformat

    folder, address = jupyter
    contexts = []

    def open_(nb, app, name, width=1280, scheme="light"):
        nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else it asks
        nbformat.write(nb, folder / f"{name}.ipynb")
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.problems, page.name = [], name
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
        page.set_default_timeout(150_000)  # a first cell imports PyTorch, on a busy machine in minutes
        path = "lab/tree" if app == "lab" else "notebooks"
        page.goto(f"{address}/{path}/{name}.ipynb?token={TOKEN}" + ("&reset" if app == "lab" else ""))
        wait_for(lambda: kernel_is_idle(address, name), 60)
        # It is there before the kernel is. On a phone's page the toolbar has no room to show it.
        light = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        light.wait_for(state="visible" if width > 600 else "attached")
        page.locator(".jp-Cell").first.click()
        page.problems.clear()  # Notebook 7.6 has some of its own while it starts
        return page

    yield open_
    for context in contexts:
        context.close()
    for path in folder.glob("*.ipynb"):
        path.unlink()


def kernel_is_idle(address, name):
    """Whether the server has a kernel for this notebook that waits for work."""
    with urllib.request.urlopen(f"{address}/api/sessions?token={TOKEN}") as answer:
        sessions = json.load(answer)
    return any(s["path"].endswith(f"{name}.ipynb") and s["kernel"]["execution_state"] == "idle" for s in sessions)


def run_all(page):
    """The menu's Run All Cells, as a person does it."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def picture(page, name):
    """A screenshot in build/browser, for whoever wants to see what was tried."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
