"""The Pythons of other environments: TensorRT-LLM and vLLM pin packages that cannot live beside this course's."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def python_of(name: str) -> Path | None:
    """The Python interpreter of environment `name` ("trtllm", "vllm"), or None where there is none.

    Looked for in this order: the variable HELPERS_<NAME>_PYTHON, `.venv-<name>/bin/python` in the course's folder, and
    for "trtllm" this interpreter, if TensorRT-LLM is installed beside it (as in NVIDIA's container).
    """
    named = os.environ.get(f"HELPERS_{name.upper()}_PYTHON")
    if named:
        return Path(named)
    own = PROJECT / f".venv-{name}" / "bin" / "python"
    if own.is_file():
        return own
    if name == "trtllm" and importlib.util.find_spec("tensorrt_llm") is not None:
        return Path(sys.executable)
    return None
