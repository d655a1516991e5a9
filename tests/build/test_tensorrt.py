"""The TensorRT builder on a machine of any kind: what went in, what came out, and how it refuses."""

import importlib.metadata
import json
import math
import runpy
import shutil
import threading

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: it comes with the course on Linux and Windows")

from onnx.reference import ReferenceEvaluator
from torch import nn

from helpers import inspect, store
from helpers.backends import tensorrt
from helpers.backends.tensorrt import api, modules, onnx_export, onnx_quantize
from helpers.backends.tensorrt import builder as tensorrt_builder
from helpers.course.recorded import recorded
from helpers.engine import build_module, build_onnx, load_plan
from helpers.errors import (
    BackendUnavailable,
    BuildError,
    CourseError,
    EngineCorrupt,
    EngineNotFound,
    RecipeError,
)
from helpers.machine.hardware import Hardware
from helpers.maintain.recordings import BLOCK
from helpers.paths import engines_folder
from helpers.recipe.tensorrt import make_options

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")


class Block(nn.Module):
    """The seed's example: LayerNorm, Linear, GELU."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.gelu = nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU()

    def forward(self, x):
        x = self.norm(x)
        x = self.linear(x)
        return self.gelu(x)


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block()


@pytest.fixture(scope="module")
def build(block):
    built = {}

    def once(precision, **options):
        key = json.dumps([precision, options])
        if key not in built:
            inputs = (torch.randn(8, 256, generator=torch.Generator().manual_seed(0)),)
            built[key] = build_module(block, inputs, precision, quiet=True, **options)
        return built[key]

    return once


@pytest.fixture(scope="module")
def driverless():
    if torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA driver")


# What a build shows.


def test_the_block_becomes_two_kernels(build):
    report = inspect(build("fp16"))
    assert (len(report.operations), len(report.kernels)) == (11, 2)
    norm, rest = report.kernels
    assert (norm.kind, rest.kind) == ("kgen", "runtime_fusion")
    assert "Mean" in norm.details["steps"] and "Sqrt" in norm.details["steps"]
    assert norm.details["nodes"] == ["node_layer_norm"]
    assert rest.details["steps"][0] == "Fc" and "Erf" in rest.details["steps"]
    assert sorted(rest.details["nodes"]) == ["node_gelu", "node_linear"]


def test_operations_lead_back_to_the_module(build):
    report = inspect(build("fp16"))
    lines = {o.node: o.source for o in report.operations if o.node}
    start = Block.forward.__code__.co_firstlineno
    assert lines == {
        "node_layer_norm": f"test_tensorrt.py:{start + 1}",
        "node_linear": f"test_tensorrt.py:{start + 2}",
        "node_gelu": f"test_tensorrt.py:{start + 3}",
    }


def test_the_weight_is_laid_out_anew(build):
    weight = inspect(build("fp16")).kernels[1].details["constants"][0]
    assert weight["shape"] == [256, 1024] and "Transposed" in weight["format"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_builds_and_shows(build, precision):
    report = inspect(build(precision))
    assert len(report.kernels) < len(report.operations)
    narrow = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn", "fp32": "float32", "bf16": "bfloat16"}
    constants = {t["dtype"] for kernel in report.kernels for t in kernel.details["constants"]}
    assert narrow.get(precision, "float16") in constants


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operation_is_in_one_kernel_or_removed(build, precision):
    report = inspect(build(precision))
    placed = [name for kernel in report.kernels for name in kernel.fused]
    placed += [name.partition("/")[2] for name in report.removed]
    assert sorted(placed) == sorted(o.name for o in report.operations)
    nodes = [node for kernel in report.kernels for node in kernel.details["nodes"]]
    assert sorted(nodes) == sorted({o.node for o in report.operations if o.node})


def test_narrower_weights_make_smaller_plans(build):
    size = {p: inspect(build(p)).sizes["module.plan"] for p in PRECISIONS}
    assert size["int4"] < size["int8"] < size["fp16"] < size["fp32"]
    assert size["fp8"] < size["fp16"]


def test_marked_outputs_hinder_fusion(build):
    whole, hindered = inspect(build("fp16")), inspect(build("fp16", mark_outputs="all"))
    assert len(hindered.kernels) > len(whole.kernels)
    assert len(hindered.operations) == len(whole.operations)


def test_a_varying_size_is_open_in_the_report(build):
    report = inspect(build("fp16", profiles=[{"x": [[1, 256], [8, 256], [64, 256]]}]))
    assert report.operations[-1].shape == ("?", 1024)


def test_equal_modules_hit_the_store_and_others_do_not(build, block):
    inputs = (torch.randn(8, 256),)
    assert build_module(block, inputs, "fp16", quiet=True) == build("fp16")
    other = Block()
    assert build_module(other, inputs, "fp16", quiet=True) != build("fp16")


def test_an_equal_module_of_torchs_own_parts_is_found_without_an_export(monkeypatch):
    inputs = (torch.randn(4, 256),)

    def module(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 64), nn.GELU())

    folder = build_module(module(), inputs, "fp16", quiet=True)

    def refuse(*_, **__):
        raise AssertionError("exported")

    monkeypatch.setattr(onnx_export, "export", refuse)
    assert build_module(module(), (torch.randn(4, 256),), "fp16", quiet=True) == folder
    with_hook = module()
    with_hook[1].register_forward_hook(lambda *_: None)
    changed_setting = module()
    changed_setting[0].eps = 1.0
    for other in (module(seed=1), with_hook, changed_setting):
        with pytest.raises(AssertionError, match="exported"):
            build_module(other, inputs, "fp16", quiet=True)
    with pytest.raises(AssertionError, match="exported"):
        build_module(module(), (torch.randn(5, 256),), "fp16", quiet=True)


def test_a_class_of_ones_own_is_only_known_by_its_export(block):
    assert modules.content_of(block, (torch.randn(8, 256),), "fp16") == ""
    assert modules.content_of(block.norm, (torch.randn(8, 256),), "fp16")


def test_parts_and_weights_that_are_used_twice_count_twice():
    one, two, relu, inputs = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), (torch.zeros(1, 8),)
    tied = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)]
    tied[1].load_state_dict(tied[0].state_dict())
    for first, stack in enumerate(tied):
        stack[2].weight = stack[first].weight
    stacks = [nn.Sequential(*parts) for parts in ([one, relu, two], [one, relu, two, relu], [one], [one, one])]
    contents = {modules.content_of(stack, inputs, "fp16") for stack in (*stacks, *tied)}
    assert len(contents) == 6 and "" not in contents


def test_the_inputs_that_fp8_is_calibrated_with_count_for_a_class_of_ones_own(block):
    def content(precision, scale):
        inputs = (torch.ones(8, 256) * scale,)
        settings = {"name": "", "time_limit": 60.0, "options": {}}
        return modules.from_module(block, inputs, precision, **settings).identity["checkpoint"]

    assert content("fp8", 1) == content("fp8", 1) != content("fp8", 8)
    assert content("fp16", 1) == content("fp16", 8)


def test_the_module_itself_is_left_alone(build, block):
    build("fp16")
    assert all(p.dtype == torch.float32 for p in block.parameters()) and block.training


def test_the_manifest_says_who_built_it_and_where_it_runs(build):
    details = store.read_manifest(build("fp16"))["details"]
    assert (details["provider"], details["runs_on"][:2]) == ("tensorrt_rtx", ["8.0", "8.6"])
    assert details["version"] == tensorrt_builder.provider_version("tensorrt_rtx")
    targeted = store.read_manifest(build("fp16", compute_capabilities=["8.9"]))["details"]
    assert targeted["runs_on"] == ["8.9"]


def test_a_plan_of_tensorrt_itself_is_of_one_gpu(monkeypatch):
    def identity(provider, name, architecture):
        gpu = Hardware("cuda", name, architecture, 132, 80 << 30, "570.1")
        monkeypatch.setattr(tensorrt_builder, "describe", lambda device: gpu)
        return tensorrt_builder.machine_facts(provider)

    monkeypatch.setattr(tensorrt_builder, "provider_version", lambda provider: "11.1")
    monkeypatch.setattr(tensorrt_builder, "resolve_device", lambda: "cuda")
    gpus = ("H100", "sm_90"), ("A100", "sm_80")
    assert identity("tensorrt", *gpus[0]) != identity("tensorrt", *gpus[1])
    assert identity("tensorrt_rtx", *gpus[0]) == identity("tensorrt_rtx", *gpus[1])


def test_an_onnx_file_is_built_in_its_own_and_in_another_precision(block, tmp_path):
    file = tmp_path / "block.onnx"
    onnx_export.save(onnx_export.export(block, (torch.randn(8, 256),)), file)
    sizes = [inspect(build_onnx(file, p, quiet=True)).sizes["module.plan"] for p in ("", "fp16", "int8")]
    assert sizes == sorted(sizes, reverse=True)


def test_the_export_says_nothing(block, capfd, recwarn):
    onnx_export.export(block, (torch.randn(8, 256),))
    build_module(block, (torch.randn(8, 256),), quiet=True)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


# Quantized graphs compute what they should.


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("int8", 0.02), ("int4", 0.15), ("fp8", 0.08)])
def test_the_graph_computes_the_module(block, precision, tolerance):
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    model = onnx_export.export(block, (x,))  # fp32, so that only the quantization differs
    if precision != "fp32":
        largest = onnx_quantize.calibrate(model, {"x": x.numpy()})
        assert onnx_quantize.quantize(model, precision, largest) == ["linear.weight"]
    got = ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]
    expected = block(x).detach()
    assert (torch.from_numpy(got) - expected).norm() / expected.norm() < tolerance


def test_int8_rounds_to_the_nearest_of_255_values(block):
    model = onnx_export.export(block, (torch.randn(8, 256),))
    onnx_quantize.quantize(model, "int8")
    import onnx

    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    wide = tensors["linear.weight_int8"] * tensors["linear.weight_int8_scale"][:, None]
    step = tensors["linear.weight_int8_scale"][:, None]
    assert ((wide - block.linear.weight).abs() <= step * 0.5001).all()
    assert math.isclose(tensors["linear.weight_int8"].abs().max(), 127)


def test_int4_needs_whole_blocks(tmp_path):
    with pytest.raises(BuildError, match="multiple of 64"):
        build_module(nn.Linear(100, 8), (torch.randn(2, 100),), "int4", quiet=True)


# Refusals.


def test_without_a_driver_loading_is_refused_in_tensorrts_words(build, driverless):
    with pytest.raises(BackendUnavailable, match=f"{build('fp16').name}.*cudaError 35") as caught:
        load_plan(build("fp16"))
    assert "driver" in caught.value.cause and "aot" in caught.value.fix


def test_fp8_is_refused_for_a_target_without_it(build):
    with pytest.raises(BuildError, match="sm86.*fp8_e4m3") as caught:
        build("fp8", compute_capabilities=["8.6"])
    assert "8.9" in caught.value.fix
    assert build("fp8", compute_capabilities=["8.9"]).exists()


def test_a_target_that_the_provider_does_not_know(build):
    with pytest.raises(BuildError, match="9.0"):
        build("fp16", compute_capabilities=["9.0"])


@pytest.fixture
def copy(build, tmp_path, monkeypatch):
    """An engine of this test's own."""
    folder = build("fp16")
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    return shutil.copytree(folder, tmp_path / folder.name)


