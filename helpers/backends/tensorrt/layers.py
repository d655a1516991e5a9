"""What TensorRT says about the layers of an engine, in its two forms, as the report that every backend shares.

Two sources tell the same: the builder's log message "Layers:", which needs no GPU, and EngineInspector's JSON, which
needs a GPU that the engine runs on. TensorRT 10 writes data type and format of a tensor in one field of the JSON,
TensorRT 11 (and TensorRT for RTX) in two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from helpers.backends.report import Kernel, Operation
from helpers.backends.tensorrt import INSTALL
from helpers.errors import BuildError

# TensorRT's words for data types, in both of its forms, and torch's words for the same.
DTYPES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "int4": "int4",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
BITS = {"float32": 32, "int32": 32, "int64": 64, "int4": 4, "float16": 16, "bfloat16": 16}  # the others have 8
PARTS = ("Inputs", "Constants", "Outputs")
# What can be known of a network layer that no engine layer names. Of the rest, TensorRT does not say it.
FOLDED = "constant folding: all that it reads was known while building"
MOVES = ("identity", "shuffle", "squeeze", "unsqueeze")
MOVED = "no layer of its own: it changes only names, shape or order"
NOT_PARSED = "left out by TensorRT's ONNX parser"
UNKNOWN = "not known: no layer of the engine names it"


@dataclass(frozen=True)
class LayerTensor:
    name: str
    shape: tuple[int, ...]  # -1 where the length is known only at run time
    dtype: str
    format: str  # the memory layout, in TensorRT's words


@dataclass(frozen=True)
class Layer:
    """One layer of a built engine: mostly one kernel launch."""

    name: str
    type: str  # kgen (generated kernel), gemm, runtime_fusion, ... in TensorRT's words
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    tactic: str
    nodes: tuple[str, ...]  # names of the ONNX nodes that it came from


def parse_message(text: str) -> list[Layer]:
    """The layers in the builder's message that begins with "Layers:"; other parts of the message are skipped."""
    lines = [line for line in text.splitlines() if line.startswith("Name: ")]
    if not lines:
        raise _unreadable("no line that begins with 'Name:'")
    return [_from_text(line) for line in lines]


def parse_inspector(text: str) -> list[Layer]:
    """The layers in EngineInspector's JSON, as get_engine_information(LayerInformationFormat.JSON) returns it."""
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(f"no JSON with the key 'Layers' ({error})") from error
    return [_from_json(layer) for layer in layers]


def steps(name: str) -> list[str]:
    """What a layer does, from its name: the generated ones spell out their operations, the others name their nodes.

    "__myl_FcAddErfMul_myl0_1" gives Fc, Add, Erf, Mul; "node_q+node_k_U7_myl0_2" gives node_q, node_k.
    """
    base = re.sub(r"_myl\d+_\d+$", "", name)
    if base.startswith("__myl_"):
        return re.findall(r"[A-Z][a-z0-9]*", base.removeprefix("__myl_"))
    parts = (re.sub(r"_U\d+$", "", part).strip("_ ") for part in base.split("+"))  # _U18: a number that it adds
    return [part for part in parts if part]


