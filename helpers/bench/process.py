"""The measured side of a benchmark: one engine in a worker process, driven by run.py through `CALLS`."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from helpers.backends.answers import Generation
from helpers.backends.base import Engine
from helpers.backends.remote import RemoteEngine
from helpers.bench.records import HAVE_DECODE_GRAPHS
from helpers.errors import InputError
from helpers.machine import hardware
from helpers.machine.gpu_time import GpuTime, traced
from helpers.model.sampling import SamplingParams
from helpers.recipe import from_dict

TRACED_STEPS = 16  # enough for a mean; eager PyTorch starts some thousand kernels in each
_engine: Engine


def build(recipe: dict[str, Any]) -> dict[str, Any]:
    """Build the engine of a recipe, or find it built; how long that took when it was done, and its size."""
    from helpers import engine, store

    folder = engine.build(from_dict(recipe), quiet=True)
    return {"seconds": sum(store.read_manifest(folder)["seconds"].values()), "bytes": store.size(folder)}


def load(recipe: dict[str, Any], threads: int, cache: str) -> dict[str, Any]:
    """Load the engine of a recipe, with this many CPU threads for whatever library asks; 0 leaves that to each."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    import torch

    from helpers import engine

    global _engine
    if threads:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    _engine = engine.load(from_dict(recipe))
    seconds = time.perf_counter() - start
    remote = isinstance(_engine, RemoteEngine)  # it does not say how many threads its library takes
    used = None if remote else getattr(_engine, "num_threads", torch.get_num_threads())
    return {
        "load_s": seconds,
        "versions": getattr(_engine, "versions", None) or {"python": sys.version.split()[0], **hardware.versions()},
        "device": getattr(_engine, "device", None) or hardware.resolve_device(_engine.recipe.device),
        "threads": used,
        "decode_graphs": list(_engine.recipe.all_decode_batch_sizes) if recipe["backend"] in HAVE_DECODE_GRAPHS else [],
    }


def check(prompts: list[list[int]], output_len: int, logits: bool) -> dict[str, Any]:
    """The first request at a batch size, timed apart: its tokens, then, if asked, logits after the first prompt."""
    start = time.perf_counter()
    answers = _answer(prompts, output_len)
    seconds = time.perf_counter() - start
    scores = [[round(value, 6) for value in row] for row in _logits(prompts)] if logits else []
    return {"tokens": answers[0].token_ids, "logits": scores, "seconds": seconds, "host_bytes": _host_bytes()}


def _logits(prompts: list[list[int]]) -> Iterator[list[float]]:
    """Logits [V] after the first prompt, read whole by prefill; and again where the engine hands out single steps, with
    the prompts' second half read by decode: what takes the time at this batch size is compared too."""
    half = (len(prompts[0]) + 1) // 2
    with contextlib.suppress(InputError):  # some backends hand out none, some no steps
        yield _engine.logits(prompts[0]).tolist()
        logits = _engine.prefill([ids[:half] for ids in prompts])  # [B, V]
        for tokens in zip(*(ids[half:] for ids in prompts), strict=True):
            logits = _engine.decode(tokens)
        yield logits[0].float().tolist()


def measure(prompts: list[list[int]], output_len: int) -> dict[str, Any]:
    """One batch, timed: TTFT and TPOT are means over its requests, E2E the last one's, the gaps the first one's."""
    metrics = [answer.metrics for answer in _answer(prompts, output_len)]
    return {
        "ttft_s": statistics.fmean(m.ttft_s for m in metrics),
        "tpot_s": statistics.fmean(m.tpot_s for m in metrics),
        "e2e_s": max(m.e2e_s for m in metrics),
        "itl_s": [round(gap, 7) for gap in metrics[0].gaps_s],
    }


def gpu_time(prompts: list[list[int]], output_len: int) -> dict[str, float]:
    """What the GPU does in one decode step, in the mean of some: all work of a request, less that of its prefill."""
    steps = min(output_len - 1, TRACED_STEPS)
    whole, prefill = (_traced(prompts, tokens) for tokens in (steps + 1, 1))
    means = (max(0.0, (a - b) / steps) for a, b in zip(whole, prefill, strict=True))
    return GpuTime(*means)._asdict()


def _traced(prompts: list[list[int]], output_len: int) -> GpuTime:
    if isinstance(_engine, RemoteEngine):
        return _engine.traced(lambda: _answer(prompts, output_len))
    return traced(lambda: _answer(prompts, output_len))


def _answer(prompts: list[list[int]], output_len: int) -> list[Generation]:
    """Greedy, past the end token. InputError if an answer has another length: its times would be of other work."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    answers = _engine.generate(prompts, sampling)
    for answer in answers:
        if len(answer.token_ids) != output_len:
            raise InputError(f"It gave {len(answer.token_ids)} tokens where {output_len} were asked for.")
    return answers


def _host_bytes() -> int:
    """Most bytes that the engine's process has held: this one, or the worker that a remote engine answers in."""
    return _engine.memory()["host"] if isinstance(_engine, RemoteEngine) else hardware.peak_host_bytes()


CALLS = {"build": build, "load": load, "check": check, "measure": measure, "gpu_time": gpu_time}
