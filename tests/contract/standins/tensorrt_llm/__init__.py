"""Stand-in for tensorrt_llm 1.2.1 (see ../README.md). Source: tensorrt_llm/__init__.py."""

import os
import sys

import tensorrt  # noqa: F401  (as the real one: imported eagerly)
from standin import fail, gpu

fail("import")
if "torch" in sys.modules:  # the real one needs a GPU; what imports torch first shall see the one of STANDIN_GPU
    gpu(sys.modules["torch"])
__version__ = os.environ.get("STANDIN_VERSION", "1.2.1")

from .builder import BuildConfig, Engine, EngineConfig  # noqa: E402
from .llmapi import LLM, KvCacheConfig, SamplingParams  # noqa: E402
from .plugin import _load_plugin_lib  # noqa: E402

_load_plugin_lib()
print(f"[TensorRT-LLM] TensorRT LLM version: {__version__}")  # on standard output, as the real one does

__all__ = ["LLM", "BuildConfig", "Engine", "EngineConfig", "KvCacheConfig", "SamplingParams", "__version__"]
