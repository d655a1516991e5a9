"""A worker that is killed, hangs, crashes, chatters or loses its parent never takes the notebook with it."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from promises import how_many

from helpers.errors import BackendUnavailable, BuildError, CourseError, OutOfMemory, WorkerError
from helpers.machine import worker as worker_module
from helpers.machine.worker import Worker

posix = pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX's")

SERVED = """
import ctypes, errno, os, sys, time
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

def open_too_many():
    raise OSError(errno.EMFILE, "Too many open files")

def fill():
    import torch
    torch.zeros(1 << 50)

def child():
    import subprocess
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

ENVIRONMENT = {"COURSE_TEST_GIVEN": "by the module", "COURSE_TEST_SET": "by the module"}
CALLS = {
    "surroundings": lambda: dict(os.environ),
    "child": child, "ask": lambda: sys.stdin.read(), "kill": lambda number: os.kill(os.getpid(), number),
    "echo": lambda **given: given, "count": count, "chatter": chatter, "refuse": refuse, "fail": fail, "fill": fill,
    "open_too_many": open_too_many,
    "hang": lambda: time.sleep(600), "segfault": lambda: ctypes.string_at(0), "exit": os._exit,
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


def test_a_worker_has_its_modules_variables_and_not_those_that_would_change_what_it_does(served, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("COURSE_TEST_SWITCH_A", "1")
    monkeypatch.setenv("COURSE_TEST_SET", "by the user")
    with Worker(served, without=("COURSE_TEST_SWITCH_",)) as worker:
        variables = worker.call("surroundings")
    assert not {"PYTHONWARNINGS", "COURSE_TEST_SWITCH_A"} & set(variables)
    assert (variables["COURSE_TEST_GIVEN"], variables["COURSE_TEST_SET"]) == ("by the module", "by the user")


def test_importing_a_workers_module_changes_no_variable_but_one_of_its_library():
    code = "import os, importlib; os.environ.pop('TLLM_WORKER_USE_SINGLE_PROCESS', None)  # another test's\n"
    code += "before = dict(os.environ); [importlib.import_module(name) for name in " + repr(
        ["helpers.backends.vllm.worker", "helpers.backends.tensorrt_llm.worker", "helpers.backends.aot.compile"]
    )
    code += "]; print({name for name, _ in set(os.environ.items()) ^ set(before.items())})"
    changed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert changed.strip() == "{'TLLM_WORKER_USE_SINGLE_PROCESS'}"


def test_a_worker_starts_where_the_temporary_folder_was_cleared_away(served, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cleared away"))
    with Worker(served) as worker:
        assert worker.call("echo", a=1) == {"a": 1}


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
    with pytest.raises(WorkerError, match="ZeroDivisionError"):  # and one that nobody foresaw ends it
        worker.call("fail")


@posix
def test_memory_that_runs_out_in_a_library_is_told_as_that_and_a_limit_as_a_limit(worker):
    with pytest.raises(OutOfMemory, match="allocate"):
        worker.call("fill")
    assert worker.call("echo") == {}
    with pytest.raises(WorkerError, match="Too many open files") as limit:
        worker.call("open_too_many")
    assert "ulimit -n" in limit.value.cause


def gone(pid, seconds=10):
    """Whether a process ends within some seconds: it does not exist, or is only still listed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_hang_has_a_time_limit_and_is_not_reported_as_want_of_memory(worker):
    with pytest.raises(WorkerError, match="within 1 s"):
        worker.call("hang", time_limit=1)
    assert not psutil.pid_exists(worker.pid)
    with pytest.raises(WorkerError, match="gone: it did not finish within 1 s") as after:
        worker.call("echo")
    assert "memory" not in str(after.value) and "native code" not in str(after.value)


def test_events_without_an_end_stop_at_the_time_limit(worker):
    with pytest.raises(WorkerError, match="within 1 s"):
        worker.call("count", n=10**12, time_limit=1)
    assert not psutil.pid_exists(worker.pid)


def test_what_a_reader_takes_between_two_events_is_not_the_workers_time(worker):
    events = worker.stream("count", n=3, time_limit=2)
    assert next(events) == 0
    time.sleep(2.5)
    assert list(events) == [1, 2]


# What a worker's end means


@posix
@pytest.mark.parametrize(
    ("call", "arguments", "name", "cause"),
    [
        ("kill", {"number": 9}, "SIGKILL", "lack of memory is one cause"),
        ("kill", {"number": 15}, "SIGTERM", "from outside"),
        ("kill", {"number": int(signal.SIGBUS)}, "SIGBUS", "disk is full; or native code crashed"),
        ("kill", {"number": int(signal.SIGXCPU)}, "SIGXCPU", "processor time"),
        ("kill", {"number": int(signal.SIGILL)}, "SIGILL", "this processor lacks"),
        ("segfault", {}, "SIGSEGV", "crash in native code"),
        ("exit", {"status": 3}, "exit code 3", "ended the process"),
        ("exit", {"status": 255}, "exit code 255", "ended the process"),
        ("exit", {"status": 128 + 9}, "SIGKILL", "lack of memory is one cause"),  # of a shell that started Python
    ],
)
def test_an_end_is_told_by_its_name_and_meaning_and_leaves_no_process(worker, call, arguments, name, cause):
    child = worker.call("child")
    with pytest.raises(WorkerError, match=name) as end:
        worker.call(call, **arguments)
    assert cause in end.value.cause and gone(child)
    with pytest.raises(WorkerError, match=name):  # and it stays reported, instead of hanging
        worker.call("echo")


@posix
def test_want_of_memory_is_said_where_the_system_counted_it(worker, monkeypatch):
    before = worker_module._oom_kills()
    monkeypatch.setattr(worker_module, "_oom_kills", lambda: before + 1)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError) as end:
        worker.call("echo")
    assert "ran out of memory" in end.value.cause


def test_a_worker_killed_while_another_thread_waits_for_it_frees_that_thread(worker):
    errors = []

    def wait():
        try:
            worker.call("hang")
        except WorkerError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)
    worker.kill("the build was given up")
    waiting.join(10)
    assert not waiting.is_alive() and "the build was given up" in errors[0]


def test_a_worker_that_nobody_holds_any_more_ends(served):
    worker = Worker(served)
    pid = worker.pid
    del worker
    gc.collect()
    assert gone(pid)


def test_a_library_that_asks_a_question_gets_no_answer_and_takes_no_request(worker):
    assert worker.call("ask", time_limit=10) == ""
    assert worker.call("echo", a=1) == {"a": 1}


# Interrupts


def interrupted(worker, function, **arguments):
    """Call a function; interrupt this process half a second later."""
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.call(function, **arguments)
    finally:
        timer.join()


@posix
def test_an_interrupt_ends_the_worker_that_is_waited_for_and_no_other(served):
    with Worker(served) as busy, Worker(served) as idle:
        interrupted(busy, "hang")
        assert gone(busy.pid)
        with pytest.raises(WorkerError, match="gone: a call to it was interrupted") as after:
            busy.call("echo")
        assert "native code" not in str(after.value)
        assert idle.call("echo", a=1) == {"a": 1}


@posix
def test_the_terminals_interrupt_reaches_the_parent_only(served):
    """The Stop button and Ctrl-C signal the whole process group: idle workers and their engines live on."""
    code = """
    import os, signal, time
    from helpers.machine.worker import Worker
    idle, busy = Worker("served"), Worker("served")
    print(os.getpid(), busy.pid, flush=True)
    interrupts = 0
    while interrupts < 1:
        try:
            busy.call("hang")
        except KeyboardInterrupt:
            interrupts += 1
    print(idle.call("echo", a=1), flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    group, busy = map(int, process.stdout.readline().split())
    time.sleep(0.5)
    os.killpg(group, signal.SIGINT)
    shown, _ = process.communicate(timeout=30)
    assert "{'a': 1}" in shown and gone(busy)


@posix
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01, 0.05])
def test_a_second_interrupt_leaves_no_process(served, delay):
    code = """
    import os, time
    from helpers.machine.worker import Worker
    print(os.getpid(), flush=True)
    try:
        with Worker("served") as worker:
            print(worker.pid, worker.call("child"), flush=True)
            worker.call("hang")
    except KeyboardInterrupt:
        pass
    while True:
        try:
            time.sleep(60)  # this process lives on, as a notebook's kernel does
        except KeyboardInterrupt:
            pass
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(process.stdout.readline())
        workers = [int(word) for word in process.stdout.readline().split()]
        time.sleep(0.3)
        os.kill(pid, signal.SIGINT)
        time.sleep(delay)
        os.kill(pid, signal.SIGINT)
        assert all(gone(worker) for worker in workers) and process.poll() is None
    finally:
        process.kill()


# Its parent ends, or closes it; also in an environment without psutil


@pytest.fixture
def bare_python(tmp_path, served):
    """A Python that has no psutil, as an environment with nothing but TensorRT in it."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "psutil.py").write_text("raise ModuleNotFoundError('No module named psutil')")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/bare:$PYTHONPATH" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@posix
@pytest.mark.parametrize("bare", [False, True])
def test_closing_ends_all_its_processes_and_is_remembered(served, bare_python, bare):
    with Worker(served, python=str(bare_python) if bare else "") as worker:
        child = worker.call("child")
    worker.close()
    assert not psutil.pid_exists(worker.pid) and gone(child)
    with pytest.raises(WorkerError, match="gone: it was closed"):
        worker.call("echo")


@posix
@pytest.mark.parametrize("bare", [False, True])
def test_dies_with_its_parent(served, bare_python, bare):
    code = f"""
    import os
    from helpers.machine.worker import Worker
    worker = Worker("served", python={(str(bare_python) if bare else "")!r})
    print(worker.pid, worker.call("child"), flush=True)
    os._exit(1)  # no clean-up of any kind
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=60
    )
    assert all(gone(int(pid)) for pid in done.stdout.split()) and done.stdout


@posix
def test_a_parent_without_psutil_kills_too(served, bare_python):
    code = "from helpers.machine.worker import Worker; w = Worker('served'); print(w.pid, w.call('child')); w.kill()"
    done = subprocess.run([bare_python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and all(gone(int(pid)) for pid in done.stdout.split())


# A Python that cannot be used


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [(None, 0, "No such file"), ("#!/bin/sh\n", 0o644, "Permission denied"), ("nothing", 0o755, "Exec format error")],
)
@posix
def test_a_python_that_cannot_be_started_is_named(served, tmp_path, text, mode, words):
    python = tmp_path / "my-python"
    if text is not None:
        python.write_text(text)
        python.chmod(mode)
    with pytest.raises(BackendUnavailable, match="my-python") as refused:
        Worker(served, python=str(python))
    assert words in refused.value.what and "COURSE_" in refused.value.cause


@posix
def test_a_program_that_is_no_python_is_named_and_a_module_that_is_not_there(served):
    with pytest.raises(WorkerError, match="(?s)/bin/true.*exit code 0.*Let the variable"):
        Worker(served, python="/bin/true")
    with pytest.raises(WorkerError, match="no_such_module"):
        Worker("no_such_module")


def test_without_room_for_a_thread_no_process_is_left(served, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    before = psutil.Process().children()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(WorkerError, match="new thread") as refused:
        Worker(served)
    assert refused.value.fix and set(psutil.Process().children()) <= set(before)


# A worker that does not keep to the protocol


@pytest.fixture
def script_worker(tmp_path):
    """script_worker(code): a worker whose process runs this code after it has said that it is ready."""
    started = []

    def start(code):
        python = tmp_path / "python"
        source = 'import json, os, sys, time\nprint(\'{"result": "ready"}\', flush=True)\n' + textwrap.dedent(code)
        (tmp_path / "script.py").write_text(source)
        python.write_text(f"#!/bin/sh\nexec {sys.executable} -u {tmp_path}/script.py\n")
        python.chmod(0o755)
        started.append(Worker("script", python=str(python)))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


@posix
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.close(1); time.sleep(600)", "closed its output"),  # and lives
        ("time.sleep(600)", "within 2 s"),  # never reads its input
        ("while True: print('{\"event\": 1}')", "within 2 s"),
        ("os.write(1, b'\\xff\\xfe\\n'); time.sleep(600)", "not the protocol"),
        ("print('[1, 2]'); time.sleep(600)", "not the protocol"),
        ("print('{}'); time.sleep(600)", "not the protocol"),
        ("print('[' * 100000); time.sleep(600)", "not the protocol"),
        ('print(\'{"error": {"type": "BuildError"}}\'); time.sleep(600)', "not the protocol"),
        ("print('{\"result\": 1', end='', flush=True)", "exit code 0"),  # cut off
    ],
)
def test_a_worker_that_breaks_the_protocol_is_noticed_within_the_limit(script_worker, code, words):
    worker = script_worker(code)
    with pytest.raises(WorkerError, match=words):
        worker.call("x", text="x" * 10**6, time_limit=2)  # more than a pipe holds
    assert gone(worker.pid)


@posix
def test_an_error_of_an_unknown_type_is_a_worker_error(script_worker):
    fields = {"what": "No.", "cause": "", "fix": ""}
    for kind in ("NoSuchError", "annotations", "__name__", "Exception"):
        worker = script_worker(f"print(json.dumps({{'error': {dict(fields, type=kind)!r}}})); time.sleep(600)")
        with pytest.raises(WorkerError, match="No."):
            worker.call("x", time_limit=5)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["event", "result", "error", "type", "what", "cause", "fix", "BuildError", "os", ""])
FIELDS = st.dictionaries(NAMES, VALUES | NAMES, max_size=5)
LINES = (
    st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"") + b"\n")
    | st.dictionaries(NAMES, VALUES | FIELDS, max_size=2).map(lambda answer: json.dumps(answer).encode() + b"\n")
    | FIELDS.map(lambda fields: json.dumps({"error": fields}).encode() + b"\n")
    | VALUES.map(lambda value: json.dumps(value).encode() + b"\n")
)


@pytest.mark.promise("Any line of a worker is an answer, or ends it in our words", 500, 10_000)
@settings(max_examples=how_many(500, 10_000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(b'{"error": {"type": "annotations", "what": "", "cause": "", "fix": ""}}\n')
@example(b'{"result": ' + b"[" * 100_000 + b"\n")
@example(b'{"result": ' + b"9" * 100_000 + b"}\n")
@given(LINES)
def test_any_line_is_an_answer_or_no_protocol(line):
    """What every line goes through answers, or raises what the caller turns into a WorkerError."""
    try:
        kind, value = worker_module._parse(line)
    except (ValueError, RecursionError):
        return
    assert kind in ("event", "result", "error")
    if kind == "error":
        assert isinstance(worker_module._as_error(value), CourseError)


def test_a_stream_left_in_the_middle_ends_the_worker(worker):
    stream = worker.stream("count", n=10**9)
    assert next(stream) == 0
    stream.close()
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_lets_its_parents_worker_be(worker):
    """Whatever it does with its copies, a stream that it drops and one that it begins included."""
    events = worker.stream("count", n=3)
    next(events)
    child = os.fork()
    if child == 0:
        try:
            events.close()
            worker.close()
            worker.kill()
            with pytest.raises(WorkerError, match="fork"):
                worker.call("echo")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(events) == [1, 2]
    assert worker.call("echo") == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_dies_with_its_parent_though_a_fork_of_that_lives_on(served):
    """As multiprocessing makes them: the fork holds the other end of the worker's input."""
    code = """
    import os, signal, time
    from helpers.machine.worker import Worker
    worker = Worker("served")
    fork = os.fork()
    if fork == 0:
        os.closerange(0, 3)
        time.sleep(60)
    print(worker.pid, fork, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=50
    )
    worker, fork = map(int, done.stdout.split())
    try:
        assert gone(worker)
    finally:
        os.kill(fork, signal.SIGKILL)
