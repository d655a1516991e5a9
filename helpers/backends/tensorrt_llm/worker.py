"""TensorRT-LLM's side of the backends `tensorrt_llm` and `tensorrt_llm_pytorch`: served by worker.py in the Python of
TensorRT-LLM 1.2.1's own environment. It is the only module of the course that imports `tensorrt_llm`.

Written against names and signatures that were read in NVIDIA's repository shortly before and after 1.2.1, and tested
against a stand-in that has exactly these (tests/contract); no machine of ours could install TensorRT-LLM, so nothing
here has run with it. Sources stand beside the calls.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import secrets
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from helpers.backends.tensorrt_llm.errors import explain
from helpers.errors import BackendUnavailable, BuildError, CourseError, InputError, WorkerError
from helpers.machine.worker import log_since, log_size

# Before the first import of tensorrt_llm. One GPU needs no second process, and an MPI start inside a worker or a
# notebook can hang (llmapi/utils.py reads the variable once; issues 5854, 5495, 9766 of NVIDIA/TensorRT-LLM).
os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"
ENVIRONMENT = {
    "TLLM_LOG_LEVEL": "WARNING",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # NVIDIA's container runs as root
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded; build() lifts it for a data set on the Hub that the recipe names
    "TRANSFORMERS_OFFLINE": "1",
}
_llm: Any = None  # the LLM that is loaded: one at a time, for two on one GPU hang instead of failing
_gives_logits = False


def explained(what: str, otherwise: type[CourseError] = WorkerError) -> Callable[[Callable], Callable]:
    """Whatever the library raises becomes an error of ours, by its words and by what it logged during the call."""

    def decorate(call: Callable) -> Callable:
        @functools.wraps(call)
        def run(**arguments: Any) -> Any:
            with _translated(what, otherwise):
                return call(**arguments)

        @functools.wraps(call)
        def run_steps(**arguments: Any) -> Generator[Any, None, Any]:
            with _translated(what, otherwise):
                return (yield from call(**arguments))

        return run_steps if inspect.isgeneratorfunction(call) else run

    return decorate


@contextlib.contextmanager
def _translated(what: str, otherwise: type[CourseError]) -> Generator[None, None, None]:
    start = log_size()
    try:
        yield
    except CourseError:
        raise
    except Exception as error:  # the boundary to the library: AssertionError, RuntimeError, ValueError, ImportError ...
        message = f"{type(error).__name__}: {error}" if str(error) else ""
        raise explain(message, what, log_since(start), otherwise) from error


@explained("TensorRT-LLM cannot be used here.", BackendUnavailable)
def describe() -> dict[str, Any]:
    """What an engine depends on: versions and the GPU. TensorRT-LLM's own config.json names its version only."""
    import torch  # isort: skip  (before TensorRT-LLM, whose libraries link to it)
    import tensorrt
    import tensorrt_llm

    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "TensorRT-LLM needs an NVIDIA GPU, and its PyTorch finds none here.",
            cause="No GPU, no driver, or a container that was started without it.",
            fix="Use backend='aot' here.",
        )
    gpu = torch.cuda.get_device_properties(0)
    return {
        "versions": {
            "tensorrt_llm": str(tensorrt_llm.__version__),
            "tensorrt": str(tensorrt.__version__),
            "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda or ""),
        },
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
    }


