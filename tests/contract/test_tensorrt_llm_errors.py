"""Contract tests: what TensorRT-LLM 1.2.1 and the libraries under it say becomes an error of ours, with cause and fix.

The texts are those that users reported in the issues named beside them, or that stand in the source. The stand-in
(contract/README.md) raises each at its place; our side meets it in a real worker process. Not run with TensorRT-LLM.
"""

import dataclasses

import pytest

from helpers import BuildRecipe, SamplingParams, build, load, store
from helpers.backends.tensorrt_llm import backend as tensorrt_llm
from helpers.backends.tensorrt_llm.errors import KNOWN, explain
from helpers.errors import (
    BackendUnavailable,
    BuildError,
    CourseError,
    EngineCorrupt,
    EngineMismatch,
    EngineNotFound,
    InputError,
    LimitError,
    ModelError,
    OutOfMemory,
    WorkerError,
)
from helpers.messages import matches

KV_CACHE = (
    "Executor creation failed due to insufficient GPU memory. The following component could not be created: KV cache\n"
    "| component | free memory before |"
)
VERSION_TAG = (
    "Error Code 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
    "Version tag does not match. Note: Current Version: 228, Serialized Engine Version: 237)"
)
BUILDER_LOG = (
    "[E] [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (Requested amount of GPU memory "
    "(1073741824 bytes) could not be allocated. There may not be enough free memory for allocation to succeed.)"
)
LOG_POINTER = "Engine building failed, please check the error log."

