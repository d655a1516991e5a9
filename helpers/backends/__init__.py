"""The backends, by name. Each module is imported when its backend is first asked for.

What a backend's module has (base.py says what each returns):

    check_available()                                raises BackendUnavailable where the backend cannot run
    load(recipe)                                     for backends that compile nothing: an Engine

and, for backends that compile:

    identity(recipe, checkpoint)                     all that the engine depends on beside checkpoint and recipe
    estimate(recipe, config, device)                 seconds, bytes, and bytes that only the build takes
    build(recipe, checkpoint, folder, progress)      compiles into the folder; what the manifest keeps for loading
    check_machine(name, identity)                    raises EngineMismatch where an engine of that identity cannot run
    load(recipe, folder, manifest)                   an Engine from a folder that has been verified
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from helpers.errors import BackendUnavailable, CourseError, starved, why_refused
from helpers.machine import environments
from helpers.paths import check_working_folder
from helpers.progress import say, shown_if_slow

MODULES = {
    "aot": "aot.backend",
    "pytorch": "pytorch",
    "torch_compile": "pytorch",
    "tensorrt": "tensorrt.backend",
    "tensorrt_llm": "tensorrt_llm.backend",
    "tensorrt_llm_pytorch": "tensorrt_llm.backend",
    "vllm": "vllm.backend",
}
# What each needs: a package beside the course, or another environment (see machine/environments.py).
PACKAGES = {"aot": "torch", "pytorch": "transformers", "torch_compile": "transformers", "tensorrt": "tensorrt_rtx"}
ENVIRONMENTS = {"tensorrt_llm": "trtllm", "tensorrt_llm_pytorch": "trtllm", "vllm": "vllm"}


def module(backend: str) -> Any:
    """The module that implements a backend."""
    _check_name(backend)
    check_working_folder()
    try:
        with shown_if_slow("Starting PyTorch, once in a process", "import"):
            return importlib.import_module(f"helpers.backends.{MODULES[backend]}")
    except ImportError as error:
        raise wrong_library(error) from error
    except OSError as error:
        if explained := starved(error):
            raise explained from error
        raise BackendUnavailable(
            f"Backend {backend!r} cannot be imported: {error}.",
            cause=why_refused(error),
            fix="Mend that, then start Python again.",
        ) from error


def wrong_library(error: Exception) -> CourseError:
    """What it means that a library cannot be imported, or lacks what belongs there."""
    if explained := starved(error):
        return explained
    library = getattr(error, "obj", None)  # that lacks an attribute
    where = f" ({getattr(library, '__file__', '')})" if library else ""
    return BackendUnavailable(
        f"A library is not what it should be: {error}{where}.",
        cause="A file or folder with its name is found first, such as one beside the notebook, or its installation is "
        "damaged.",
        fix="Rename that file, or mend the installation (helpers doctor may tell more); then restart the kernel.",
    )


def installed() -> dict[str, str]:
    """Each backend with where it is: "in this environment", another environment's Python, or "" where it is missing.
    A quick look: nothing is imported, so it does not say that a GPU is there."""
    places = {backend: "in this environment" if find_spec(package) else "" for backend, package in PACKAGES.items()}
    for backend, name in ENVIRONMENTS.items():
        python = environments.python_of(name)
        own = environments.folder(name)
        places[backend] = "" if python is None else f"in {own.name}" if own in python.parents else "in another Python"
    return places


def _check_name(backend: str) -> None:
    if backend not in MODULES:
        raise BackendUnavailable(f"There is no backend {backend!r}.", fix=f"Use one of {', '.join(MODULES)}.")


def prefer(backend: str, otherwise: str = "aot") -> str:
    """`backend` where it can run on this machine; else `otherwise`, and one line that says so and why.

    For cells that use TensorRT-LLM where it is and go on without it elsewhere.
    """
    _check_name(backend)
    _check_name(otherwise)
    try:
        module(backend).check_available()
    except CourseError as error:
        say(f"{error.what} So this cell uses {otherwise!r}.")
        return otherwise
    return backend
