"""Commands that may be missing, hang, or leave processes behind: none of that reaches who runs them."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from typing import Any

POSIX = os.name == "posix"
LONGEST = 1 << 24  # bytes of what a command writes
MISSING, TOO_SLOW = 127, 124  # exit statuses, as a shell and `timeout` give them
# Popen's settings for a process that leads a session: it can be killed with all that it starts, and the Stop button of
# a notebook and Ctrl-C of a terminal do not reach it.
OWN_SESSION: dict[str, Any] = {
    "start_new_session": POSIX,
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
}


def run(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run; a command that is missing, takes more than `limit` seconds or does not stop writing is a
    result too, with exit status MISSING or TOO_SLOW. One that is too slow is killed with all that it has started."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **OWN_SESSION,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, MISSING, "", f"{command[0]}: {error.strerror or error}")
    try:
        output, complaints = _communicate(process, limit)
        status = process.returncode
    except subprocess.TimeoutExpired as late:
        output, status = late.stdout or b"", TOO_SLOW
        endless = len(output) + len(late.stderr or b"") > LONGEST
        complaints = b"it does not stop writing" if endless else f"no answer within {limit:.0f} s".encode()
    finally:
        if process.returncode is None:  # too slow, or we were interrupted
            kill_all(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    return subprocess.CompletedProcess(command, status, *(x.decode(errors="replace") for x in (output, complaints)))


def _communicate(process: subprocess.Popen[bytes], limit: float) -> tuple[bytes, bytes]:
    """What it writes until it ends. TimeoutExpired after `limit` seconds, and once there is more than anybody reads:
    memory would not hold what is written for ever."""
    if not POSIX:
        return process.communicate(timeout=limit)
    deadline = time.monotonic() + limit
    output, complaints = bytearray(), bytearray()
    with selectors.DefaultSelector() as open_pipes:
        for pipe, text in ((process.stdout, output), (process.stderr, complaints)):
            if pipe is not None:
                open_pipes.register(pipe, selectors.EVENT_READ, text)
        while open_pipes.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or len(output) + len(complaints) > LONGEST:
                raise subprocess.TimeoutExpired(process.args, limit, bytes(output), bytes(complaints))
            for key, _ in open_pipes.select(left):
                block = os.read(key.fd, 1 << 16)
                key.data.extend(block)
                if not block:
                    open_pipes.unregister(key.fileobj)
    process.wait(max(0.0, deadline - time.monotonic()))
    return bytes(output), bytes(complaints)


def complaint(words: str) -> str:
    """The line that says most of what a program complains of: the first that names an error of a compiler or a linker,
    else the last."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror: |cannot find", line)]
    return [*lines[-1:], *telling[:1]][-1][:500] if lines else ""


def complaint_of(answer: subprocess.CompletedProcess[str]) -> str:
    """The same of a command that failed; without words, how it ended."""
    if answer.returncode < 0:
        killed = answer.returncode == -9  # SIGKILL
        return f"it {'was killed, as where memory runs out' if killed else 'crashed'} (signal {-answer.returncode})"
    return complaint(answer.stderr or answer.stdout) or f"exit status {answer.returncode}"


def kill_all(process: subprocess.Popen[Any]) -> None:
    """Kill a process of OWN_SESSION and all that it has started: its group and, where psutil is there, what has left
    the group. After its own end too, for what it left."""
    others: list[Any] = []
    try:
        if process.poll() is None:
            others = _descendants(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: a group of zombies, on macOS
            if POSIX:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        _kill_each(others)


def kill_own_descendants() -> None:
    """Kill all that this process has started; and this process too, if it leads a group."""
    _kill_each(_descendants(os.getpid()))
    if POSIX and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


def _descendants(pid: int) -> list[Any]:
    """Without psutil, which another environment need not have, only the process group is known."""
    try:
        import psutil
    except ImportError:
        return []
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _kill_each(processes: list[Any]) -> None:
    for process in processes:
        import psutil

        with contextlib.suppress(psutil.Error):  # it has ended, or is not ours
            process.kill()