@pytest.mark.parametrize(("content", "words"), [(None, "Serialization"), (b"no plan at all" * 100, "magicTag")])
def test_what_is_no_plan_is_refused_in_tensorrts_words(copy, content, words):
    """Even where all hashes fit, as they would if the build itself had written it."""
    plan = copy / "module.plan"
    plan.write_bytes(content or plan.read_bytes()[:1000])
    manifest = store.read_manifest(copy)
    store.save_manifest(copy, {**manifest, "files": {**manifest["files"], "module.plan": store.entry_of(plan)}})
    with pytest.raises(EngineCorrupt, match=words):
        load_plan(copy)


def test_only_plans_that_the_manifest_lists_are_loaded(copy):
    (copy / "a.plan").write_bytes(b"not of this engine")
    with pytest.raises(EngineCorrupt, match=r"no build wrote 'a\.plan'"):
        load_plan(copy)
    assert tensorrt_builder.plans(store.read_manifest(copy)) == ["module.plan"]


def test_a_timing_cache_lies_in_the_engines_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    options = make_options({"provider": "tensorrt", "timing_cache": "kernels.cache"})
    assert tensorrt_builder.timing_cache(options) == str(tmp_path / "kernels.cache")
    assert tensorrt_builder.timing_cache(make_options({})) == ""
    (tmp_path / "kernels.cache").mkdir()
    with pytest.raises(RecipeError, match="a folder"):
        tensorrt_builder.timing_cache(options)


