"""The doctor's checks of what others have left: packages that do not belong together, locks that nobody gives back,
GPU memory of a kernel that is gone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import site
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from helpers.machine import commands
from helpers.machine.check import Check, failure, ok, warning
from helpers.paths import PROJECT, PYTHON, locks_folder

COURSE = "tensorrt-llm-course"  # its own distribution, where it was installed
CONSTRAINTS = shlex.quote(str(PROJECT / "constraints/course.txt"))
ANEW = "make clean setup (with OFFLINE=FOLDER in a room without a network)"
NOTEBOOK_TOOLS = ("ipykernel", "nbclient", "ipywidgets", "matplotlib")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "tensorrt_rtx", "tensorrt", *NOTEBOOK_TOOLS)
OLD = 2 * 3600.0  # seconds after which a build is no longer believed to go on

# What a library pins, beside what is there, asked in its own environment: its version, then one JSON line a conflict.
ASK_PINS = """
import json, sys
from importlib.metadata import PackageNotFoundError, requires, version
name = sys.argv[1]
print(version(name))
from packaging.requirements import Requirement
for text in requires(name) or ():
    needed = Requirement(text)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            there = ""
        if not (there and needed.specifier.contains(there, prereleases=True)):
            print(json.dumps([needed.name, there or "none", str(needed.specifier)]))
