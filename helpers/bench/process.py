"""The measured side of a benchmark: one engine in a worker process, driven by benchmark.py through `CALLS`."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from helpers.errors import InputError

if TYPE_CHECKING:
    from helpers.backends.base import Engine
    from helpers.model.sampling import SamplingParams

_engine: Engine


def build(recipe: dict[str, Any]) -> dict[str, Any]:
    """Build the engine of a recipe, or find it built; how long that took when it was done, and its size."""
    from helpers import engine, store
    from helpers.recipe import from_dict

    folder = engine.build(from_dict(recipe), quiet=True)
    return {"seconds": sum(store.read_manifest(folder)["seconds"].values()), "bytes": store.size(folder)}


def load(recipe: dict[str, Any], threads: int, cache: str) -> dict[str, Any]:
    """Load the engine of a recipe, with this many CPU threads for whatever library asks; 0 leaves that to each."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    import torch

    from helpers import engine
    from helpers.machine import hardware
    from helpers.recipe import from_dict

    global _engine
    if threads:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    _engine = engine.load(from_dict(recipe))
    seconds = time.perf_counter() - start
    versions = getattr(_engine, "versions", None) or {"python": sys.version.split()[0], **hardware.versions()}
    return {"load_s": seconds, "versions": versions}


def check(prompts: list[list[int]], output_len: int, logits: bool) -> dict[str, Any]:
    """The first request at a batch size, timed apart: its tokens, then, if asked, the logits after the first prompt."""
    start = time.perf_counter()
    answers = _engine.generate(prompts, _greedy(output_len))
    seconds = time.perf_counter() - start
    found = None
    if logits:
        with contextlib.suppress(InputError):  # some backends hand out none
            found = [round(value, 6) for value in _engine.logits(prompts[0]).tolist()]
    return {"tokens": answers[0].token_ids, "logits": found, "seconds": seconds, "host_bytes": _host_bytes()}


def measure(prompts: list[list[int]], output_len: int) -> dict[str, Any]:
    """One batch, timed: TTFT and TPOT are means over its requests, E2E the last one's, the gaps the first one's."""
    answers = _engine.generate(prompts, _greedy(output_len))
    metrics = [answer.metrics for answer in answers]
    return {
        "ttft_s": statistics.fmean(m.ttft_s for m in metrics),
        "tpot_s": statistics.fmean(m.tpot_s for m in metrics),
        "e2e_s": max(m.e2e_s for m in metrics),
        "itl_s": [round(gap, 7) for gap in metrics[0].gaps_s],
    }


def _host_bytes() -> int:
    """Most bytes that the engine's process has held: this one, or the worker that a remote engine answers in."""
    from helpers.backends.remote import RemoteEngine
    from helpers.machine import hardware

    return _engine.memory()["host"] if isinstance(_engine, RemoteEngine) else hardware.peak_host_bytes()


def _greedy(tokens: int) -> SamplingParams:
    from helpers.model.sampling import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


CALLS = {"build": build, "load": load, "check": check, "measure": measure}
