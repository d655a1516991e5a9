"""What this machine is: the facts that an engine is compiled for, and the bandwidth that bounds it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import BackendUnavailable, InputError, shown
from helpers.machine import commands, limits
from helpers.paths import check_working_folder, is_one_word

if TYPE_CHECKING:
    from torch import Tensor

ANSWER_LIMIT = 4.0  # seconds for a compiler to say what it is


@dataclass(frozen=True)
class Hardware:
    """One device as an engine sees it. `architecture` is what must be equal for an engine to run."""

    device: str  # "cpu" or "cuda"
    name: str  # as the maker calls it
    architecture: str  # such as "x86_64 AVX512" or "sm_90"
    cores: int  # cores this process may use, or streaming multiprocessors
    memory_bytes: int
    driver: str  # NVIDIA driver version, or "" on a CPU
    instructions: tuple[str, ...] = ()  # the CPU's vector instruction sets: compiled code uses all that there are

    def __str__(self) -> str:
        unit = "SMs" if self.device == "cuda" else "cores"
        return f"{self.name} ({self.architecture}, {self.cores} {unit}, {self.memory_bytes / 2**30:.0f} GiB)"


def resolve_device(device: str = "auto") -> str:
    """'cpu' or 'cuda' for a recipe's device; asking for cuda where there is none raises BackendUnavailable."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"There is no device {shown(device)}.", fix="Give 'auto', 'cpu' or 'cuda'.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            "The recipe asks for device 'cuda', and PyTorch finds no NVIDIA GPU here.",
            cause="No GPU, no driver, or a CPU build of PyTorch.",
            fix="Use device='auto' or 'cpu', or run on a machine where nvidia-smi lists a GPU.",
        )
    return device


@cache
def driver() -> str:
    """The NVIDIA driver's version, or "" where there is none: from nvidia-smi, else from the kernel."""
    answer = commands.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 5)
    words = answer.stdout.split()[:1] if answer.returncode == 0 else []
    with contextlib.suppress(OSError):
        words += Path("/proc/driver/nvidia/version").read_text().split()
    return next((word for word in words if re.match(r"\d+\.", word)), "")


@cache
def describe(device: str = "auto") -> Hardware:
    """The device that a recipe would use here."""
    check_working_folder()
    import psutil
    import torch

    if resolve_device(device) == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Hardware(
            "cuda",
            properties.name,
            f"sm_{properties.major}{properties.minor}",
            properties.multi_processor_count,
            properties.total_memory,
            driver(),
        )
    name = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    architecture = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    memory = psutil.virtual_memory().total
    return Hardware("cpu", name, architecture, free_cores(), memory, "", instructions())


def free_memory() -> int:
    """Bytes that this process can still take: what the system has free, less what a container's limit leaves out."""
    import psutil

    left = limits.memory()
    free = psutil.virtual_memory().available
    return free if left is None else min(free, left)


def peak_host_bytes(pid: int | str = "self") -> int:
    """On Linux from /proc: getrusage would count what the parent held when it started this process."""
    if held := _field(f"/proc/{pid}/status", "VmHWM"):
        return int(held.split()[0]) * 1024
    import psutil

    info = psutil.Process(None if pid == "self" else int(pid)).memory_info()
    return getattr(info, "peak_wset", info.rss)  # Windows counts the peak; elsewhere it is what is held now


def free_cores() -> int:
    """Cores this process may run on: the scheduler's mask, less what a container's quota leaves out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = limits.cores()
    return cores if granted is None else min(cores, max(1, int(granted)))


def free_threads() -> int:
    """Threads for the loops of one process: its cores, or fewer where OMP_NUM_THREADS says so, of which a server's
    learners get a share."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has a number for each nesting
    return min(free_cores(), int(first)) if first.isdecimal() and int(first) else free_cores()


@cache
def cache_bytes() -> int:
    """The processor's largest cache, as Linux tells its size; 32 MB where nobody does."""
    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes)


def default_threads(weight_bytes: int) -> int:
    """CPU threads for a comparison in which all contenders get the same: one while the weights fit in cache, else
    `free_threads`.

    A decode step is a few hundred small loops. Below about 64 MB of weights, waking a second thread for each costs
    more than it gives on some CPUs, and pays on others; threads that lose their core to another job cost ten times
    that. So one is the safe choice. An engine's own number is measured when it is built.
    """
    return 1 if weight_bytes < 64e6 else free_threads()


