"""A worker that is killed, hangs, crashes, chatters or loses its parent never takes the notebook with it."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from helpers.errors import BuildError, WorkerError
from helpers.machine.worker import Worker

SERVED = """
import ctypes, os, sys, time
from helpers.errors import BuildError

def count(n):
    for i in range(n):
        yield i
    return "done"

def chatter():
    print("python prints"); sys.stdout.flush()
    os.write(1, b"native code prints\\n")
    return "heard"

def refuse():
    raise BuildError("No.", cause="Because.", fix="Ask again.")

def fail():
    return 1 / 0

CALLS = {
    "echo": lambda **given: given, "count": count, "chatter": chatter, "refuse": refuse, "fail": fail,
    "hang": lambda: time.sleep(600), "segfault": lambda: ctypes.string_at(0), "exit": lambda: os._exit(3),
}
"""


@pytest.fixture
def served(tmp_path, monkeypatch):
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "served"


@pytest.fixture
def worker(served):
    with Worker(served) as running:
        yield running


def test_values_go_there_and_back(worker):
    assert worker.call("echo", text="é\n", number=1.5, rows=[[1], {}]) == {
        "text": "é\n",
        "number": 1.5,
        "rows": [[1], {}],
    }
    assert worker.call("echo") == {}


def test_events_stream_before_the_result(worker):
    assert list(worker.stream("count", n=3)) == [0, 1, 2]
    assert worker.call("count", n=3) == "done"


def test_prints_do_not_disturb_the_protocol(worker):
    assert worker.call("chatter") == "heard"
    assert worker.call("echo", a=1) == {"a": 1}


def test_an_error_keeps_its_type_cause_and_fix_and_the_worker_goes_on(worker):
    with pytest.raises(BuildError) as caught:
        worker.call("refuse")
    assert (caught.value.what, caught.value.cause, caught.value.fix) == ("No.", "Because.", "Ask again.")
    assert worker.call("echo", a=1) == {"a": 1}


def test_an_unforeseen_error_is_named(worker):
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        worker.call("fail")


@pytest.mark.skipif(os.name != "posix", reason="signals have these names on POSIX only")
def test_a_real_segmentation_fault_is_reported(worker):
    with pytest.raises(WorkerError, match="SIGSEGV"):
        worker.call("segfault")
    with pytest.raises(WorkerError, match="SIGSEGV"):  # and it stays reported, instead of hanging
        worker.call("echo")


def test_exit_is_reported(worker):
    with pytest.raises(WorkerError, match="exit code 3"):
        worker.call("exit")


def test_a_hang_has_a_time_limit(worker):
    start = time.monotonic()
    with pytest.raises(WorkerError, match="within 1 s"):
        worker.call("hang", time_limit=1)
    assert time.monotonic() - start < 10
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.skipif(os.name != "posix", reason="signals have these names on POSIX only")
def test_killed_from_outside(worker):
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="SIGKILL") as caught:
        worker.call("echo")
    assert "memory" in caught.value.cause


def test_a_stream_left_in_the_middle_ends_the_worker(worker):
    stream = worker.stream("count", n=10**9)
    assert next(stream) == 0
    stream.close()
    assert not psutil.pid_exists(worker.pid)


def test_a_module_that_cannot_be_imported(served):
    with pytest.raises(WorkerError, match="no_such_module"):
        Worker("no_such_module")


def test_closing_ends_the_process(served):
    with Worker(served) as worker:
        pid = worker.pid
    assert not psutil.pid_exists(pid)


def test_dies_with_its_parent(served):
    code = """
    import os, sys
    from helpers.backends.worker import Worker
    worker = Worker("served")
    print(worker.pid, flush=True)
    os._exit(1)  # no clean-up of any kind
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=60
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)
