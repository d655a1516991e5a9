"""The language model as TensorRT engines: graphs with transformers' tokens, plans that build, a host side that runs.

No GPU that TensorRT for RTX supports was at hand. So the engine's host side runs here against a stand-in for TensorRT's
execution context: the same calls, answered by ONNX Runtime, which reads and writes the same addresses.
"""

import ctypes
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from promises import NIGHTLY

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: it comes with the course on Linux and Windows")

from helpers import BuildRecipe, SamplingParams, inspect, load, store
from helpers import build as build_engine
from helpers.backends.tensorrt import backend, llama_onnx
from helpers.engine import build_module
from helpers.errors import BackendUnavailable, EngineMismatch, LimitError, RecipeError
from helpers.model.checkpoint import BUNDLED, find_checkpoint
from helpers.model.config import save_config

PROMPTS = [
    "Once upon a time", "One day", "There was a little", "The", "In the", "A small", "Her", "He", "It was a", "They",
    "Lily", "Tom", "The dog", "The cat", "Every morning", "At night", "Near the", "My", "When the", "She",
]  # fmt: skip
RECIPE = BuildRecipe(backend="tensorrt", precision="fp16", max_batch_size=2, max_input_len=16, max_seq_len=64)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def bundled():
    return find_checkpoint("stories")


@pytest.fixture(scope="module")
def sessions(bundled, tmp_path_factory):
    """Both graphs in fp32, decode for a batch of 1 or 2, in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("onnx")
    weights = llama_onnx.write_weights(bundled, "fp32", RECIPE.max_seq_len, folder)
    found = {}
    for graph in backend.GRAPHS:
        limits = {"cache_length": RECIPE.max_seq_len, "batch_sizes": (1, 2)}
        file = llama_onnx.write(graph, bundled.config, weights, folder, precision="fp32", **limits)
        found[graph] = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return found


class Context:
    """TensorRT's IExecutionContext as the backend uses it. Shapes outside the profile are refused, as there."""

    def __init__(self, session, limits):
        self.session, self.limits = session, limits
        self.shapes, self.addresses = {}, {}
        self.types = {i.name: i.type for i in session.get_inputs()}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        least, greatest = self.limits.get(name, (shape, shape))
        return all(a <= b <= c for a, b, c in zip(least, shape, greatest, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        feeds = {}
        for name, kind in self.types.items():
            dtype = np.int64 if kind == "tensor(int64)" else np.float32
            feeds[name] = self._view(name, self.shapes[name], dtype).copy()
        outputs = [o.name for o in self.session.get_outputs()]
        for name, value in zip(outputs, self.session.run(outputs, feeds), strict=True):
            self._view(name, value.shape, np.float32)[...] = value
        return True

    def _view(self, name, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(buffer, dtype).reshape(shape)


@pytest.fixture
def engine(bundled, sessions, tmp_path):
    """The backend's own engine, host side, over the stand-in."""
    folder = tmp_path / "engine"
    folder.mkdir()
    save_config(bundled.config, folder)
    shutil.copy(bundled.folder / "tokenizer.json", folder)
    manifest = {"details": {"compute_dtype": "float32"}}
    contexts = {"prefill": Context(sessions["prefill"], {"tokens": ((1, 1), (1, 16))})}
    contexts |= {f"decode_b{b}": Context(sessions["decode"], {"tokens": ((b,), (b,))}) for b in (1, 2)}
    with backend.TensorRTEngine(RECIPE, folder, manifest, contexts, "cpu") as running:
        yield running


def greedy(reference, ids, count, end):
    """transformers' own greedy tokens."""
    out = reference.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(ids)),
    )
    found = out[0, len(ids) :].tolist()
    return found[: found.index(end)] if end in found else found


def test_twenty_prompts_give_transformers_tokens(engine, stories_reference, bundled):
    reference, _ = stories_reference
    (end,) = bundled.config.eos_token_ids
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    for pair in zip(PROMPTS[::2], PROMPTS[1::2], strict=True):
        for answer in engine.generate(list(pair), sampling):
            assert answer.token_ids == greedy(reference, answer.prompt_token_ids, NEW_TOKENS, end)


FAMILIES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_transformers_logits(checkpoint, tmp_path, family):
    """Three prompt tokens by prefill, three more by decode, against one forward of transformers; random weights."""
    from transformers import AutoModelForCausalLM

    name, changes = FAMILIES[family]
    small = find_checkpoint(str(checkpoint(name, **changes)))
    limits = {"precision": "fp32", "cache_length": 8, "batch_sizes": (1,)}
    weights = llama_onnx.write_weights(small, "fp32", 8, tmp_path)
    prefill, decode = (
        ort.InferenceSession(str(llama_onnx.write(graph, small.config, weights, tmp_path, **limits)))
        for graph in backend.GRAPHS
    )
    ids = np.array([[5, 17, 3, 99, 64, 1]])
    logits, *new = prefill.run(None, {"tokens": ids[:, :3]})
    found = [logits[0]]
    kv_heads, size = small.config.num_key_value_heads, small.config.head_dim
    cache = {key: np.zeros((1, kv_heads, 8, size), np.float32) for key in llama_onnx.cache_names(small.config)}
    for position in range(3, 7):
        for name, entry in zip(cache, new, strict=True):
            cache[name][:, :, position - entry.shape[2] : position] = entry
        if position < 6:
            inputs = {"tokens": ids[0, position : position + 1], "positions": np.array([position])}
            logits, *new = decode.run(None, inputs | cache)
            found.append(logits[0])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(small.folder, dtype=torch.float32)(torch.from_numpy(ids)).logits
    torch.testing.assert_close(torch.from_numpy(np.stack(found)), expected[0, 2:], atol=1e-4, rtol=1e-4)


def test_a_prompt_of_one_token_and_the_last_place_of_the_cache(engine, stories_reference):
    reference, _ = stories_reference
    sampling = SamplingParams(temperature=0.0, max_tokens=RECIPE.max_seq_len - 1, ignore_eos=True)
    (answer,) = engine.generate([[1]], sampling)
    assert len(answer.token_ids) == RECIPE.max_seq_len - 1
    with torch.no_grad():
        logits = reference(torch.tensor([[1, *answer.token_ids[:-1]]])).logits[0]
    assert answer.token_ids == logits.argmax(-1).tolist()


def test_a_batch_answers_as_each_prompt_alone(engine):
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    together = engine.generate(["One day", "The little cat was"], sampling)
    alone = [engine.generate([p], sampling)[0] for p in ("One day", "The little cat was")]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]


