"""Is this machine ready for the course? Each check is one line: OK, a warning or a failure, and the step that mends it.

Whatever can crash (torch, a compiled library, another environment) is tried in a process of its own with a time limit.
The checks run side by side, and one that does not answer is a line too: the whole takes seconds, and never more than
`LONGEST`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from helpers.access import check_store
from helpers.errors import BackendUnavailable, CourseError, StoreError, starved, why_refused
from helpers.machine import environments, hardware, leftovers, limits
from helpers.machine.check import Check, failure, ok, warning
from helpers.machine.commands import MISSING, TOO_SLOW, complaint_of, run
from helpers.machine.environments import shown
from helpers.paths import (
    PYTHON,
    compilers_folder,
    engines_folder,
    engines_folders,
    lets_programs_run,
    owned_folder,
    temporary_folder,
)

TIME_LIMIT = 14.0  # seconds for one command; all begin together, after the driver's 5
LONGEST = 20.0  # seconds for all
NEWEST_PYTHON, OLDEST_PYTHON = (3, 13), (3, 10)
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # of each CUDA, the first driver branch that runs it (its release notes)
SPACE = 3e9  # bytes that the course's own engines and caches may take
PROCESSES, FILES = 200, 512  # that JupyterLab, a kernel and a build take together, with some to spare


# What torch sees, asked in a process of its own: its CUDA context and its crashes stay there. One JSON line a step,
# so that a crash keeps what came before it.
_ASK_TORCH = """
import json, os, torch
def tell(**facts): print(json.dumps(facts), flush=True)
tell(torch=str(torch.__version__), cuda=torch.version.cuda, threads=torch.get_num_threads())
tell(available=torch.cuda.is_available())
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    tell(gpu=p.name, capability=f"{p.major}.{p.minor}", sms=p.multi_processor_count, free=free, total=total,
         gpus=torch.cuda.device_count(), architectures=torch.cuda.get_arch_list())
    x = torch.ones(64, 64, device="cuda")
    tell(product=float((x @ x)[0, 0]))
