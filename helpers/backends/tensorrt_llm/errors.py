"""What TensorRT-LLM 1.2.1 and the libraries under it say when something is wrong, and what it means.

Each entry: words that mark the message, the error of ours that it becomes, the likely cause and the way out. The texts
come from the issues of NVIDIA/TensorRT-LLM named beside them and from its source around 1.2.1; users met them, we did
not run it. The first entry that matches counts, so causes stand before their consequences.
"""

from __future__ import annotations

import re

from helpers.errors import (
    BackendUnavailable,
    BuildError,
    CourseError,
    EngineCorrupt,
    EngineMismatch,
    EngineNotFound,
    InputError,
    LimitError,
    ModelError,
    OutOfMemory,
    WorkerError,
)

_ENV = "Make the environment anew: helpers env create trtllm; or use NVIDIA's container (compose.yaml)."
_REBUILD = "Build the recipe again here: build(recipe, force=True)."
_SMALLER = "Build with a smaller max_batch_size, max_num_tokens or max_seq_len, and close what else is on the GPU."

KNOWN: tuple[tuple[str, type[CourseError], str, str], ...] = (
    # The installation.
    (
        "libnvinfer",  # issue 1774
        BackendUnavailable,
        "TensorRT's libraries are not where the loader looks: the wheel tensorrt is missing, or another version.",
        _ENV,
    ),
    (
        "libmpi.so",  # issue 167
        BackendUnavailable,
        "TensorRT-LLM needs Open MPI, on one GPU too.",
        "Install it: apt-get install libopenmpi-dev; then try: python -c 'from mpi4py import MPI'.",
    ),
    (
        "libpython3",  # issue 6102
        BackendUnavailable,
        "This Python was built without its shared library, which TensorRT-LLM's code asks for.",
        "Use the Python of your Linux distribution, or put the folder of libpython on LD_LIBRARY_PATH.",
    ),
    (
        "libcuda.so",
        BackendUnavailable,
        "There is no NVIDIA driver here, or the container was started without the GPU.",
        "Install the driver, or start the container with --gpus all.",
    ),
    (
        "undefined symbol",  # issues 1008, 2380, 4275
        BackendUnavailable,
        "TensorRT-LLM's library was compiled for another version of PyTorch than the one beside it.",
        _ENV,
    ),
    (
        "factory function returned nullptr",  # trt.Builder() after another package replaced tensorrt
        BackendUnavailable,
        "TensorRT beside TensorRT-LLM 1.2.1 is not 10.14.1: another package has replaced it.",
        _ENV,
    ),
    (
        "no module named 'tensorrt_llm._tensorrt_engine'",  # NVIDIA's guide on the removal of the TensorRT backend
        BackendUnavailable,
        "This TensorRT-LLM builds no engines any more: they were removed in the release candidates of 1.3.",
        "Install 1.2.1, the last stable release with engines; or backend='tensorrt_llm_pytorch'.",
    ),
    (
        "no module named 'tensorrt_llm'",
        BackendUnavailable,
        "The environment's Python has no TensorRT-LLM.",
        _ENV,
    ),
    # The GPU.
    (
        "fp8 precision require hardware with fp8",  # issue 1428
        BuildError,
        "FP8 begins with compute capability 8.9 (Ada) and 9.0 (Hopper); this GPU is older.",
        "Use precision 'int8' or 'int4'.",
    ),
    (
        "fp8 fmha cannot be enabled",  # issues 1864, 1914
        BuildError,
        "Attention in FP8 is for Hopper and later.",
        "Set the option use_fp8_context_fmha to false.",
    ),
    (
        "quantization is not supported on sm>=100",
        BuildError,
        "On Blackwell GPUs (compute capability 10.x), TensorRT-LLM 1.2.1 has no INT8 and INT4 weights.",
        "Use precision 'fp8', or 'bf16'.",
    ),
    (
        "pre sm 80 gpus do not support bfloat16",
        BuildError,
        "bf16 begins with compute capability 8.0 (Ampere).",
        "Use precision='fp16'.",
    ),
    (
        "unsupported architecture",  # fmhaRunner.cpp; issues 199, 1515
        BuildError,
        "TensorRT-LLM 1.2.1 has no attention kernels for this GPU; it begins with compute capability 8.0.",
        "Use another GPU, or backend='aot'.",
    ),
    # The model.
    (
        "unsupported model architecture",  # issue 1026
        ModelError,
        "The engine side of TensorRT-LLM 1.2.1 does not know this kind of model; new kinds came for PyTorch only.",
        "Try backend='tensorrt_llm_pytorch', or another model.",
    ),
    (
        "cannot access gated repo",
        ModelError,
        "The model's owner asks for a licence to be accepted, and for a token.",
        "Accept it on the model's page and set HF_TOKEN; TinyLlama is open.",
    ),
    # Engine files.
    (
        "expecting compute",  # issue 3031
        EngineMismatch,
        "A plan is native code for one GPU architecture, and this GPU has another.",
        _REBUILD,
    ),
    (
        "stdversionread == kserialization_version",  # tensorrtllm_backend issue 531
        EngineMismatch,
        "The plan was written by another version of TensorRT.",
        _REBUILD,
    ),
    (
        "not compatible with this version of tensorrt",  # triton_cli pull request 59
        EngineMismatch,
        "The plan was written by another version of TensorRT.",
        _REBUILD,
    ),
    (
        "cannot instantiate generator for engine built for",
        EngineMismatch,
        "The engine was built for several GPUs, and this course runs one process.",
        _REBUILD,
    ),
    (
        "engine world size",
        EngineMismatch,
        "The engine was built for another number of GPUs.",
        _REBUILD,
    ),
    (
        "failed to infer model format because no config.json exists",
        EngineNotFound,
        "The folder holds no engine, and no checkpoint either.",
        "Build first, and give the folder that build returned.",
    ),
    # Memory. The builder's own message stands in its log, and the exception only points there.
    (
        "executor creation failed due to insufficient gpu memory",  # issue 5872
        OutOfMemory,
        "The KV cache does not fit beside the weights and what else is on the GPU.",
        "Set the option free_gpu_memory_fraction lower, build with smaller limits, or close other programs on the GPU.",
    ),
    (
        "could not be allocated. there may not be enough free memory",  # issues 346, 1543, 2451
        OutOfMemory,
        "The builder needs several times the weights' size for a while, and cannot be told to use less.",
        _SMALLER,
    ),
    ("error code 2: outofmemory", OutOfMemory, "TensorRT ran out of GPU memory while it built.", _SMALLER),
    (
        "out of memory",  # issues 401, 2398, 8642
        OutOfMemory,
        "Weights, KV cache and intermediate results do not fit on the GPU beside what else is there.",
        "Send fewer or shorter prompts, build with smaller limits, or close other programs on the GPU.",
    ),
    # Consequences of the above.
    (
        "failed to deserialize cuda engine",  # issue 1838
        EngineCorrupt,
        "TensorRT cannot read the plan: it was cut short, or built by another version or for another GPU.",
        _REBUILD,
    ),
    (
        "self.engine is not none",
        EngineCorrupt,
        "TensorRT cannot read the plan: it was cut short, or built by another version or for another GPU.",
        _REBUILD,
    ),
    (
        "engine building failed, please check the error log",
        BuildError,
        "TensorRT found no way to build this network, most often for lack of memory.",
        _SMALLER,
    ),
    # Limits. Ours are checked before; these are the library's own, such as max_num_tokens.
    (
        "should not exceed max_num_tokens",  # issue 9277
        LimitError,
        "A step takes at most max_num_tokens tokens from all sequences together.",
        "Build with a larger option max_num_tokens.",
    ),
    (
        "should not exceed max_seq_len",
        LimitError,
        "Prompt and answer together are longer than the engine was built for.",
        "Ask for less, or build with a larger max_seq_len.",
    ),
    (
        "exceeds the engine or specified limit",
        LimitError,
        "An engine's limits are fixed when it is built.",
        "Ask for less, or build with a larger limit; the message names it.",
    ),
    (
        "does not satisfy any optimization profile",  # issue 214
        LimitError,
        "A shape lies outside the ranges that the engine was built for.",
        "Ask for less, or build with larger limits.",
    ),
    ("cannot exceed max_batch_size", LimitError, "More answers a prompt than the engine has places.", "Ask for fewer."),
    (
        "tokenizer is required to reset end_id",
        InputError,
        "TensorRT-LLM was told neither a tokenizer nor the end token.",
        "Give SamplingParams(end_id=...), or LLM(tokenizer=...).",
    ),
    # Processes.
    (
        "not enough slots available",  # issue 5854
        WorkerError,
        "Open MPI wanted to start a second process, and this machine has no place for it.",
        "Set TLLM_WORKER_USE_SINGLE_PROCESS=1 before TensorRT-LLM is imported; the course's worker does.",
    ),
    (
        "already filled",  # issue 5495
        WorkerError,
        "Open MPI wanted to start a second process, and this machine has no place for it.",
        "Set TLLM_WORKER_USE_SINGLE_PROCESS=1 before TensorRT-LLM is imported; the course's worker does.",
    ),
    (
        "gpus are available, but",  # issue 2594
        BackendUnavailable,
        "The engine or the settings ask for more GPUs than there are.",
        "Use tensor_parallel_size=1.",
    ),
    (
        "llm is shutting down",
        InputError,
        "The engine was closed while a request was on its way.",
        "Load it again.",
    ),
    # Settings that belong to the other class, or to another version.
    (
        "specific to tensorrt backend",
        BackendUnavailable,
        "tensorrt_llm.LLM runs PyTorch; settings of engines belong to tensorrt_llm._tensorrt_engine.LLM.",
        "Import LLM from tensorrt_llm._tensorrt_engine.",
    ),
    (
        "got invalid argument",
        BackendUnavailable,
        "This version of TensorRT-LLM does not know one of the settings that the course gives.",
        "Install 1.2.1: helpers env create trtllm.",
    ),
)


