"""Is this machine ready for the course? Each check is one line: OK, a warning or a failure, and the step that mends it.

Whatever can crash or hang (torch, a compiled library, another environment) is tried in a process of its own with a
time limit, and the checks run side by side, so that the whole takes seconds and never more than `TIME_LIMIT`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from helpers.errors import BackendUnavailable
from helpers.machine import environments, hardware
from helpers.paths import PROJECT, engines_folder

TIME_LIMIT = 14.0  # seconds for one check; all begin together, after the driver's 5
NEWEST_PYTHON, OLDEST_PYTHON = (3, 13), (3, 10)
CUDA13_DRIVER = 580  # CUDA 13.0 release notes: the first driver branch that runs CUDA 13
SPACE = 3e9  # bytes that the course's own engines and caches may take


@dataclass(frozen=True)
class Check:
    """One line. status: "OK", "warning" (the course runs, something is missing or slow) or "failure"."""

    name: str
    status: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.name:<22} {self.found}"
        return f"{line}\n{'':<9}Fix: {self.fix}" if self.fix else line


def ok(name: str, found: str) -> Check:
    return Check(name, "OK", found)


def warning(name: str, found: str, fix: str) -> Check:
    return Check(name, "warning", found, fix)


def failure(name: str, found: str, fix: str) -> Check:
    return Check(name, "failure", found, fix)


# What torch sees, asked in a process of its own: its CUDA context and its crashes stay there. One JSON line a step,
# so that a crash keeps what came before it.
_ASK_TORCH = """
import json, os, torch
def say(**found): print(json.dumps(found), flush=True)
say(torch=str(torch.__version__), cuda=torch.version.cuda, threads=torch.get_num_threads())
say(available=torch.cuda.is_available())
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    say(gpu=p.name, capability=f"{p.major}.{p.minor}", sms=p.multi_processor_count, free=free, total=total,
        gpus=torch.cuda.device_count(), architectures=torch.cuda.get_arch_list())
    x = torch.ones(64, 64, device="cuda")
    say(product=float((x @ x)[0, 0]))
"""


@cache
def torch_facts(limit: float = TIME_LIMIT) -> dict[str, Any]:
    """What torch says of itself and of the GPU; "error" holds what went wrong, if something did."""
    facts: dict[str, Any] = {}
    done = _run([sys.executable, "-c", _ASK_TORCH], limit)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            facts.update(json.loads(line))
    if done.returncode != 0:
        facts["error"] = _last_line(done)
    return facts


def _run(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run, but a command that is missing or too slow is a result too, with exit status 127 or 124."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit, check=False)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return subprocess.CompletedProcess(command, 124, said, f"no answer within {limit:.0f} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it crashed (signal {-done.returncode})"
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


# The checks


def check_python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON or sys.maxsize < 2**32:
        fix = "Use a 64-bit Python 3.10 to 3.13, for example: make PYTHON=python3.12 setup"
        return failure("Python", found, fix)
    return ok("Python", found)


def check_notebook_tools() -> Check:
    missing = [n for n in ("ipykernel", "nbclient", "ipywidgets", "matplotlib") if not importlib.util.find_spec(n)]
    if missing:
        return warning("notebook tools", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return ok("notebook tools", f"ipykernel {importlib.metadata.version('ipykernel')}")


_TINY = r"""
#include <regex>
#include <string>
extern "C" int course_matches(const char* text) { return std::regex_match(std::string(text), std::regex("a+b")); }
"""
_LOAD = "import ctypes, sys; sys.exit(0 if ctypes.CDLL(sys.argv[1]).course_matches(b'aab') == 1 else 3)"


def check_compiler() -> Check:
    """Compile, load and call something tiny, as the aot backend does with an engine's kernels."""
    try:
        compiler = hardware.compiler()
    except BackendUnavailable as error:
        return failure("C++ compiler", error.what, error.fix)
    name = f"{hardware.compiler_version()}{' (from CXX)' if compiler == os.environ.get('CXX') else ''}"
    other = next((path for path in map(shutil.which, ("g++", "clang++")) if path and path != compiler), None)
    fix = f"export CXX={other}" if other else "Install g++ and, if CXX is set, unset it."
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "tiny.cpp", Path(folder) / "tiny.so"
        source.write_text(_TINY)
        done = _run([compiler, "-shared", "-fPIC", "-O0", "-o", str(library), str(source)], TIME_LIMIT - 4)
        if done.returncode != 0:
            return failure("C++ compiler", f"{name}: cannot compile: {_last_line(done)}", fix)
        if sys.platform == "linux" and not any(n in library.read_bytes() for n in (b"libstdc++.so", b"libc++.so")):
            # Two copies of the C++ library in one process: torch's and this one. A CUDA engine then crashes on loading.
            return failure("C++ compiler", f"{name}: puts a copy of the C++ library into each engine", fix)
        done = _run([sys.executable, "-c", _LOAD, str(library)], 4)
        if done.returncode != 0:
            return failure("C++ compiler", f"{name}: what it compiles does not load: {_last_line(done)}", fix)
    return ok("C++ compiler", f"{name}: compiled, loaded and called a function")


