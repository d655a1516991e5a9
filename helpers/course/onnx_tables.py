"""What is in an ONNX file of a language model, as tables: its nodes, one plugin's node, its inputs and outputs; and two
such files side by side. Weights are never read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from helpers.backends.tensorrt import llama_onnx, onnx_export
from helpers.backends.tensorrt.onnx_export import is_plugin
from helpers.display import Table
from helpers.errors import InputError, need
from helpers.model.checkpoint import find_checkpoint
from helpers.paths import name_of_folder, named, owned_folder

PRODUCTS = ("MatMul", "Gemm")


def read(path: Path | str) -> ModelProto:
    return onnx_export.read(named(path), weights=False)


def course_graphs(model: Path | str, *, cache_length: int = 1024) -> list[ModelProto]:
    """The graphs that this course's `tensorrt` backend builds engines from: prefill and decode, in fp16."""
    checkpoint = find_checkpoint(name_of_folder(model))
    with owned_folder("course-onnx-") as folder:
        config = checkpoint.config
        weights = llama_onnx.write_weights(checkpoint, "fp16", cache_length, folder)
        sizes: dict[str, Any] = {"cache_length": cache_length, "batch_sizes": (1, 4)}
        return [
            read(llama_onnx.write(graph, config, weights, folder, precision="fp16", **sizes))
            for graph in (llama_onnx.PREFILL, llama_onnx.DECODE)
        ]


def operators(model: ModelProto, caption: str = "") -> Table:
    _need_model(model)
    counts = Counter((node.op_type, node.domain if is_plugin(node) else "ONNX") for node in model.graph.node)
    return Table(caption, ("operator", "defined by", "nodes"), [(*key, n) for key, n in counts.most_common()])


def plugin_node(model: ModelProto) -> Table:
    """The first node that is no ONNX operator: what it reads and writes, and its attributes."""
    _need_model(model)
    graph, node = model.graph, next(filter(is_plugin, model.graph.node), None)
    if node is None:
        raise InputError("This graph has no plugin: all its nodes are ONNX operators.", fix="See them by `operators`.")
    types = {value.name: _type(value) for value in (*graph.input, *graph.output, *graph.value_info)}
    rows = [("input", name, types.get(name, "")) for name in node.input if name]
    rows += [("output", name, types.get(name, "")) for name in node.output]
    rows += [("attribute", a.name, _attribute(helper.get_attribute_value(a))) for a in node.attribute]
    return Table(f"One {node.op_type} of {node.domain}", ("", "name", "type or value"), rows)


def interface(model: ModelProto, caption: str = "") -> Table:
    """Inputs and outputs; those that differ only in a number at their name's end, such as a layer's, are one row."""
    _need_model(model)
    rows = [("input", *row) for row in _families(model.graph.input)]
    rows += [("output", *row) for row in _families(model.graph.output)]
    return Table(caption, ("", "how many", "name", "type and shape"), rows)


def compare(exports: Mapping[str, Sequence[ModelProto]], caption: str = "") -> Table:
    """A column for each graph, under its export's title; where an export has several, with the graph's name, or its
    place where two have one name."""
    need(exports, Mapping, "Give each export's graphs with a title: {'this course': course_graphs(MODEL)}.")
    for models in exports.values():
        need(models, Sequence, "Give a list of graphs, also for one: [read(file)].")
        list(map(_need_model, models))
    columns = {}
    for title, models in exports.items():
        names = [model.graph.name for model in models]
        places = names if len(set(names)) == len(names) else range(1, len(names) + 1)
        for place, model in zip(places, models, strict=True):
            columns[title if len(models) == 1 else f"{title}: {place}"] = model
    rows = {
        "nodes": lambda model: f"{len(model.graph.node):,}",
        "of them plugins": lambda model: _counted(n.op_type for n in model.graph.node if is_plugin(n)),
        "kinds of ONNX operator": lambda model: len({n.op_type for n in model.graph.node if not is_plugin(n)}),
        "matrix products in ONNX": lambda model: sum(n.op_type in PRODUCTS for n in model.graph.node),
        "KV cache, read": lambda model: _cache(model.graph.input),
        "KV cache, written": lambda model: _cache(model.graph.output),
        "open axes": _open_axes,
        "weights, MB": lambda model: f"{weights_bytes(model) / 1e6:,.0f}",
    }
    return Table(caption, ("", *columns), [(name, *map(row, columns.values())) for name, row in rows.items()])


def _need_model(model: Any) -> None:
    """InputError for another thing than a graph, such as its file, or the list that `course_graphs` returns."""
    need(model, ModelProto, "Give one graph: read(file), or one of course_graphs(MODEL).")


def _counted(kinds: Iterable[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).most_common()) or "none"


def _open_axes(model: ModelProto) -> str:
    names = dict.fromkeys(d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim)
    return ", ".join(filter(None, names)) or "none"


def _cache(values: Iterable[ValueInfoProto]) -> str:
    """Keys and values have axes for heads and for a head's size, so four or more; nothing else here has."""
    rows = _families(value for value in values if len(value.type.tensor_type.shape.dim) >= 4)
    return ", ".join(f"{count} {name} {kind}" for count, name, kind in rows) or "none"


def _families(values: Iterable[ValueInfoProto]) -> list[tuple[int, str, str]]:
    counts = Counter((re.sub(r"\d+$", "N", value.name), _type(value)) for value in values)
    return [(n, name, kind) for (name, kind), n in counts.items()]


def _type(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    shape = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{shape}]"


def _attribute(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def weights_bytes(model: ModelProto) -> int:
    """Bytes of the constants, by their shapes: where they lie in another file, that is not opened."""
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4}
    total = 0
    for tensor in model.graph.initializer:
        width = bits.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += math.prod(tensor.dims) * width // 8
    return total