@explained("The build failed.", BuildError)
def build(
    checkpoint: str,
    engine_dir: str,
    workspace: str,
    limits: dict[str, int],
    dtype: str,
    quantization: dict[str, Any],
    calibration: dict[str, Any],
    plugins: dict[str, Any],
    dummy: bool,
    fast: bool,
    gather_logits: bool,
    memory_fraction: float,
) -> Generator[dict[str, str], None, dict[str, float]]:
    """Build an engine from a Hugging Face checkpoint into engine_dir. Yields the phase; returns seconds of each.

    The same way as NVIDIA's `trtllm-bench build` (bench/build/build.py): one BuildConfig, LLM(...), save, shutdown.
    """
    if calibration and not Path(calibration["calib_dataset"]).is_absolute():  # a name on the Hub, asked for
        os.environ["HF_HUB_OFFLINE"] = "0"
        os.environ["HF_DATASETS_OFFLINE"] = "0"
    from tensorrt_llm._tensorrt_engine import LLM
    from tensorrt_llm.llmapi import BuildConfig, CalibConfig, KvCacheConfig, QuantAlgo, QuantConfig

    seconds: dict[str, float] = {}
    likely = limits.pop("opt_batch_size")
    config = BuildConfig(**limits)
    # Set one by one: BuildConfig was a dataclass until autumn 2025 and is a pydantic model since; both allow this.
    config.profiling_verbosity = "detailed"  # or the layers of the engine have names only
    config.gather_generation_logits = gather_logits
    if hasattr(config, "opt_batch_size"):  # read before 1.2.1 only; 8 unless set, also where max_batch_size is less
        config.opt_batch_size = likely
    config.output_timing_cache = str(Path(workspace) / "model.cache")  # else it lands in the current folder
    config.plugin_config.dtype = dtype
    for name, value in plugins.items():
        setattr(config.plugin_config, name, None if value == "disable" else value)
    settings: dict[str, Any] = {"workspace": workspace, "fast_build": fast, "gather_generation_logits": gather_logits}
    if quantization:
        algorithms = {name: QuantAlgo(value) for name, value in quantization.items()}
        settings["quant_config"] = QuantConfig(**algorithms)
    if calibration:
        settings["calib_config"] = CalibConfig(**calibration)
    if dummy:
        settings["load_format"] = "dummy"
    yield {"phase": "build (TensorRT-LLM)"}
    start = time.perf_counter()
    llm = LLM(
        model=checkpoint,
        skip_tokenizer_init=True,  # token ids go in and come out; text is the course's business
        dtype=dtype,
        build_config=config,
        kv_cache_config=KvCacheConfig(**_cache_settings(memory_fraction)),  # LLM() starts the engine as well
        **settings,
    )
    seconds["build"] = time.perf_counter() - start
    try:
        yield {"phase": "save the engine"}
        start = time.perf_counter()
        llm.save(engine_dir)
        seconds["save"] = time.perf_counter() - start
    finally:
        llm.shutdown()
    return seconds


@explained("The engine cannot be loaded.")
def load(engine_dir: str, memory_fraction: float, gives_logits: bool) -> None:
    """Load a built engine; it stays until the process ends."""
    from tensorrt_llm._tensorrt_engine import LLM
    from tensorrt_llm.llmapi import KvCacheConfig

    global _llm, _gives_logits
    _llm = LLM(
        model=engine_dir,
        skip_tokenizer_init=True,
        kv_cache_config=KvCacheConfig(**_cache_settings(memory_fraction)),
        gather_generation_logits=gives_logits,
    )
    _gives_logits = gives_logits


@explained("The model cannot be loaded.")
def load_pytorch(
    checkpoint: str, limits: dict[str, int], dtype: str, dummy: bool, memory_fraction: float, cuda_graphs: bool
) -> None:
    """TensorRT-LLM without an engine: its PyTorch backend, the only one after 1.2.1."""
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi import KvCacheConfig

    global _llm, _gives_logits
    settings: dict[str, Any] = {} if cuda_graphs else {"cuda_graph_config": None}  # by default they are on
    if dummy:
        settings["load_format"] = "dummy"
    _llm = LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        dtype=dtype,
        kv_cache_config=KvCacheConfig(**_cache_settings(memory_fraction)),
        **limits,
        **settings,
    )
    _gives_logits = True  # this backend gathers them for each request that asks


@explained("The request failed.")
def generate(
    prompts: list[list[int]], sampling: dict[str, Any]
) -> Generator[list[list[Any]], None, dict[str, list[float]]]:
    """Answer all prompts at once. Yields lists of [prompt's index, token id, seconds]: a single prompt's as they come,
    a batch's at the end, for handing them over takes longer than some steps."""
    from tensorrt_llm import SamplingParams

    params = SamplingParams(**sampling_settings(sampling))
    start = time.perf_counter()
    # A streaming result can be waited for step by step without an event loop (executor/result.py, __next__).
    running = {
        index: _llm.generate_async(ids, sampling_params=params, streaming=True) for index, ids in enumerate(prompts)
    }
    ended = [0.0] * len(prompts)
    collected: list[list[Any]] = []
    while running:
        # The engine works on all sequences in one step, so their tokens arrive together: waiting in turn costs nothing.
        for index, result in list(running.items()):
            more = next(result, None)
            seconds = ended[index] = time.perf_counter() - start
            if more is None:
                del running[index]
                continue
            tokens = [[index, token, seconds] for token in more.outputs[0].token_ids_diff]
            if len(prompts) == 1 and tokens:
                yield tokens
            else:
                collected += tokens
    if collected:
        yield collected
    return {"seconds": ended}


