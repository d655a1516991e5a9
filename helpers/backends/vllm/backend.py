"""The `vllm` backend: vLLM 0.25.1, for comparison, in a worker process under the Python of its own environment.

vLLM is used as it comes: compiled, with CUDA graphs, its engine core in one more process. Set are only the recipe's
limits, no prefix cache, and the room for keys and values: as much as the other backends have. By default it would take
92 % of the GPU for them.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from helpers.backends.remote import RemoteEngine, start
from helpers.machine.environments import need_python
from helpers.machine.worker import Worker
from helpers.model.checkpoint import Checkpoint, find_checkpoint
from helpers.model.tokenizer import load_tokenizer
from helpers.paths import temporary_folder
from helpers.recipe import BuildRecipe

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
BLOCK = 16  # tokens in a block of vLLM's KV cache
# Its own profiler (vllm 0.25.1, config/profiler.py) is made when a trace is asked for, so it costs nothing before.
PROFILER = {
    "profiler": "torch",
    "torch_profiler_with_stack": False,
    "torch_profiler_use_gzip": False,
    "torch_profiler_dump_cuda_time_total": False,
}
START_LIMIT_S = 900.0  # LLM() compiles; a minute is usual


def load(recipe: BuildRecipe) -> RemoteEngine:
    """Start vLLM with a recipe's model and limits. Raises BackendUnavailable, ModelError, OutOfMemory."""
    checkpoint = find_checkpoint(recipe.model)
    checkpoint.check(recipe.max_seq_len)
    checkpoint.check_sole_weights("vLLM")
    tokenizer = load_tokenizer(checkpoint.folder)
    traces = temporary_folder() / f"vllm-traces-{uuid4().hex}"  # vLLM makes it with the first trace
    arguments = {"profiler_config": PROFILER | {"torch_profiler_dir": str(traces)}, **settings(recipe, checkpoint)}
    worker = Worker("helpers.backends.vllm.worker", python=need_python("vllm"))
    versions = start(worker, "vLLM", "load", START_LIMIT_S, settings=arguments)
    engine = RemoteEngine(recipe, tokenizer, checkpoint.config.eos_token_ids, checkpoint.config.vocab_size, worker)
    engine.versions, engine.traces = versions, traces
    return engine


def check_available() -> None:
    """BackendUnavailable where vLLM's environment is not there. Nothing is started."""
    need_python("vllm")


def settings(recipe: BuildRecipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a recipe (vllm 0.25.1, entrypoints/llm.py and engine/arg_utils.py)."""
    # A spare block for each sequence, and one sequence more: vLLM keeps a block for itself.
    blocks = (recipe.max_batch_size + 1) * (recipe.max_seq_len // BLOCK + 2)
    width = 4 if recipe.precision == "fp32" else 2
    fields: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "dtype": DTYPES[recipe.precision],
        "load_format": "dummy" if checkpoint.dummy else "safetensors",
        "skip_tokenizer_init": True,  # token ids go in and come out; text is this course's business
        "max_model_len": recipe.max_seq_len,
        "max_num_seqs": recipe.max_batch_size,
        "kv_cache_memory_bytes": checkpoint.config.kv_cache_bytes(1, blocks * BLOCK, width),
        "gpu_memory_utilization": 0.05,  # with the line above, only what must be free before it starts
        "enable_prefix_caching": False,
        "max_logprobs": -1,  # all of them, for `logits`
        "seed": 0,
    }
    if recipe.precision == "fp8":
        fields["quantization"] = "fp8"
    return {**fields, **recipe.options}