@pytest.mark.parametrize(
    "change",
    [
        {"module": None},
        {"module": nn.Linear},
        {"example_inputs": torch.zeros(8, 256)},  # whose rows would count as inputs
        {"example_inputs": None},
        {"precision": "fp64"},
        {"precision": None},
        {"name": 5},
        {"time_limit": 0},
        {"time_limit": "long"},
        {"time_limit": math.nan},
        {"mark_outputs": [1]},
        {"profiles": [{"x": [[1.0, 256], [8, 256], [64, 256]]}]},
        {"profiles": [{"x": [[True, 256], [8, 256], [64, 256]]}]},
        {"profiles": [{"x": [[1, 256], [8, 256], [2**40, 256]]}]},
        {"profiles": [{1: [[1, 256], [8, 256], [64, 256]]}]},
        {"compute_capabilities": [8.9]},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_in_our_words(block, change):
    arguments = {"module": block, "example_inputs": (torch.randn(8, 256),), "precision": "fp16", **change}
    with pytest.raises(CourseError) as refused:
        build_module(**arguments, quiet=True)
    assert refused.value.fix


def test_a_module_that_cannot_be_copied_is_refused_in_our_words():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(BuildError, match="cannot be copied"):
        build_module(Locked(), (torch.randn(2),), quiet=True)


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", "", "x" * 300])
def test_whatever_its_name_an_engine_lies_in_the_store(build, name):
    folder = build("fp16", name=name)
    assert folder.parent == engines_folder() and len(folder.name) < 100


def test_a_changed_plan_never_reaches_native_code(build, tmp_path, block):
    folder = build_module(block, (torch.randn(4, 256),), quiet=True)
    with (folder / "module.plan").open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    with pytest.raises(EngineCorrupt, match="module.plan"):
        load_plan(folder)


@pytest.mark.parametrize("content", [b"", b"hello world, not onnx", b"\x00" * 100])
def test_a_file_that_is_not_onnx(tmp_path, content):
    (tmp_path / "wrong.onnx").write_bytes(content)
    with pytest.raises(BuildError, match="not an ONNX file"):
        build_onnx(tmp_path / "wrong.onnx", quiet=True)
    (tmp_path / "pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BuildError, match="not an ONNX file") as refused:
        build_onnx(tmp_path / "pointer.onnx", quiet=True)
    assert "pointer" in refused.value.cause and "git lfs pull" in refused.value.fix
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # which lies beside it on the Hub
    with pytest.raises(BuildError, match="not an ONNX file"):
        build_onnx(tmp_path / "config.json", quiet=True)
    for path, words in (("/dev/zero", "a device"), (tmp_path, "Is a directory")):  # memory does not hold the first
        with pytest.raises(BuildError, match=words):
            build_onnx(path, quiet=True)


@pytest.mark.parametrize("state", ["missing", "cut", "a link, as in the Hub's cache"])
def test_weights_beside_an_onnx_file_that_cannot_be_read_are_told(tmp_path, state):
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in "xy"]
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([product], "g", ends[:1], ends[1:], [weight])
    beside = {"save_as_external_data": True, "location": "weights", "size_threshold": 0}
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx", **beside)
    onnx_export.read(tmp_path / "model.onnx")
    data = tmp_path / "weights"
    if state == "cut":
        data.write_bytes(data.read_bytes()[:100])
    else:
        data.rename(tmp_path / "blob")
        if state != "missing":
            data.symlink_to("blob")
    with pytest.raises(BuildError, match="weights of 'model.onnx'.*\n.*beside it"):
        build_onnx(tmp_path / "model.onnx", quiet=True)
    assert onnx_export.read(tmp_path / "model.onnx", weights=False).graph.node


def test_a_module_without_data_is_refused_in_our_words():
    with pytest.raises(BuildError, match="cannot compute with these inputs"):
        build_module(nn.Linear(4, 4, device="meta"), (torch.ones(1, 4),), quiet=True)


class FFT(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x).abs()


class Checked(nn.Module):
    def forward(self, x):
        assert x.shape[1] == 768, "width"
        return x


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        (nn.Linear(256, 64), (8, 128), "cannot be multiplied"),
        (nn.Conv2d(3, 8, 3), (1, 1, 28, 28), "to have 3 channels"),
        (nn.Embedding(9, 8), (2, 3), "Long, Int"),
        (nn.Bilinear(4, 4, 4), (2, 4), "missing 1 required"),
        (Checked(), (2, 16), "AssertionError: width"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_inputs_that_a_module_cannot_take_are_told_as_that(module, shape, words, capfd):
    with pytest.raises(BuildError, match="cannot compute with these inputs") as refused:
        build_module(module, (torch.ones(shape),), "fp16", quiet=True)
    assert words in refused.value.what and "module(*inputs)" in refused.value.fix
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("op", "weight", "words"),
    [
        ("Mul", np.ones(64, "f2"), "must have same input types"),
        ("MatMul", np.ones((32, 5), "f4"), "must match"),
        ("Add", np.ones(7, "f4"), "conformable"),
        ("Reshape", np.array([7, 7]), "changes volume"),
    ],
)
def test_a_wrong_graph_is_told_in_tensorrts_first_words(op, weight, words, tmp_path):
    """Without a driver, another complaint follows: that CUDA is not there."""
    node = onnx.helper.make_node(op, ["x", "w"], ["y"], name="wrong")
    with pytest.raises(BuildError, match=words) as refused:
        build_onnx(onnx_file(tmp_path / "m.onnx", [node], [("w", weight)]), quiet=True)
    assert f"wrong ({op})" in refused.value.cause


def test_weights_that_an_old_file_lists_as_inputs_too_are_constants(tmp_path):
    node, weight = onnx.helper.make_node("MatMul", ["x", "w"], ["y"]), np.ones((64, 32), "f4")
    file = onnx_file(tmp_path / "m.onnx", [node], [("w", weight)])
    model = onnx.load(file)
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [64, 32]))
    onnx.save(model, file)
    folder = build_onnx(file, "int8", quiet=True)
    assert [value["name"] for value in store.read_manifest(folder)["details"]["inputs"]] == ["x"]