def measure_bandwidth(device: str = "auto", threads: int | None = None) -> float:
    """Bytes per second that reading memory once reaches: of 64 MB on a CPU for each thread that has a core (past the
    caches), of 2 GB on a GPU.

    Reading is what a decode step does with its weights, so weight bytes over this figure is the least possible time
    per token.
    """
    kind, threads = resolve_device(device), threads or free_cores()
    size = 2**31 if kind == "cuda" else min(threads, free_cores()) * 2**26
    return size / least_time(size, kind, threads)


def least_time(size: int, device: str, threads: int) -> float:
    """Seconds to read `size` bytes once, by the best of up to 20 sums over one float32 array of that size.

    The array is read again and again, as a decode step reads its weights. So where these fit in the processor's
    cache, the limit is the cache's, not the memory's. On a GPU its own clock counts, over sums that need no host: to
    start one takes the host longer than a GPU needs to read ten megabytes.
    """
    import torch

    device = resolve_device(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # The type is named, because a notebook may have set another as torch's default.
        values = torch.ones(max(1, size // 4), dtype=torch.float32, device=device)
        once = _sum_on_gpu(values) if device == "cuda" else partial(_sum_on_cpu, values)
        times: list[float] = []
        while len(times) < 20 and (len(times) < 5 or sum(times) < 0.3):
            times.append(once())
        return min(times)
    finally:
        torch.set_num_threads(before)


def _sum_on_cpu(values: Tensor) -> float:
    start = time.perf_counter()
    values.sum().item()
    return time.perf_counter() - start


def _sum_on_gpu(values: Tensor) -> Callable[[], float]:
    """A function that gives the seconds of one sum: of ten that follow each other in a CUDA graph."""
    import torch

    sums, recording = 10, torch.cuda.CUDAGraph()
    values.sum()  # outside the recording, because a first call sets up what a recording may not
    with torch.cuda.graph(recording, capture_error_mode="thread_local"):
        for _ in range(sums):
            values.sum()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        begin.record()
        recording.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / sums

    return once


def compiler() -> str:
    """Name or path of the C++ compiler that Inductor will call; raises BackendUnavailable if there is none. Inductor
    puts it into one line, where a space in its path would cut it."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and is_one_word(name) and shutil.which(name):
            return name
    raise BackendUnavailable(
        "There is no C++ compiler on this machine.",
        cause="The aot backend compiles its kernels with g++ or clang++, and neither is on the PATH. What CXX names "
        "does not count where it is no program, or has a space in its path.",
        fix="Install one: 'apt-get install g++', 'dnf install gcc-c++' or 'xcode-select --install'.",
    )


def compiler_version() -> str:
    """The C++ compiler's first line about itself, or its name, where it says nothing within some seconds; "none" where
    there is none, for an engine runs without. Asked anew each time (1.4 ms): a kernel may outlive a compiler."""
    try:
        name = compiler()
    except BackendUnavailable:
        return "none"
    return next(iter(commands.run([name, "--version"], ANSWER_LIMIT).stdout.splitlines()), "") or name


def versions() -> dict[str, str]:
    """What an engine depends on beside its recipe; a change in any of these means a new build. BackendUnavailable where
    another version was installed since this process imported its own: a build's workers would import the other."""
    import torch

    for name, file in (("torch", "version.py"), ("transformers", "__init__.py")):
        if name not in sys.modules:
            continue
        with contextlib.suppress(OSError, AttributeError):  # it was taken away, or is a stand-in
            module = sys.modules[name]
            installed = Path(str(module.__file__)).with_name(file).read_text(encoding="utf-8")
            if not re.search(rf"""['"]{re.escape(module.__version__)}['"]""", installed):
                raise BackendUnavailable(
                    f"Another {name} than {module.__version__}, which this process has imported, is installed by now.",
                    cause="It was installed after the notebook's kernel or the program had started.",
                    fix="Restart the kernel, or the program.",
                )
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {"torch": str(torch.__version__), **cuda}


def instructions() -> tuple[str, ...]:
    """Such as avx2, avx512f, amx_int8 (x86) or asimd, sve (Arm), as Linux lists them; empty elsewhere."""
    kinds = ("avx", "amx", "fma", "f16c", "bmi", "abm", "asimd", "sve", "sme", "bf16", "i8mm")
    listed = _field("/proc/cpuinfo", "flags") or _field("/proc/cpuinfo", "Features")
    return tuple(sorted(name for name in listed.split() if name.startswith(kinds)))


def _field(file: str, name: str) -> str:
    """What Linux says under a name, in a file of lines "name: value"; "" elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""
