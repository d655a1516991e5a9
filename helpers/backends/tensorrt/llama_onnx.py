"""The Llama-family decoder as two ONNX graphs, prefill and decode, for TensorRT.

They are written node by node, which takes a tenth of a second; torch.onnx would trace and tidy the same model for
half a minute. The mathematics is that of llama.py, and the tests compare the tokens with transformers. What differs:
an engine's inputs and outputs are plain buffers, so the graphs read the KV cache as inputs and return the new entries
as outputs, and whoever runs them writes those into the cache. And the weights are constants of the graph, since
TensorRT lays them out anew, joins and narrows them while it builds. They lie in one file, which both graphs point to.

Shapes: B sequences, T prompt tokens, S cache length, E hidden size, H heads, G KV heads, D head size, V vocabulary,
M rows of what a layer reads: T in prefill, B in decode.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from helpers.backends.tensorrt import onnx_export, onnx_quantize
from helpers.model.checkpoint import Checkpoint, read_tensors
from helpers.model.config import ModelConfig
from helpers.model.weights import convert, rope_tables

PREFILL, DECODE = "prefill", "decode"
WEIGHTS = "weights.bin"
ALIGNMENT = 64  # bytes; where a tensor begins in the weights' file
Protos = dict[str, TensorProto]


def cache_names(config: ModelConfig) -> list[str]:
    """k0, v0, k1, v1, ...: the decode graph's cache inputs. The outputs with the new entries are new_k0, ..."""
    return [f"{kind}{layer}" for layer in range(config.num_hidden_layers) for kind in "kv"]


def write_weights(checkpoint: Checkpoint, precision: str, length: int, folder: Path) -> Protos:
    """Write the decoder's weights and rope tables for `length` positions to folder/weights.bin.

    One tensor at a time, so that memory holds no second model. Returns the tensors as ONNX names them, each with its
    place in the file. Products with int8, int4 or fp8 weights have two: NAME_int8 and NAME_int8_scale, for example.
    """
    config, dtype = checkpoint.config, onnx_export.compute_dtype(precision)
    narrow = precision in onnx_export.COMPUTE
    tensors = convert(read_tensors(checkpoint, config), config, dtype, qkv=False, gate_up=False)
    placed: Protos = {}
    with (folder / WEIGHTS).open("wb") as file:
        for name, tensor in itertools.chain(tensors, rope_tables(config, length, dtype).items()):
            product = _product_of(name, config)
            protos: list[TensorProto] = []
            if product and narrow:
                protos += onnx_quantize.narrowed(f"{product}_{precision}", tensor, precision, rows=0)
            if name != product or not narrow:
                protos.append(onnx_export.proto(name, tensor))
            for proto in protos:
                file.write(bytes(-file.tell() % ALIGNMENT))
                placed[proto.name] = _outside(proto, file.tell())
                file.write(proto.raw_data)
    return placed


def _product_of(name: str, config: ModelConfig) -> str:
    """The weight of a matrix product that this tensor is, "" if it is none. A tied embedding is the head's too."""
    if name == "embedding":
        return "head.weight" if config.tie_word_embeddings else ""
    return name if name.endswith(".weight") else ""


def _outside(proto: TensorProto, offset: int) -> TensorProto:
    placed = TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
    placed.data_location = TensorProto.EXTERNAL
    entries = {"location": WEIGHTS, "offset": offset, "length": len(proto.raw_data)}
    for key, value in entries.items():
        placed.external_data.add(key=key, value=str(value))
    return placed


def write(
    graph: str,
    config: ModelConfig,
    weights: Protos,
    folder: Path,
    *,
    precision: str,
    cache_length: int,
    batch_sizes: tuple[int, ...],
    largest: Mapping[str, float] | None = None,
) -> Path:
    """Write one phase as folder/GRAPH.onnx, beside the weights that `write_weights` left there.

    With one batch size, decode's shapes are all fixed; with several, the batch varies. largest: for fp8, the greatest
    magnitude at each product's input, by the weight's name (onnx_quantize.calibrate finds them).
    """
    writer = _Decoder(config, weights, precision, largest or {})
    if graph == PREFILL:
        writer.prefill(cache_length)
    else:
        writer.decode(cache_length, batch_sizes[0] if len(batch_sizes) == 1 else "B")
    path = folder / f"{graph}.onnx"
    onnx.save(writer.model(graph), path)
    return path


