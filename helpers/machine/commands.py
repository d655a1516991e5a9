"""Commands that may be missing, hang, or leave processes behind: none of that reaches who runs them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from typing import Any

POSIX = os.name == "posix"
MISSING, TOO_SLOW = 127, 124  # exit statuses, as a shell and `timeout` give them
# Popen's settings for a process that leads a session: it can be killed with all that it starts, and the Stop button of
# a notebook and Ctrl-C of a terminal do not reach it.
OWN_SESSION: dict[str, Any] = {
    "start_new_session": POSIX,
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
}


def run(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run; a command that is missing or takes more than `limit` seconds is a result too, with exit
    status MISSING or TOO_SLOW. One that is too slow is killed with all that it has started."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            **OWN_SESSION,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, MISSING, "", f"{command[0]}: {error.strerror or error}")
    try:
        output, complaints = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return subprocess.CompletedProcess(command, TOO_SLOW, output, f"no answer within {limit:.0f} s")
    finally:
        if process.returncode is None:  # too slow, or we were interrupted
            kill_all(process)
    return subprocess.CompletedProcess(command, process.returncode, output, complaints)


def complaint(words: str) -> str:
    """The line that says most of what a program complains of: the first that names an error of a compiler or a linker,
    else the last."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror: |cannot find", line)]
    return [*lines[-1:], *telling[:1]][-1] if lines else ""


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
