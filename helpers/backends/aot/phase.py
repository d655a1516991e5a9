"""One graph of an engine, compiled, with its weights: a library that does it whole, or two that do it in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from helpers.backends.aot.loader import Graph
from helpers.model import llama
from helpers.model.config import ModelConfig
from helpers.model.weights import Weights


class Phase:
    """`run` takes what the decoder's forward takes after the weights: tokens, numbers and the cache.

    entry: what the build kept of the graph; its parts are the libraries, each with the weights of its calls.
    """

    def __init__(self, folder: Path, name: str, entry: dict[str, Any], config: ModelConfig, weights: Weights):
        device = weights["norm"].device.type
        self.decoder, self.all_weights = llama.Decoder(config), weights
        self.decodes = not name.startswith("prefill")
        self.parts = [
            (Graph(folder / f"{file}.pt2", device), [[weights[w] for w in call] for call in calls])
            for file, calls in entry["parts"].items()
        ]

    def run(self, tokens: Tensor, *rest: Any) -> Tensor:
        """Logits [B, V]; keys and values go to the cache."""
        *numbers, cache = rest
        (first, calls), *others = self.parts
        if not others:
            return first.run([*calls[0], tokens, *numbers, *cache])[0]
        between, after = (numbers, []) if self.decodes else ([], numbers)
        x = self.decoder.embed(self.all_weights, tokens)
        size = len(cache) // len(calls)
        for at, weights in enumerate(calls):
            x = first.run([*weights, x, *between, *cache[at * size : (at + 1) * size]])[0]
        ((end, (weights,)),) = others
        return end.run([*weights, x, *after])[0]

    def close(self) -> None:
        for graph, _ in self.parts:
            graph.close()
        self.parts, self.all_weights = [], {}