def onnx_file(path, nodes, constants):
    """An ONNX file with an fp32 input x [8, 64] and the output y."""
    value = onnx.helper.make_tensor_value_info
    x, y = value("x", onnx.TensorProto.FLOAT, [8, 64]), value("y", onnx.TensorProto.FLOAT, None)
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants]
    graph = onnx.helper.make_graph(nodes, "main", [x], [y], tensors)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_an_onnx_operation_that_tensorrt_lacks_is_no_plugin():
    with pytest.raises(BuildError, match="DFT") as refused:
        build_module(FFT(), (torch.randn(2, 16),), quiet=True)
    assert "no such operation" in refused.value.cause and "test_tensorrt.py" in refused.value.cause


def test_an_operator_that_tensorrt_lacks():
    class Determinant(nn.Module):
        def forward(self, x):
            return torch.linalg.det(x + 1)

    line = Determinant.forward.__code__.co_firstlineno + 1
    with pytest.raises(BuildError, match="operator: Det") as caught:
        build_module(Determinant(), (torch.randn(4, 4),), quiet=True)
    assert f"test_tensorrt.py:{line}" in caught.value.cause


def test_an_operator_that_onnx_lacks():
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(BuildError, match="bessel_j0"):
        build_module(Bessel(), (torch.randn(4, 4),), quiet=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timing_cache": "cache"}, BuildError),
        ({"hardware_compatibility": "ampere_plus"}, BuildError),
        ({"optimization_level": 9}, RecipeError),
        ({"compute_capabilities": ["sm86"]}, RecipeError),
        ({"mark_outputs": "some"}, RecipeError),
        ({"profiles": [{"x": [[8, 256], [1, 256], [64, 256]]}]}, RecipeError),
        ({"profiles": [{"y": [[1, 256], [8, 256], [64, 256]]}]}, BuildError),
        ({"provider": "onnxruntime"}, RecipeError),
        ({"precision_flags": ["FP16"]}, BuildError),
        ({"provider": "tensorrt", "precision_flags": ["FP64"]}, RecipeError),
        ({"no_such_option": 1}, RecipeError),
    ],
)
def test_options_are_refused_with_a_way_out(build, options, error):
    with pytest.raises(error) as caught:
        build("fp16", **options)
    assert caught.value.fix


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_refit_needs_a_driver(build, option, driverless):
    with pytest.raises(BuildError, match="CUDA_SUCCESS") as caught:
        build("fp16", **{option: True})
    assert "driver" in caught.value.cause


