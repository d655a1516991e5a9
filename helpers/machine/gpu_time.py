"""How long a GPU worked, read from a trace of torch.profiler: the same reading for an engine in this process and for
one in another, such as vLLM's.

A trace slows the host down, but not the kernels. So their durations count here, and the time of a step is measured
without a trace.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from helpers.errors import InputError
from helpers.paths import owned_folder

WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of Kineto's trace events
# A gap up to this long between two pieces of work is the GPU's own: it goes on to what is queued already, or to the
# next node of a CUDA graph. A longer one is a wait for the host, which takes more than this to launch anything.
HANDOVER_S = 5e-6
PATIENCE_S = 60.0  # for a trace that another thread writes


class GpuTime(NamedTuple):
    """Seconds in which the GPU worked, and seconds in which it went from one piece of work to the next."""

    busy_s: float
    handover_s: float


def traced(call: Callable[[], Any]) -> GpuTime:
    """What the GPU does while this process makes the call. Raises InputError where the profiler sees nothing."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with owned_folder("course-trace-") as folder:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        path = folder / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read(path)


def read(trace: Path) -> GpuTime:
    """What the GPU did in a trace, on whatever streams. Raises InputError where the trace shows nothing of a GPU."""
    events = json.loads(trace.read_bytes())["traceEvents"]
    work = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e.get("cat") in WORK)
    if not work:
        raise InputError(
            "The profiler saw no work on the GPU.",
            cause="The driver lets only administrators look at a GPU's work, or another profiler is looking.",
            fix="See NVIDIA's ERR_NVGPUCTRPERM page, or ask the machine's owner.",
        )
    busy = handover = 0.0
    end = work[0][0]
    for start, stop in work:  # in microseconds; pieces may overlap
        gap = max(0.0, start - end)
        handover += gap if gap <= HANDOVER_S * 1e6 else 0.0
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return GpuTime(busy / 1e6, handover / 1e6)


def read_from(folder: Path) -> GpuTime:
    """The same of the one trace that another process writes into a folder, which goes with it. Raises InputError if
    none comes."""
    deadline = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < deadline:
            for path in folder.glob("*.json"):
                with contextlib.suppress(ValueError):  # it is not whole yet
                    return read(path)
            time.sleep(0.1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise InputError("The library wrote no trace of its work on the GPU.", cause="Its profiler failed; see its log.")