"""


@cache
def torch_facts(limit: float = TIME_LIMIT) -> dict[str, Any]:
    """What torch says of itself and of the GPU; "error" holds what went wrong, if something did."""
    facts: dict[str, Any] = {}
    answer = run([sys.executable, "-c", _ASK_TORCH], limit)
    for line in answer.stdout.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # somebody else's words
            facts.update(json.loads(line))
    if answer.returncode != 0:
        facts["error"] = complaint_of(answer)
    return facts


# The checks


def check_python() -> Check:
    version = f"{platform.python_implementation()} {platform.python_version()}"
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON or sys.maxsize < 2**32:
        fix = "Use a 64-bit Python 3.10 to 3.13, for example: make PYTHON=python3.12 setup"
        return failure(version, fix)
    try:
        os.getcwd()  # noqa: PTH109  (libraries ask as this does)
    except FileNotFoundError:
        return failure(f"{version}, started in a folder that is gone: libraries cannot be loaded from there", "cd ~")
    return ok(version)


def check_notebook_tools() -> Check:
    missing = [name for name in leftovers.NOTEBOOK_TOOLS if not importlib.util.find_spec(name)]
    if missing:
        return warning(f"missing: {', '.join(missing)}", f"{PYTHON} -m pip install {' '.join(missing)}")
    done = run([sys.executable, "-c", f"import {', '.join(leftovers.NOTEBOOK_TOOLS)}, matplotlib.figure"], LONGEST)
    if done.returncode:
        return failure(
            f"they cannot be imported: {complaint_of(done)}",
            f"Install them anew: {leftovers.ANEW}; see the packages, too.",
        )
    from jupyter_client.kernelspec import KernelSpecManager

    kernel = KernelSpecManager().get_kernel_spec("python3")
    python = Path(kernel.argv[0])  # a bare name stands for the Python that starts it
    if python.is_absolute() and python.parent.resolve() != Path(sys.executable).parent.resolve():
        fix = f"Remove {kernel.resource_dir}, which another environment has left; then start JupyterLab again."
        return warning(f"notebooks start another Python: {python}", fix)
    return ok(f"ipykernel {importlib.metadata.version('ipykernel')}")


# It uses the C++ library and torch's, as the kernels of an engine do; waiting is of a newer version of that library.
_PROBE = """
#include <condition_variable>
#include <stdexcept>
#include <string>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
void course_waits(std::condition_variable& one, std::unique_lock<std::mutex>& lock) { one.wait(lock); }
extern "C" int course_probe(const char* text) {
  try { throw std::runtime_error(std::string(text) + "b"); }
  catch (const std::exception& error) { return aoti_torch_device_type_cpu() == 0 && error.what() == std::string("ab"); }
}
"""
_CALL = "import ctypes, sys; sys.exit(0 if ctypes.CDLL(sys.argv[1]).course_probe(b'a') == 1 else 'it answers nonsense')"


def check_compiler() -> Check:
    """Compile, link with torch's own libraries, load and call something tiny, as the aot backend does with an engine's
    kernels. torch itself is not imported, for that takes longer than the rest."""
    try:
        compiler = hardware.compiler()
    except BackendUnavailable as error:
        return failure(error.what, error.fix)
    name = f"{hardware.compiler_version()}{' (from CXX)' if compiler == os.environ.get('CXX') else ''}"
    there = [path for path in map(shutil.which, (compiler, "g++", "clang++")) if path]
    other = next((path for path in there if not Path(path).samefile(there[0])), None)
    fix = f"export CXX={other}" if other else "Install g++ anew and, if CXX is set, unset it."
    torch = importlib.util.find_spec("torch")
    headers, libraries = (Path(torch and torch.origin or "").parent / name for name in ("include", "lib"))
    if not (headers / "torch").is_dir():
        return failure(f"{name}: there is no PyTorch to link with", "See the lines of PyTorch and of the packages.")
    standard = _standard_of(headers.parent)
    with owned_folder("course-doctor-") as folder:
        source, library = folder / "probe.cpp", folder / "probe.so"
        source.write_text(_PROBE)
        command = [compiler, str(source), "-o", str(library), f"-std={standard}", "-shared", "-fPIC", f"-I{headers}"]
        command += ["-fopenmp"] if sys.platform == "linux" else []
        command += [f"-L{libraries}", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        answer = run(command, TIME_LIMIT - 4)
        if answer.returncode == TOO_SLOW:
            return warning(f"{name}: {complaint_of(answer)}", f"Run this again. If it stays so: {fix}")
        if answer.returncode != 0:
            if f"-std={standard}" in answer.stderr:
                fix = "Install g++ 10 or newer (or clang++ 10 or newer), and let CXX name it: export CXX=COMPILER"
            return failure(f"{name}: cannot compile: {complaint_of(answer)}", fix)
        if sys.platform == "linux" and not any(n in library.read_bytes() for n in (b"libstdc++.so", b"libc++.so")):
            # Two copies of the C++ library in one process: torch's and this one. A CUDA engine then crashes on loading.
            return failure(f"{name}: puts a copy of the C++ library into each engine", fix)
        answer = run([sys.executable, "-c", _CALL, str(library)], 4)
        if answer.returncode != 0:
            newer = re.search(r"version `\w+_[\d.]+' not found", answer.stderr)
            fix = "unset LD_LIBRARY_PATH" if newer else f"See the line of the temporary folder. If that is OK: {fix}"
            return failure(f"{name}: what it compiles does not load: {complaint_of(answer)}", fix)
    if (named := os.environ.get("CXX")) and named != compiler:
        wrong = "has a space in its path" if shutil.which(named) else "is no program"
        return warning(f"{name}: it works, but CXX names {named!r}, which {wrong}", "unset CXX")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        fix = f"Install Python's headers, such as: apt install python{sysconfig.get_python_version()}-dev"
        return warning(f"{name}: it works, but there is no Python.h, which torch_compile's kernels include", fix)
    return ok(f"{name}: compiled, linked with PyTorch, loaded and called a function")


def _standard_of(torch: Path) -> str:
    """The C++ standard that a torch compiles with, as its own text says: c++20 in 2.13, c++17 in 2.9."""
    with contextlib.suppress(OSError):
        text = (torch / "_inductor/cpp_builder.py").read_text(encoding="utf-8")
        if said := re.search(r'def _get_cpp_std_cflag\(std_num: str = "(c\+\+\w+)"', text):
            return said[1]
    return "c++17"


def check_torch() -> Check:
    facts = torch_facts()
    if "torch" not in facts:
        if "no answer" in facts["error"]:
            return warning(facts["error"], "Run this again: the first import on a fresh machine is slow.")
        return failure(
            facts["error"], f"See the lines of the memory and the packages. If they are OK: {leftovers.ANEW}"
        )
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU build"
    line = f"{facts['torch']}, {build}"
    version = tuple(int(part) for part in facts["torch"].split("+")[0].split(".")[:2])
    if not (2, 9) <= version <= (2, 13):
        return warning(line, f"The course is made for 2.9 to 2.13. {leftovers.ANEW} installs one of them.")
    if hardware.driver() and not facts["cuda"]:
        # pip's own index has the CUDA build; the other came from one that pip was told of, which --isolated leaves out.
        pip = f"{PYTHON} -m pip --isolated install --force-reinstall"
        fix = f"Install the CUDA build: {pip} --constraint {leftovers.CONSTRAINTS} torch"
        return warning(f"{line}, and there is an NVIDIA driver here", fix)
    if hardware.driver() and not facts.get("available"):
        fix = "Does nvidia-smi list a GPU? If so, this build of PyTorch needs a newer driver, or an older CUDA build."
        return failure(f"{line}, but it finds no usable GPU", fix)
    if "error" in facts:
        fix = "Run nvidia-smi: is the GPU in order, is it free? Without a GPU: see the line of the memory."
        return failure(f"{line}: {facts['error']}", fix)
    return ok(line)


def check_driver() -> Check:
    version = hardware.driver()
    if not version and (answer := run(["nvidia-smi"], 3)).returncode != MISSING:
        fix = "Restart the machine, or install its driver anew; start a container with --gpus all."
        return warning(f"nvidia-smi is here, but names no driver: {complaint_of(answer)}", fix)
    return judge_driver(version, torch_facts().get("cuda"))


def judge_driver(version: str, cuda: str | None) -> Check:
    """A driver against the CUDA that PyTorch was built for, and against that of TensorRT-LLM and vLLM."""
    if not version:
        return ok("none: the engines of this machine run on the CPU")
    branch = int(version.split(".")[0])
    needed = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0) if cuda else 0
    if branch < needed:
        fix = f"Install driver {needed} or newer, or a PyTorch that is built for an older CUDA."
        return failure(f"{version}: too old for this PyTorch, which is built for CUDA {cuda}", fix)
    if branch < OLDEST_DRIVER[13]:
        fix = f"TensorRT-LLM 1.2.1 and vLLM are built for CUDA 13: install driver {OLDEST_DRIVER[13]} or newer."
        return warning(version, fix)
    return ok(version)


def check_gpu() -> Check:
    facts = torch_facts()
    if "gpu" not in facts:
        if hardware.driver():
            return warning("the driver is there, but PyTorch reports no GPU", "See the line of PyTorch.")
        return ok("none that PyTorch can use")
    line = f"{facts['gpu']}, compute capability {facts['capability']}, {facts['sms']} SMs"
    line += f"; {facts['gpus']} GPUs, the first is used" if facts["gpus"] > 1 else ""
    major = int(facts["capability"].split(".")[0])
    if not any(name.split("_")[-1].rstrip("af").startswith(str(major)) for name in facts["architectures"]):
        fix = f"Install a PyTorch that has it; this one has {', '.join(facts['architectures'])}."
        return failure(f"{line}: this PyTorch has no kernels for it", fix)
    if major < 8:
        return warning(line, "TensorRT-LLM 1.2.1 needs compute capability 8.0 (Ampere) or newer.")
    return ok(line)


def check_memory(needed: float = 0) -> Check:
    """needed: bytes that a recipe's build takes."""
    free, left = hardware.free_memory(), limits.memory()
    line = f"{free / 2**30:.1f} GiB free"
    if left is not None and left < free + 2**24:  # both change from moment to moment
        line += " under a limit (control group, or ulimit -v)"
    if "free" in (facts := torch_facts()):
        line += f"; on the GPU {facts['free'] / 2**30:.1f} of {facts['total'] / 2**30:.1f} GiB free"
        if facts["free"] < 2 * 2**30:
            return warning(line, "Close what else uses the GPU; nvidia-smi lists it. A kernel restart helps.")
    if free < 2**29:
        return failure(line, "Close other programs, or give the container more memory.")
    if free < needed:
        line += f"; a build of this recipe needs {needed / 2**30:.1f} GiB"
        return warning(line, "Close other programs, take a narrower precision or a smaller model, or a larger machine.")
    if free < 2 * 2**30:
        return warning(line, "A build needs up to 2 GiB: close other programs first.")
    return ok(line)