def test_weight_streaming_is_accepted(build):
    assert len(inspect(build("fp16", weight_streaming=True)).kernels) == 2


def test_a_missing_provider_is_one_clear_line(build):
    with pytest.raises(BackendUnavailable, match="'tensorrt' is not installed") as refused:
        build("fp16", provider="tensorrt")
    assert "pip install tensorrt==" in refused.value.fix  # and not the other package, which is here


# Recorded engines, for machines without TensorRT.


@pytest.mark.parametrize("kind", BLOCK)
def test_a_record_shows_what_a_build_shows_here(build, kind):
    options = dict(BLOCK[kind])
    record, live = inspect(recorded("block", kind, quiet=True)), inspect(build(options.pop("precision"), **options))
    assert record.backend == "tensorrt, recorded"
    assert (len(record.operations), len(record.kernels)) == (len(live.operations), len(live.kernels))
    assert record.sizes["module.plan"] == pytest.approx(live.sizes["module.plan"], rel=0.02)


def test_a_record_says_that_it_is_one_and_is_not_loaded(capsys):
    folder = recorded("block", "fp16")
    (line,) = capsys.readouterr().out.splitlines()
    assert "tensorrt_rtx 1.7.1" in line and "without a GPU, 20" in line and "not built on this machine" in line
    with pytest.raises(BackendUnavailable, match="record"):
        load_plan(folder)
    with pytest.raises(EngineNotFound, match="no-such") as caught:
        recorded("block", "no-such")
    assert "block-int8" in caught.value.fix


