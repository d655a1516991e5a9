"""A language model that runs as two TensorRT engines, one for each phase.

torch's CUDA tensors hold the KV cache, inputs and outputs; one execution context a profile; decode is recorded as a
CUDA graph. TensorRT for RTX runs on compute capabilities 8.0, 8.6, 8.9 and 12.x, and none of these was at hand: what
runs on the GPU was written against TensorRT's interface and has not run. The host's part is tested with a stand-in for
the execution context.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.backends.base import Engine
from helpers.backends.tensorrt import api, llama_onnx
from helpers.errors import LimitError, WorkerError
from helpers.model.config import load_config
from helpers.model.tokenizer import load_tokenizer
from helpers.recipe import BuildRecipe

GRAPHS = (llama_onnx.PREFILL, llama_onnx.DECODE)


class TensorRTEngine(Engine):
    """Both engines' execution contexts and one KV cache for max_batch_size sequences.

    contexts: "prefill" and "decode_b1", "decode_b4", ... with TensorRT's IExecutionContext interface. device: where
    the tensors lie; the tests' stand-in reads them from the CPU.
    """

    def __init__(
        self, recipe: BuildRecipe, folder: Path, manifest: dict[str, Any], contexts: dict[str, Any], device: str
    ):
        config = load_config(folder)
        super().__init__(recipe, load_tokenizer(folder), config.eos_token_ids, config.vocab_size)
        self.config, self.device, self.contexts = config, device, contexts
        dtype = getattr(torch, manifest["details"]["compute_dtype"])
        shape = (recipe.max_batch_size, config.num_key_value_heads, recipe.max_seq_len, config.head_dim)
        self.cache = {name: torch.zeros(shape, dtype=dtype, device=device) for name in llama_onnx.cache_names(config)}
        self.batch = 0
        self.steps = {size: DecodeStep(self, size) for size in recipe.all_decode_batch_sizes}

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        self.batch = len(prompts)
        rows = []
        for slot, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt], device=self.device)
            outputs = self.new_outputs(1, len(prompt))
            self.execute("prefill", {"tokens": tokens}, outputs)
            for name, entries in self.cache.items():
                entries[slot].zero_()  # NaN of an earlier request would pass the mask
                entries[slot, :, : len(prompt)] = outputs[f"new_{name}"][0]
            rows.append(outputs["logits"][0])
        for step in self.steps.values():
            step.start([len(p) for p in prompts])
        return torch.stack(rows)

    def _decode(self, tokens: Tensor) -> Tensor:
        size = min(size for size in self.steps if size >= self.batch)
        return self.steps[size](tokens)[: self.batch]

    def new_outputs(self, batch: int, length: int) -> dict[str, Tensor]:
        """Buffers for the logits [B, V] and the new cache entries [B, G, length, D]."""
        shape = (batch, self.config.num_key_value_heads, length, self.config.head_dim)
        logits = {"logits": torch.empty(batch, self.vocab_size, device=self.device)}
        return logits | {f"new_{name}": entries.new_empty(shape) for name, entries in self.cache.items()}

    def execute(self, context: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Tell a context its shapes and addresses, and start it on torch's stream."""
        running = self.contexts[context]
        for name, tensor in inputs.items():
            if not running.set_input_shape(name, tuple(tensor.shape)):
                raise LimitError(
                    f"TensorRT refuses the shape {tuple(tensor.shape)} for {name!r}: it lies outside the profile.",
                    cause="Kernels and memory were chosen for the shapes between the profile's least and greatest.",
                    fix="Ask for less, or build with larger limits.",
                )
        for name, tensor in (inputs | outputs).items():
            running.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        if not running.execute_async_v3(stream):
            raise WorkerError(
                f"TensorRT could not start {context!r}.", cause="See the messages above.", fix="Load the engine again."
            )

    def _release(self) -> None:
        self.steps, self.contexts, self.cache = {}, {}, {}
        if self.device == "cuda":
            torch.cuda.empty_cache()


class DecodeStep:
    """One decode step for a batch size, its buffers at fixed addresses; on a GPU recorded as a CUDA graph."""

    def __init__(self, engine: TensorRTEngine, size: int):
        self.engine, self.size, self.name = engine, size, f"decode_b{size}"
        self.tokens = torch.zeros(size, dtype=torch.long, device=engine.device)
        self.positions = torch.zeros_like(self.tokens)
        self.rows = torch.arange(size, device=engine.device)
        self.cache = {name: entries[:size] for name, entries in engine.cache.items()}
        self.outputs = engine.new_outputs(size, 1)
        self.recording: Any = None
        if engine.device == "cuda":
            self._record()

    def start(self, lengths: list[int]) -> None:
        """A new batch: the next token of sequence b goes to position lengths[b]; rows without one start at 0."""
        self.positions.zero_()
        if len(lengths) <= self.size:
            self.positions[: len(lengths)] = torch.tensor(lengths, device=self.positions.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens[: len(tokens)].copy_(tokens)
        if self.recording is None:
            self._run()
        else:
            self.recording.replay()
        return self.outputs["logits"]

    def _run(self) -> None:
        self.engine.execute(self.name, {"tokens": self.tokens, "positions": self.positions, **self.cache}, self.outputs)
        for name, entries in self.cache.items():
            entries[self.rows, :, self.positions] = self.outputs[f"new_{name}"][:, :, 0]
        self.positions += 1

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside the recording: TensorRT finishes its kernels at the first run
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recording):
            self._run()


def open_contexts(recipe: BuildRecipe, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """One execution context a profile. A context keeps its engine alive."""
    trt = api.load_provider(manifest["details"]["provider"])
    contexts: dict[str, Any] = {}
    for graph in GRAPHS:
        engine = api.deserialize(trt, folder / f"{graph}.plan", folder.name)
        sizes = recipe.all_decode_batch_sizes
        names = ["prefill"] if graph == llama_onnx.PREFILL else [f"decode_b{size}" for size in sizes]
        for profile, name in enumerate(names):
            contexts[name] = engine.create_execution_context()
            contexts[name].set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return contexts
