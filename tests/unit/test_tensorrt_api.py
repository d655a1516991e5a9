"""What TensorRT's own interface says and takes, in any of its versions, without a build: messages that become errors,
flags for the builder, and the inspector's layer reports."""

import importlib.metadata
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from onnx import TensorProto, helper

from helpers.backends.tensorrt import api as tensorrt_api
from helpers.backends.tensorrt import builder, layers, onnx_quantize
from helpers.errors import BackendUnavailable, BuildError, EngineCorrupt, EngineMismatch
from helpers.machine.worker import Worker
from helpers.paths import PROJECT
from helpers.recipe import tensorrt as tensorrt_options

# Messages.


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (
            "IRuntime::deserializeCudaEngine: Error Code 1: Cuda Runtime (In ScopedCudaStream at x (cudaError 35: CUDA "
            "driver version is insufficient for CUDA runtime version))",
            BackendUnavailable,
        ),
        (
            "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on this GPU, which "
            "has compute capability 9.0. Supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0.)",
            EngineMismatch,
        ),
        ("Error Code 1: Serialization (Serialization assertion header.magicTag == ... failed.", EngineCorrupt),
        ("something new", BuildError),
    ],
)
def test_tensorrts_messages_become_errors_with_its_words(words, kind):
    error = tensorrt_api.explain(["another message", words], "It failed.")
    assert type(error) is kind and words in str(error) and error.fix


# Weak typing, which only TensorRT 10 has. Not run by us: a stand-in with the names of its interface, from NVIDIA's
# documentation of tensorrt 10.x (Builder, BuilderFlag) and of the APIs that 11 removed.


def ten(version="10.14.1.48"):
    flags = SimpleNamespace(**{name: name for name in ("FP16", "BF16", "INT8", "FP8", "INT4", "REFIT")})
    typed = SimpleNamespace(STRONGLY_TYPED=1)
    verbosity = SimpleNamespace(DETAILED="detailed")
    return SimpleNamespace(
        __version__=version, BuilderFlag=flags, NetworkDefinitionCreationFlag=typed, ProfilingVerbosity=verbosity
    )


class StandInConfig:
    def __init__(self):
        self.flags = []

    def set_flag(self, flag):
        self.flags.append(flag)

    def add_optimization_profile(self, profile):
        pass


@pytest.mark.parametrize(("provider", "lock"), [("tensorrt_rtx", "course.txt"), ("tensorrt", "trtllm.txt")])
def test_the_package_that_an_error_names_is_the_one_that_is_missing_as_it_is_pinned(provider, lock, monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.delenv("COURSE_TENSORRT_PYTHON", raising=False)
    monkeypatch.setitem(sys.modules, provider, None)  # so that it cannot be imported
    pins = (PROJECT / "constraints" / lock).read_text(encoding="utf-8").splitlines()
    for ask in (builder.provider_version, tensorrt_api.load_provider):
        with pytest.raises(BackendUnavailable) as refused:
            ask(provider)
        (pin,) = re.findall(r"pip install (\S+==\S+?)\.(?:\s|$)", refused.value.fix)
        assert pin.partition("==")[0] == provider.replace("_", "-")
        assert pin in [line.partition(" ;")[0] for line in pins]


def test_tensorrt_10_is_strongly_typed_unless_precisions_are_flagged():
    assert tensorrt_api._typing(ten(), {}) == 1 << 1
    assert tensorrt_api._typing(ten(), {"precision_flags": ["FP16"]}) == 0
    assert tensorrt_api._typing(ten("11.0.0"), {}) == 0
    for version in ("11.0.0", "1.7.1.116"):
        with pytest.raises(BuildError, match="strongly typed"):
            tensorrt_api._typing(ten(version), {"precision_flags": ["FP16"]})


def test_flagged_precisions_reach_the_builders_configuration():
    config = StandInConfig()
    builder = SimpleNamespace(create_builder_config=lambda: config, create_optimization_profile=lambda: None)
    network = SimpleNamespace(num_inputs=0)
    log = SimpleNamespace(errors=list)
    options = tensorrt_options.make_options(
        {"provider": "tensorrt", "precision_flags": ["FP16", "INT8"], "refit": True}
    )
    assert tensorrt_api._configure(ten(), builder, network, vars(options), log) is config
    assert config.flags == ["REFIT", "FP16", "INT8"]


# The layer report's two sources.


def test_both_spellings_of_the_inspectors_json():
    common = {"Name": "__myl_FcAdd_myl0_1", "LayerType": "gemm", "TacticName": "t"}
    metadata = "[ONNX Layer: a]\x1f[ONNX Layer: b]"
    ten = {"Name": "x", "Dimensions": [8, 256], "Format/Datatype": "Row major linear FP16 format"}
    eleven = {"Name": "x", "Dimensions": [8, 256], "Datatype": "Half", "Format": "Row major linear format"}
    found = [
        layers.parse_inspector(
            json.dumps({"Layers": [{**common, "Inputs": [t], "Outputs": [t], "Metadata": metadata}]})
        )
        for t in (ten, eleven)
    ]
    for (layer,) in found:
        assert (layer.inputs[0].dtype, layer.inputs[0].shape) == ("float16", (8, 256))
        assert layer.nodes == ("a", "b") and "linear" in layer.inputs[0].format


def test_names_only_and_nonsense():
    assert layers.parse_inspector('{"Layers": ["a", "b"]}')[1].name == "b"
    for text in ("", "[]", "no json"):
        with pytest.raises(BuildError, match="cannot be read"):
            layers.parse_inspector(text)
    with pytest.raises(BuildError, match="cannot be read"):
        layers.parse_message("Layers:\n")


def test_the_names_spell_out_the_steps():
    assert layers.steps("__myl_FcAddErf_myl0_1") == ["Fc", "Add", "Erf"]
    assert layers.steps("node_linear_2+node_linear_myl0_1") == ["node_linear_2", "node_linear"]
    assert layers.steps("_gemv_mha_v1_myl0_3") == ["gemv_mha_v1"]


def test_the_builders_peak_of_memory_is_its_own():
    """Of a process that was started by a large one, the system counts that one's memory too, as it was before."""
    held = bytearray(b"x") * 400_000_000
    with Worker("helpers.backends.tensorrt.api") as worker:
        assert 0 < worker.call("memory") < len(held) / 2


def test_calibration_feeds_tensors_and_no_number_that_the_export_has_fixed():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in "xy")
    model = helper.make_model(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y]))
    feeds = onnx_quantize.example_feeds(model, (3, [torch.full((2, 8), 7.0)]))
    assert feeds.keys() == {"x"} and (feeds["x"] == 7).all()
