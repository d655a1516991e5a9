"""A process of its own for native code: a crash, a hang or its memory never reaches the notebook.

One request at a time goes out as a line of JSON, its answers come back as lines of JSON:

    to the worker     {"call": "build", "arguments": {...}}
    from the worker   {"event": ...}   any number: what the called function yields
                      {"result": ...} or {"error": {"type", "what", "cause", "fix"}}

A worker serves one module, whose dictionary CALLS names the functions that may be called, and ENVIRONMENT, if it has
one, the variables that a worker gets unless they are set. Whatever native code prints goes to the worker's standard
error, which is kept for the message after a crash.

A worker leads a session of its own, so the Stop button of a notebook and Ctrl-C of a terminal reach this process only;
it then ends the one worker that it waits for. When the parent ends, however it ends, the worker's standard input closes
and the worker ends too, with all processes of its session.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import json
import os
import queue
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

from helpers import errors
from helpers.errors import BackendUnavailable, CourseError, WorkerError
from helpers.machine import commands
from helpers.paths import PROJECT, temporary_folder

START_LIMIT = 120.0  # seconds until a new worker must have answered: another environment's imports can be slow
END_LIMIT = 2.0  # seconds that a worker without an output, or a killed one, may take to end
TAIL = 2000  # characters of standard error that a crash message shows
OTHER_PYTHON = (
    "Let the variable COURSE_..._PYTHON name the Python of an environment that works, or unset it; "
    "`helpers doctor` shows which Pythons are used."
)
AGAIN = "This notebook is unharmed: run the cell again. If it happens again, build something smaller."
LONGEST = 2**28  # bytes of one answer
AHEAD = 1000  # answers that are read before somebody asks for them; after that the worker waits


class Worker:
    """A module in a process of its own. Use it as a context manager, or close it.

    module: its full name, such as "helpers.backends.tensorrt.api".
    python: another environment's interpreter, if need be.
    without: how the names of variables begin that it must not inherit.
    """

    def __init__(
        self, module: str, *, python: str = "", start_limit: float = START_LIMIT, without: tuple[str, ...] = ()
    ):
        self.name = f"The worker for {module}{f' under {python}' if python else ''}"
        self._reason = ""  # why this side ended the worker; "" while it runs, and when it ended by itself
        self._again = OTHER_PYTHON if python else AGAIN  # what to do if it ends by itself: at first, as it starts
        self._last_words = ""  # the end of its standard error, once it has ended
        self._oom_kills = _oom_kills()
        self._owner = os.getpid()  # a fork of it has this object too, and none of the threads that read the answers
        self._ending = threading.RLock()
        self._start(module, python or sys.executable, without)
        self._forgotten = weakref.finalize(self, _forget, self._process, self._owner)  # alive until the worker ended
        self._lines: queue.Queue[bytes | None] = queue.Queue(AHEAD)  # None: its output has ended
        self._reader = threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True)
        try:
            self._start_thread(self._reader)
            kind, answer = self._answer(time.monotonic() + start_limit, start_limit)
            if kind == "error":  # of importing the module
                raise _as_error(answer)
            self._again = AGAIN
        except BaseException:
            self.kill("it did not start")
            raise

    def _start(self, module: str, python: str, without: tuple[str, ...]) -> None:
        search_path = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # PYTHONWARNINGS=error would make errors of what libraries only warn about.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONWARNINGS", *without))}
        try:
            self._log = tempfile.TemporaryFile(dir=temporary_folder())  # noqa: SIM115  (open as long as the worker is)
            self._process = subprocess.Popen(
                [python, "-u", "-m", "helpers.machine.worker", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**kept, "PYTHONPATH": os.pathsep.join(search_path)},
                **commands.OWN_SESSION,
            )
        except OSError as error:
            if error.filename == python or error.errno == errno.ENOEXEC:  # not there, not executable, no program
                raise BackendUnavailable(
                    f"{python} cannot be started as a Python: {error.strerror}.",
                    cause="A variable COURSE_..._PYTHON names it, or its environment was moved or removed.",
                    fix=OTHER_PYTHON,
                ) from error
            raise self._no_room(error) from error

    def _start_thread(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError as error:
            raise self._no_room(error) from error

    def _no_room(self, error: Exception) -> WorkerError:
        return WorkerError(
            f"{self.name} could not be started, or asked: {error}.",
            cause="The system has no room for another process, thread, file or temporary file.",
            fix="Close other programs; `helpers doctor` looks at memory, disk, limits and the temporary folder.",
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, function: str, *, time_limit: float = 600.0, **arguments: Any) -> Any:
        """The result of one function; what it yields on the way is dropped. See `stream`."""
        return _drain(self.stream(function, time_limit=time_limit, **arguments), lambda **event: None)

    def stream(self, function: str, *, time_limit: float = 600.0, **arguments: Any) -> Generator[Any, None, Any]:
        """What the function yields, as it comes; its result is the generator's return value.

        time_limit: seconds for the whole call, without those that the caller takes between two events. After that the
        worker is killed. Raises the function's own CourseError, or WorkerError if the worker ended, hung or answered
        nonsense. An interrupt, and a generator that is closed before its end, kill the worker too: nobody would read
        the rest of the answer.
        """
        request = json.dumps({"call": function, "arguments": arguments}) + "\n"
        if os.getpid() != self._owner:
            raise WorkerError(
                f"{self.name} was started by another process, of which this one is a fork.",
                cause="A fork has the memory of its parent, but not the threads that hear what the worker says.",
                fix="Use it there, or start processes with multiprocessing's method 'spawn'.",
            )
        if not self._alive:
            raise self._ended()
        assert self._process.stdin is not None
        # In a thread, since a worker that does not read blocks it. One that has ended is noticed by its output.
        pipe = os.dup(self._process.stdin.fileno())
        try:
            self._start_thread(threading.Thread(target=_write, args=(pipe, request.encode()), daemon=True))
        except WorkerError:
            os.close(pipe)
            raise
        deadline = time.monotonic() + time_limit
        complete, reason = False, "a call to it was given up"
        try:
            while True:
                kind, answer = self._answer(deadline, time_limit)
                if kind == "result":
                    complete = True
                    return answer
                if kind == "error":
                    error = _as_error(answer)
                    complete, reason = not isinstance(error, WorkerError), "a call to it failed in an unknown way"
                    raise error
                paused = time.monotonic()
                yield answer
                deadline += time.monotonic() - paused
        except KeyboardInterrupt:
            reason = "a call to it was interrupted"
            raise
        finally:
            if not complete:
                self.kill(reason)

    def close(self, patience: float = 5.0) -> None:
        """Ask the worker to end by closing its input, and kill it if it does not."""
        try:
            if self._alive and self._process.stdin is not None:
                self._process.stdin.close()
                self._process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill("it was closed")

    def kill(self, reason: str = "it was stopped") -> None:
        """End the worker and every process that it has started. reason: what a later call is told."""
        if self._alive:
            self._reason = self._reason or reason
        self._end()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _alive(self) -> bool:
        """Whether there is something to end. A fork ends nothing: the worker is its parent's."""
        return self._forgotten.alive and os.getpid() == self._owner

    def _end(self) -> None:
        """Kill whatever is left of the worker, and free what it takes here: the reading thread, pipes, the log."""
        with self._ending:
            if not self._alive:
                return
            commands.kill_all(self._process)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver can hold a killed process for long
                self._process.wait(END_LIMIT)
            deadline = time.monotonic() + END_LIMIT
            while self._reader.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):
                    self._lines.get(timeout=0.01)  # the reader may wait for room
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)  # for another thread that waits for an answer
            for pipe in (self._process.stdin, None if self._reader.is_alive() else self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4 * TAIL))
            self._last_words = self._log.read().decode("utf-8", "replace").strip()[-TAIL:]
            self._log.close()
            self._forgotten.detach()

    def _answer(self, deadline: float, limit: float) -> tuple[str, Any]:
        """The next answer's kind ("event", "result" or "error") and what it holds."""
        try:
            left = deadline - time.monotonic()
            if left <= 0:  # there may be answers without end
                raise queue.Empty
            line = self._lines.get(timeout=left)
        except queue.Empty:
            self.kill(f"it did not finish within {limit:g} s")
            raise WorkerError(
                f"{self.name} did not finish within {limit:g} s; it was ended.",
                cause="The native code hangs, or this machine needs longer: a slow disk, or much other work.",
                fix="Run it again, with less beside it; nothing half-built was left behind. A network disk is slow to "
                "start from: move the course to a disk of this machine.",
            ) from None
        if line is None:
            raise self._ended(min(END_LIMIT, left))
        try:
            return _parse(line)
        except (ValueError, RecursionError):
            self.kill("it answered nonsense")
            raise WorkerError(
                f"{self.name} answered {line!r:.200}, which is not the protocol; it was ended.",
                cause="A library writes to the worker's output, or the two sides are of different versions.",
                fix="Make the environment anew, or name the right Python.",
            ) from None

    def _ended(self, patience: float = END_LIMIT) -> WorkerError:
        """The error for a worker that is no more: what its end means. patience: seconds that it may take to end."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill("it closed its output, or wrote a line without an end")
        self._end()
        if self._reason:
            return WorkerError(
                f"{self.name} is gone: {self._reason}.",
                cause="Whatever it held, an engine for example, is gone with it.",
                fix="Start again: load the engine, or run the build.",
            )
        starved = _oom_kills() > self._oom_kills
        what, cause, fix = _explain_end(self._process.returncode, self._last_words, starved, self._again)
        return WorkerError(f"{self.name} ended unexpectedly ({what}).", cause=cause, fix=fix)


# What the parent does beside the class: nothing here holds the Worker, so that one that is forgotten can end.


def _read(output: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed meanwhile
        while (line := output.readline(LONGEST)).endswith(b"\n"):
            lines.put(line)
    lines.put(None)


def _write(pipe: int, request: bytes) -> None:
    with contextlib.suppress(OSError), os.fdopen(pipe, "wb", buffering=0) as file:
        view = memoryview(request)
        while view:
            view = view[file.write(view) :]


def _parse(line: bytes) -> tuple[str, Any]:
    """ValueError (or RecursionError) for whatever is not the protocol."""
    answer = json.loads(line.decode("utf-8"))
    if isinstance(answer, dict) and len(answer) == 1:
        kind, value = next(iter(answer.items()))
        if kind in ("event", "result"):
            return kind, value
        texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        if kind == "error" and texts and set(value) == {"type", "what", "cause", "fix"}:
            return kind, value
    raise ValueError("not an answer")


def _as_error(fields: dict[str, str]) -> CourseError:
    """The error that the worker raised; one of a type that this side does not know is a WorkerError."""
    kind = getattr(errors, fields["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, CourseError)):
        kind = WorkerError
    return kind(fields["what"], cause=fields["cause"], fix=fields["fix"])


def _explain_end(code: int, last_words: str, out_of_memory: bool, again: str) -> tuple[str, str, str]:
    """What happened, the likely cause and the fix, for a worker that this side did not end.

    code: as subprocess gives it, so a signal is negative.
    out_of_memory: whether the system has killed a process for want of memory while the worker ran.
    """
    words = f"Its last words: {last_words or 'none'}"
    number = -code if code < 0 else code - 128  # as a shell that starts Python passes it on
    name = next((known.name for known in signal.Signals if known == number), "")
    if code >= 0 and not name:
        return f"exit code {code}", f"Something in it ended the process. {words}", again
    if name == "SIGKILL" and out_of_memory:
        return name, "The system ran out of memory and ended it.", "Close other programs, or build something smaller."
    causes = {
        "SIGKILL": "It was killed from outside; lack of memory is one cause.",
        "SIGXCPU": "It reached the limit on processor time (ulimit -t).",
        "SIGBUS": f"A file that it reads was cut, or a disk is full; or native code crashed. {words}",
        "SIGILL": f"Native code asks for instructions that this processor lacks. {words}",
        **dict.fromkeys(("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"), "Somebody or the system ended it from outside."),
    }
    return name or f"signal {number}", causes.get(name, f"A crash in native code. {words}"), again


def _oom_kills() -> int:
    """How often Linux has killed a process for want of memory: in this container if it counts that, else at all."""
    for file in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"):
        with contextlib.suppress(OSError):
            counts = dict(line.split()[:2] for line in Path(file).read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


def _forget(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker that nobody holds any more. owner: its parent; a fork of that has the Worker too, and lets it be."""
    if os.getpid() == owner:
        commands.kill_all(process)


