"""The fields of a recipe, not yet checked, and what each of them may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from helpers.errors import RecipeError, shown

BACKENDS = ("aot", "pytorch", "torch_compile", "tensorrt", "tensorrt_llm", "tensorrt_llm_pytorch", "vllm")
COMPILED = ("aot", "tensorrt", "tensorrt_llm")  # these leave an engine on disk; the others only hold a recipe
PRECISIONS = {  # what each backend can build; issue text and README table say the same
    "aot": ("fp32", "bf16", "fp16", "int8", "int4"),
    "pytorch": ("fp32", "bf16", "fp16"),
    "torch_compile": ("fp32", "bf16", "fp16"),
    "tensorrt": ("fp32", "bf16", "fp16", "int8", "int4", "fp8"),
    "tensorrt_llm": ("fp32", "bf16", "fp16", "int8", "int4", "fp8"),
    "tensorrt_llm_pytorch": ("bf16", "fp16"),
    "vllm": ("fp32", "bf16", "fp16", "fp8"),
}
DEVICES = ("auto", "cpu", "cuda")
OPTIMIZATION_LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Fusion:
    """What the builder may merge. All on is what to ship; switching one off shows what it was worth."""

    kernels: bool = True  # let the compiler put several operations into one kernel
    qkv: bool = True  # the query, key and value projections as one matrix product
    gate_up: bool = True  # the two input projections of the MLP as one matrix product


@dataclass(frozen=True)
class RecipeFields:
    """What BuildRecipe documents and checks, as the schemas of the backends' options see it."""

    model: str = "stories"
    backend: str = "aot"
    precision: str = "fp32"
    max_batch_size: int = 1
    max_input_len: int = 128
    max_seq_len: int = 256
    optimization_level: int = 3
    fusion: Fusion = field(default_factory=Fusion)
    device: str = "auto"
    decode_batch_sizes: tuple[int, ...] = ()
    num_threads: int = 0
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # a dict has no hash; the other fields do

    @property
    def all_decode_batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes that get a decode graph: those asked for, and always 1 and max_batch_size."""
        return tuple(sorted({1, self.max_batch_size, *self.decode_batch_sizes}))


def not_allowed(what: str, value: Any, allowed: str) -> RecipeError:
    """The error for a value that something may not have."""
    return RecipeError(f"{what} is {shown(value)}, which is not allowed.", fix=f"Give {allowed}.")


def safe_name(name: str) -> str:
    """A name as part of a folder's name: no separators, no dots at its ends, and short, since systems allow 255 bytes
    for all of a file's name."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).strip(".-")[:40] or "model"