def account(
    graph: str, network: list[dict[str, Any]], layers: list[Layer], nodes: dict[str, str]
) -> tuple[list[Operation], list[Kernel], dict[str, str]]:
    """Which engine layer does each network layer's work: the operations, the kernels, and why the rest has none.

    network: the layers that the parser made, in order: name, op, node (the ONNX node, "" for none), dtype, shape,
    inputs and outputs (tensor names). nodes: every ONNX node's name, with the module's line it came from.

    A network layer goes with its ONNX node, and a node with the first engine layer that names it. Layers that the
    parser added on its own (weights, broadcasts) go with the layer that reads them. What nobody names has no layer.
    """
    first: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for node in layer.nodes:
            first.setdefault(node, index)
    names = _unique([entry["name"] for entry in network])
    readers: dict[str, list[int]] = {}  # tensor name -> network layers that read it
    for index, entry in enumerate(network):
        for tensor in entry["inputs"]:
            readers.setdefault(tensor, []).append(index)
    homes: list[int | None] = [None] * len(network)
    for index in reversed(range(len(network))):  # readers first
        entry = network[index]
        if entry["node"]:
            homes[index] = first.get(entry["node"])
        else:
            users = [homes[r] for tensor in entry["outputs"] for r in readers.get(tensor, [])]
            homes[index] = min((home for home in users if home is not None), default=None)
    fused: dict[int, list[str]] = {}
    removed = {}
    known: set[str] = set()  # tensors that depend on nothing but constants
    for name, home, entry in zip(names, homes, network, strict=True):
        constant = entry["op"] == "constant" or (entry["inputs"] and known.issuperset(entry["inputs"]))
        known.update(entry["outputs"] if constant else ())
        if home is not None:
            fused.setdefault(home, []).append(name)
        else:
            removed[f"{graph}/{name}"] = FOLDED if constant else MOVED if entry["op"] in MOVES else UNKNOWN
    parsed = {entry["node"] for entry in network}
    makers = {tensor: name for name, entry in zip(names, network, strict=True) for tensor in entry["outputs"]}
    removed |= {f"{graph}/{node}": NOT_PARSED for node in nodes if node not in parsed}
    operations = [
        Operation(
            graph,
            name,
            e["op"],
            e["dtype"],
            tuple(e["shape"]),
            nodes.get(e["node"], ""),
            e["node"],
            tuple(dict.fromkeys(makers[tensor] for tensor in e["inputs"] if tensor in makers)),
        )
        for name, e in zip(names, network, strict=True)
    ]
    kernels = [_kernel(graph, index, layer, tuple(fused.get(index, ())), first) for index, layer in enumerate(layers)]
    return operations, _with_bytes(kernels), removed


