"""The backends, by name. Each module is imported when its backend is first asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import BackendUnavailable

MODULES = {"aot": "aot", "pytorch": "pytorch", "tensorrt": "tensorrt", "torch_compile": "pytorch", "vllm": "vllm"}


def module(backend: str) -> ModuleType:
    """The module that implements a backend: it has `load`, and `build` where something is compiled."""
    if backend not in MODULES:
        raise BackendUnavailable(
            f"Backend {backend!r} cannot run here yet.",
            cause="This version of the course does not implement it.",
            fix=f"Use one of {', '.join(MODULES)}.",
        )
    return importlib.import_module(f".{MODULES[backend]}", __package__)