def check_engines(needed: float = 0) -> Check:
    """The learner's own store: it can be written, and has room for the course's engines, and for a recipe that needs so
    many bytes. The other stores, which are only read, are named. Of each, whether `load` takes what lies there."""
    fix = "Delete what you do not need (helpers list, helpers remove ENGINE), or set COURSE_ENGINES to another folder."
    own, *others = engines_folders()
    check = _check_folder(own, fix, needed)
    for store in (*others, own) if check.status != "failure" else ():
        try:
            check_store(store)
        except StoreError as error:  # what another store is not trusted for is built in the learner's own
            check = (failure if store == own else warning)(f"{error.what} {check.found}", error.fix)
    stores = [f"{shown(folder)} ({'writable' if os.access(folder, os.W_OK) else 'read-only'})" for folder in others]
    return replace(check, found=f"{check.found}; also read: {', '.join(stores)}") if stores else check


def check_temporary_folder() -> Check:
    """Compilers and the loader of engines write there, and run what they have written."""
    fix = "export TMPDIR=FOLDER, one that can be written and that has room."
    named = os.environ.get("TMPDIR")
    if named and not (Path(named).is_dir() and os.access(named, os.W_OK)):
        return failure(f"TMPDIR names {named}, which is not a folder that can be written", fix)
    try:
        folder = temporary_folder()
    except BackendUnavailable as error:
        return failure(error.what, fix)
    if not lets_programs_run(folder):
        return failure(f"{folder} lets no program run (noexec)", "export TMPDIR=FOLDER, one without noexec.")
    return _check_folder(folder, fix)