def test_a_shape_outside_the_profile(engine):
    with pytest.raises(LimitError, match="outside the profile"):
        engine.execute("prefill", {"tokens": torch.zeros(1, 17, dtype=torch.long)}, engine.new_outputs(1, 17))


@pytest.fixture(scope="module")
def engine_folder():
    return build_engine(RECIPE.replace(max_batch_size=1), quiet=True)


def test_the_model_builds_as_two_plans(engine_folder):
    report = inspect(engine_folder)
    assert report.graphs() == ["prefill", "decode"]
    for graph in report.graphs():
        part = report.of(graph)
        assert len(part.kernels) < len(part.operations)
    details = store.read_manifest(engine_folder)["details"]
    names = [t["name"] for t in details["graphs"]["decode"]["inputs"]]
    assert names[:4] == ["tokens", "positions", "k0", "v0"]
    assert details["graphs"]["decode"]["outputs"][0]["dtype"] == "float32"


def test_tensorrt_finds_the_attention_and_joins_the_projections(engine_folder, bundled):
    decode = inspect(engine_folder).of("decode")
    attention = [k for k in decode.kernels if "mha" in k.name]
    assert len(attention) == bundled.config.num_hidden_layers
    joined = [sorted(k.details["steps"]) for k in decode.kernels if k.kind == "gemm"]
    assert ["layers.1.gate", "layers.1.up"] in joined


def test_every_node_of_the_model_is_accounted_for_once(engine_folder):
    report = inspect(engine_folder)
    for graph in report.graphs():
        part = report.of(graph)
        placed = [name for kernel in part.kernels for name in kernel.fused]
        assert len(placed) == len(set(placed))
        gone = {name.partition("/")[2] for name in part.removed}
        assert {o.name for o in part.operations} == set(placed) | (gone & {o.name for o in part.operations})
        nodes = [node for kernel in part.kernels for node in kernel.details["nodes"]]
        assert len(nodes) == len(set(nodes))
        named = {o.node for o in part.operations if o.node}
        dissolved = {o.node for o in part.operations if o.node and o.name in gone}
        assert named == set(nodes) | dissolved