# (where it is raised, its type, its text, our error, a word of the way out; the issue or file it was read in)
REPORTED = [
    ("import", "ImportError", "libnvinfer.so.10: cannot open shared object file", BackendUnavailable, "env"),  # 1774
    ("import", "ImportError", "libmpi.so.40: cannot open shared object file", BackendUnavailable, "openmpi"),  # 167
    ("import", "ImportError", "libpython3.10.so.1.0: cannot open shared object file", BackendUnavailable, "Linux"),
    ("import", "ImportError", "libcuda.so.1: cannot open shared object file", BackendUnavailable, "--gpus all"),
    ("import", "ImportError", "bindings.so: undefined symbol: _ZN3c10...", BackendUnavailable, "env create"),  # 1008
    ("import", "ModuleNotFoundError", "No module named 'tensorrt_llm'", BackendUnavailable, "env create"),
    ("import", "ImportError", "No module named 'tensorrt_llm.bindings.BuildInfo'", BackendUnavailable, "folder"),
    ("import", "RuntimeError", "CUDA runtime error in cudaGetDevice(&device): forward compatibility was attempted on "
     "non supported HW", BackendUnavailable, "driver"),  # 1806
    ("build", "RuntimeError", "[TRT] [E] 3: getPluginCreator could not find plugin: Gemmtensorrt_llm version: 1",
     BackendUnavailable, "Import tensorrt_llm"),  # 107
    ("build", "RuntimeError", "CUDA error: no kernel image is available for execution on the device",
     BackendUnavailable, "8.0"),  # 159
    ("build", "RuntimeError", "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any "
     "implementation for node {ForeignNode[a...b]}.)", BuildError, "smaller limits"),  # 54
    ("build", "ValueError", "AutoConfig cannot load the huggingface config.", ModelError, "aot"),  # 2302
    ("build", "ValueError", "Config name is missing. Please pick one among the available configs: ['1.0.0', '3.0.0']",
     BuildError, "train.jsonl"),  # 5247
    ("build", "NotImplementedError", "Unsupported dataset name or local repo directory: x.", BuildError, "train.jsonl"),
    ("load", "RuntimeError", "[json.exception.out_of_range.403] key 'use_context_fmha_for_generation' not found",
     EngineMismatch, "Build"),  # 1803
    ("generate", "RuntimeError", "Cannot process new request: Prompt length (5056) exceeds maximum sequence length "
     "(2048)", LimitError, "max_input_len"),  # tensorrtllm_backend 141
    ("build", "TypeError", "pybind11::init(): factory function returned nullptr", BackendUnavailable, "env create"),
    ("build", "RuntimeError", "Networks with FP8 precision require hardware with FP8 support.", BuildError, "int"),
    ("build", "AssertionError", "Fp8 FMHA cannot be enabled on pre-Hopper Arch", BuildError, "use_fp8"),  # 1864
    ("build", "RuntimeError", "INT8/INT4 quantization is not supported on SM>=100.", BuildError, "fp8"),
    ("build", "RuntimeError", "Pre SM 80 GPUs do not support bfloat16", BuildError, "fp16"),
    ("build", "RuntimeError", "Assertion failed: Unsupported architecture (fmhaRunner.cpp:70)", BuildError, "aot"),
    ("build", "AssertionError", "Unsupported model architecture: GptOssForCausalLM", ModelError, "pytorch"),  # 1026
    ("build", "OSError", "401 Client Error. Cannot access gated repo for url ...", ModelError, "HF_TOKEN"),
    ("build", "ValueError", "LLM got invalid argument: fast_builds", BackendUnavailable, "1.2.1"),
    ("build", "RuntimeError", "Requested amount of GPU memory (9 bytes) could not be allocated. There may not be enough"
     " free memory for allocation to succeed.", OutOfMemory, "max_batch_size"),  # 346
    ("build", "RuntimeError", "Error Code 2: OutOfMemory (no further information)", OutOfMemory, "max_num_tokens"),
    ("build", "RuntimeError", "There are not enough slots available in the system", WorkerError, "SINGLE_PROCESS"),
    ("build", "RuntimeError", "All nodes which are allocated for this job are already filled.", WorkerError, "SINGLE"),
    ("build", "RuntimeError", "Only 8 GPUs are available, but 16 are required.", BackendUnavailable, "=1"),  # 2594
    ("build", "AssertionError", LOG_POINTER, BuildError, "max_seq_len"),
    ("load", "RuntimeError", "The engine plan file is generated on an incompatible device, expecting compute 9.0 got "
     "compute 8.9, please rebuild.", EngineMismatch, "Build"),  # 3031
    ("load", "RuntimeError", VERSION_TAG, EngineMismatch, "Build"),  # tensorrtllm_backend 531
    ("load", "RuntimeError", "The engine plan file is not compatible with this version of TensorRT, expecting library "
     "version 9.2.0.5 got 9.3.0.1, please rebuild.", EngineMismatch, "Build"),  # triton_cli 59
    ("load", "RuntimeError", "Engine world size (2) != Runtime world size (1)", EngineMismatch, "Build"),
    ("load", "ValueError", "Failed to infer model format because no config.json exists in x", EngineNotFound, "Build"),
    ("load", "RuntimeError", "Assertion failed: Failed to deserialize cuda engine.", EngineCorrupt, "Build"),  # 1838
    ("load", "RuntimeError", KV_CACHE, OutOfMemory, "free_gpu_memory_fraction"),  # 5872
    ("load", "ValueError", "The following arguments are specific to TensorRT backend and cannot be used with PyTorch "
     "backend: ['build_config']", BackendUnavailable, "_tensorrt_engine"),  # 8223
    ("generate", "RuntimeError", "CUDA out of memory. Tried to allocate 2.00 GiB", OutOfMemory, "prompts"),  # 8642
    ("generate", "ValueError", "The sum of prompt length (9351.0), query length (0) should not exceed max_num_tokens "
     "(8192)", LimitError, "max_num_tokens"),  # 9277
    ("generate", "ValueError", "The sum of prompt length (60.0) and query length (0) max_tokens (9) should not exceed "
     "max_seq_len (64)", LimitError, "max_seq_len"),  # llmapi/llm.py
    ("generate", "RuntimeError", "satisfyProfile Runtime dimension does not satisfy any optimization profile.",
     LimitError, "limits"),  # 214
    ("generate", "ValueError", "sampling_params.n (9) cannot exceed max_batch_size (4) when use_beam_search is False",
     LimitError, "fewer"),
    ("generate", "ValueError", "tokenizer is required to reset end_id if it is None, or you can explicitly specify the "
     "end_id for sampling_params", InputError, "end_id"),
    ("generate", "RuntimeError", "LLM is shutting down", InputError, "Load"),
    ("walk", "AssertionError", "assert self.engine is not None", EngineCorrupt, "Build"),  # runtime/generation.py
    ("walk", "RuntimeError", "Cannot instantiate Generator for engine built for 2 ranks, while currently running on 1 "
     "ranks.", EngineMismatch, "Build"),
    ("walk", "RuntimeError", "Input batch size (9) exceeds the engine or specified limit (4)", LimitError, "less"),
]  # fmt: skip
# The same troubles in other words, which are explained without a stand-in that raises them.
OTHER_WORDS = [
    "No module named 'tensorrt_llm._tensorrt_engine'",  # the removal guide; the stand-in says it (test_tensorrt_llm.py)
    "x.so: undefined symbol: _ZNK3c105Error4whatEv",  # 2380
    "x.so: undefined symbol: _ZN2at4_ops5zeros4callE",
    "x.so: undefined symbol: _ZN5torch8autogradE",
    "libs/libtensorrt_llm.so: undefined symbol: ncclX",
    "The `bindings` module does not exist. Please check the package integrity.",  # 2599
    "CUDA driver version is insufficient for CUDA runtime version",
    "The NVIDIA driver on your system is too old (found version 12020).",  # torch/cuda/__init__.py
    "version 510.85.02 was detected and compatibility mode is UNAVAILABLE.",  # 23
    "Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry",  # 452
    'Assertion failed: creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
    "The checkpoint has model type `new` but Transformers does not recognize this architecture.",
    "Unsupported dataset name or local repo directory: x.",
    "CUDA error: out of memory",
    "[TensorRT-LLM][ERROR] cudaErrorMemoryAllocation",
    "cudaMallocAsync failed: out of memory",
    "the device is out of memory",
    "RuntimeError: Unsupported architecture (cpp/kernels/fmhaRunner.cpp:70)",
]


