"""Stand-in. Source: tensorrt_llm/_tensorrt_engine/__init__.py; gone in the late release candidates of 1.3."""

from tensorrt_llm import __version__

if tuple(int(part) for part in __version__.split(".")[:2]) >= (1, 3):
    raise ModuleNotFoundError("No module named 'tensorrt_llm._tensorrt_engine'")

from tensorrt_llm.llmapi.llm import _TrtLLM as LLM  # noqa: E402

__all__ = ["LLM"]
