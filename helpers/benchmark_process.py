"""The measured side of a benchmark: one engine in a worker process, driven by benchmark.py through `CALLS`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.base import Engine
    from .sampling import SamplingParams

_engine: Engine


def load(recipe: dict[str, Any], threads: int, cache: str) -> dict[str, Any]:
    """Load the engine of a recipe, with this many CPU threads for whatever library asks."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    import torch

    from . import engine, hardware
    from .recipe import from_dict

    global _engine
    torch.set_num_threads(threads)
    start = time.perf_counter()
    _engine = engine.load(from_dict(recipe))
    seconds = time.perf_counter() - start
    return {"load_s": seconds, "versions": {"python": sys.version.split()[0], **hardware.versions()}}


def check(prompts: list[list[int]], output_len: int) -> dict[str, Any]:
    """The first request of all, timed apart: its tokens, then the logits after the first prompt."""
    start = time.perf_counter()
    answers = _engine.generate(prompts, _greedy(output_len))
    seconds = time.perf_counter() - start
    logits = [round(value, 6) for value in _engine.logits(prompts[0]).tolist()]
    return {"tokens": answers[0].token_ids, "logits": logits, "seconds": seconds}


def measure(prompts: list[list[int]], output_len: int, stream: bool) -> dict[str, Any]:
    """One batch, timed; with `stream` the first prompt once more, as a stream, for the gaps between its tokens."""
    metrics = _engine.generate(prompts, _greedy(output_len))[0].metrics
    gaps: list[float] = []
    if stream:
        at = [token.elapsed_s for token in _engine.stream(prompts[0], _greedy(output_len))]
        gaps = [later - earlier for earlier, later in zip(at, at[1:], strict=False)]
    return {**asdict(metrics), "itl_s": gaps}


def memory() -> dict[str, int]:
    """Most bytes that this process has held, on the host and on the GPU."""
    import torch

    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"host": peak_host_bytes(), "device": torch.cuda.max_memory_reserved() if on_gpu else 0}


def peak_host_bytes() -> int:
    """On Linux from /proc: getrusage would count what the parent held when it started this process."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)  # Windows counts the peak; elsewhere it is what is held now


def _greedy(tokens: int) -> SamplingParams:
    from .sampling import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


CALLS = {"load": load, "check": check, "measure": measure, "memory": memory}