# The worker's side


def serve(module: str) -> None:
    """Answer requests until the input closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to standard output from here on, native code included, lands on standard error
    sys.stdout = sys.stderr
    incoming = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a library that asks a question gets no answer, and no request

    def send(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def send_error(error: Exception) -> None:
        if not isinstance(error, CourseError):
            error = errors.out_of_memory(error) or error
        if isinstance(error, CourseError):
            send(error={"type": type(error).__name__, "what": error.what, "cause": error.cause, "fix": error.fix})
        else:
            what = f"{type(error).__name__} in the worker: {error}"
            cause = errors.why_refused(error) if isinstance(error, OSError) else ""
            send(error={"type": "WorkerError", "what": what, "cause": cause, "fix": ""})

    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(incoming, requests), daemon=True).start()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    try:
        served = importlib.import_module(module)
        os.environ |= getattr(served, "ENVIRONMENT", {}) | os.environ
        calls = served.CALLS
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


def _drain(steps: Any, send: Callable[..., None]) -> Any:
    """What a generator returns in the end; all that it yields is sent."""
    while True:
        try:
            send(event=next(steps))
        except StopIteration as end:
            return end.value


def _listen(incoming: IO[str], requests: queue.Queue[str]) -> None:
    """Pass on the lines of standard input. Its end means that the parent closed us or is gone: end at once."""
    try:
        for line in incoming:
            requests.put(line)
    finally:
        _end()


def _watch(parent: int) -> None:
    """End with the parent too where a fork of it lives on, which holds the other end of our input."""
    while os.getppid() == parent:
        time.sleep(0.5)
    _end()


def _end() -> None:
    commands.kill_own_descendants()
    os._exit(0)


def log_size() -> int:
    """In a worker: bytes that native code and we have written to standard error so far; 0 where that is no file."""
    status = os.fstat(2)
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def log_since(start: int) -> str:
    if not stat.S_ISREG(os.fstat(2).st_mode):
        return ""
    with contextlib.suppress(OSError):  # opened for writing only
        return os.pread(2, 1 << 20, start).decode("utf-8", "replace")
    return ""


if __name__ == "__main__":
    serve(sys.argv[1])
