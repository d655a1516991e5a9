"""An ONNX graph with int8, int4 or fp8 weights: pairs of QuantizeLinear and DequantizeLinear around its matrix
products, which TensorRT takes into its kernels."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from helpers.backends.tensorrt.onnx_export import OPSET, TORCH_TYPES, first_words, proto, values_of
from helpers.errors import BuildError

REARRANGE = ("Transpose", "Slice", "Split", "Reshape", "Squeeze", "Unsqueeze", "Gather")
BLOCKS = (128, 64)  # int4 weights that share a scale, along the axis that is summed over
FP8_MAX, INT8_MAX, INT4_MAX = 448.0, 127.0, 7.0


def quantize(model: onnx.ModelProto, precision: str, largest: Mapping[str, float] | None = None) -> list[str]:
    """Rewrite every MatMul and Gemm by a constant matrix to int8, int4 or fp8 weights; returns those weights' names.

    int8: one scale a row (w = q * s, s = max|w| / 127); int4: one scale for 128 weights along a row; both are
    symmetric and leave the activations alone. fp8 (E4M3): weights and activations, one scale each; `largest` has
    the greatest magnitude of each product's input, by weight name (see `calibrate`).
    """
    graph = model.graph
    constants = _constants(graph)
    products = list(_products(graph, constants))
    if not products:
        raise BuildError(
            f"Nothing of this graph becomes {precision}.",
            cause="It has no product (MatMul, Gemm) with a constant matrix; convolutions, recurrent layers and what is "
            "inside an If or a Loop stay as they are.",
            fix="Build it in fp16 or bf16.",
        )
    done: set[str] = set()
    for node, weight, rows in products:
        values = values_of(constants[weight])
        name = f"{weight}_{precision}"
        if weight not in done:
            done.add(weight)
            graph.initializer.extend(narrowed(name, values, precision, rows))
        attributes = scale_axes(weight, precision, rows, values.shape[1 - rows])
        _insert(graph, node, 1, "DequantizeLinear", [name, f"{name}_scale"], f"{node.name}_weight", attributes)
        if precision == "fp8":
            _quantize_activation(graph, node, weight, (largest or {})[weight], constants[weight].data_type)
    used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return sorted(done)


def calibrate(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The greatest magnitude at each product's input when the graph runs on these inputs, by weight name.

    Runs onnx's reference evaluator: slow, and good enough for a few inputs. BuildError where it cannot.
    """
    from onnx.reference import ReferenceEvaluator

    products = list(_products(model.graph, _constants(model.graph)))
    names = sorted({node.input[0] for node, _, _ in products})
    watched = copy.deepcopy(model)
    del watched.graph.output[:]
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            activations = dict(zip(names, ReferenceEvaluator(watched).run(None, dict(feeds)), strict=True))
        except Exception as error:  # whatever an operation of somebody's graph makes of these inputs
            raise _not_calibrated(f"{type(error).__name__}: {first_words(str(error))}") from error
    largest = {weight: float(np.abs(activations[n.input[0]]).max().astype(np.float32)) for n, weight, _ in products}
    if wrong := [weight for weight, most in largest.items() if not math.isfinite(most)]:
        raise _not_calibrated(f"the input of the product with {wrong[0]} is not finite")
    return largest


def _not_calibrated(why: str) -> BuildError:
    return BuildError(
        f"The graph cannot be calibrated for fp8: {why}",
        cause="It is computed once by onnx's reference evaluator: with the example inputs, or with random ones of the "
        "profile's likely shapes.",
        fix="Give profiles, or example inputs, that the graph can compute with; or build in int8, which needs none.",
    )