@explained("The request failed.")
def logits(prompt: list[int]) -> list[float]:
    """Scores [V] after the prompt."""
    from tensorrt_llm import SamplingParams

    if not _gives_logits:
        raise InputError(
            "This engine was built without its logits as an output.",
            cause="TensorRT-LLM's engines choose the token themselves; handing out scores costs memory and time.",
            fix="Build with the option gather_generation_logits = true.",
        )
    settings = sampling_settings({"temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "end_ids": []})
    answer = _llm.generate(prompt, SamplingParams(**settings, return_generation_logits=True), use_tqdm=False)
    return answer.outputs[0].generation_logits[0].float().tolist()


@explained("ModelRunner failed.")
def walk(
    engine_dir: str, prompts: list[list[int]], sampling: dict[str, Any], cpp: bool, memory_fraction: float
) -> list[list[int]]:
    """The older interface, step by step: ModelRunner.from_dir, generate; the answers' token ids, without the prompts.

    What 1.2.1 asks for, beyond what tutorials show (runtime/generation.py, model_runner.py, model_runner_cpp.py):
    SamplingConfig has no default for end_id and pad_id; its top_k is 1, so nothing is drawn until it is raised; the C++
    runner reads max_new_tokens (which is 1 unless given), end_id and pad_id from keywords only, and takes no
    SamplingConfig of `tensorrt_llm.runtime`. So everything is given by name.
    """
    import torch
    from tensorrt_llm.runtime import ModelRunner, SamplingConfig

    global _llm
    if _llm is not None:
        _llm.shutdown()
        _llm = None
    common = runner_settings(sampling)
    batch = [torch.tensor(ids, dtype=torch.int32) for ids in prompts]
    if cpp:
        from tensorrt_llm.runtime import ModelRunnerCpp

        runner = ModelRunnerCpp.from_dir(
            engine_dir=engine_dir, rank=0, kv_cache_free_gpu_memory_fraction=memory_fraction
        )
        outputs = runner.generate(batch, **common)
    else:
        runner = ModelRunner.from_dir(engine_dir=engine_dir, rank=0)
        outputs = runner.generate(batch, sampling_config=SamplingConfig(**common))
    end = common["end_id"]
    answers = []
    for ids, row in zip(prompts, outputs[:, 0].tolist(), strict=True):  # [batch, beams, tokens], the prompt included
        answer = row[len(ids) : len(ids) + sampling["max_tokens"]]
        answers.append(answer[: answer.index(end)] if end in answer else answer)
    return answers


def memory() -> dict[str, int]:
    """The most bytes that this process has held. On the GPU TensorRT allocates beside torch: what is in use now."""
    import torch

    from helpers.machine.hardware import peak_host_bytes

    device = 0
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        device = total - free
    return {"host": peak_host_bytes(), "device": device}


def sampling_settings(sampling: dict[str, Any]) -> dict[str, Any]:
    """The arguments of tensorrt_llm.SamplingParams for the course's settings (sampling_params.py).

    Greedy is top_k=1: a temperature of 0 is outside what the C++ runtime documents. To draw, top_k and top_p are both
    given, for with neither TensorRT-LLM is greedy whatever the temperature. And without a seed it uses 0, each time.
    """
    ends = sampling["end_ids"] or [-1]
    settings = {
        "end_id": ends[0],
        "pad_id": ends[0],
        "stop_token_ids": None if sampling["ignore_eos"] else ends[1:] or None,
        "max_tokens": sampling["max_tokens"],
        "ignore_eos": sampling["ignore_eos"],
        "detokenize": False,
        **_choice(sampling, "seed"),
    }
    if sampling.get("repetition_penalty", 1.0) != 1.0:
        settings["repetition_penalty"] = sampling["repetition_penalty"]
    return settings


def runner_settings(sampling: dict[str, Any]) -> dict[str, Any]:
    """The same for ModelRunner: its names differ, and ids of tokens that end a text are one number."""
    end = sampling["end_ids"][0] if sampling["end_ids"] and not sampling["ignore_eos"] else -1
    return {
        "end_id": end,
        "pad_id": sampling["end_ids"][0] if sampling["end_ids"] else 0,
        "max_new_tokens": sampling["max_tokens"],
        "repetition_penalty": sampling["repetition_penalty"],
        **_choice(sampling, "random_seed"),
    }


def _choice(sampling: dict[str, Any], seed: str) -> dict[str, Any]:
    """How a token is chosen. seed: its name."""
    if sampling["temperature"] == 0:
        return {"top_k": 1}
    number = secrets.randbits(31) if sampling["seed"] is None else sampling["seed"]
    drawn = {name: sampling[name] for name in ("top_k", "top_p")}
    return {"temperature": max(sampling["temperature"], 1e-5), **drawn, seed: number}


def _cache_settings(fraction: float) -> dict[str, Any]:
    """Keys and values get a part of the free memory, not 90 % of it; and a prompt that came before is computed again,
    for an answer out of the cache would be timed as if it had been work (llmapi/llm_args.py, KvCacheConfig)."""
    return {"free_gpu_memory_fraction": fraction, "enable_block_reuse": False, "enable_partial_reuse": False}


CALLS = {
    "describe": describe,
    "build": build,
    "load": load,
    "load_pytorch": load_pytorch,
    "generate": generate,
    "logits": logits,
    "walk": walk,
    "memory": memory,
}