# Exceptions that are only the consequence of what stands in the log.
_POINTERS = ("engine building failed, please check the error log", "failed to deserialize", "self.engine is not none")


def explain_import(message: str, what: str) -> CourseError:
    """The error for a library that was installed and cannot be imported."""
    return explain(message, what, otherwise=BackendUnavailable)


def explain(said: str, what: str, log: str = "", otherwise: type[CourseError] = WorkerError) -> CourseError:
    """Our error for an exception's text or, where that says too little, for what the library logged meanwhile."""
    complaints = "\n".join(line for line in log.splitlines() if re.search("error|assert|allocated", line, re.I))
    pointer = any(words in said.lower() for words in _POINTERS) or not said.strip()
    for text in (complaints, said) if pointer else (said, complaints):
        for words, kind, cause, fix in KNOWN:
            if words in text.lower():
                return kind(f"{what} TensorRT-LLM says: {_line_with(text, words)}", cause=cause, fix=fix)
    return otherwise(
        f"{what} TensorRT-LLM says: {said.strip()[:1500] or 'nothing'}",
        cause="This message is not among those that the course knows.",
        fix="Search for it in the issues of NVIDIA/TensorRT-LLM; the version here is 1.2.1.",
    )


def _line_with(text: str, words: str) -> str:
    lines = text.strip().splitlines()
    return next((line.strip() for line in lines if words in line.lower()), lines[0])[:500]