def recipe():
    return BuildRecipe(backend="tensorrt_llm", precision="bf16", max_batch_size=4, max_input_len=64, max_seq_len=256)


def provoke(at):
    """Do what meets the failure at its place."""
    if at in ("import", "build"):
        return build(recipe(), quiet=True)
    folder = store.list_engines()[0]
    if at == "walk":
        return tensorrt_llm.model_runner(recipe(), folder, [[5]])
    with load(folder) as engine:
        return engine.generate([5], SamplingParams(temperature=0, max_tokens=2))


@pytest.mark.parametrize(
    ("at", "kind", "text", "expected", "way_out"), REPORTED, ids=[f"{r[0]}-{r[2][:40]}" for r in REPORTED]
)
def test_a_reported_failure_is_explained(standin, at, kind, text, expected, way_out):
    if at not in ("import", "build"):
        build(recipe(), quiet=True)
    standin(FAIL={"at": at, "type": kind, "text": text})
    with pytest.raises(CourseError) as caught:
        provoke(at)
    error = caught.value
    assert type(error) is expected, error
    assert text.splitlines()[0][:60] in error.what  # its own words, too
    assert error.cause and way_out in error.fix
    if at in ("import", "build"):
        assert not store.list_engines()  # nothing half-built stays


def test_the_cause_in_the_log_counts_more_than_the_exception_that_points_to_it(standin):
    """Issue 346: the exception says "check the error log"; the reason is what native code printed."""
    standin(FAIL={"at": "build", "type": "AssertionError", "text": LOG_POINTER, "log": BUILDER_LOG})
    with pytest.raises(OutOfMemory, match="could not be allocated"):
        build(recipe(), quiet=True)


def test_a_warning_in_the_log_explains_nothing(standin):
    """Issue 436: a tactic that does not fit in memory is skipped, and the build goes on."""
    log = "[W] Tactic Device request: 66048MB Available: 32510MB. Device memory is insufficient to use tactic."
    standin(FAIL={"at": "build", "type": "ValueError", "text": "something new", "log": log})
    with pytest.raises(BuildError, match="something new") as caught:
        build(recipe(), quiet=True)
    assert "not among those" in caught.value.cause


def test_every_card_is_met_by_a_reported_text():
    """No card stands in the shadow of an earlier one, and none of its words is untested."""
    explained = {text: explain(text, "") for text in [*(report[2] for report in REPORTED), *OTHER_WORDS]}
    for card in KNOWN:
        assert card.cause and card.fix
        for words in card.words:
            one = dataclasses.replace(card, words=(words,))
            met = [error for text, error in explained.items() if list(matches(text, [one]))]
            assert any(error.cause == card.cause and type(error).__name__ == card.error for error in met), words
