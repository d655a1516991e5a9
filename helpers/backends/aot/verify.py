"""Whether a compiled graph computes what the decoder says: both run on the same random numbers.

The reference is llama.py itself, run by PyTorch with the checkpoint's plain weights, in the next wider type. So
the check also covers what products.py and gpu_kernels.py make of the products, and how weights are joined, packed and
widened.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from helpers.errors import BuildError
from helpers.model import llama
from helpers.model.weights import Weights

# Largest difference between a compiled graph and the exact results, as a share of the largest value: this much, or what
# rounding makes of PyTorch's own results, several times. A deep model can turn a last bit into a thousandth, or in bf16
# into a tenth, and does so differently in each order of the additions.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
ROUNDINGS = 4
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
LENGTH = 128  # at most so many tokens in a prompt; of a cache, all entries, or so many where they take too much memory
ROOM = 1 << 28  # bytes of a cache
DRAWS = 4  # of random numbers; the one that rounding disturbs least is taken

Run = Callable[..., Tensor]  # a graph's inputs after the weights, to logits [B, V]; it updates the cache in place


def check_graph(
    name: str, run: Run, reference: llama.Decoder, weights: Weights, cache: llama.Cache, limit: int
) -> None:
    """BuildError unless `run` gives the logits of the reference, and leaves the same keys and values in the cache.

    cache: of as many sequences as the graph takes, each [B, G, S, D]; its content is overwritten.
    limit: the longest prompt, or for decode the cache entries in use, that the graph takes.
    """
    tolerance = TOLERANCE[cache[0].dtype]
    best, best_seed = math.inf, 0
    for seed in range(DRAWS):
        inputs = _random_inputs(reference, weights, cache, limit, seed)
        plain, exact = (_expected(reference, weights, inputs, cache, wider) for wider in (False, True))
        if all(bool(tensor.isfinite().all()) for tensor in plain):
            rounding = max(map(relative_error, plain, exact))
            best, best_seed = min((best, best_seed), (rounding, seed))
        if best * ROUNDINGS <= tolerance:
            break
    if best == math.inf:
        raise BuildError(
            f"{name} cannot be checked: for random tokens, PyTorch's own results are not finite numbers.",
            cause="The model's numbers are too large for this precision (fp16 holds no more than 65504), or its "
            "weights are damaged.",
            fix="Build with precision='bf16' or 'fp32', and check the checkpoint's weights.",
        )
    if best_seed != seed:
        inputs = _random_inputs(reference, weights, cache, limit, best_seed)
        exact = _expected(reference, weights, inputs, cache, wider=True)
    used = exact[1].shape[2]
    computed = [run(*inputs, cache), *(entries[:, :, :used] for entries in cache)]
    error = max(map(relative_error, computed, exact))
    if not error <= max(tolerance, ROUNDINGS * best):
        raise BuildError(
            f"The compiled graph {name} computes something else: it is off by {error:.2g} of the largest value.",
            cause="A fault of the compiler, or of the processor or GPU.",
            fix="Build with optimization_level=0. If that works, report the fault with this recipe.",
        )


def relative_error(computed: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected value; where all are zero, as it is. NaN counts as
    infinitely wrong."""
    largest = expected.abs().max().item() or 1.0
    return ((computed.float() - expected.float()).abs().nan_to_num(nan=torch.inf).max() / largest).item()


def _random_inputs(
    reference: llama.Decoder, weights: Weights, cache: llama.Cache, limit: int, seed: int
) -> list[Tensor]:
    """The tensors between the weights and the cache; the cache gets random entries.

    Every sequence has tokens of its own. Prompts have different lengths, so that most are filled up; in decode,
    sequences are at different positions, so that most have entries before them and entries that they must not see.
    """
    batch, device = len(cache[0]), cache[0].device
    generator = torch.Generator("cpu").manual_seed(seed)

    def whole_numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device="cpu").to(device)

    used = min(limit, _length(reference, cache))
    for entries in cache:
        values = torch.randn(entries[:, :, :used].shape, generator=generator, dtype=torch.float32, device="cpu") / 2
        entries[:, :, :used] = values.to(device, entries.dtype)
    vocabulary = len(weights["embedding"])
    if isinstance(reference, llama.Prefill):
        width = max(2, used)
        return [whole_numbers(vocabulary, batch, width), width - 1 - torch.arange(batch, device=device) % (width - 1)]
    spread = torch.arange(batch, device=device) * 5 + used * 3 // 4
    return [whole_numbers(vocabulary, batch), spread % used, torch.arange(limit, device=device)]


def _expected(
    reference: llama.Decoder, weights: Weights, inputs: list[Tensor], cache: llama.Cache, wider: bool = False
) -> list[Tensor]:
    """The reference's logits, and after them its cache: the entries in use, of a copy that is no longer. wider:
    computed in the next wider type."""
    inputs = list(inputs)
    if isinstance(reference, llama.Prefill):
        used = inputs[0].shape[1]
    else:
        used = min(len(inputs[2]), _length(reference, cache))
        inputs[2] = inputs[2][:used]
    dtype = WIDER[cache[0].dtype] if wider else cache[0].dtype
    copies = [entries[:, :, :used].to(dtype, copy=True) for entries in cache]
    return [reference(_Wide(weights) if wider else weights, *inputs, copies), *copies]


def _length(reference: llama.Decoder, cache: llama.Cache) -> int:
    """So many entries are looked at. Decode's code can take another way far into a text, so that is where most
    sequences are; a prompt of that length would take the reference minutes."""
    entry = sum(entries[:, :, 0].nbytes for entries in cache)
    return LENGTH if isinstance(reference, llama.Prefill) else max(LENGTH, ROOM // entry)


class _Wide(dict):
    """Weights that become wider as they are read: only one at a time is in memory so."""

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name)
        return weight.to(WIDER.get(weight.dtype, weight.dtype))