def example_feeds(
    model: onnx.ModelProto, inputs: Sequence[Any] = (), shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, np.ndarray]:
    """Inputs to calibrate with: the tensors among those given, for the export has fixed what else there is; else
    standard normal numbers (ones for whole numbers, which may be a mask). shapes: of inputs whose axes are open."""
    generator = np.random.default_rng(0)
    feeds = {}
    flat = [value for value in _flat(inputs) if isinstance(value, Tensor)]
    for index, value in enumerate(model.graph.input):
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if flat:
            feeds[value.name] = flat[index].detach().cpu().float().numpy().astype(dtype)
            continue
        shape = (shapes or {}).get(value.name) or [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
        numbers = generator.standard_normal(shape) if dtype.kind not in "iub" else np.ones(shape)
        feeds[value.name] = numbers.astype(dtype)
    return feeds


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _flat(inner)
    else:
        yield value


def _constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """The tensors that a graph holds, by name: initializers, and what nodes named Constant give."""
    nodes = {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.HasField("t")
    }
    return nodes | {tensor.name: tensor for tensor in graph.initializer}


def fold(graph: onnx.GraphProto) -> None:
    """Compute what a graph only rearranges of its constants, such as the transpose of a tied head or the parts of an
    attention's one matrix: then a product's weight is a constant, which can be narrow."""
    from onnx.reference import ReferenceEvaluator

    constants = _constants(graph)
    for node in list(graph.node):
        names = [name for name in node.input if name]
        if node.op_type in REARRANGE and names and all(name in constants for name in names):
            known = {name: onnx.numpy_helper.to_array(constants[name]) for name in names}
            results = ReferenceEvaluator(node, opsets={"": OPSET}).run(None, known)
            made = [onnx.numpy_helper.from_array(np.asarray(r), n) for r, n in zip(results, node.output, strict=True)]
            constants |= {tensor.name: tensor for tensor in made}
            graph.initializer.extend(made)
            graph.node.remove(node)


def _products(graph: onnx.GraphProto, constants: Mapping[str, TensorProto]) -> Iterator[tuple[Any, str, int]]:
    """Each product with a constant matrix: its node, the matrix's name, its axis of output rows."""
    for node in graph.node:
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        weight = node.input[1]
        matrix = constants.get(weight)
        if matrix is not None and len(matrix.dims) == 2 and matrix.data_type in TORCH_TYPES:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            yield node, weight, 0 if transposed else 1


def narrowed(name: str, values: Tensor, precision: str, rows: int) -> Iterator[TensorProto]:
    """A weight's narrow values and their scales, as tensors NAME and NAME_scale. rows: the axis of output rows."""
    wide, source = values.float(), values.dtype
    if precision == "int8":
        scale = wide.abs().amax(1 - rows, keepdim=True).clamp_min(1e-6) / INT8_MAX
        yield proto(name, (wide / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8))
        yield proto(f"{name}_scale", scale.flatten().to(source))
    elif precision == "int4":
        size = _block(name, wide.shape[1 - rows])
        blocks = wide.unflatten(1 - rows, (-1, size))  # the block's own axis comes right after its number
        scale = blocks.abs().amax(2 - rows, keepdim=True).clamp_min(1e-6) / INT4_MAX
        narrow = (blocks / scale).round().clamp(-INT4_MAX, INT4_MAX).to(torch.int8).view(wide.shape)
        pairs = narrow.flatten().numpy().view(np.uint8)
        packed = (pairs[0::2] & 15) | (pairs[1::2] << 4)  # two to a byte, the first in the low half
        yield helper.make_tensor(name, TensorProto.INT4, wide.shape, packed.tobytes(), raw=True)
        yield proto(f"{name}_scale", scale.squeeze(2 - rows).to(source))
    else:
        one = fp8_scale(wide.abs().max().item())
        yield proto(name, (wide / one).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))
        yield proto(f"{name}_scale", torch.tensor(one, dtype=source, device="cpu"))


def scale_axes(weight: str, precision: str, rows: int, columns: int) -> dict[str, Any]:
    """DequantizeLinear's attributes: which numbers share a scale. columns: weights in a row."""
    if precision == "int4":
        return {"axis": 1 - rows, "block_size": _block(weight, columns)}
    return {} if precision == "fp8" else {"axis": rows}


def fp8_scale(largest: float) -> float:
    return max(largest, 1e-6) / FP8_MAX


def _quantize_activation(graph: onnx.GraphProto, node: Any, weight: str, largest: float, source: int) -> None:
    """QuantizeLinear and DequantizeLinear on the product's input: TensorRT then feeds fp8 to the product."""
    scale, zero = f"{weight}_input_scale", f"{weight}_input_zero"
    if scale not in {t.name for t in graph.initializer}:
        for name, value, dtype in ((scale, fp8_scale(largest), TORCH_TYPES[source]), (zero, 0.0, torch.float8_e4m3fn)):
            # Type and device are named, because a notebook may have set others as torch's defaults.
            graph.initializer.append(proto(name, torch.tensor(value, dtype=dtype, device="cpu")))
    _insert(graph, node, 0, "QuantizeLinear", [node.input[0], scale, zero], f"{node.name}_narrow", {})
    _insert(graph, node, 0, "DequantizeLinear", [node.input[0], scale], f"{node.name}_input", {})


def _insert(
    graph: onnx.GraphProto, node: Any, position: int, op: str, inputs: list[str], name: str, attributes: dict[str, int]
) -> None:
    """A new node before `node`, feeding its input at this position; it inherits the module's line."""
    added = helper.make_node(op, inputs, [f"{name}_value"], name=name, **attributes)  # type: ignore[arg-type]
    added.metadata_props.extend(node.metadata_props)
    node.input[position] = f"{name}_value"
    graph.node.insert(list(graph.node).index(node), added)


def _block(weight: str, length: int) -> int:
    size = next((b for b in BLOCKS if length % b == 0), 0)
    if not size:
        raise BuildError(
            f"int4 needs rows of a multiple of {BLOCKS[-1]} weights; those of {weight!r} have {length}.",
            cause=f"A scale is shared by {BLOCKS[0]} or {BLOCKS[-1]} weights of a row.",
            fix="Use precision 'int8', which has one scale a row of any length.",
        )
    return size
