"""Progress that a person can follow: which phase runs, for how long, and what each one took."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import filelock


SILENT_S = 2.0  # what takes longer is shown
_hushed: ContextVar[bool] = ContextVar("_hushed", default=False)


@contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """With quiet, nothing is shown or said while the block runs."""
    token = _hushed.set(quiet or _hushed.get())
    try:
        yield
    finally:
        _hushed.reset(token)


class Progress:
    """A list of phases, redrawn every half second while one runs, and left as a table of times.

    In a notebook it is one output that changes in place; in a terminal, one line a phase.
    """

    def __init__(self, title: str):
        self.title, self.quiet = title, _hushed.get()
        self.seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None
        self._parts: list[str] = []
        self._handle = None if self.quiet else _notebook_display()
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._say(title)
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str, start: float | None = None) -> Iterator[None]:
        start = start or time.perf_counter()
        self._running = (name, start)
        self._draw()
        try:
            yield
        finally:
            self._running = None
        self.seconds[name] = time.perf_counter() - start
        self._draw()
        if self._handle is None:
            self._say(f"  {name:<28} {self.seconds[name]:6.1f} s")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A piece of the running phase, named beside it and not timed by itself. Pieces may run side by side."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.remove(name)

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._draw()

    def vanish(self) -> None:
        """Leave an empty output of it, where it is closed and in a notebook."""
        if self._handle is not None:
            with suppress(Exception):  # as in _write
                self._handle.update({}, raw=True)  # an empty text would be an empty line

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lines(self) -> list[str]:
        lines = [self.title, *(f"  {name:<28} {took:6.1f} s" for name, took in self.seconds.items())]
        if running := self._running:
            parts = ", ".join(self._parts)
            lines.append(f"  {running[0]:<28} {time.perf_counter() - running[1]:6.1f} s ... {parts}".rstrip())
        elif self._done.is_set() and self.seconds:
            lines.append(f"  {'total':<28} {sum(self.seconds.values()):6.1f} s")
        return lines

    def _draw(self) -> None:
        if self._handle is not None:
            with self._lock, suppress(Exception):  # as in _write
                self._handle.update({"text/plain": "\n".join(self._lines())}, raw=True)
        elif not self.quiet and self._running:
            _write(f"  {self._lines()[-1].strip()}", sys.stderr, on_terminal=True)

    def _tick(self) -> None:
        while not self._done.wait(0.5):
            self._draw()

    def _say(self, line: str) -> None:
        if not self.quiet and self._handle is None:
            _write(line, sys.stderr)


@contextmanager
def shown_if_slow(title: str, phase: str) -> Iterator[None]:
    """The block as a phase that is shown once it has taken some time. A notebook shows it while it runs, and keeps
    nothing of it: what is slow on one machine is not on another."""
    start, done = time.perf_counter(), threading.Event()

    def show() -> None:
        if not done.wait(SILENT_S):
            with Progress(title) as progress, progress.phase(phase, start):
                done.wait()
            progress.vanish()

    thread = threading.Thread(target=copy_context().run, args=(show,), daemon=True)  # hushed where this one is
    try:
        with suppress(RuntimeError):  # a limit on threads keeps nobody from what is to be done
            thread.start()
        yield
    finally:
        done.set()
        if thread.ident:
            thread.join()


@contextmanager
def held(lock: filelock.BaseFileLock, what: str) -> Iterator[None]:
    """Hold a lock for the block. Where another process has it, say what that one does, and wait.

    what: such as "builds NAME".
    """
    import filelock

    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        title = f"Another process {what}. This one waits for it; interrupt it if you do not want to."
        with Progress(title) as progress, progress.phase("wait"):
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def say(line: str) -> None:
    """One line to whoever is watching: a cell's output in a notebook, standard error in a terminal."""
    if not _hushed.get():
        _write(line, sys.stdout if in_notebook() else sys.stderr)


def _write(line: str, stream: TextIO | None, on_terminal: bool = False) -> None:
    """What nobody reads any more, or has no room, must not end the work that it tells of; nor must an object of the
    learner's own in the stream's place, which may lack anything. on_terminal: a line that the next one overwrites."""
    with suppress(Exception):
        if stream is not None and (not on_terminal or stream.isatty()):
            print(line, end="\r" if on_terminal else "\n", file=stream, flush=True)


def in_notebook() -> bool:
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None and get_ipython().__class__.__name__ == "ZMQInteractiveShell"


def _notebook_display():
    if not in_notebook():
        return None
    from IPython.display import display

    with suppress(Exception):  # as in _write
        return display({"text/plain": ""}, raw=True, display_id=True)
    return None