def test_without_the_package_one_line_says_so(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert "not installed" in tensorrt_builder.missing()
    with monkeypatch.context() as on_macos:
        on_macos.setattr("sys.platform", "darwin")
        words = runpy.run_path(tensorrt.__file__)
    monkeypatch.setattr(tensorrt_builder, "WHY_MISSING", words["WHY_MISSING"])
    assert "macOS" in tensorrt_builder.missing() and "\n" not in tensorrt_builder.missing()


def test_looking_for_a_driver_starts_no_program(monkeypatch):
    """A compiler that is killed with the worker leaves its files in the temporary folder."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started"))
    assert api._has_driver() in (True, False)


def of_products(names, constant=False):
    """Two products and what is between them, with names of nodes or without; the weights as Constant nodes or not."""
    weights = [
        onnx.numpy_helper.from_array(np.random.default_rng(at).standard_normal((64, 64), np.float32), f"w{at}")
        for at in range(2)
    ]
    make = onnx.helper.make_node
    nodes = [make("Constant", [], [w.name], value=w) for w in weights] if constant else []
    nodes += [make("MatMul", ["x", "w0"], ["a"]), make("Relu", ["a"], ["r"]), make("MatMul", ["r", "w1"], ["y"])]
    for node, name in zip(nodes, names, strict=False):
        node.name = name
    ends = [onnx.helper.make_tensor_value_info(name, 1, [8, 64]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [] if constant else weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(("names", "constant"), [((), False), (("same",) * 3, False), ((), True)])
def test_nodes_without_names_of_their_own_and_constants_are_quantized(names, constant, tmp_path):
    onnx.save(of_products(names, constant), tmp_path / "g.onnx")
    report = inspect(build_onnx(tmp_path / "g.onnx", "int8", quiet=True))
    read = onnx_export.read(tmp_path / "g.onnx")
    assert len({node.name for node in read.graph.node}) == len(read.graph.node)
    assert len(onnx_quantize.quantize(read, "int8")) == 2 and report.kernels


def test_a_graph_of_which_nothing_can_be_narrow_is_refused_and_not_called_int8():
    """It had been built in fp16, under the name of an engine in int8."""
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    for precision in ("int8", "int4", "fp8"):
        with pytest.raises(BuildError, match=f"Nothing of this graph becomes {precision}"):
            build_module(convolution, (torch.randn(1, 3, 16, 16),), precision, quiet=True)


class OfADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, batch):
        return self.linear(batch["x"])


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_inputs_in_a_dictionary_have_the_precision_of_the_graph(precision):
    build_module(OfADict(), ({"x": torch.randn(2, 64)},), precision, quiet=True)


class OfAnImage(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 8, 7, stride=2), nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.convolution(x).relu().mean((2, 3)))


@pytest.mark.parametrize("precision", ["", "fp16", "fp32", "bf16"])
def test_an_onnx_file_in_fp16_gets_the_precision_that_is_asked_for(precision, tmp_path):
    """Or keeps its own, and is called by it."""
    matrix = np.ones((64, 32), "f2")
    weight = onnx.numpy_helper.from_array(matrix)
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["narrow"], to=onnx.TensorProto.FLOAT16),
        onnx.helper.make_node("Constant", [], ["w"], value=weight),
        onnx.helper.make_node("MatMul", ["narrow", "w"], ["p"]),
        onnx.helper.make_node("Cast", ["p"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    folder = build_onnx(onnx_file(tmp_path / "m.onnx", nodes, []), precision, quiet=True)
    asked = precision or "fp16"
    types = {kernel.dtype for kernel in inspect(folder).kernels if "float" in kernel.dtype}
    assert store.read_manifest(folder)["recipe"]["precision"] == asked
    assert {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}[asked] in types
    assert precision not in ("fp32", "bf16") or "float16" not in types


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_branches_of_an_if_and_lone_numbers_get_the_precision_too(precision, tmp_path):
    """Types that are mixed would be refused."""
    value = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)
    branch = [
        onnx.helper.make_graph(
            [onnx.helper.make_node("Mul", ["x", f"w{i}"], ["b"])],
            f"branch{i}",
            [],
            [value],
            [onnx.numpy_helper.from_array(np.full(64, 2.0, "f4"), f"w{i}")],
        )
        for i in range(2)
    ]
    nodes = [
        onnx.helper.make_node("Constant", [], ["half"], value_float=0.5),
        onnx.helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        onnx.helper.make_node("Greater", ["most", "half"], ["large"]),
        onnx.helper.make_node("If", ["large"], ["y"], then_branch=branch[0], else_branch=branch[1]),
    ]
    assert build_onnx(onnx_file(tmp_path / "m.onnx", nodes, []), precision, quiet=True)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, left, right):
        return self.a(left) + self.b(right)


@pytest.mark.parametrize("module", [Two(), nn.MultiheadAttention(16, 2, batch_first=True)], ids=["own", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_tensor_for_several_inputs_leaves_every_input_read(module, precision):
    x = torch.randn(2, 4, 16)
    inputs = (x, x) if isinstance(module, Two) else (x, x, x)
    graph = onnx_export.export(module, inputs, precision=precision).graph
    assert len(graph.input) == len(inputs)
    assert all(any(value.name in node.input for node in graph.node) for value in graph.input)


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(512, 64), nn.Linear(64, 512, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_weights_that_are_only_rearranged_become_narrow_too(precision):
    """An attention's three projections lie in one matrix; a tied head reads the embedding's."""
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(64, 2, batch_first=True, bias=False), torch.randn(2, 8, 64)
    graphs = [
        onnx_export.export(attention, (x, x, x), precision=precision),
        onnx_export.export(TiedHead(), (torch.tensor([[1, 2]]),), precision=precision),
    ]
    for model, products in zip(graphs, (4, 1), strict=True):
        feeds = onnx_quantize.example_feeds(model)
        expected = ReferenceEvaluator(model).run(None, feeds)[0]
        onnx_quantize.fold(model.graph)
        largest = onnx_quantize.calibrate(model, feeds) if precision == "fp8" else None
        assert len(onnx_quantize.quantize(model, precision, largest)) == products
        if precision == "int8":
            found = ReferenceEvaluator(model).run(None, feeds)[0]
            assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_an_axis_is_open_where_profiles_differ_whatever_their_order():
    module, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.randn(8, 64)
    many, one = {"input": ((1, 64), (8, 64), (32, 64))}, {"input": ((1, 64),) * 3}
    for profiles in ([many, one], [one, many], [one, {"input": ((8, 64),) * 3}]):
        folder = build_module(module, (x,), "fp16", quiet=True, profiles=profiles)
        assert store.read_manifest(folder)["details"]["inputs"][0]["shape"] == ["?", 64]
    with pytest.raises(BuildError, match="the example has length 1"):
        build_module(module, (x[:1],), "fp16", quiet=True, profiles=[many])


class Of(nn.Module):
    """forward is a function of two layers, a table of 8 rows and one of 64, an input, and perhaps another."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.linear = function, nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.register_buffer("eight", torch.randn(8, 32))
        self.register_buffer("many", torch.randn(64, 32))

    def forward(self, x, y=None):
        return self.function(self, x) if y is None else self.function(self, x) + y


def recurrent(m, x):
    state = x[0]
    for row in range(1, x.shape[0]):
        state = torch.tanh(m.linear(x[row]) + state)
    return state


def causal(m, x):
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    return (m.linear(x) @ x.transpose(1, 2) + mask).softmax(-1) @ x


def heads(m, x):
    return m.linear(x).view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)


