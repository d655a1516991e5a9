"""What this process may have of memory, cores, processes and files, where that is less than the machine has: on Linux
by its control groups, of both versions (a container has one, and systemd makes one for each user)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PROC, CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def memory() -> int | None:
    """Bytes that the tightest control group has left, or the process's own limit (ulimit -v); None without a limit.
    What a group keeps of files it would give back, so that does not count as taken."""
    left = []
    if (most := _soft_limit("RLIMIT_AS")) is not None:
        import psutil

        left.append(most - psutil.Process().memory_info().vms)
    for group in _groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # the files of the other version, or "max": no limit
                given_back = _fields(group / "memory.stat").get(cache, 0)
                if (most := int(_read(group / limit))) < 1 << 60:
                    left.append(most - int(_read(group / used)) + given_back)
    return max(0, min(left)) if left else None


def cores() -> float | None:
    """Cores' worth of time that the tightest control group grants; None without a limit."""
    granted = []
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = _read(group / "cpu.max").split()
            granted.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if int(quota) > 0:
                granted.append(int(quota) / int(period))
    return min(granted) if granted else None


def processes() -> int | None:
    """Processes and threads that may still start: by the tightest control group, and by the user's own limit, which
    root does not have. None without a limit."""
    left = []
    for group in _groups("pids"):
        with contextlib.suppress(OSError, ValueError):
            left.append(int(_read(group / "pids.max")) - int(_read(group / "pids.current")))
    most = _soft_limit("RLIMIT_NPROC")
    if most is not None and os.getuid() != 0:
        left.append(most - _threads_of(os.getuid()))
    return max(0, min(left)) if left else None


def open_files() -> int | None:
    """Files that this process may have open at a time; None without a limit."""
    return _soft_limit("RLIMIT_NOFILE")


def file_size() -> int | None:
    """Bytes that one file may have; None without a limit."""
    return _soft_limit("RLIMIT_FSIZE")


def _soft_limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def _threads_of(user: int) -> int:
    import psutil

    threads = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            threads += process.num_threads() if process.uids().real == user else 0
    return threads


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those above it: each one's limit binds."""
    with contextlib.suppress(OSError, ValueError):
        for line in _read(PROC / "self" / "cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root = CONTROL_GROUPS  # version 2: one hierarchy for all
            elif controller in controllers.split(","):
                root = CONTROL_GROUPS / controller
            else:
                continue
            folder = root / path.strip("/")
            yield from (group for group in (folder, *folder.parents) if group.is_relative_to(root))


def _read(path: Path) -> str:
    return path.read_text().strip()


def _fields(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        return {name: int(value) for name, value in (line.split() for line in _read(path).splitlines())}
    return {}
