"""What an `aot` engine holds in memory and reads in each step: counted from its recipe, before anything is built."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from helpers import backends
from helpers.backends.aot.graphs import cache_length, compute_dtype
from helpers.backends.aot.stored import stored_bytes
from helpers.display import Table
from helpers.engine import locate
from helpers.errors import EngineNotFound, RecipeError, need
from helpers.machine import hardware
from helpers.model.checkpoint import find_checkpoint
from helpers.model.config import ModelConfig
from helpers.recipe import BuildRecipe
from helpers.recipe.fields import not_allowed

SPARE = 0.1  # of a GPU's memory, left for intermediate results and the driver


@dataclass(frozen=True)
class Memory:
    """Bytes that an engine holds from its start to its end. What a step computes comes on top."""

    weights: int
    kv_cache: int  # for max_batch_size sequences of max_seq_len tokens
    unread: int  # of the weights: what a decode step leaves alone, such as an embedding table of its own
    sequences: int

    @property
    def all(self) -> int:
        return self.weights + self.kv_cache

    def most_sequences(self, room: float) -> int:
        """How many sequences of the full length fit into so many bytes, beside the weights."""
        return max(0, int((room - self.weights) // (self.kv_cache // self.sequences)))

    def least_seconds(self, bandwidth: float, sequences: int = 1) -> float:
        """Of a decode step with full caches: each weight is read once, and each sequence's cache."""
        return (self.weights - self.unread + self.kv_cache / self.sequences * sequences) / bandwidth


def memory(recipe: BuildRecipe, device: str) -> Memory:
    """device: "cpu" or "cuda", which need not be there. An engine's cache has one entry more than max_seq_len."""
    need(recipe, BuildRecipe, "Give a BuildRecipe(...).")
    if device not in ("cpu", "cuda"):
        raise not_allowed("The device whose memory is counted", device, "'cpu' or 'cuda'")
    if recipe.backend != "aot":
        raise RecipeError(f"Memory is counted for backend 'aot', not {recipe.backend!r}.", fix="Set backend='aot'.")
    config = find_checkpoint(recipe.model).config
    width = compute_dtype(recipe, device).itemsize
    short = recipe.replace(max_batch_size=1, decode_batch_sizes=(), max_input_len=1, max_seq_len=3)
    weights, unread = _stored(short, config, device)
    length = cache_length(recipe, device)
    longer = (length - cache_length(short, device)) * 2 * config.head_dim * width  # bytes of the rope tables
    kv_cache = config.kv_cache_bytes(recipe.max_batch_size, length + 1, width)
    return Memory(weights + longer, kv_cache, unread + longer, recipe.max_batch_size)


@cache
def _stored(recipe: BuildRecipe, config: ModelConfig, device: str) -> tuple[int, int]:
    """Bytes of all weights and of those unread. All layers are alike, so models of one and two layers tell any's."""
    one, two = (stored_bytes(recipe, replace(config, num_hidden_layers=n), device) for n in (1, 2))
    return one[0] + (config.num_hidden_layers - 1) * (two[0] - one[0]), one[1]


@cache
def bandwidth(device: str) -> float:
    """This machine's, in bytes per second, measured once."""
    return hardware.measure_bandwidth(device)


def memory_table(recipe: BuildRecipe, speed: float | None = None) -> Table:
    """What the recipe's engine takes on this machine and on common GPUs, and how many sequences would fit.

    speed: this machine's bandwidth in bytes per second, where it has been measured already. A recipe for a GPU is
    counted on a machine without one too: as a CPU's.
    """
    need(recipe, BuildRecipe, "Give a BuildRecipe(...).")
    here = hardware.describe("cpu" if recipe.device == "cpu" else "auto")
    machines = [("this machine", here.device, float(here.memory_bytes), speed or bandwidth(here.device))]
    for gpu in json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8")):
        machines.append((gpu["name"], "cuda", gpu["memory_gb"] * 1e9, gpu["gb_per_s"] * 1e9))
    rows, each = [], {device: memory(recipe, device) for device in {"cuda", here.device}}  # it may read both embeddings
    for name, device, size, reads in machines:
        takes, room = each[device], size * (1 - SPARE)
        least = takes.least_seconds(reads, recipe.max_batch_size) * 1e3
        sizes = map(in_words, (size, takes.weights, takes.kv_cache, takes.all))
        fits = "yes" if takes.all <= room else "no"
        rows.append((name, *sizes, fits, f"{takes.most_sequences(room):,}", _ms(least)))
    return Table(
        f"{recipe.model}, {recipe.precision}, batch {recipe.max_batch_size}, sequences of {recipe.max_seq_len} tokens. "
        f"It fits if {SPARE:.0%} of the memory stay free. A step's least time: reading weights and caches once, at "
        "this machine's measured bandwidth and at the GPUs' published one",
        ("machine", "memory", "weights", "KV cache", "together", "fits", "most sequences", "least time of a step"),
        rows,
    )


def plan(recipe: BuildRecipe, speed: float | None = None) -> Table:
    """What a build of this recipe would take and give on this machine."""
    need(recipe, BuildRecipe, "Give a BuildRecipe(...).")
    device = hardware.resolve_device(recipe.device)
    speed = speed or bandwidth(device)
    takes = memory(recipe, device)
    try:
        state = f"built already: {locate(recipe).name}"
    except EngineNotFound:
        state = "not built yet"
    sizes = {"weights": takes.weights, "KV cache": takes.kv_cache}
    rows = [(name, in_words(taken)) for name, taken in {**sizes, "in memory together": takes.all}.items()]
    for batch in sorted({1, recipe.max_batch_size}):
        least = takes.least_seconds(speed, batch) * 1e3
        rows.append((f"least time of a step, batch {batch}", _ms(least)))
    rows += [("build, about", f"{expected_seconds(recipe):.0f} s"), ("engine", state)]
    place = f"{hardware.describe(device).name}, which reads {speed / 1e9:.0f} GB/s (measured)"
    return Table(f"{recipe.short_name} on {place}", ("what", "how much"), rows)


def expected_seconds(recipe: BuildRecipe) -> float:
    """About how long a build takes on this machine, as the build itself says when it starts."""
    device, config = hardware.resolve_device(recipe.device), find_checkpoint(recipe.model).config
    return backends.module(recipe.backend).estimate(recipe, config, device)[0]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds < 10 else f"{milliseconds:,.0f} ms"


def in_words(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