FIXED = {
    "loop": recurrent,
    "number": lambda m, x: m.linear(x).sum(0) / int(x.shape[0]),
    "written size": lambda m, x: m.linear(x).view(8, 4, 8),
    "table": lambda m, x: m.linear(x) + m.eight,
    "other input": lambda m, x: m.linear(x),
}
BRANCH = Of(lambda m, x: m.linear(x) * 2 if x.shape[0] > 4 else m.linear(x))
TABLE = Of(lambda m, x: m.linear(x) + m.many[: x.shape[0]])


@pytest.mark.parametrize("kind", FIXED)
def test_an_axis_that_the_module_fixes_is_refused_in_a_profile(kind):
    """torch.export says nothing, and the engine would promise a range and compute for the example's length."""
    inputs = [torch.randn(8, 32) for _ in range(2 if kind == "other input" else 1)]
    opened = {"x": ((2, 32), (8, 32), (64, 32))}
    with pytest.raises(BuildError, match=r"opens axis 0 of x, .* computes for length 8 alone") as refused:
        build_module(Of(FIXED[kind]), inputs, quiet=True, profiles=[opened])
    assert "a loop, int(), a size" in refused.value.cause and "another input" in refused.value.cause
    assert "x.shape[0]" in refused.value.fix and "each length" in refused.value.fix
    if kind == "other input":  # which the fix tells to open too
        folder = build_module(Of(FIXED[kind]), inputs, quiet=True, profiles=[{**opened, "y": opened["x"]}])
        assert [value["shape"] for value in store.read_manifest(folder)["details"]["inputs"]] == [["?", 32]] * 2


