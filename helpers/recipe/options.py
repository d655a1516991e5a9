"""Which options each backend takes. Every list is closed: a backend refuses what is not on its list.

An option's kind is a type (bool, int, float, str, list), a tuple of types, or a tuple of the values that are allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from helpers.errors import RecipeError, shown
from helpers.recipe.fields import RecipeFields, not_allowed

# vLLM 0.25.1, vllm/engine/arg_utils.py. What loads code, such as trust_remote_code, is not on the list.
VLLM: dict[str, Any] = {
    "enforce_eager": bool,  # no compilation and no CUDA graphs
    "enable_prefix_caching": bool,
    "enable_chunked_prefill": bool,
    "async_scheduling": bool,
    "kv_cache_dtype": ("auto", "fp8", "fp8_e4m3", "fp8_e5m2"),
    "max_num_batched_tokens": int,
}
AOT: dict[str, Any] = {"time_kernels": bool}  # on a CPU: torch.profiler sees each kernel (helpers/course/lab)
# Recipe fields that a backend has no use for.
_COMPILES_NOTHING_AHEAD = ("optimization_level", "fusion", "decode_batch_sizes", "num_threads")
UNUSED: dict[str, tuple[str, ...]] = {
    "aot": (),
    "pytorch": _COMPILES_NOTHING_AHEAD,
    "torch_compile": _COMPILES_NOTHING_AHEAD,
    "tensorrt": ("fusion", "num_threads"),
    "tensorrt_llm": ("decode_batch_sizes", "num_threads"),  # and parts of fusion: see tensorrt_llm.py
    "tensorrt_llm_pytorch": _COMPILES_NOTHING_AHEAD,
    "vllm": _COMPILES_NOTHING_AHEAD,
}
KIND_WORDS = {
    bool: "true or false",
    int: "a whole number of at least 1",
    float: "a number",
    str: "a text",
    list: "a list",
}


def refuse_cpu(recipe: RecipeFields, library: str) -> None:
    if recipe.device == "cpu":
        raise RecipeError(
            f"Recipe field device is 'cpu'; this course uses engines of {library} on NVIDIA GPUs only.",
            fix="Leave device out, or use backend='aot'.",
        )


def refuse_unused(recipe: RecipeFields) -> None:
    """RecipeError for a field that was set, and that this backend would ignore."""
    for name in UNUSED[recipe.backend]:
        if (value := getattr(recipe, name)) != getattr(RecipeFields(), name):
            raise RecipeError(
                f"Backend {recipe.backend!r} has no use for the recipe field {name}, which is {shown(value)}.",
                cause="That backend decides it by itself, so the value would do nothing.",
                fix="Leave the field out, use backend='aot', or look at that backend's own options.",
            )
    if recipe.num_threads and recipe.device == "cuda":
        raise RecipeError("num_threads is for CPUs, and the recipe's device is 'cuda'.", fix="Leave one of them out.")


def check_options(
    library: str, options: Mapping[str, Any], known: Mapping[str, Any], refused: Mapping[str, str] | None = None
) -> None:
    """RecipeError unless each option is known and has a value of its kind. refused: names that exist, and why not."""
    for name, value in options.items():
        if reason := (refused or {}).get(name):
            raise RecipeError(f"Option {name} of {library} is not taken: {reason}.", fix="Leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            names = f"The options are: {', '.join(known)}." if known else "Leave it out: it takes none."
            raise RecipeError(
                f"{library} has no option {name!r}.",
                cause="A misspelt name, or one of another backend. It would do nothing.",
                fix=f"Did you mean {near[0]!r}?" if near else names,
            )
        _check_kind(f"Option {name} of {library}", value, known[name])


def _check_kind(what: str, value: Any, kind: Any) -> None:
    if isinstance(kind, tuple) and isinstance(kind[0], type):
        if not isinstance(value, kind):
            raise not_allowed(what, value, " or ".join(KIND_WORDS[one] for one in kind))
        return
    if isinstance(kind, tuple):
        if type(value) is not type(kind[0]) or value not in kind:
            raise not_allowed(what, value, f"one of {', '.join(map(repr, kind))}")
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {int: number and isinstance(value, int) and value > 0, float: number, list: isinstance(value, (list, tuple))}
    if not fits.get(kind, isinstance(value, kind)):
        raise not_allowed(what, value, KIND_WORDS[kind])
