"""A process of its own for native code: a crash, a hang or its memory never reaches the notebook.

One request at a time goes out as a line of JSON, its answers come back as lines of JSON:

    to the worker     {"call": "build", "arguments": {...}}
    from the worker   {"event": ...}   any number: what the called function yields
                      {"result": ...} or {"error": {"type", "what", "cause", "fix"}}

A worker serves one module, whose dictionary CALLS names the functions that may be called. Whatever native code
prints goes to the worker's standard error, which is kept for the message after a crash. When the parent ends,
however it ends, the worker's standard input closes and the worker ends too.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from helpers import errors
from helpers.errors import CourseError, WorkerError
from helpers.paths import PROJECT

START_LIMIT = 120.0  # seconds until a new worker must have answered: another environment's imports can be slow
TAIL = 2000  # characters of standard error that a crash message shows


class Worker:
    """A module in a process of its own. Use it as a context manager, or close it.

    module: its full name, such as "helpers.backends.tensorrt.api".
    python: another environment's interpreter, if need be.
    """

    def __init__(self, module: str, *, python: str = "", start_limit: float = START_LIMIT):
        self.module = module
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the worker is)
        self._lines: queue.Queue[str | None] = queue.Queue()
        course = str(PROJECT)
        paths = [course, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [python or sys.executable, "-u", "-m", "helpers.machine.worker", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._answer(time.monotonic() + start_limit, start_limit)  # "ready", or the error of importing the module
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, function: str, *, time_limit: float = 600.0, **arguments: Any) -> Any:
        """The result of one function; what it yields on the way is dropped. See `stream`."""
        running = self.stream(function, time_limit=time_limit, **arguments)
        while True:
            try:
                next(running)
            except StopIteration as done:
                return done.value

    def stream(self, function: str, *, time_limit: float = 600.0, **arguments: Any) -> Iterator[Any]:
        """What the function yields, as it comes; its result is the generator's return value.

        time_limit: seconds for the whole call; after that the worker is killed. Raises the function's own
        CourseError, or WorkerError if the worker died, hung or answered nonsense.
        """
        deadline = time.monotonic() + time_limit
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # a broken pipe, or closed by us
            raise self._dead() from None
        finished = False
        try:
            while True:
                answer = self._answer(deadline, time_limit)
                if "result" in answer:
                    finished = True
                    return answer["result"]
                yield answer["event"]
        except CourseError as error:
            finished = not isinstance(error, WorkerError)
            raise
        finally:
            if not finished:  # dead, or left in the middle of an answer that nobody will read
                self.kill()

    def close(self, patience: float = 5.0) -> None:
        """Ask the worker to end by closing its input, and kill it if it does not."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # it died with something unsent
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.kill()

    def kill(self) -> None:
        if self._process.poll() is None:
            _kill_children(self._process.pid)
            self._process.kill()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _answer(self, deadline: float, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.kill()
            raise WorkerError(
                f"The worker for {self.module} gave no answer within {limit:.0f} s; it was ended.",
                cause="The native code hangs, or this machine needs longer.",
                fix="Try again with a larger time_limit; nothing half-built was left behind.",
            ) from None
        if line is None:
            raise self._dead()
        try:
            answer = json.loads(line)
        except ValueError:
            self.kill()
            raise WorkerError(f"The worker for {self.module} answered {line!r:.200}, which is not JSON.") from None
        if "error" in answer:
            raise _as_error(answer["error"])
        return answer

    def _dead(self) -> WorkerError:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip()[-TAIL:]
        return WorkerError(
            f"The worker for {self.module} ended unexpectedly ({_exit_words(code)}).",
            cause=("It was ended from outside; the system does that when memory runs out." if code == -9 else "")
            or (f"A fault in native code. Its last words: {said}" if said else "A fault in native code."),
            fix="This notebook is unharmed: run the cell again. If it happens again, build something smaller.",
        )


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _as_error(fields: dict[str, str]) -> CourseError:
    kind = getattr(errors, fields["type"], CourseError)
    return kind(fields["what"], cause=fields["cause"], fix=fields["fix"])


def serve(module: str) -> None:
    """The worker's side: answer requests until the input closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to standard output from here on, native code included, lands on standard error
    sys.stdout = sys.stderr

    def send(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def send_error(error: Exception) -> None:
        if isinstance(error, CourseError):
            send(error={"type": type(error).__name__, "what": error.what, "cause": error.cause, "fix": error.fix})
        else:
            what = f"{type(error).__name__} in the worker: {error}"
            send(error={"type": "WorkerError", "what": what, "cause": "", "fix": ""})

    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    try:
        calls = importlib.import_module(module).CALLS
    except Exception as error:  # the boundary of the process: the parent shall hear of it, whatever it is
        send_error(error)
        return
    send(result="ready")
    while True:
        request = json.loads(requests.get())
        try:
            value = calls[request["call"]](**request["arguments"])
            if inspect.isgenerator(value):
                value = _drain(value, send)
            send(result=value)
        except Exception as error:  # the boundary of the process, as above
            send_error(error)


def _drain(steps: Any, send: Any) -> Any:
    while True:
        try:
            send(event=next(steps))
        except StopIteration as done:
            return done.value


def _listen(requests: queue.Queue[str]) -> None:
    """Pass on the lines of standard input. Its end means that the parent closed us or is gone: end at once."""
    for line in sys.stdin:
        requests.put(line)
    _kill_children(os.getpid())
    os._exit(0)


def _kill_children(pid: int) -> None:
    """vLLM and MPI start processes of their own, which would live on and hold the GPU's memory."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


if __name__ == "__main__":
    serve(sys.argv[1])