def _check_folder(folder: Path, fix: str, needed: float = 0) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        return failure(f"{shown(folder)} cannot be written: {error.strerror}", fix)
    free = shutil.disk_usage(folder).free
    line = f"{free / 1e9:.0f} GB free in {shown(folder)}"
    line += f"; this recipe needs {needed / 1e9:.1f} GB" if needed else ""
    if free < max(needed, 2e8):
        return failure(line, fix)
    return warning(line, fix) if free < SPACE else ok(line)


def check_compiler_folder() -> Check:
    """The folder that a build of the aot backend works in."""
    if place := compilers_folder(engines_folder()):
        return ok(f"{shown(place)}: no space in its path, can be written, lets programs run")
    return failure(
        f"{engines_folder()} and {temporary_folder()} have a space or a quote in their path, cannot be written, "
        "or let no program run",
        "export TMPDIR=FOLDER, one without a space in its path and without noexec.",
    )


def check_threads() -> Check:
    cores, used = hardware.free_cores(), torch_facts().get("threads", 0)
    threads = used or "an unknown number of"
    line = f"{cores} of {os.cpu_count() or 1} cores are this process's, PyTorch would use {threads} threads"
    if used > cores:
        fix = f"export OMP_NUM_THREADS={cores}: threads that share a core make decoding many times slower."
        return warning(line, fix)
    return ok(line)