def check_torch() -> Check:
    facts = torch_facts()
    if "torch" not in facts:
        slow = "no answer" in facts["error"]
        return (warning if slow else failure)(
            "PyTorch",
            facts["error"],
            "Run this again: the first import on a fresh machine is slow." if slow else "Install it: make setup",
        )
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    found = f"{facts['torch']}, {build}"
    version = tuple(int(part) for part in facts["torch"].split("+")[0].split(".")[:2])
    if not (2, 9) <= version <= (2, 13):
        return warning("PyTorch", found, "The course is made for 2.9 to 2.13: make setup installs one of them.")
    if hardware.driver() and not facts["cuda"]:
        fix = "Install the CUDA build: pip install --force-reinstall torch, from an index that has it."
        return warning("PyTorch", f"{found}, and there is an NVIDIA driver here", fix)
    if hardware.driver() and not facts.get("available"):
        fix = "Does nvidia-smi list a GPU? If so, this build of PyTorch needs a newer driver, or an older CUDA build."
        return failure("PyTorch", f"{found}, but it finds no usable GPU", fix)
    if "error" in facts:
        return failure("PyTorch", f"{found}: {facts['error']}", "Run nvidia-smi: is the GPU in order, is it free?")
    return ok("PyTorch", found)


def check_driver() -> Check:
    version = hardware.driver()
    if not version:
        return ok("NVIDIA driver", "none: the engines of this machine run on the CPU")
    if int(version.split(".")[0]) < CUDA13_DRIVER:
        fix = f"TensorRT-LLM 1.2.1 and vLLM are built for CUDA 13: install driver {CUDA13_DRIVER} or newer for them."
        return warning("NVIDIA driver", version, fix)
    return ok("NVIDIA driver", version)


def check_gpu() -> Check:
    facts = torch_facts()
    if "gpu" not in facts:
        return (
            ok("GPU", "none that PyTorch can use")
            if not hardware.driver()
            else warning("GPU", "the driver is there, but PyTorch reports no GPU", "See the line of PyTorch.")
        )
    found = f"{facts['gpu']}, compute capability {facts['capability']}, {facts['sms']} SMs"
    found += f"; {facts['gpus']} GPUs, the first is used" if facts["gpus"] > 1 else ""
    major = int(facts["capability"].split(".")[0])
    if not any(name.split("_")[-1].rstrip("af").startswith(str(major)) for name in facts["architectures"]):
        fix = f"Install a PyTorch that has it; this one has {', '.join(facts['architectures'])}."
        return failure("GPU", f"{found}: this PyTorch has no kernels for it", fix)
    if major < 8:
        return warning("GPU", found, "TensorRT-LLM 1.2.1 needs compute capability 8.0 (Ampere) or newer.")
    return ok("GPU", found)


def check_memory() -> Check:
    free = hardware.free_memory()
    found = f"{free / 2**30:.1f} GiB free"
    if "free" in (facts := torch_facts()):
        found += f"; on the GPU {facts['free'] / 2**30:.1f} of {facts['total'] / 2**30:.1f} GiB free"
        if facts["free"] < 2 * 2**30:
            return warning(
                "memory", found, "Close what else uses the GPU; nvidia-smi lists it. A kernel restart helps."
            )
    if free < 2**29:
        return failure("memory", found, "Close other programs, or give the container more memory.")
    if free < 2 * 2**30:
        return warning("memory", found, "A build needs up to 2 GiB: close other programs first.")
    return ok("memory", found)


def check_disk() -> Check:
    places = {"engines": engines_folder(), "temporary files": Path(tempfile.gettempdir())}
    free = {what: shutil.disk_usage(_existing(place)).free for what, place in places.items()}
    found = ", ".join(f"{size / 1e9:.0f} GB free for {what}" for what, size in free.items())
    least = min(free.values())
    fix = "Delete what you do not need: helpers list, helpers remove ENGINE; COURSE_ENGINES names another folder."
    if least < 2e8:
        return failure("disk", found, fix)
    return warning("disk", found, fix) if least < SPACE else ok("disk", found)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.is_dir())


