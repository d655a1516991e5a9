"""The backends, by name. Each module is imported when its backend is first asked for."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from .. import environments
from ..errors import BackendUnavailable, CourseError
from ..progress import say

MODULES = {
    "aot": "aot",
    "pytorch": "pytorch",
    "torch_compile": "pytorch",
    "tensorrt": "tensorrt",
    "tensorrt_llm": "tensorrt_llm",
    "tensorrt_llm_pytorch": "tensorrt_llm",
    "vllm": "vllm",
}
# What each needs: a package beside the course, or another environment (see environments.py).
PACKAGES = {"aot": "torch", "pytorch": "transformers", "torch_compile": "transformers", "tensorrt": "tensorrt_rtx"}
ENVIRONMENTS = {"tensorrt_llm": "trtllm", "tensorrt_llm_pytorch": "trtllm", "vllm": "vllm"}


def module(backend: str) -> ModuleType:
    """The module that implements a backend: it has `load`, and `build` where something is compiled."""
    if backend not in MODULES:
        raise BackendUnavailable(f"There is no backend {backend!r}.", fix=f"Use one of {', '.join(MODULES)}.")
    return importlib.import_module(f".{MODULES[backend]}", __package__)


def installed() -> dict[str, str]:
    """Each backend with where it is: "in this environment", another environment's Python, or "" where it is missing.
    A quick look: nothing is imported, so it does not say that a GPU is there."""
    found = {backend: "in this environment" if find_spec(package) else "" for backend, package in PACKAGES.items()}
    for backend, name in ENVIRONMENTS.items():
        python = environments.python_of(name)
        own = environments.folder(name)
        found[backend] = "" if python is None else f"in {own.name}" if own in python.parents else "in another Python"
    return found


def prefer(backend: str, otherwise: str = "aot") -> str:
    """`backend` where it can run on this machine; else `otherwise`, and one line that says so and why.

    For cells that use TensorRT-LLM where it is and go on without it elsewhere.
    """
    try:
        implementation = module(backend)
        if hasattr(implementation, "machine"):
            implementation.machine()  # starts it once, and asks for the GPU
    except CourseError as error:
        say(f"{error.what} So this cell uses {otherwise!r}.")
        return otherwise
    return backend
