"""vLLM's side of the `vllm` backend: the calls that remote.py names, served in vLLM's own Python.

Tokens come from the step loop that `LLM.generate` itself runs (vllm 0.25.1, entrypoints/offline_utils.py,
`_run_engine`), with each step's new tokens handed out, as a stream needs them. Seconds count from the request to the
moment this process has the token; no text is made.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

from helpers.errors import BackendUnavailable, InputError, OutOfMemory
from helpers.machine import hardware
from helpers.machine.worker import log_since, log_size

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # A forked child would inherit the worker's thread that reads standard input, and the lock it holds.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_llm: Any = None  # vLLM's LLMEngine
_count = 0  # requests so far: their names


def load(settings: dict[str, Any]) -> dict[str, str]:
    """Start vLLM; settings are the arguments of `vllm.LLM`. The versions of what answers."""
    global _llm
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise BackendUnavailable("vLLM is used on NVIDIA GPUs here, and it finds none on this machine.")
    start = log_size()
    try:
        _llm = vllm.LLM(**settings).llm_engine
    except (RuntimeError, ValueError) as error:
        # Its engine core is another process, whose error stands in the log alone.
        told = re.search(
            r"\b[A-Z]\w*Error: (?!Engine core)(.+)", f"{type(error).__name__}: {error}\n{log_since(start)}"
        )
        words = told[1].strip()[:400] if told else str(error).splitlines()[0]
        if "memory" in words.lower():
            fix = "Close what else is on the GPU, or ask for less."
            raise OutOfMemory(f"vLLM did not start: {words}", fix=fix) from error
        fix = "Search the issues of vllm-project/vllm for these words, without your own paths and numbers."
        raise BackendUnavailable(f"vLLM did not start: {words}", fix=fix) from error
    return {"python": sys.version.split()[0], "vllm": vllm.__version__, **hardware.versions()}


def generate(prompts: list[list[int]], sampling: dict[str, Any]) -> Generator[Any, None, dict[str, Any]]:
    """Answer all prompts at once. A single prompt's tokens are handed over as they come, a batch's at the end."""
    start = time.perf_counter()
    ends = set(sampling.pop("end_ids"))
    stop = set() if sampling["ignore_eos"] else ends
    # All end tokens, because vLLM is loaded without the tokenizer, and knows those of the configuration alone.
    names = {name: index for index, name in enumerate(_submit(prompts, **sampling, stop_token_ids=sorted(stop)))}
    ended = [0.0] * len(prompts)
    collected: list[list[Any]] = []
    for name, output in _steps():
        seconds = time.perf_counter() - start
        tokens = [[names[name], token, seconds] for token in output.token_ids if token not in stop]
        ended[names[name]] = seconds
        if len(prompts) == 1 and tokens:
            yield tokens
        else:
            collected += tokens
    if collected:
        yield collected
    return {"seconds": ended}


def logits(prompt: list[int]) -> list[float]:
    """Log-probabilities [V] after the prompt: the logits less a constant, which is what vLLM hands out."""
    try:
        _submit([prompt], temperature=0.0, max_tokens=1, logprobs=-1)
    except ValueError as error:  # vLLM's own check of the request
        raise InputError(f"vLLM hands out no log-probabilities: {error}") from error
    scores: dict[int, Any] = {}  # by token id
    for _, output in _steps():
        scores = output.logprobs[0] if output.logprobs else scores
    if sorted(scores) != list(range(len(scores))) or not scores:
        raise InputError(f"vLLM handed out {len(scores)} log-probabilities, and not one for each token.")
    return [scores[token].logprob for token in range(len(scores))]


def memory() -> dict[str, int]:
    """Host: the peaks of this process and of vLLM's engine core, added. Device: vLLM's own allocator is in the other
    process, so 0; the benchmark measures it from outside."""
    import psutil

    from helpers.machine.hardware import peak_host_bytes

    children = [child.pid for child in psutil.Process().children()]
    return {"host": sum(peak_host_bytes(pid) for pid in [os.getpid(), *children]), "device": 0}


def profile(on: bool) -> None:
    """Begin or end a trace of the engine core's work (vllm 0.25.1, v1/engine/llm_engine.py). A thread writes it."""
    if on:
        _llm.start_profile()
    else:
        _llm.stop_profile()


def _submit(prompts: list[list[int]], **sampling: Any) -> list[str]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    global _count
    params = SamplingParams(**sampling, detokenize=False, output_kind=RequestOutputKind.DELTA)
    names = []
    for ids in prompts:
        _count += 1
        names.append(str(_count))
        _llm.add_request(names[-1], {"type": "token", "prompt_token_ids": ids}, params)
    return names


def _steps() -> Iterator[tuple[str, Any]]:
    """Each request's new tokens, step by step, until all requests have ended."""
    while _llm.has_unfinished_requests():
        for answer in _llm.step():
            yield answer.request_id, answer.outputs[0]


CALLS = {"load": load, "generate": generate, "logits": logits, "memory": memory, "profile": profile}