def _with_bytes(kernels: list[Kernel]) -> list[Kernel]:
    """Bytes that each layer reads and writes; and those that no other layer writes or reads, so that none can save
    them. Without, where a length is known only at run time."""
    written = {t["name"] for k in kernels for t in k.details["outputs"]}
    read = {t["name"] for k in kernels for t in k.details["inputs"]}
    for kernel in kernels:
        sizes = [
            (t["name"], math.prod(t["shape"]) * BITS.get(t["dtype"], 8) // 8, t["name"] in inner)
            for part, inner in (("constants", set()), ("inputs", written), ("outputs", read))
            for t in kernel.details[part]
        ]
        if all(size >= 0 for _, size, _ in sizes):
            kernel.details["bytes"] = sum(size for _, size, _ in sizes)
            kernel.details["outside"] = {name: size for name, size, inside in sizes if not inside}
    return kernels


def by_name(graph: str, layers: list[Layer]) -> tuple[list[Operation], list[Kernel]]:
    """The report of an engine whose network is not at hand, such as TensorRT-LLM's: a merged layer's name lists its
    parts, joined by " + ", and these stand for the operations. What TensorRT removed is not in it.

    An operation's kind is the end of its name: ".../attention/qkv/PLUGIN_V2_Gemm_0" is a plugin_v2_gemm.
    """
    operations: dict[str, Operation] = {}
    kernels = []
    for index, layer in enumerate(layers):
        parts = tuple(steps(layer.name)) or (layer.name,)
        kernels.append(_kernel(graph, index, layer, parts, dict.fromkeys(layer.nodes, index)))
        for part in parts:
            op = part.rpartition("/")[2].rstrip("0123456789").rstrip("_").lower() or part
            operations.setdefault(part, Operation(graph, part, op, kernels[-1].dtype))
    return list(operations.values()), _with_bytes(kernels)


def _kernel(graph: str, index: int, layer: Layer, fused: tuple[str, ...], first: dict[str, int]) -> Kernel:
    written = next((t.dtype for t in (*layer.outputs, *layer.inputs)), "")
    details = {
        "steps": steps(layer.name),
        "nodes": [node for node in layer.nodes if first[node] == index],
        "continues": [node for node in layer.nodes if first[node] != index],  # begun in an earlier layer
        "tactic": layer.tactic,
        **{part: [asdict(t) for t in getattr(layer, part)] for part in ("inputs", "constants", "outputs")},
    }
    return Kernel(graph, layer.name, layer.type, fused, written, details)


def _from_text(line: str) -> Layer:
    fields = dict(_fields(line))
    inputs, constants, outputs = (tuple(_tensors(fields.get(part, ""))) for part in PARTS)
    kind, tactic = fields.get("LayerType", ""), fields.get("TacticName", "")
    return Layer(fields.get("Name", ""), kind, inputs, constants, outputs, tactic, _nodes(fields.get("Metadata", "")))


def _tensors(text: str) -> Iterator[LayerTensor]:
    """`[ { Name: x, Dimensions: [8,256], ... }, { ... }]`"""
    for braces in _braces(text):
        fields = dict(_fields(braces.strip()))
        shape = tuple(int(d) for d in re.findall(r"-?\d+", fields.get("Dimensions", "")))
        yield _tensor(fields, shape)


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """`Key: value, Key: value`, where a value may hold commas and keys inside brackets."""
    starts = [m for m in re.finditer(r"(?:^|, )([A-Z]\w*(?:/\w+)?): ?", text) if _depth(text, m.start()) == 0]
    for match, end in zip(starts, [m.start() for m in starts[1:]] + [len(text)], strict=True):
        yield match[1], text[match.end() : end].strip()


def _depth(text: str, end: int) -> int:
    return sum(text.count(c, 0, end) for c in "[{") - sum(text.count(c, 0, end) for c in "]}")


def _braces(text: str) -> Iterator[str]:
    """What stands between each outermost { and }."""
    level, start = 0, 0
    for brace in re.finditer(r"[{}]", text):
        level += 1 if brace[0] == "{" else -1
        if brace[0] == "{" and level == 1:
            start = brace.end()
        elif brace[0] == "}" and level == 0:
            yield text[start : brace.start()]


def _from_json(layer: Any) -> Layer:
    if isinstance(layer, str):  # an engine built without detailed profiling verbosity has names only
        return Layer(layer, "", (), (), (), "", ())
    inputs, constants, outputs = (
        tuple(_tensor(t, tuple(t.get("Dimensions", ()))) for t in layer.get(part) or ()) for part in PARTS
    )
    nodes = _nodes(str(layer.get("Metadata", "")))
    kind, tactic = layer.get("LayerType", ""), str(layer.get("TacticName", ""))
    return Layer(layer.get("Name", ""), kind, inputs, constants, outputs, tactic, nodes)


def _tensor(fields: dict[str, Any], shape: tuple[int, ...]) -> LayerTensor:
    both = str(fields.get("Format/Datatype", ""))  # TensorRT 10: "Row major linear FP16 format"
    dtype = str(fields.get("Datatype", "")) or next((w for w in re.findall(r"\w+", both) if w.lower() in DTYPES), "")
    return LayerTensor(
        str(fields.get("Name", "")), shape, DTYPES.get(dtype.lower(), dtype), str(fields.get("Format", both))
    )


def _nodes(metadata: str) -> tuple[str, ...]:
    """`[ONNX Layer: a][ONNX Layer: b]`, at times with a control character between them."""
    return tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata)))


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        count = seen[name] = seen.get(name, -1) + 1
        unique.append(f"{name}#{count}" if count else name)
    return unique


def _unreadable(what: str) -> BuildError:
    return BuildError(
        f"TensorRT's description of the layers cannot be read: it has {what}.",
        cause="This version of TensorRT writes it in a way that the course does not know.",
        fix=f"Install the version that the course names: {INSTALL['tensorrt_rtx']}; "
        f"of TensorRT itself: {INSTALL['tensorrt']}.",
    )
