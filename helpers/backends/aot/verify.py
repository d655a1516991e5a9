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
LENGTH = 128  # so many tokens of a prompt, and entries of a cache, at least; more up to these two, as there may be:
LONGEST, WORK = 1024, 1 << 34  # tokens of a prompt, and their number times that of the weights
ROOM = 1 << 28  # bytes of a cache
SHORT = 12  # tokens of a short prompt: whole tiles of any size, and no whole register
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
        cases = _random_cases(reference, weights, cache, limit, seed)
        plain, exact = (_expected(reference, weights, cases, cache, wider) for wider in (False, True))
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
        cases = _random_cases(reference, weights, cache, limit, best_seed)
        exact = _expected(reference, weights, cases, cache, wider=True)
    error, used = 0.0, exact[-1].shape[2]
    for inputs, logits in zip(cases, exact, strict=False):
        _fill(cache, used, best_seed)
        seen = inputs[0].shape[1] if isinstance(reference, llama.Prefill) else used
        computed = [run(*inputs, cache), *(entries[:, :, :seen] for entries in cache)]
        expected = [logits, *(entries[:, :, :seen] for entries in exact[len(cases) :])]
        error = max(error, *map(relative_error, computed, expected))
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


def _random_cases(
    reference: llama.Decoder, weights: Weights, cache: llama.Cache, limit: int, seed: int
) -> list[list[Tensor]]:
    """The tensors between the weights and the cache, several times: as many of each open length as there may be, and
    fewer, so that they fill no vector register; the cache gets random entries.

    Every sequence has tokens of its own. Prompts have different lengths, so that some are filled up and each row of a
    tile is some prompt's last; in decode, sequences are at different positions, so that most have entries before them
    and entries that they must not see.
    """
    batch, device = len(cache[0]), cache[0].device
    used = min(limit, _length(reference, weights, cache))
    generator, rows = _fill(cache, used, seed), torch.arange(batch, device=device)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(len(weights["embedding"]), shape, generator=generator, device="cpu").to(device)

    if isinstance(reference, llama.Prefill):
        width = max(2, used)
        widths = [width, *[min(width, SHORT)] * 3]
        prompts = tokens(batch, width)
        return [[prompts[:, :w].contiguous(), w - (rows + back) % w] for back, w in enumerate(widths)]
    positions, span = (rows * 5 + used * 3 // 4) % used, torch.arange(limit, device=device)
    spans = [span] if device.type == "cuda" else [span, span[: max(2, int(positions.max()) + 1)]]  # fixed on a GPU
    step = tokens(batch)
    return [[step, positions, span] for span in spans]


def _fill(cache: llama.Cache, used: int, seed: int) -> torch.Generator:
    """Random entries; returns where further random numbers of this draw come from."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for entries in cache:
        values = torch.randn(entries[:, :, :used].shape, generator=generator, dtype=torch.float32, device="cpu") / 2
        entries[:, :, :used] = values.to(entries.device, entries.dtype)
    return generator


def _expected(
    reference: llama.Decoder, weights: Weights, cases: list[list[Tensor]], cache: llama.Cache, wider: bool = False
) -> list[Tensor]:
    """The reference's logits of each case, and after them its cache: the entries in use, of a copy that is no longer.
    wider: computed in the next wider type. It runs once: neither what follows in a prompt changes its logits, nor how
    much there is behind the last position."""
    dtype = WIDER[cache[0].dtype] if wider else cache[0].dtype
    weights = _Wide(weights) if wider else weights
    tokens, numbers, *rest = cases[0]
    used = tokens.shape[1] if not rest else min(len(rest[0]), _length(reference, weights, cache))
    copies = [entries[:, :, :used].to(dtype, copy=True) for entries in cache]
    if isinstance(reference, llama.Prefill):
        x = reference.through(weights, reference.embed(weights, tokens.flatten()), copies).unflatten(0, tokens.shape)
        ends = torch.cat([lengths for _, lengths in cases])
        logits = list(reference.end(weights, x.repeat(len(cases), 1, 1), ends).chunk(len(cases)))
    else:
        logits = [reference(weights, tokens, numbers, rest[0][:used], copies)] * len(cases)
    return [*logits, *copies]


def _length(reference: llama.Decoder, weights: Weights, cache: llama.Cache) -> int:
    """So many entries are looked at. The code can take another way far into a text, so that is where most sequences
    are, unless the reference would need too much memory for that, or minutes."""
    if isinstance(reference, llama.Prefill):
        tokens = WORK // sum(weight.numel() for weight in weights.values())
        return max(LENGTH, min(LONGEST, tokens) // SHORT * SHORT)
    return max(LENGTH, ROOM // sum(entries[:, :, 0].nbytes for entries in cache))


class _Wide(dict):
    """Weights that become wider as they are read: only one at a time is in memory so."""

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name)
        return weight.to(WIDER.get(weight.dtype, weight.dtype))
