"""What else the machine does while something is timed here."""

from __future__ import annotations

import contextlib
import time

import psutil

BUSY = 0.1  # of the cores: with more of them at other work, times are not this machine's best


class OtherWork:
    """Counts the work of everybody but this process and those it started, from now on.

    What the host of a virtual machine takes for itself counts as well.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._all, self._own = _seconds()

    def cores(self) -> float:
        """How many cores it has kept busy since then, in the mean."""
        took = time.perf_counter() - self._start
        everything, own = _seconds()
        return max(0.0, (everything - self._all) - (own - self._own)) / took


def _seconds() -> tuple[float, float]:
    """Processor seconds since the machine was started: all that were used, and those of this process and its own."""
    times = psutil.cpu_times()
    unused = ("idle", "iowait", "guest", "guest_nice")  # what guests use counts as the user's already
    everything = sum(value for name, value in times._asdict().items() if name not in unused)
    me, own = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended since
            t = process.cpu_times()
            own += t.user + t.system + t.children_user + t.children_system
    return everything, own
