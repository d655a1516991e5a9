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
KEPT = 32  # tokens that the model reads for what a cache holds before a decode step
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
        cases, filled = _random_cases(reference, weights, cache, limit, seed)
        plain, exact = (_expected(reference, weights, cases, filled, wider) for wider in (False, True))
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
        cases, filled = _random_cases(reference, weights, cache, limit, best_seed)
        exact = _expected(reference, weights, cases, filled, wider=True)
    error, used = 0.0, filled[0].shape[2]
    for inputs, logits in zip(cases, exact, strict=False):
        for entries, before in zip(cache, filled, strict=True):
            entries[:, :, :used] = before
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
) -> tuple[list[list[Tensor]], llama.Cache]:
    """The tensors between the weights and the cache, several times: as many of each open length as there may be, and
    fewer, so that they fill no vector register. And what the cache holds before: the entries in use.

    Every sequence has tokens of its own. Prompts have different lengths, so that some are filled up and each row of a
    tile is some prompt's last; in decode, sequences are at different positions, so that most have entries before them
    and entries that they must not see.
    """
    batch, device = len(cache[0]), cache[0].device
    used = max(2, min(limit, _length(reference, weights, cache)))
    generator, rows = torch.Generator("cpu").manual_seed(seed), torch.arange(batch, device=device)
    filled = [_random(entries[:, :, :used], generator) for entries in cache]

    def tokens(*shape: int) -> Tensor:
        return torch.randint(len(weights["embedding"]), shape, generator=generator, device="cpu").to(device)

    if isinstance(reference, llama.Prefill):
        widths = [used, *[min(used, SHORT)] * 3]
        prompts = tokens(batch, used)
        return [[prompts[:, :w].contiguous(), w - (rows + back) % w] for back, w in enumerate(widths)], filled
    positions, span = (rows * 5 + used * 3 // 4) % used, torch.arange(limit, device=device)
    spans = [span] if device.type == "cuda" else [span, span[: max(2, int(positions.max()) + 1)]]  # fixed on a GPU
    kept = _kept(reference, weights, tokens(min(KEPT, len(weights["rope.cos"]))), cache)
    # Not the first token's: where those are, most heads look there, and see little else.
    which = torch.randint(1, kept[0].shape[1], (batch, used), generator=generator, device="cpu").to(device)
    hidden = (span[:used] > positions[:, None])[:, None, :, None]  # [B, 1, S, 1]; random ones are easier to tell there
    for noise, entries in zip(filled, kept, strict=True):
        seen = entries[:, which].transpose(0, 1)  # [B, G, S, D]
        torch.where(hidden, noise * (4 * entries.float().std()).to(noise.dtype), seen, out=noise)
    step = tokens(batch)
    return [[step, positions, span] for span in spans], filled


def _random(entries: Tensor, generator: torch.Generator) -> Tensor:
    numbers = torch.randn(entries.shape, generator=generator, dtype=torch.float32, device="cpu") / 2
    return numbers.to(entries.device, entries.dtype)


def _kept(reference: llama.Decoder, weights: Weights, tokens: Tensor, cache: llama.Cache) -> llama.Cache:
    """The keys and values, [G, T, D] of each layer, that the model itself keeps of tokens [T]. Behind random ones a
    deep model computes what it was never trained for, and rounding makes tens of times more of it."""
    kept = [torch.zeros_like(entries[:1, :, : len(tokens)]) for entries in cache]
    prefill = llama.Prefill(reference.config)
    prefill.through(weights, prefill.embed(weights, tokens), kept)
    return [entries[0] for entries in kept]


def _expected(
    reference: llama.Decoder, weights: Weights, cases: list[list[Tensor]], cache: llama.Cache, wider: bool = False
) -> list[Tensor]:
    """The reference's logits of each case, and after them its cache: a copy of the one given, of the entries in use.
    wider: computed in the next wider type. It runs once: neither what follows in a prompt changes its logits, nor how
    much there is behind the last position."""
    dtype = WIDER[cache[0].dtype] if wider else cache[0].dtype
    weights = _Wide(weights) if wider else weights
    tokens, numbers, *rest = cases[0]
    copies = [entries.to(dtype, copy=True) for entries in cache]
    if isinstance(reference, llama.Prefill):
        x = reference.through(weights, reference.embed(weights, tokens.flatten()), copies).unflatten(0, tokens.shape)
        ends = torch.cat([lengths for _, lengths in cases])
        logits = list(reference.end(weights, x.repeat(len(cases), 1, 1), ends).chunk(len(cases)))
    else:
        logits = [reference(weights, tokens, numbers, rest[0][: copies[0].shape[2]], copies)] * len(cases)
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