def check_processes() -> Check:
    """How many processes, threads and files this process may still have, and how large a file."""
    room, files = limits.processes(), limits.open_files()
    more = "no limit on" if room is None else f"room for {room}"
    line = f"{more} processes and threads, {files or 'no limit on'} files"
    if room is not None and room < PROCESSES:
        fix = "ulimit -u 4096 in the terminal that starts Python; in a container: docker run --pids-limit 4096."
        return (failure if room < PROCESSES / 4 else warning)(line, fix)
    if files and files < FILES:
        return (failure if files < FILES / 4 else warning)(line, "ulimit -n 4096 in the terminal that starts Python.")
    if (size := limits.file_size()) is not None and size < SPACE:  # weights are one file
        line += f", and none may have more than {size / 1e6:.0f} MB"
        return (failure if size < 2e8 else warning)(line, "ulimit -f unlimited in the terminal that starts Python.")
    return ok(line)


def check_tensorrt() -> Check:
    """The first TensorRT that really loads, in the order in which the course looks for one."""
    complaints = []
    elsewhere = environments.named_python("tensorrt")
    for provider in ("tensorrt_rtx", "tensorrt"):
        if not elsewhere and not importlib.util.find_spec(provider):
            continue
        code = f"import {provider} as p; print(p.__version__)"
        answer = run([elsewhere or sys.executable, "-c", code], TIME_LIMIT / 2)
        if answer.returncode == 0 and answer.stdout.strip():
            return ok(f"{provider} {answer.stdout.split()[-1]}{f' ({elsewhere})' if elsewhere else ''}")
        complaints.append(f"{provider}: {complaint_of(answer)}")
    if complaints and elsewhere:
        fix = "Let COURSE_TENSORRT_PYTHON name a Python that has tensorrt-rtx, or unset it."
        return failure("; ".join(complaints), fix)
    if complaints:
        fix = (
            f"{PYTHON} -m pip install --force-reinstall tensorrt-rtx; beside a GPU it needs the driver's libcuda, too."
        )
        return failure("; ".join(complaints), fix)
    if sys.platform == "darwin":
        return ok("none: NVIDIA has no package for macOS; the cells that need it are skipped")
    fix = f"{PYTHON} -m pip install tensorrt-rtx (some 300 MB); without it the cells that need it are skipped."
    return warning("not installed", fix)


def check_environment(name: str) -> Check:
    """A library's own environment: does its Python start, is the version the pinned one, do its libraries load?"""
    environment, python = environments.ENVIRONMENTS[name], environments.python_of(name)
    if python is None:
        if not environment.driver:
            return ok(f"not here, and needed by one section of notebook 06 only: helpers env create {name}")
        if not hardware.driver():
            return ok("not here: it needs an NVIDIA GPU; the cells that need it are skipped")
        return warning("no environment", f"helpers env create {name}, or the container of compose.yaml")
    version, conflicts = leftovers.pins(str(python), environment.package, TIME_LIMIT)
    if not version:
        return failure(f"{shown(python)}: {conflicts}", environments.another(name))
    anew = environments.another(name)
    if version != environment.version:
        return warning(f"{version} ({shown(python)})", f"The course is made for {environment.version}. {anew}")
    if conflicts:
        return warning(f"{version} ({shown(python)}), but beside it {conflicts}", anew)
    for what, fix in environments.missing_libraries(name, str(python)):
        return warning(f"{version} ({shown(python)}), but {what}", fix)
    return ok(f"{version} ({shown(python)})")


CHECKS: dict[str, Callable[..., Check]] = {
    "Python": check_python,
    "notebook tools": check_notebook_tools,
    "C++ compiler": check_compiler,
    "PyTorch": check_torch,
    "NVIDIA driver": check_driver,
    "GPU": check_gpu,
    "memory": check_memory,
    "engines": check_engines,
    "locks": leftovers.check_locks,
    "temporary folder": check_temporary_folder,
    "compiler's folder": check_compiler_folder,
    "threads": check_threads,
    "processes and files": check_processes,
    "packages": leftovers.check_packages,
    "GPU memory": leftovers.check_gpu_memory,
    "TensorRT": check_tensorrt,
    "TensorRT-LLM": lambda: check_environment("trtllm"),
    "vLLM": lambda: check_environment("vllm"),
    "TensorRT Edge-LLM": lambda: check_environment("edgellm"),
}


NEED_TORCH = ("PyTorch", "NVIDIA driver", "GPU", "memory", "threads")
OF_A_BUILD = ("C++ compiler", "memory", "engines", "temporary folder", "compiler's folder", "processes and files")


