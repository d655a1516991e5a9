"""Tables of ONNX graphs: a small graph that is made here, and the counts that a decoder's mathematics demands."""

import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not in this environment")

from onnx import TensorProto, helper

from helpers.course import onnx_tables
from helpers.course.recorded import FOLDER
from helpers.model.checkpoint import find_checkpoint

HALF, INT = TensorProto.FLOAT16, TensorProto.INT32
PAGES = (2, "num_pages", 128, 2, 64)


def tensor(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, list(shape))


def two_layers():
    """Two attention plugins over paged caches, a product whose weight lies in a file that is not there, and an Add."""
    weight = TensorProto(name="weight", data_type=TensorProto.INT4, dims=[4, 6], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="nowhere.data")
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["qkv"])]
    for i in range(2):
        names = [f"out{i}", f"present_{i}"]
        nodes.append(
            helper.make_node("AttentionPlugin", ["qkv", f"past_{i}", "table"], names, domain="trt_edgellm", heads=4)
        )
    nodes.append(helper.make_node("Add", ["out0", "out1"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "main",
        [
            tensor("x", HALF, ("tokens", 4)),
            tensor("past_0", HALF, PAGES),
            tensor("past_1", HALF, PAGES),
            tensor("table", INT, ("B", 2)),
        ],
        [tensor("y", HALF, ("tokens", 6)), tensor("present_0", HALF, PAGES), tensor("present_1", HALF, PAGES)],
        [weight],
        value_info=[tensor("qkv", HALF, ("tokens", 6))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("trt_edgellm", 1)])


@pytest.fixture
def small(tmp_path):
    onnx.save(two_layers(), tmp_path / "model.onnx")
    return onnx_tables.read(tmp_path / "model.onnx")  # its weight's file is not there, and is not asked for


def test_operators_are_counted_and_say_who_defines_them(small):
    assert onnx_tables.operators(small).rows == [
        ("AttentionPlugin", "trt_edgellm", 2),
        ("MatMul", "ONNX", 1),
        ("Add", "ONNX", 1),
    ]


def test_a_plugins_node_shows_types_and_attributes(small):
    table = onnx_tables.plugin_node(small)
    assert "AttentionPlugin" in table.caption
    assert ("input", "qkv", "float16 [tokens, 6]") in table.rows
    assert ("input", "past_0", "float16 [2, num_pages, 128, 2, 64]") in table.rows
    assert ("attribute", "heads", "4") in table.rows


def test_inputs_of_every_layer_are_one_row(small):
    rows = onnx_tables.interface(small).rows
    assert ("input", 2, "past_N", "float16 [2, num_pages, 128, 2, 64]") in rows
    assert sum(count for _, count, _, _ in rows) == len(small.graph.input) + len(small.graph.output)


def test_two_graphs_of_one_name_are_two_columns(small):
    assert onnx_tables.compare({"mine": [small, two_layers()]}).columns == ("", "mine: 1", "mine: 2")


def test_side_by_side(small):
    second = two_layers()
    second.graph.name = "decode"
    table = onnx_tables.compare({"one": [small], "other": [small, second]})
    assert table.columns == ("", "one", "other: main", "other: decode")
    cells = {name: first for name, first, *_ in table.rows}
    assert cells["nodes"] == "4" and cells["of them plugins"] == "2 AttentionPlugin"
    assert cells["matrix products in ONNX"] == 1 and cells["kinds of ONNX operator"] == 2
    assert cells["KV cache, read"] == "2 past_N float16 [2, num_pages, 128, 2, 64]"
    assert cells["open axes"] == "tokens, num_pages, B"


@pytest.mark.parametrize(("kind", "size"), [(TensorProto.INT4, 12), (TensorProto.BFLOAT16, 48), (INT, 96)])
def test_weights_are_weighed_by_their_shape(small, kind, size):
    small.graph.initializer[0].data_type = kind
    assert onnx_tables.weights_bytes(small) == size


def test_the_two_ways_to_export_a_model_hold_the_same_mathematics():
    """A layer multiplies by q, k, v, o, gate, up and down, and attention twice more; then comes the head. Edge-LLM
    joins q, k and v, and has attention, with its cache and its rotation, in a plugin."""
    config = find_checkpoint("stories").config
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    edge = onnx_tables.read(FOLDER / "edge_llm-stories" / "llm" / "model.onnx")
    course = onnx_tables.course_graphs("stories", cache_length=64)
    table = onnx_tables.compare({"edge": [edge], "course": course})
    assert table.columns == ("", "edge", "course: prefill", "course: decode")
    cells = {name: each for name, *each in table.rows}
    assert cells["of them plugins"] == [f"{layers} AttentionPlugin", "none", "none"]
    assert cells["matrix products in ONNX"] == [5 * layers + 1, 9 * layers + 1, 9 * layers + 1]
    paged, _, dense = cells["KV cache, read"]
    assert paged == f"{layers} past_key_values_N float16 [2, num_pages, 128, {heads}, {size}]"
    assert f"{layers} kN float16 [B, {heads}, 64, {size}]" in dense
    parameters = 2 * config.parameter_count()
    assert onnx_tables.weights_bytes(edge) == pytest.approx(parameters, rel=0.01)
    assert onnx_tables.weights_bytes(course[1]) == pytest.approx(parameters, rel=0.01)
