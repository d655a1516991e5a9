"""The Pythons of other environments: TensorRT-LLM, vLLM and TensorRT Edge-LLM pin packages that cannot live beside
this course's.

`create` makes one from its lock in constraints/, after checking what is known to break such an installation. An
environment that could not be finished is removed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.errors import BackendUnavailable, CourseError, InputError
from helpers.machine import commands, hardware
from helpers.paths import PROJECT
from helpers.progress import held

UNFINISHED = ".unfinished"  # a file in an environment that is still being made


@dataclass(frozen=True)
class Environment:
    """What one environment needs.

    disk: bytes for the packages and, while they are installed, their downloads. Estimated for TensorRT-LLM and vLLM.
    For TensorRT Edge-LLM the sum over its wheels, packed and unpacked, with PyTorch's build for CUDA.
    """

    title: str
    package: str  # as pip and importlib.metadata know it
    module: str
    version: str
    pythons: tuple[str, ...]  # the versions with wheels, the best first
    disk: float
    driver: int  # the oldest driver branch; 0 where no GPU is needed
    instead: str  # the way out where it cannot be installed
    indexes: tuple[str, ...] = ()  # beside pip's own
    libraries: tuple[str, ...] = ()  # of the system, beside libcuda
    machines: tuple[str, ...] = ("x86_64", "aarch64")  # with wheels


ENVIRONMENTS = {
    "trtllm": Environment(
        title="TensorRT-LLM",
        package="tensorrt-llm",
        module="tensorrt_llm",
        version="1.2.1",
        pythons=("3.12", "3.10"),
        disk=40e9,
        driver=580,
        # NVIDIA's installation guide: torch in its build for CUDA 13, and the wheel, which PyPI only points to.
        indexes=("https://download.pytorch.org/whl/cu130", "https://pypi.nvidia.com"),
        libraries=("libmpi.so.40",),
        instead="Use NVIDIA's container, which has everything: docker compose up (see compose.yaml).",
    ),
    "vllm": Environment(
        title="vLLM",
        package="vllm",
        module="vllm",
        version="0.25.1",
        pythons=("3.12", "3.13", "3.11", "3.10"),
        disk=25e9,
        driver=580,
        instead="Use a Python that has vLLM already: export COURSE_VLLM_PYTHON=/path/to/its/python",
    ),
    # Only its exporter is used, which runs on a CPU.
    "edgellm": Environment(
        title="TensorRT Edge-LLM",
        package="tensorrt-edgellm",
        module="tensorrt_edgellm.scripts.export",
        version="0.11.0",
        pythons=("3.12", "3.11", "3.10"),
        disk=9e9,
        driver=0,
        instead="Without it, notebook 06 shows a recorded export.",
        machines=("x86_64",),
    ),
}


# Finding


def variable(name: str) -> str:
    return f"COURSE_{name.upper()}_PYTHON"


def named_python(name: str) -> str:
    """The Python that COURSE_<NAME>_PYTHON names; "" where it is not set."""
    return os.path.expanduser(os.environ.get(variable(name), ""))  # noqa: PTH111  (Path's own fails for a user who is not here)


def folder(name: str) -> Path:
    return PROJECT / f".venv-{name}"


def python_of(name: str) -> Path | None:
    """The Python interpreter of environment `name` ("trtllm", "vllm", "edgellm"), or None where there is none.

    Looked for in this order: the variable COURSE_<NAME>_PYTHON, `.venv-<name>/bin/python` in the course's folder, and
    for "trtllm" this interpreter, if TensorRT-LLM is installed beside it (as in NVIDIA's container).
    """
    if named := named_python(name):
        return Path(named)
    own = folder(name) / "bin" / "python"
    if own.is_file() and not (folder(name) / UNFINISHED).exists():
        return own
    spec = importlib.util.find_spec("tensorrt_llm") if name == "trtllm" else None
    if spec is not None and spec.origin:  # any folder of that name passes for a package without an origin
        return Path(sys.executable)
    return None


def need_python(name: str) -> str:
    """The same as a path to start; BackendUnavailable where there is none, or none that can be started."""
    environment, python = ENVIRONMENTS[name], python_of(name)
    if python and shutil.which(python):
        return str(python)
    state = "does not exist" if python and not python.exists() else "is no program that can be started"
    raise BackendUnavailable(
        f"{environment.title} {environment.version} is not here.",
        cause="It lives in an environment of its own, and "
        + (f"{python} {state}." if python else f"neither {folder(name).name} nor {variable(name)} is there."),
        fix=("Without an NVIDIA GPU use backend='aot'; with one: " if environment.driver else "")
        + f"{another(name) if python else f'helpers env create {name}'}. {environment.instead}",
    )


def another(name: str) -> str:
    """How to come to another environment of that name where one is found: until that is gone, none is made."""
    python, own = python_of(name), folder(name)
    if python and python.parent.parent == own:
        return f"Make it anew: remove {shown(own)}, then helpers env create {name}"
    # A variable names it, or it is this one; what is around it is not ours to remove.
    return f"Let {variable(name)} name another, or unset it; then: helpers env create {name}"


def describe() -> list[tuple[str, str, str]]:
    """(name, installed version, where) of every environment; the version is "-" where there is none."""
    rows = []
    for name, environment in ENVIRONMENTS.items():
        python = python_of(name)
        if python is None:
            rows.append((name, "-", f"not installed: helpers env create {name}"))
            continue
        source = variable(name) if os.environ.get(variable(name)) else ""
        where = f"{shown(python)} {source}".strip()
        rows.append((name, installed_version(python, environment.package) or "broken", where))
    return rows


def shown(path: Path) -> Path:
    """Relative to the course's folder where it lies in it."""
    return path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path


def installed_version(python: Path, package: str) -> str:
    """The version of a package beside another Python; "" if that Python does not start or does not have it."""
    return _ask(python, f"from importlib.metadata import version; print(version({package!r}))")


def _ask(python: Path | str, code: str) -> str:
    answer = commands.run([str(python), "-c", code], 60)
    return answer.stdout.strip() if answer.returncode == 0 else ""


# Checking


def problems(name: str, python: str = "") -> Iterator[tuple[str, str]]:
    """What is known to break this environment and is so on this machine, each with what mends it."""
    environment = ENVIRONMENTS[name]
    if sys.platform != "linux" or platform.machine() not in environment.machines:
        machines = " and ".join(environment.machines)
        yield (
            f"This is {platform.system()} on {platform.machine()}; the wheels are for Linux on {machines}.",
            f"Use a Linux machine{' with an NVIDIA GPU' if environment.driver else ''}.",
        )
    if environment.driver:
        yield from _driver_problems(environment.driver)
    free = shutil.disk_usage(PROJECT).free
    if free < environment.disk:
        yield (
            f"{free / 1e9:.0f} GB of disk are free; {environment.disk / 1e9:.0f} GB are needed while it is installed.",
            "Free some space, or put the course on a larger disk.",
        )
    interpreter = find_python(name, python)
    if not interpreter:
        versions = " or ".join(environment.pythons)
        yield (
            f"{python} is no Python {versions}." if python else f"There is no Python {versions} with venv here.",
            f"Install Python {environment.pythons[0]} with its venv package, or name one: --python /path/to/python.",
        )
    yield from missing_libraries(name, interpreter)


def missing_libraries(name: str, python: str) -> Iterator[tuple[str, str]]:
    """The libraries of the system that an environment needs and its Python ("": none yet) does not find, each with what
    mends it."""
    if name == "trtllm" and python and (library := _libpython_missing(python)):
        yield (
            f"{python} has no shared {library} that the loader finds; TensorRT-LLM's bindings need it.",
            "Use the system's Python (apt install python3.12 libpython3.12), or add its lib folder to LD_LIBRARY_PATH.",
        )
    for library in ENVIRONMENTS[name].libraries:
        if not _loads(library, python or sys.executable):
            yield (
                f"{library} is not there, or not where the loader looks.",
                "Install Open MPI: apt install libopenmpi-dev",
            )


def _driver_problems(oldest: int) -> Iterator[tuple[str, str]]:
    driver = hardware.driver() if _loads("libcuda.so.1") else ""
    if not driver:
        yield (
            "There is no NVIDIA driver (libcuda.so.1 does not load, or nvidia-smi does not answer).",
            "Install the driver; in a container, start it with the GPU (docker run --gpus all).",
        )
    elif int(driver.split(".")[0]) < oldest:
        yield (
            f"The NVIDIA driver is {driver}; the wheels are built for CUDA 13.",
            f"Install driver {oldest} or newer.",
        )


def find_python(name: str, asked: str = "") -> str:
    """A Python of a version that has wheels and can make environments, as a path; "" if there is none."""
    pythons = ENVIRONMENTS[name].pythons
    for candidate in [asked] if asked else [*(f"python{version}" for version in pythons), sys.executable, "python3"]:
        path = shutil.which(candidate)
        if path and _ask(path, "import ensurepip, venv, sys; print('%d.%d' % sys.version_info[:2])") in pythons:
            return path
    return ""


def _loads(library: str, python: str = sys.executable) -> bool:
    """Whether the system's loader finds a library; tried in a process of its own, for some fail by crashing."""
    return _ask(python, f"import ctypes; ctypes.CDLL({library!r}); print('yes')") == "yes"


def _libpython_missing(python: str) -> str:
    code = "import sysconfig; print('libpython' + sysconfig.get_config_var('LDVERSION') + '.so.1.0')"
    name = _ask(python, code)
    return "" if name and _loads(name, python) else name or "libpython"


# Making


Explain = Callable[[str, str], CourseError]  # a library's last words, and what happened, to an error of ours


def create(name: str, *, python: str = "", explain: Explain | None = None) -> Path:
    """Make `.venv-<name>` from constraints/<name>.txt and try it; the path of its Python. Prints each step.

    explain: says what it means if the library was installed and cannot be imported.

    Raises BackendUnavailable with everything that stands in the way, before anything is made. If a later step fails
    or is interrupted, the unfinished environment is removed.
    """
    if name not in ENVIRONMENTS:
        raise InputError(f"There is no environment {name!r}.", fix=f"Name one of these: {', '.join(ENVIRONMENTS)}.")
    environment = ENVIRONMENTS[name]
    source = variable(name) if os.environ.get(variable(name)) else folder(name).name
    if present := python_of(name):
        if version := installed_version(present, environment.package):
            print(f"{environment.title} {version} is there already: {present}")
            if version != environment.version:
                print(f"The course is made for {environment.version}: take {source} away, and run this again.")
            return present
        raise InputError(
            f"{present} (from {source}) does not start or has no {environment.title}.",
            fix=f"{another(name)}.",
        )
    print(f"[1/4] Checking this machine for {environment.title} {environment.version}", flush=True)
    if listed := list(problems(name, python)):
        lines = [f"\n  - {what}\n    {fix}" for what, fix in listed]
        raise BackendUnavailable(
            f"{environment.title} {environment.version} cannot be installed here; nothing was made.{''.join(lines)}",
            fix=f"Mend these. {environment.instead.replace('Use', 'Or use', 1)}",
        )
    if name == "trtllm" and not os.environ.get("CUDA_HOME") and not shutil.which("nvcc"):
        print(
            "      Note: NVIDIA's guide asks for the CUDA Toolkit 13 and CUDA_HOME; neither is here. Going on without."
        )
    import filelock  # a worker imports this module too, and other environments need not have it

    target = folder(name)
    with held(filelock.FileLock(f"{target}.lock"), f"makes {target.name}"):
        if ready := python_of(name):  # made by the process that this one has waited for
            return ready
        try:
            interpreter = _install(name, target, find_python(name, python), explain)
        except BaseException:
            _remove(target)
            print(f"Removed the unfinished {target.name}.", flush=True)
            raise
        (target / UNFINISHED).unlink()
    return interpreter


def _install(name: str, target: Path, base: str, explain: Explain | None) -> Path:
    environment, interpreter, wheels = ENVIRONMENTS[name], target / "bin" / "python", target / "wheels"
    print(f"[2/4] Making {target.name} with {base}", flush=True)
    _remove(target)  # what a killed attempt left
    target.mkdir()
    (target / UNFINISHED).touch()
    _step([base, "-m", "venv", str(target)], environment)
    print("[3/4] Fetching the wheel, then what it needs, and installing: gigabytes", flush=True)
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check"]
    indexes = [word for index in environment.indexes for word in ("--extra-index-url", index)]
    # The one wheel that matters comes first: where it cannot be had, this fails within seconds, and not after gigabytes
    # of other packages. (On the Python Package Index, TensorRT-LLM is a stub without a wheel.)
    requirement = f"{environment.package}=={environment.version}"
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15", "--dest", str(wheels)]
    try:
        _step([*pip, "download", requirement, *options, *indexes], environment, target)
    except CourseError as error:
        raise BackendUnavailable(
            f"pip finds no wheel of {requirement} for this Python and machine.",
            cause=f"The index that has it cannot be reached, or has none for this Python. pip says:\n  {error.cause}",
            fix=environment.instead,
        ) from None
    lock = PROJECT / "constraints" / f"{name}.txt"
    _step([*pip, "install", "--find-links", str(wheels), *indexes, "-r", str(lock)], environment, target)
    shutil.rmtree(wheels)
    print(f"[4/4] Importing {environment.module}, which can take a minute", flush=True)
    start = time.monotonic()
    try:
        _step([str(interpreter), "-c", f"import {environment.module}"], environment)
    except CourseError as error:
        raise _not_importable(name, error.cause, explain) from None
    print(f"      {time.monotonic() - start:.0f} s. Ready: {shown(interpreter)}")
    return interpreter


def _remove(target: Path) -> None:
    """Out of sight at once: half an environment whose mark is deleted already would pass for a finished one."""
    aside = target.with_name(f"{target.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _step(command: list[str], environment: Environment, temporary: Path | None = None) -> None:
    """One command whose output a person can follow; its last lines become the cause if it fails. temporary: where pip
    puts gigabytes aside, on the disk whose room was looked at."""
    lines: list[str] = []
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    output["env"] = {**os.environ, "TMPDIR": str(temporary)} if temporary else None
    with subprocess.Popen(command, **output, **commands.OWN_SESSION) as process:
        assert process.stdout is not None
        try:
            for line in filter(None, map(str.strip, process.stdout)):
                lines.append(line)
                print(f"      {line[:150]}", flush=True)
        except BaseException:  # pip would go on in a folder that is being removed
            commands.kill_all(process)
            raise
    if process.returncode != 0:
        raise CourseError(
            f"{environment.title} could not be installed: a step ended with exit status {process.returncode}.",
            cause="\n  ".join(lines[-3:]),
            fix=f"Mend that and run it again. {environment.instead}",
        )


def _not_importable(name: str, traceback: str, explain: Explain | None) -> CourseError:
    """Why an installed library does not load, by the end of its traceback."""
    instead, message = ENVIRONMENTS[name].instead, traceback.splitlines()[-1].strip()
    what = f"{ENVIRONMENTS[name].title} was installed, but importing it failed."
    if re.search(r"lib(cu|nv)\w*\.so\S*: undefined symbol", message):
        return BackendUnavailable(
            f"{what} {message}",
            cause="Libraries of two versions of CUDA are mixed: LD_LIBRARY_PATH leads to another one.",
            fix=f"Unset LD_LIBRARY_PATH, then run this again (pip has kept the downloads). {instead}",
        )
    if re.search(r"lib(cu(?!da\.so)|nv(?!infer))\w*\.so", message):
        return BackendUnavailable(
            f"{what} {message}",
            cause="The loader does not find a library of the CUDA Toolkit.",
            fix="Install the CUDA Toolkit 13 and set CUDA_HOME, or put the folder nvidia/cu13/lib of a Python that has "
            f"these wheels on LD_LIBRARY_PATH; then run this again (pip has kept the downloads). {instead}",
        )
    if explain is not None:
        return explain(message, what)
    return BackendUnavailable(f"{what} {message}", cause="See its last line above.", fix=instead)
