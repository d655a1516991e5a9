"""A torch module as an ONNX file, with the precision written into the graph; ONNX files read, saved and retyped.

TensorRT's networks are strongly typed: it computes in the types that the graph names and chooses none itself. So
fp16 and bf16 are the types of weights and activations; int8, int4 and fp8 come after (onnx_quantize.py).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from helpers.errors import BuildError, why_refused
from helpers.model.config import why_damaged
from helpers.paths import check_is_file

OPSET = 21  # the first with blocks in DequantizeLinear; TensorRT 10 and later read it
IR_VERSION = 10  # of ONNX files that belongs to that opset
SOURCE = "source"  # metadata of a node: "model.py:12", where we write the node ourselves
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPUTE = {"int8": "fp16", "int4": "fp16", "fp8": "fp16"}  # what quantized weights are widened to
ONNX_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TORCH_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
ALL_TYPES = {**TORCH_TYPES, TensorProto.INT8: torch.int8, TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn}
LARGEST = 1_900_000_000  # bytes; a protobuf file ends at 2 GB, beyond that the weights lie in a file beside it


def compute_dtype(precision: str) -> torch.dtype:
    """The type of activations for a precision: its own, or fp16 where only weights (or products) are quantized."""
    return DTYPES[COMPUTE.get(precision, precision)]


def export(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    precision: str = "fp32",
    varying: Mapping[str, Sequence[int]] | None = None,
    asked: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> onnx.ModelProto:
    """The module as ONNX, its weights and inputs cast to the precision's type; the module is not changed.

    varying: for inputs (by the name of forward's parameter) the axes whose length is open. BuildError where the module
    fixes one of them, or does not serve all the shapes that are asked of the input.
    """
    dtype = compute_dtype(precision)
    try:
        cast = copy.deepcopy(module).eval().to(dtype)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise BuildError(
            f"The module cannot be copied: {first_words(str(error))}",
            cause="It holds something besides weights, such as a lock, a file, or a tensor that was computed.",
            fix="Keep only modules, parameters and buffers in it.",
        ) from error
    inputs = tuple(_cast(value, dtype) for value in example_inputs)
    names = list(inspect.signature(module.forward).parameters)[: len(inputs)]
    if unknown := set(varying or ()) - set(names):
        raise BuildError(
            f"A profile names an input {sorted(unknown)[0]!r}; the module's forward has {', '.join(names)}.",
            fix="Use the names of forward's parameters.",
        )
    for name, value in zip(names, inputs, strict=False):
        if isinstance(value, Tensor) and (axes := [a for a in (varying or {}).get(name, ()) if value.shape[a] == 1]):
            raise BuildError(
                f"A profile opens axis {axes[0]} of {name}, and the example has length 1 there.",
                cause="torch.export takes a length of 1 for a fixed one.",
                fix="Give an example of length 2 or more along that axis.",
            )
    shapes = {name: dict.fromkeys((varying or {}).get(name, ()), torch.export.Dim.AUTO) or None for name in names}
    lengths = {
        (name, axis): [shape[axis] for shape in (asked or {}).get(name, ())]
        for name, axes in (varying or {}).items()
        for axis in axes
    }
    return _convert(cast, inputs, shapes if varying else None, lengths)


def _check_length(program: torch.export.ExportedProgram, name: str, axis: int, lengths: Sequence[int]) -> None:
    """BuildError where the program computes for one length of an open axis alone, or not for all of these lengths:
    torch.export takes what forward does with the example for what it does with every length, and says nothing."""
    (value,) = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name == name)
    length = value.shape[axis]
    size = length.node.expr if isinstance(length, torch.SymInt) else length  # a symbol, or a number that it became
    if isinstance(size, int) or size.is_number:
        raise BuildError(
            f"A profile opens axis {axis} of {name}, and the module computes for length {size} alone.",
            cause="Its forward makes a number of that length (a loop, int(), a size that is written down), or has a "
            "table or another input of that length that stays as it is.",
            fix=f"Use {name}.shape[{axis}] in torch's operations, without a loop or int(); open the other input's axis "
            "in the profile too; or leave the axis out and build an engine for each length.",
        )
    serves = program.range_constraints.get(size)
    if not lengths or serves is None:
        return
    # torch.export takes every open length for 2 or more, so that a least length of 2 says nothing of the module.
    least = serves.lower if serves.lower > 2 else 1
    if min(lengths) < least or max(lengths) > serves.upper:
        range_ = f"{least} to {serves.upper}" if serves.upper < 2**31 else f"{least} or more"
        raise BuildError(
            f"A profile asks for lengths {min(lengths)} to {max(lengths)} along axis {axis} of {name}, "
            f"and the module computes for {range_} alone.",
            cause="Its forward goes another way for other lengths, or it has a table or an operation that ends there.",
            fix=f"Keep the profile within {range_}; or write forward without a branch on that length.",
        )


def _convert(
    module: nn.Module,
    inputs: tuple[Any, ...],
    dynamic_shapes: Any,
    lengths: Mapping[tuple[str, int], Sequence[int]],
) -> onnx.ModelProto:
    """torch.export, then torch.onnx, without the messages that concern neither the module nor its reader.

    lengths: what the profiles ask of each open axis, given by its input and its number.
    """
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
            for (name, axis), asked in lengths.items():
                _check_length(program, name, axis, asked)
            converted = torch.onnx.export(program, (), dynamo=True, verbose=False, opset_version=OPSET)
        except BuildError:
            raise
        except Exception as error:  # whatever the forward of somebody's module raises
            root: Exception = error
            while root.__cause__ is not None and isinstance(root.__cause__, Exception):
                root = root.__cause__
            _check_inputs(module, inputs)
            raise BuildError(
                f"The module cannot be written as ONNX: {first_words(str(root))}",
                cause="Its forward branches on values, or uses an operation that ONNX has no word for.",
                fix="Write that line with other torch operations; the full message is in this error's __cause__.",
            ) from error
        assert converted is not None
        return converted.model_proto


def _check_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """BuildError where the module cannot compute with its inputs: then the export is not what is wrong. In fp32: a CPU
    lacks some operations in fp16."""
    try:
        module.float()(*_cast(inputs, torch.float32))
    except Exception as error:  # whatever somebody's module makes of them
        raise BuildError(
            f"The module cannot compute with these inputs: {type(error).__name__}: {first_words(str(error))}",
            cause="Their number, shapes or types are not what its forward takes, or its forward has a mistake.",
            fix="Give inputs with which module(*inputs) runs.",
        ) from error


def read(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """An ONNX file, checked to be one: any bytes can be read as an empty one. weights: also those in another file."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        check_is_file(path)
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except FileNotFoundError:
        raise BuildError(f"There is no file {path.name!r}.", fix="Check the path.") from None
    except OSError as error:
        what = f"{path.name!r} cannot be opened: {error.strerror}."
        raise BuildError(what, cause=why_refused(error), fix="Give an ONNX file that you may read.") from error
    except (DecodeError, ValueError) as error:
        raise _no_onnx(path) from error
    if not model.graph.node or not model.opset_import:
        raise _no_onnx(path)
    _name_each_node(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in constants]:  # as older exporters wrote them
        model.graph.input.remove(value)
    try:
        if weights:
            onnx.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise BuildError(
            f"The weights of {path.name!r} cannot be read: {first_words(str(error))}",
            cause="They lie in a file beside it, which is missing, cut, or only a link, as in the Hub's cache.",
            fix="Copy that file to the folder of the .onnx file, whole.",
        ) from error
    return model


def _name_each_node(graph: onnx.GraphProto) -> None:
    """Names are optional in ONNX; the report and what is inserted for narrow weights need one for each node."""
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        while not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{number}"
        taken.add(node.name)


def is_plugin(node: onnx.NodeProto) -> bool:
    """Whether a node is none of ONNX's own operators."""
    return node.domain not in ("", "ai.onnx")


def save(model: onnx.ModelProto, path: Path) -> None:
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size > LARGEST:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(model, path)


def sources(model: onnx.ModelProto) -> dict[str, str]:
    """Every node's name with the module's line that it came from ("model.py:12"), "" where that is unknown."""
    return {node.name: _source(node) for node in model.graph.node}


def retype(model: onnx.ModelProto, precision: str) -> None:
    """Give a graph the precision's type in place of fp32, fp16 and bf16: weights, inputs, outputs, casts and constants.

    What was computed in fp32 to be safe, such as a norm's mean, is then computed in the narrow type too: export a
    module instead where that matters.
    """
    target = ONNX_TYPES[COMPUTE.get(precision, precision)]
    dtype = TORCH_TYPES[target]
    for graph in _with_bodies(model.graph):
        for tensor in _tensors(graph):
            if tensor.data_type in TORCH_TYPES and tensor.data_type != target:
                tensor.CopyFrom(proto(tensor.name, values_of(tensor).to(dtype)))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in TORCH_TYPES:
                value.type.tensor_type.elem_type = target
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i in TORCH_TYPES:
                    attribute.i = target
                elif attribute.name in ("value_float", "value_floats"):  # a Constant's, and always fp32
                    values = torch.tensor(helper.get_attribute_value(attribute), dtype=dtype, device="cpu")
                    attribute.CopyFrom(helper.make_attribute("value", proto("", values)))


def float_type(model: onnx.ModelProto) -> str:
    """The precision that most of a graph's weights have: fp32, fp16 or bf16."""
    tensors = [tensor for graph in _with_bodies(model.graph) for tensor in _tensors(graph)]
    sizes = {
        precision: sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type == kind)
        for precision, kind in ONNX_TYPES.items()
    }
    return max(sizes, key=sizes.__getitem__)  # fp32, the first, where there are none