def examine(needed: Mapping[str, float] | None = None, only: Collection[str] = ()) -> Iterator[Check]:
    """Each check's line, in order, as soon as it and those before it are known. needed: bytes that a recipe's build
    takes, of the disk for "engines", and of "memory". only: names of checks; default: all."""
    for_recipe = {"engines": check_engines, "memory": check_memory}
    checks = CHECKS | {name: partial(for_recipe[name], size) for name, size in (needed or {}).items()}
    checks = {name: check for name, check in checks.items() if not only or name in only}
    deadline = time.monotonic() + LONGEST
    torch_facts.cache_clear()
    hardware.driver.cache_clear()
    hardware.driver()  # once, before the checks that share it
    torch_known = threading.Event()
    answers: dict[str, queue.Queue[Check]] = {name: queue.Queue() for name in checks}

    def ask_torch() -> None:
        try:
            torch_facts()
        finally:
            torch_known.set()

    def answer(name: str) -> None:
        if name in NEED_TORCH:
            torch_known.wait()
        answers[name].put(replace(_guarded(checks[name]), name=name))

    # Not an executor: the end of this process would wait for its threads, and a folder on a dead network holds one.
    try:
        threading.Thread(target=ask_torch, daemon=True).start()
    except RuntimeError:
        torch_known.set()
    for name in checks:
        try:
            threading.Thread(target=answer, args=(name,), daemon=True).start()
        except RuntimeError as error:
            fix = "Close other programs, or raise the limits of this process: ulimit -a shows them."
            answers[name].put(failure(f"not looked at: {error}", fix, name))
    for name in checks:
        try:
            yield answers[name].get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            fix = "Run this again. If it stays so, something that it looks at hangs: a disk on the network, a driver."
            yield warning(f"no answer within {LONGEST:.0f} s", fix, name)


def named_cause(error: CourseError) -> CourseError:
    """The error of a compiler that failed. What fails on this machine is its cause; warnings stand behind its own."""
    lines = list(examine(only=OF_A_BUILD))
    for check in lines:
        if check.status == "failure" and "others may write" not in check.found:  # which stops a load, and no build
            cause = f"The doctor's check {check.name!r} finds a failure: {check.found}"
            return type(error)(error.what, cause=cause, fix=check.fix)
    warned = "; ".join(f"{check.name}: {check.found}" for check in lines if check.status == "warning")
    told = f"The doctor {f'warns of {warned}' if warned else 'finds nothing wrong with compiler, memory and folders'}."
    return type(error)(error.what, cause=f"{error.cause} ({told})".strip(), fix=error.fix)


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except CourseError as error:
        return failure(error.what, error.fix)
    except Exception as error:  # the boundary of a check: what it met, nobody foresaw
        if explained := starved(error):
            return failure(explained.what, "Close other programs, or give the container more memory.")
        if isinstance(error, ImportError):  # a broken installation is a finding, not the end of the list
            return failure(f"{type(error).__name__}: {error}", f"Install the course's packages anew: {leftovers.ANEW}")
        if isinstance(error, OSError):
            see = "See the lines of the folders: can they be written, have they room?"
            return failure(str(error), f"{why_refused(error)} {see}".strip())
        return warning(f"the check itself failed ({type(error).__name__}: {error})", "Look at what it names.")


def main(*, as_json: bool = False, needed: Mapping[str, float] | None = None) -> dict[str, Any]:
    """`helpers doctor`: print each check, unless the answer is printed as JSON, which is returned: "ok" is false if a
    check failed. needed: as `examine` takes it."""
    start = time.monotonic()
    checks = []
    for check in examine(needed):
        checks.append(check)
        if not as_json:
            print(check, flush=True)
    seconds = time.monotonic() - start
    counts = {status: sum(c.status == status for c in checks) for status in ("OK", "warning", "failure")}
    if not as_json:
        words = ", ".join(f"{n} {status}{'s' if n > 1 and status != 'OK' else ''}" for status, n in counts.items() if n)
        print(f"\n{len(checks)} checks in {seconds:.1f} s: {words}.")
    return {"ok": not counts["failure"], "seconds": round(seconds, 1), "checks": list(map(asdict, checks))}