"""


# The course's own libraries beside PyTorch. transformers comes last: it asks for the versions of the others.
LIBRARIES = "import filelock, tokenizers, safetensors, onnx, sympy, transformers"


def check_packages() -> Check:
    """Packages of one environment that came from two, or twice, that cannot be imported, or that are of other versions
    than the course asks for."""
    fix = f"Make the environment anew: {ANEW}. TensorRT-LLM and vLLM get their own: helpers env create trtllm."
    names: set[str] = set()
    for folder in _own_folders():
        found = importlib.metadata.distributions(path=[str(folder)])
        named = (one.metadata["Name"] for one in found)
        counted = Counter(re.sub(r"[-_.]+", "-", name).lower() for name in named if name)
        if twice := sorted(name for name, number in counted.items() if number > 1):
            return failure(f"installed twice, over each other: {', '.join(twice)}", fix)
        names |= set(counted)
    if mixed := _cuda_families(names):
        return warning(f"built for different versions of CUDA: {mixed}", fix)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            folder = Path(spec.origin).resolve().parent.parent
            if folder not in _own_folders():
                again = "unset PYTHONPATH; export PYTHONNOUSERSITE=1; then start Python again, in another folder."
                return warning(f"{name} comes from {folder}, not from this environment", again)
    for library in ("tensorrt-llm", "vllm"):
        if library in names and (conflicts := pins(sys.executable, library, 10)[1]):
            return warning(f"{library} is in this environment and pins others: {conflicts}", fix)
    answer = commands.run([sys.executable, "-c", LIBRARIES], 15)
    if answer.returncode == commands.TOO_SLOW:
        return warning("libraries take more than 15 s to import", "Run this again: the first import is slow.")
    if answer.returncode != 0:
        return failure(f"one cannot be imported: {commands.complaint_of(answer)}", fix)
    if COURSE in names and (wrong := _out_of_range()):
        again = f"{PYTHON} -m pip install --constraint {CONSTRAINTS} {' '.join(one.split()[0] for one in wrong)}"
        return warning(
            f"not of the course's versions: {', '.join(wrong)}", f"Install the course's versions again: {again}"
        )
    return ok(f"{len(names)}, each once, all from this environment; the course's own can be imported")


def pins(python: str, library: str, limit: float) -> tuple[str, str]:
    """(version, conflicts) of a library beside a Python: what it pins and what is there instead. ("", what went wrong)
    if that Python does not start or does not have it."""
    answer = commands.run([python, "-c", ASK_PINS, library], limit)
    version, *conflicts = answer.stdout.strip().splitlines() or [""]
    if not version or answer.returncode != 0 and "No module named 'packaging'" not in answer.stderr:
        return "", next(reversed((answer.stderr or answer.stdout).strip().splitlines()), "it does not answer")
    told = [f"{name} {there} instead of {pinned}" for name, there, pinned in map(json.loads, conflicts)]
    return version, ", ".join(told)


def _out_of_range() -> list[str]:
    """The packages that are here in another version than the course asks for, each as `pins` tells it. What is missing
    is told where it is needed, and PyTorch has a line of its own."""
    version, conflicts = pins(sys.executable, COURSE, 10)
    told = conflicts.split(", ") if version and conflicts else []
    return [one for one in told if one.split()[0] != "torch" and one.split()[1] != "none"]


def check_locks() -> Check:
    """Builds take turns by locks in the folder of engines: that these work there, and that nobody keeps one."""
    import filelock  # where it is missing, the other checks still say so

    folder = locks_folder()
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as scratch:
        file = Path(scratch) / "lock"
        with filelock.FileLock(file):
            try:
                with filelock.FileLock(file, timeout=0):
                    return failure(
                        "two processes can hold the same lock, so two builds can spoil each other",
                        "Let COURSE_ENGINES name a folder on a local disk; some network disks have no locks.",
                    )
            except filelock.Timeout:
                pass
    for lock in folder.glob("*.lock"):
        if not os.access(lock, os.W_OK):
            return failure(f"{lock.name} belongs to another user", f"Delete it as that user: sudo rm '{lock}'")
        for process in _holders(lock):
            name, age = lock.name.removesuffix(".lock"), time.time() - process.create_time()
            if process.status() in ("stopped", "zombie", "dead"):
                return warning(f"{name} is locked by process {process.pid}, which is stopped", f"kill -9 {process.pid}")
            if age > OLD:
                fix = f"Is it still at work? If not: kill {process.pid}"
                return warning(f"{name} is locked by process {process.pid}, for up to {age / 3600:.0f} hours", fix)
    return ok("they work, and none is left")


def check_gpu_memory() -> Check:
    """GPU memory of this course's processes whose parent is gone: a kernel or a worker that nobody can reach."""
    import psutil

    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    answer = commands.run(query, 5)
    if answer.returncode != 0:
        return ok("no GPU that tells who uses it")
    used = [line.split(",") for line in answer.stdout.splitlines() if line.count(",") == 1]
    for pid, megabytes in used:
        try:
            process = psutil.Process(int(pid))
            command, parent = " ".join(process.cmdline()), process.parent()
            heir = parent is None or parent.pid == 1 or parent.name() == "systemd"  # who takes over an orphan
            alone = heir and not (parent and "jupyter" in " ".join(parent.cmdline()))  # process 1 of a container
        except (psutil.Error, ValueError):
            continue  # ended meanwhile, or of another container, whose numbers mean nothing here
        if alone and re.search(r"ipykernel|helpers\.machine\.worker", command):
            found = f"{megabytes.strip()} MB are held by process {pid}, which belongs to no notebook any more"
            return warning(found, f"kill {pid}")
    return ok(f"{len(used)} processes use a GPU, none of them a kernel that is gone")


def _own_folders() -> set[Path]:
    paths = [*site.getsitepackages(), *(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))]
    return {Path(path).resolve() for path in paths}


def _cuda_families(names: set[str]) -> str:
    """Such as "tensorrt-cu12 and tensorrt-cu13": the same package for two versions of CUDA."""
    versions = defaultdict(set)
    for name in names:
        if match := re.fullmatch(r"((?:tensorrt|nvidia|cupy)[a-z-]*?)-cu(\d+)([a-z-]*)", name):
            versions[match[1] + match[3]].add(name)
    return "; ".join(" and ".join(sorted(same)) for same in versions.values() if len(same) > 1)


def _holders(lock: Path) -> Iterator:
    """The processes that hold a lock, as Linux tells; none elsewhere."""
    import psutil

    try:
        table, node = Path("/proc/locks").read_text(), lock.stat().st_ino
    except OSError:
        return
    for line in table.splitlines():
        fields = line.split()
        if "->" not in fields and fields[-3].endswith(f":{node}"):
            try:
                process = psutil.Process(int(fields[-4]))
                if str(lock.resolve()) in (file.path for file in process.open_files()):  # not that node of another disk
                    yield process
            except psutil.Error:
                continue  # given back meanwhile, or of another user or container