def proto(name: str, values: Tensor) -> TensorProto:
    """A torch tensor as a tensor of an ONNX file."""
    raw = values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, onnx_type(values.dtype), values.shape, raw, raw=True)


def onnx_type(dtype: torch.dtype) -> int:
    return next(kind for kind, known in ALL_TYPES.items() if known == dtype)


def _with_bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those inside its nodes, such as the branches of an If."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):  # g is empty where there is none
                yield from _with_bodies(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def values_of(tensor: TensorProto) -> Tensor:
    if tensor.raw_data:
        return torch.frombuffer(bytearray(tensor.raw_data), dtype=TORCH_TYPES[tensor.data_type]).view(*tensor.dims)
    return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    # Always a copy: torch.export takes one tensor that is given twice for one input.
    return value.to(dtype if value.is_floating_point() else value.dtype, copy=True)


def _source(node: Any) -> str:
    """The innermost line outside torch, from the stack trace that torch.onnx leaves in the node's metadata."""
    metadata = {p.key: p.value for p in node.metadata_props}
    if SOURCE in metadata:
        return metadata[SOURCE]
    trace = metadata.get("pkg.torch.onnx.stack_trace", "")
    inside = (str(Path(torch.__file__).parent) + os.sep, "torch/")  # torch's own passes give a relative path
    frames = [f for f in re.findall(r'File "([^"]+)", line (\d+)', trace) if not f[0].startswith(inside)]
    if not frames:
        return ""
    path, line = frames[-1]
    cell = "ipykernel_" in path or path.startswith("<ipython")
    return f"{'cell' if cell else Path(path).name}:{line}"


def first_words(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:3])[:400]


def _no_onnx(path: Path) -> BuildError:
    cause, fix = why_damaged(
        path,
        "The file is of another kind, empty, or was cut.",
        "Export it again: torch.onnx.export(module, inputs, dynamo=True).save(path).",
    )
    return BuildError(f"{path.name!r} is not an ONNX file with operations in it.", cause=cause, fix=fix)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch's exporter tells its maintainers; errors are raised as before."""
    names = ("torch.onnx", "torch.export", "torch._subclasses", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
