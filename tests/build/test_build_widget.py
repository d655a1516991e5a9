"""The build explorer: it builds what its controls say, and a build that is stopped leaves nothing."""

import asyncio
import time

import pytest

pytest.importorskip("ipywidgets", reason="the notebook tools are not in this environment")

from jupyter_client.manager import start_new_kernel

from helpers import store
from helpers.course.widgets import build, build_explorer
from helpers.paths import PROJECT, engines_folder

LIMITS = {"device": "cpu", "max_batch_size": 1, "max_input_len": 16, "max_seq_len": 48}


def test_a_build_that_is_there_already_opens_in_the_inspector(tiny_engine, tiny_llama, tmp_path, monkeypatch):
    warns = "import atexit, sys; atexit.register(print, 'a library warns at exit', file=sys.stderr)"
    (tmp_path / "sitecustomize.py").write_text(warns)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    explorer = build_explorer(model=str(tiny_llama), **LIMITS, optimization_level=3)
    assert f"built already: {tiny_engine.name}" in explorer.output.value
    explorer.button.click()
    assert "Cache hit" in explorer.log.value and "warns at exit" in explorer.log.value
    assert explorer.errors.outputs == ()
    assert "decode_b1" in explorer.report.value and not explorer.button.disabled


def test_a_build_that_is_stopped_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    explorer = build_explorer(model=str(tiny_llama), **LIMITS)
    assert "not built yet" in explorer.output.value

    async def click():
        explorer.button.click()
        while "Building" not in explorer.log.value or not list(engines_folder().glob(".building-*/*")):
            await asyncio.sleep(0.05)
        explorer.button.click()  # is ignored
        assert explorer.bar.value < 1 and explorer.button.disabled
        explorer.stop_button.click()
        await explorer.task

    asyncio.run(asyncio.wait_for(click(), 120))
    assert "Cancelled" in explorer.log.value and "not built yet" in explorer.output.value
    assert store.list_engines() == [] and list(engines_folder().glob(".building-*")) == []
    assert not explorer.button.disabled and explorer.errors.outputs == ()


def test_a_build_ends_with_its_kernel(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    manager, client = start_new_kernel(startup_timeout=120)
    explorer = f"build_explorer(model={str(tiny_llama)!r}, **{LIMITS})"
    try:
        client.execute(f"from helpers.course.widgets import build_explorer\nex = {explorer}\nex.button.click()")
        until(lambda: list(tmp_path.glob(".building-*/*")))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)  # killed, as for memory; Restart kills one that takes long to end, too
    until(lambda: not list(tmp_path.glob(".building-*")))
    assert store.list_engines() == []


@pytest.mark.parametrize(
    ("command", "words"),
    [("print('{}', flush=True); time.sleep(0.5)", "tiny-llama"), ("time.sleep(600)", "Cancelled. It had to be killed")],
    ids=["published", "killed"],
)
def test_stop_tells_what_became_of_the_build(tiny_engine, tiny_llama, monkeypatch, command, words):
    """Whether it was done before it heard of Stop, or heard nothing."""
    monkeypatch.setattr(build, "COMMAND", "import time; " + command.format(tiny_engine))
    monkeypatch.setattr(build, "PATIENCE", 60 if "print" in command else 0.2)
    explorer = build_explorer(model=str(tiny_llama), **LIMITS, optimization_level=3)

    async def click():
        explorer.button.click()
        await asyncio.sleep(0)
        explorer.stop_button.click()
        await explorer.task

    asyncio.run(asyncio.wait_for(click(), 120))
    assert words in explorer.log.value and "Nothing is left" not in explorer.log.value
    assert ("decode_b1" in explorer.report.value) is ("print" in command)


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_build_that_fails_says_why_in_the_widget(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    explorer = build_explorer(model=str(tiny_llama), **LIMITS)
    explorer.button.click()
    words = explorer.errors.outputs[0]["text"]
    assert "no C++ compiler" in words and "Fix:" in words and not explorer.button.disabled