def check_threads() -> Check:
    free, all_cores = hardware.free_cores(), os.cpu_count() or 1
    wanted = torch_facts().get("threads", 0)
    found = (
        f"{free} of {all_cores} cores are this process's, PyTorch would use {wanted or 'an unknown number of'} threads"
    )
    if wanted > free:
        fix = f"export OMP_NUM_THREADS={free}: threads that share a core make decoding many times slower."
        return warning("threads", found, fix)
    return ok("threads", found)


def check_tensorrt() -> Check:
    """The first TensorRT that really loads, in the order in which the course looks for one."""
    problems = []
    for provider in ("tensorrt_rtx", "tensorrt"):
        if not importlib.util.find_spec(provider):
            continue
        done = _run([sys.executable, "-c", f"import {provider} as p; print(p.__version__)"], TIME_LIMIT / 2)
        if done.returncode == 0:
            return ok("TensorRT", f"{provider} {done.stdout.split()[-1]}")
        problems.append(f"{provider}: {_last_line(done)}")
    if problems:
        fix = "pip install --force-reinstall tensorrt-rtx; beside a GPU the driver's libcuda must be found too."
        return failure("TensorRT", "; ".join(problems), fix)
    if sys.platform == "darwin":
        return ok("TensorRT", "none: NVIDIA has no package for macOS; the cells that need it are skipped")
    fix = "pip install tensorrt-rtx (some 300 MB); without it the cells that need it are skipped."
    return warning("TensorRT", "not installed", fix)


def check_environment(name: str) -> Check:
    """TensorRT-LLM's or vLLM's own environment: does its Python start, and is it the pinned version?"""
    wanted = environments.ENVIRONMENTS[name]
    python = environments.python_of(name)
    if python is None:
        if not hardware.driver():
            return ok(wanted.title, "not here: it needs an NVIDIA GPU; the cells that need it are skipped")
        return warning(wanted.title, "no environment", f"helpers env create {name}, or the container of compose.yaml")
    code = f"from importlib.metadata import version; print(version({wanted.package!r}))"
    done = _run([str(python), "-c", code], TIME_LIMIT)
    if done.returncode != 0:
        fix = f"Name a Python that has it: export {environments.variable(name)}=..., or: helpers env create {name}"
        return failure(wanted.title, f"{_shown(python)}: {_last_line(done)}", fix)
    version = done.stdout.strip()
    if version != wanted.version:
        return warning(wanted.title, f"{version} ({_shown(python)})", f"The course is made for {wanted.version}.")
    return ok(wanted.title, f"{version} ({_shown(python)})")


def _shown(path: Path) -> str:
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


CHECKS: dict[str, Callable[[], Check]] = {
    "Python": check_python,
    "notebook tools": check_notebook_tools,
    "C++ compiler": check_compiler,
    "PyTorch": check_torch,
    "NVIDIA driver": check_driver,
    "GPU": check_gpu,
    "memory": check_memory,
    "disk": check_disk,
    "threads": check_threads,
    "TensorRT": check_tensorrt,
    "TensorRT-LLM": lambda: check_environment("trtllm"),
    "vLLM": lambda: check_environment("vllm"),
}


def examine() -> Iterator[Check]:
    """Every check's line, in order, each as soon as it and those before it are known."""
    torch_facts.cache_clear()
    hardware.driver.cache_clear()
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        asked = pool.submit(torch_facts)  # once, before the checks that share it
        pool.submit(hardware.driver).result()
        running = [pool.submit(_guarded, name, check, asked) for name, check in CHECKS.items()]
        for future in running:
            yield future.result()


_NEED_TORCH = ("PyTorch", "GPU", "memory", "threads")


def _guarded(name: str, check: Callable[[], Check], asked: Any) -> Check:
    if name in _NEED_TORCH:
        asked.result()
    try:
        return check()
    except (ImportError, OSError) as error:  # a broken installation is a finding, not the end of the list
        return failure(name, f"{type(error).__name__}: {error}", "make setup installs the course's packages.")


def main(*, as_json: bool = False) -> int:
    """`helpers doctor`: exit status 1 if a check failed."""
    start = time.monotonic()
    checks = []
    for check in examine():
        checks.append(check)
        if not as_json:
            print(check, flush=True)
    seconds = time.monotonic() - start
    counts = {status: sum(c.status == status for c in checks) for status in ("OK", "warning", "failure")}
    if as_json:
        passed = counts["failure"] == 0
        print(json.dumps({"ok": passed, "seconds": round(seconds, 1), "checks": [asdict(c) for c in checks]}, indent=1))
    else:
        words = ", ".join(f"{n} {status}{'s' if n > 1 and status != 'OK' else ''}" for status, n in counts.items() if n)
        print(f"\n{len(checks)} checks in {seconds:.1f} s: {words}.")
    return 1 if counts["failure"] else 0