def test_operations_lead_back_to_the_decoder(engine_folder):
    lines = Path(llama_onnx.__file__).read_text().splitlines()
    products = [o for o in inspect(engine_folder).operations if o.op == "matrix_multiply" and "layers.0.q" in o.name]
    assert len(products) == 2
    for operation in products:
        file, _, line = operation.source.partition(":")
        assert file == "llama_onnx.py" and '"Gemm"' in lines[int(line) - 1]


def test_a_second_build_is_a_hit_and_loading_is_refused_in_tensorrts_words(engine_folder):
    assert build_engine(RECIPE.replace(max_batch_size=1), quiet=True) == engine_folder
    if torch.cuda.is_available():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(BackendUnavailable, match="cudaError 35"):
        load(engine_folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A two-layer Llama of random weights."""
    folder = tmp_path_factory.mktemp("small")
    config = json.loads((BUNDLED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "vocab_size": 256}))
    return f"dummy:{folder}"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4", "fp8"])
def test_every_precision_builds_the_model(small, precision):
    recipe = RECIPE.replace(model=small, max_batch_size=1, precision=precision)
    report = inspect(build_engine(recipe, quiet=True))
    constants = {t["dtype"] for k in report.kernels for t in k.details["constants"]}
    wanted = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
    assert wanted.get(precision, precision) in constants


def written(small, folder):
    """What TensorRT is given to build the model in fp8, file by file."""
    checkpoint, recipe = find_checkpoint(small), RECIPE.replace(precision="fp8")
    limits = {"cache_length": recipe.max_seq_len, "batch_sizes": (1,)}
    for name in ("calibration", "graphs"):
        (folder / name).mkdir(parents=True)
    limits["largest"] = backend._calibrate(checkpoint, recipe, folder / "calibration", limits)
    weights = llama_onnx.write_weights(checkpoint, "fp8", recipe.max_seq_len, folder / "graphs")
    for graph in backend.GRAPHS:
        llama_onnx.write(graph, checkpoint.config, weights, folder / "graphs", precision="fp8", **limits)
    return {path.name: path.read_bytes() for path in (folder / "graphs").iterdir()}


def test_torchs_defaults_change_nothing_of_what_is_built(small, tmp_path):
    """As a notebook sets them: with device "cuda" no model was written, with bfloat16 other scales."""
    expected = written(small, tmp_path / "plain")
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")  # as "cuda", where there is one
        assert written(small, tmp_path / "changed") == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_int8_plans_are_smaller_than_fp16s(small):
    sizes = {}
    for precision in ("fp16", "int8"):
        report = inspect(build_engine(RECIPE.replace(model=small, max_batch_size=1, precision=precision), quiet=True))
        sizes[precision] = report.sizes["decode.plan"]
    assert sizes["int8"] < sizes["fp16"]


@pytest.mark.parametrize("changes", [{"options": {"profiles": []}}, {"fusion": {"qkv": False}}, {"options": {"x": 1}}])
def test_what_a_language_model_fixes_itself_is_refused(changes):
    with pytest.raises(RecipeError) as caught:
        RECIPE.replace(**changes)
    assert caught.value.fix


def test_a_modules_engine_answers_no_prompts():
    folder = build_module(torch.nn.Linear(64, 64), (torch.randn(1, 64),), quiet=True)
    with pytest.raises(EngineMismatch, match="holds a module"):
        load(folder)


@pytest.mark.skipif(not NIGHTLY, reason="takes more than a minute: make nightly")
@pytest.mark.promise("An engine of more than 2 GB is built", 1, 1)
def test_tinyllamas_shape_builds():
    """1.1 billion dummy weights: more than the 2 GB that an ONNX file itself can hold."""
    folder = build_engine(BuildRecipe("dummy:tinyllama-1.1b", "tensorrt", "fp16", max_input_len=256, max_seq_len=512))
    details = store.read_manifest(folder)["details"]
    assert inspect(folder).sizes["decode.plan"] > 2.1e9
    assert details["builder_peak_bytes"] > 2.1e9
    assert details["graphs"]["prefill"]["inputs"][0]["shape"] == [1, "?"]
    store.remove(folder)