class _Writer:
    """Nodes, written one after the other. Every method that writes one returns the name of what it computes."""

    def __init__(self, weights: Protos, dtype: torch.dtype):
        self.weights, self.dtype = weights, dtype
        self.kind = onnx_export.onnx_type(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: Protos = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.scope = ""  # begins the nodes' names: "layers.3."
        self.names: dict[str, int] = {}

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """One node; its name or names. Its line in this file is noted, as torch.onnx notes a module's."""
        name = self.scope + (name or kind.lower())
        count = self.names[name] = self.names.get(name, 0) + 1
        name = name if count == 1 else f"{name}_{count}"
        results = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        node = helper.make_node(kind, list(inputs), results, name=name, **attributes)
        frame = sys._getframe(1)
        node.metadata_props.add(key=onnx_export.SOURCE, value=f"{Path(__file__).name}:{frame.f_lineno}")
        self.nodes.append(node)
        for used in inputs:
            if used in self.weights:
                self.constants[used] = self.weights[used]
        return results[0] if outputs == 1 else results

    def numbers(self, *values: int) -> str:
        """A list of whole numbers as a constant: axes, shapes, bounds."""
        return self._constant(f"numbers {' '.join(map(str, values))}", np.array(values, np.int64))

    def span(self, length: int) -> str:
        """0, 1, ..., length - 1"""
        return self._constant(f"span {length}", np.arange(length, dtype=np.int64))

    def number(self, value: float, dtype: torch.dtype | None = None) -> str:
        """A number of the graph's type, or of another."""
        dtype = dtype or self.dtype
        name = f"number {value!r} {dtype}".replace("torch.", "")
        self.constants.setdefault(name, onnx_export.proto(name, torch.tensor(value, dtype=dtype, device="cpu")))
        return name

    def _constant(self, name: str, values: np.ndarray) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def take(self, name: str, kind: int, shape: Iterable[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def give(self, name: str, value: str, kind: int, shape: Iterable[int | str]) -> None:
        self.scope = ""
        output = self.op("Identity", value, name=name)
        self.outputs.append(helper.make_tensor_value_info(output, kind, list(shape)))

    def model(self, name: str) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, list(self.constants.values()))
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", onnx_export.OPSET)], ir_version=onnx_export.IR_VERSION
        )


class _Decoder(_Writer):
    def __init__(self, config: ModelConfig, weights: Protos, precision: str, largest: Mapping[str, float]):
        super().__init__(weights, onnx_export.compute_dtype(precision))
        self.config, self.precision, self.largest = config, precision, largest

    def prefill(self, length: int) -> None:
        """tokens [1, T] to the logits [1, V] of the last one, and each layer's keys and values [1, G, T, D]."""
        tokens = self.take("tokens", TensorProto.INT64, (1, "T"))
        row = self.op("Squeeze", tokens, self.numbers(0), name="row")  # [T]
        count = self.op("Shape", row, name="count")
        x = self.op("Gather", "embedding", row, name="embed")
        cos, sin = (
            self.op(
                "Unsqueeze", self._until(table, count), self.numbers(1), name=table.removeprefix("rope.")
            )  # [T, 1, D]
            for table in ("rope.cos", "rope.sin")
        )
        here = self._until(self.span(length), count)
        visible = self.op("LessOrEqual", here, self.op("Unsqueeze", here, self.numbers(1)), name="visible")  # [T, T]
        new: list[str] = []

        def attention(q: str, k: str, v: str) -> str:
            turned = (self.op("Transpose", each, perm=(1, 0, 2)) for each in (q, k, v))
            q, k, v = (self.op("Unsqueeze", each, self.numbers(0)) for each in turned)  # [1, H or G, T, D]
            new.extend((k, v))
            return self._attend(q, k, v, visible)

        x = self._layers(x, cos, sin, attention)
        self._logits(self.op("Gather", x, self.numbers(-1), name="last"), 1)
        self._give_cache(new, (1, self.config.num_key_value_heads, "T", self.config.head_dim))

    def decode(self, length: int, batch: int | str) -> None:
        """tokens [B] at positions [B] and the cache (2L of [B, G, S, D]) to logits [B, V] and new entries [B, G, 1, D].

        Every step reads all S cache entries and masks those that lie in the future: the shapes stay the same, which
        TensorRT's kernels and a CUDA graph want.
        """
        c = self.config
        tokens, positions = (self.take(name, TensorProto.INT64, (batch,)) for name in ("tokens", "positions"))
        shape = (batch, c.num_key_value_heads, length, c.head_dim)
        cache = iter([self.take(name, self.kind, shape) for name in cache_names(c)])
        x = self.op("Gather", "embedding", tokens, name="embed")
        cos, sin = (
            self.op(
                "Unsqueeze", self.op("Gather", table, positions), self.numbers(1), name=table.removeprefix("rope.")
            )  # [B, 1, D]
            for table in ("rope.cos", "rope.sin")
        )
        column = self.op("Unsqueeze", positions, self.numbers(1), name="column")
        here = self.op("Equal", self.span(length), column)  # [B, S]: the entry that this step makes
        here = self.op("Unsqueeze", here, self.numbers(1, 3), name="here")
        visible = self.op("LessOrEqual", self.span(length), column)
        visible = self.op("Unsqueeze", visible, self.numbers(1, 2), name="visible")  # [B, 1, 1, S]
        new: list[str] = []

        def attention(q: str, k: str, v: str) -> str:
            q, k, v = (self.op("Unsqueeze", each, self.numbers(2)) for each in (q, k, v))  # [B, H or G, 1, D]
            new.extend((k, v))
            keys, values = (self.op("Where", here, entry, next(cache), name="cache") for entry in (k, v))
            return self._attend(q, keys, values, visible)

        x = self._layers(x, cos, sin, attention)
        self._logits(x, batch)
        self._give_cache(new, (batch, c.num_key_value_heads, 1, c.head_dim))

    def _layers(self, x: str, cos: str, sin: str, attention: Callable[[str, str, str], str]) -> str:
        """x [M, E] through all layers and the last norm. attention: q [M, H, D], k and v [M, G, D] to [M, H * D]."""
        c = self.config
        for i in range(c.num_hidden_layers):
            self.scope = layer = f"layers.{i}."
            h = self._rms_norm(x, f"{layer}attention_norm")
            q, k, v = (
                self.op("Reshape", self._product(layer + part, h), self.numbers(-1, heads, c.head_dim))
                for part, heads in (
                    ("q", c.num_attention_heads),
                    ("k", c.num_key_value_heads),
                    ("v", c.num_key_value_heads),
                )
            )
            if c.qk_norm:
                q, k = self._rms_norm(q, f"{layer}q_norm"), self._rms_norm(k, f"{layer}k_norm")
            h = attention(self._rotate(q, cos, sin), self._rotate(k, cos, sin), v)
            x = self.op("Add", x, self._product(layer + "o", h), name="attention_added")
            h = self._rms_norm(x, f"{layer}mlp_norm")
            gate, up = self._product(layer + "gate", h), self._product(layer + "up", h)
            silu = self.op("Mul", gate, self.op("Sigmoid", gate), name="silu")
            h = self.op("Mul", silu, up, name="gated")
            x = self.op("Add", x, self._product(layer + "down", h), name="mlp_added")
        self.scope = ""
        return self._rms_norm(x, "norm")

    def _attend(self, q: str, k: str, v: str, visible: str) -> str:
        """q [B, H, M, D] over k and v [B, G, S, D], where visible [.., M, S] is true; to rows of [H * D]."""
        c = self.config
        group = c.num_attention_heads // c.num_key_value_heads
        if group > 1:  # each key and value serves `group` heads
            k, v = (self._repeat(each, group) for each in (k, v))
        q = self.op("Mul", q, self.number(c.head_dim**-0.5), name="scaled")
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=(0, 1, 3, 2)), name="scores")
        scores = self.op("Where", visible, scores, self.number(-math.inf), name="masked")
        out = self.op("MatMul", self.op("Softmax", scores, axis=-1), v, name="attention")
        out = self.op("Transpose", out, perm=(0, 2, 1, 3))
        return self.op("Reshape", out, self.numbers(-1, c.num_attention_heads * c.head_dim))

    def _repeat(self, x: str, group: int) -> str:
        """[B, G, S, D] to [B, G * group, S, D], each entry `group` times."""
        c = self.config
        x = self.op("Expand", self.op("Unsqueeze", x, self.numbers(2)), self.numbers(1, 1, group, 1, 1))
        return self.op("Reshape", x, self.numbers(0, c.num_attention_heads, -1, c.head_dim))

    def _rms_norm(self, x: str, weight: str) -> str:
        """Computed in fp32, as llama.rms_norm."""
        name = weight.removeprefix(self.scope)
        narrow = self.dtype != torch.float32
        wide = self.op("Cast", x, to=TensorProto.FLOAT, name=f"{name}.wide") if narrow else x
        mean = self.op("ReduceMean", self.op("Mul", wide, wide), self.numbers(-1), name=f"{name}.mean")
        root = self.op("Sqrt", self.op("Add", mean, self.number(self.config.rms_norm_eps, torch.float32)))
        x = self.op("Div", wide, root, name=f"{name}.divided")
        x = self.op("Cast", x, to=self.kind, name=f"{name}.narrow") if narrow else x
        return self.op("Mul", x, weight, name=f"{name}.weighted")

    def _rotate(self, x: str, cos: str, sin: str) -> str:
        """Rotary position embedding: x [M, heads, D]; cos and sin [M, 1, D], the first half of sin already negated."""
        first, second = self.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        swapped = self.op("Concat", second, first, axis=-1, name="swapped")
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", swapped, sin), name="rotated")

    def _product(self, name: str, x: str) -> str:
        """x [M, K] times the transpose of the weight [N, K], with its bias where there is one."""
        weight = f"{name}.weight"
        bias = [f"{name}.bias"] if f"{name}.bias" in self.weights else []
        if self.precision in onnx_export.COMPUTE:
            if self.precision == "fp8":
                x = self._round_to_fp8(x, weight)
            narrow = f"{weight}_{self.precision}"
            columns = self.weights[narrow].dims[1]
            axes = onnx_quantize.scale_axes(weight, self.precision, 0, columns)
            weight = self.op("DequantizeLinear", narrow, f"{narrow}_scale", **axes)
        elif weight not in self.weights:
            weight = "embedding"  # tied
        return self.op("Gemm", x, weight, *bias, transB=1, name=name.removeprefix(self.scope))

    def _round_to_fp8(self, x: str, weight: str) -> str:
        """TensorRT feeds fp8 to a product whose inputs both come out of such a pair."""
        scale = self.number(onnx_quantize.fp8_scale(self.largest[weight]))
        zero = self.number(0.0, torch.float8_e4m3fn)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero), scale)

    def _until(self, table: str, count: str) -> str:
        """The first `count` rows."""
        return self.op("Slice", table, self.numbers(0), count, self.numbers(0))

    def _logits(self, x: str, rows: int | str) -> None:
        logits = self._product("head", x)
        if self.dtype != torch.float32:
            logits = self.op("Cast", logits, to=TensorProto.FLOAT)
        self.give("logits", logits, TensorProto.FLOAT, (rows, self.config.vocab_size))

    def _give_cache(self, new: list[str], shape: tuple[int | str, ...]) -> None:
        for name, value in zip(cache_names(self.config), new, strict=True):
            self.give(f"new_{name}", value, self.kind, shape)


def profiles(
    graph: str, config: ModelConfig, max_input_len: int, cache_length: int, batch_sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Least, likely and greatest shape of every input that varies; for decode one profile a batch size."""
    if graph == PREFILL:
        return [{"tokens": ((1, 1), (1, max(1, max_input_len // 2)), (1, max_input_len))}]
    if len(batch_sizes) == 1:
        return []
    heads, size = config.num_key_value_heads, config.head_dim
    profiles = []
    for batch in batch_sizes:
        shapes: dict[str, tuple[int, ...]] = {"tokens": (batch,), "positions": (batch,)}
        shapes |= dict.fromkeys(cache_names(config), (batch, heads, cache_length, size))
        profiles.append({name: (shape, shape, shape) for name, shape in shapes.items()})
    return profiles
