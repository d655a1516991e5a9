"""Stand-in. Source: tensorrt_llm/llmapi/__init__.py (names), llm_args.py (KvCacheConfig and others)."""

from ..builder import BuildConfig
from ..quantization import CalibConfig, QuantAlgo, QuantConfig
from ..sampling_params import SamplingParams
from .llm import LLM, CompletionOutput, RequestOutput
from .llm_args import BuildCacheConfig, CudaGraphConfig, KvCacheConfig, SchedulerConfig

__all__ = [
    "LLM",
    "BuildCacheConfig",
    "BuildConfig",
    "CalibConfig",
    "CompletionOutput",
    "CudaGraphConfig",
    "KvCacheConfig",
    "QuantAlgo",
    "QuantConfig",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]