@pytest.mark.parametrize(
    ("module", "serves", "within", "beyond"),
    [
        (BRANCH, "5 or more", [(5, 8, 9), (8, 9, 500)], [(4, 8, 9), (1, 2, 500)]),
        (TABLE, "1 to 64", [(1, 8, 64)], [(1, 8, 65), (65, 66, 70)]),
    ],
    ids=["branch", "table"],
)
def test_a_profile_beyond_the_lengths_that_the_module_serves_is_refused(module, serves, within, beyond):
    def build(*lengths):
        profiles = [{"x": [(length, 32) for length in some]} for some in lengths]
        return build_module(module, (torch.randn(8, 32),), quiet=True, profiles=profiles)

    for lengths in beyond:
        with pytest.raises(BuildError, match=f"lengths {lengths[0]} to {lengths[-1]} .* for {serves} alone") as refused:
            build(lengths)
        assert f"within {serves}" in refused.value.fix
    with pytest.raises(BuildError, match=f"for {serves} alone"):  # one profile of several
        build(within[0], beyond[0])
    assert store.read_manifest(build(*within))["details"]["inputs"][0]["shape"] == ["?", 32]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda m, x: m.attention(x, x, x, need_weights=False)[0], [(1, 1, 32), (2, 8, 32), (4, 64, 32)]),
        (heads, [(1, 1, 32), (2, 8, 32), (4, 64, 32)]),
        (causal, [(1, 1, 32), (2, 8, 32), (4, 64, 32)]),
        (lambda m, x: x.flatten(2).transpose(1, 2) + m.eight, [(1, 32, 2, 4), (2, 32, 2, 4), (4, 32, 2, 4)]),  # patches
        (lambda m, x: x.sum(1) / x.shape[1], [(2, 1, 32), (2, 8, 32), (2, 64, 32)]),
        (lambda m, x: x + m.many[: x.shape[1]], [(1, 1, 32), (2, 8, 32), (4, 64, 32)]),
        (lambda m, x: x[:, 1:] - x[:, :-1], [(1, 2, 32), (2, 8, 32), (4, 64, 32)]),
    ],
    ids=["attention", "heads", "causal", "patches", "mean", "positions", "differences"],
)
def test_a_module_that_serves_the_whole_profile_is_built_and_its_graph_computes_each_length(function, shapes):
    module = Of(function).eval()
    build_module(module, (torch.randn(shapes[1]),), quiet=True, optimization_level=0, profiles=[{"x": shapes}])
    axes = [axis for axis, lengths in enumerate(zip(*shapes, strict=True)) if len(set(lengths)) > 1]
    graph = onnx_export.export(module, (torch.randn(shapes[1]),), varying={"x": axes}, asked={"x": shapes})
    for shape in shapes:
        x = torch.randn(shape)
        (found,) = ReferenceEvaluator(graph).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, module(x).detach().numpy(), atol=1e-4)


def test_open_axes_are_calibrated_with_the_profiles_likely_shape(tmp_path):
    file, image = tmp_path / "net.onnx", torch.randn(1, 3, 64, 64)
    axes = {"x": {0: "b", 2: "h", 3: "w"}}
    torch.onnx.export(OfAnImage().eval(), (image,), file, dynamo=True, input_names=["x"], dynamic_shapes=axes)
    profiles = [{"x": ((1, 3, 64, 64), (1, 3, 64, 64), (4, 3, 128, 128))}]
    build_onnx(file, "fp8", quiet=True, profiles=profiles)
    small = [{"x": ((1, 3, 4, 4), (1, 3, 4, 4), (4, 3, 128, 128))}]
    with pytest.raises(BuildError, match="cannot be calibrated for fp8"):
        build_onnx(file, "fp8", quiet=True, profiles=small)
