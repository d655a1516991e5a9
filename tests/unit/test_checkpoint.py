"""What a checkpoint is taken to be: its configuration as transformers reads it, the files that hold its weights, their
digests; and what is refused."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file, save_file
from test_models import PROMPT, Ours, assert_close, change_config, reference, tensors_of

from helpers import BuildRecipe, SamplingParams, backends, load
from helpers.backends import pytorch
from helpers.errors import BackendUnavailable, EngineCorrupt, ModelError, OutOfMemory
from helpers.model import checkpoint as checkpoints
from helpers.model.checkpoint import BUNDLED, check_weights, find_checkpoint, read_tensors
from helpers.model.config import COMPUTED_OTHERWISE, FIELDS, MODEL_FILE, SIZES, load_config, read_config, save_config
from helpers.model.sampling import Sampler
from helpers.model.tokenizer import load_tokenizer
from helpers.model.weights import rope_tables
from helpers.paths import name_of_folder

# ---- configurations of public models ----------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}


def config_of(kind, hidden, intermediate, layers, heads, kv_heads, positions, vocabulary, **more):
    """The fields of a config.json that all have; None leaves one out."""
    fields = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **more,
    }
    return {name: value for name, value in fields.items() if value is not None}


QWEN25 = config_of(
    *("qwen2", 896, 4864, 24, 14, 2, 32768, 151936),
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "eos_token_id": 151645},
    **{"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21},
)
# As their authors publish them; the number is the longest sequence.
PUBLIC = {
    "Llama-2-7b": (config_of("llama", 4096, 11008, 32, 32, 32, 4096, 32000, pretraining_tp=1, eos_token_id=2), 4096),
    "Llama-2-7b without KV heads": (config_of("llama", 4096, 11008, 32, 32, None, 4096, 32000), 4096),
    "Llama-3.1-8B": (
        config_of(
            *("llama", 4096, 14336, 32, 32, 8, 131072, 128256),
            **{"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "attention_bias": False},
            **{"mlp_bias": False, "eos_token_id": [128001, 128008, 128009], "tie_word_embeddings": False},
        ),
        131072,
    ),
    "Llama-3.2-1B": (
        config_of(
            *("llama", 2048, 8192, 16, 32, 8, 131072, 128256),
            **{"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "factor": 32.0, "rope_type": "llama3"}},
            **{"head_dim": 64, "tie_word_embeddings": True},
        ),
        131072,
    ),
    "TinyLlama-1.1B": (json.loads((checkpoints.SHAPES / "tinyllama-1.1b" / "config.json").read_text()), 2048),
    "SmolLM2-135M": (
        config_of(
            *("llama", 576, 1536, 30, 9, 3, 8192, 49152),
            **{"rope_theta": 100000, "rope_interleaved": False, "is_llama_config": True, "tie_word_embeddings": True},
        ),
        8192,
    ),
    "vicuna-7b-v1.5-16k": (
        config_of(*("llama", 4096, 11008, 32, 32, 32, 4096, 32000), rope_scaling={"factor": 4.0, "type": "linear"}),
        16384,
    ),
    "Llama with a window": (config_of("llama", 4096, 11008, 32, 32, 32, 8192, 32000, sliding_window=4096), 4096),
    "Llama with a window on no layer": (
        config_of(
            *("llama", 4096, 11008, 32, 32, 32, 8192, 32000),
            **{"sliding_window": 4096, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
        ),
        8192,
    ),
    "Mistral-7B-v0.1": (config_of("mistral", 4096, 14336, 32, 32, 8, 32768, 32000, sliding_window=4096), 4096),
    "Mistral-7B without sliding_window": (config_of("mistral", 4096, 14336, 32, 32, 8, 32768, 32000), 4096),
    "Mistral-7B-v0.3": (
        config_of("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1e6) | {"sliding_window": None},
        32768,
    ),
    "Qwen2.5-0.5B": (QWEN25, 32768),
    "Qwen2.5-0.5B with its window": (
        QWEN25 | {"use_sliding_window": True, "sliding_window": 4096, "attention_bias": True},
        4096,
    ),
    "Qwen2.5-0.5B with a window on no layer": (
        QWEN25 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 24},
        32768,
    ),
    "Qwen3-0.6B": (
        config_of(
            *("qwen3", 1024, 3072, 28, 16, 8, 40960, 151936),
            **{"head_dim": 128, "rope_theta": 1000000, "tie_word_embeddings": True, "attention_bias": False},
            **{"rms_norm_eps": 1e-6, "use_sliding_window": False, "max_window_layers": 28},
        )
        | {"rope_scaling": None, "sliding_window": None},
        40960,
    ),
    "saved by transformers 5": (
        config_of(
            *("llama", 2048, 8192, 16, 32, 8, 131072, 128256),
            rope_parameters={**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0},
            dtype="bfloat16",
        ),
        131072,
    ),
    "rope_scaling beside rope_parameters": (
        config_of(
            *("llama", 4096, 11008, 32, 32, 32, 4096, 32000),
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rope_scaling={"rope_type": "linear", "factor": 2.0},
        ),
        8192,
    ),
}
REFUSED = {
    "Phi-3-mini": (config_of("phi3", 3072, 8192, 32, 32, 32, 4096, 32064), "'phi3'"),
    "gemma-2b": (config_of("gemma", 2048, 16384, 18, 8, 1, 8192, 256000, hidden_act="gelu"), "'gemma'"),
    "Mixtral-8x7B": (config_of("mixtral", 4096, 14336, 32, 32, 8, 32768, 32000, num_local_experts=8), "'mixtral'"),
    "Qwen2-57B-A14B": (config_of("qwen2_moe", 3584, 18944, 28, 28, 4, 32768, 151936), "'qwen2_moe'"),
    "Qwen2.5 with yarn": (QWEN25 | {"rope_scaling": YARN}, "'yarn'"),
    "a type of rope that is null": (QWEN25 | {"rope_scaling": {"rope_type": None, "factor": 2.0}}, "encoding is None"),
    "Qwen2.5 with yarn beside rope_parameters": (
        QWEN25 | {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "'yarn'",
    ),
    "Llama with dynamic scaling": (
        config_of("llama", 64, 96, 2, 4, 2, 64, 128, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "'dynamic'",
    ),
    "Llama with longrope": (
        config_of(
            *("llama", 64, 96, 2, 4, 2, 64, 128),
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        ),
        "'longrope'",
    ),
    "Llama that rotates half of each head": (
        config_of("llama", 64, 96, 2, 4, 2, 64, 128, partial_rotary_factor=0.5),
        "a part of each head",
    ),
    "Llama 3 with two original lengths": (
        config_of("llama", 64, 96, 2, 4, 2, 64, 128, rope_scaling={**LLAMA3, "rope_type": "llama3"})
        | {"original_max_position_embeddings": 16},
        "original_max_position_embeddings",
    ),
    "gptq": (QWEN25 | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
    "mlx": (QWEN25 | {"quantization": {"group_size": 64, "bits": 4}}, "already quantized"),
    "an encoder": (QWEN25 | {"is_causal": False}, "is_causal"),
    "layers of their own": (QWEN25 | {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, "per_layer_config"),
    "Llama that attends in chunks": (PUBLIC["Llama-2-7b"][0] | {"attention_chunk_size": 512}, "attention_chunk_size"),
    "weights under another name": (QWEN25 | {"transformers_weights": "a.safetensors"}, "transformers_weights"),
    "Qwen2 with another kind of layer": (QWEN25 | {"layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
}


def written(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def theirs(folder):
    from transformers import AutoConfig, __version__

    if __version__ < "5" and "rope_parameters" in json.loads((folder / "config.json").read_text()):
        pytest.skip("transformers 4 does not know rope_parameters")
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_field_is_as_transformers_reads_it(tmp_path, name):
    fields, longest = PUBLIC[name]
    ours, config = read_config(written(tmp_path, fields)), theirs(tmp_path)
    same = {*SIZES, "model_type", "rms_norm_eps", "tie_word_embeddings"} - {"head_dim"}
    assert {n: getattr(ours, n) for n in same} == {n: getattr(config, n) for n in same}
    assert ours.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    ends = config.eos_token_id
    assert list(ours.eos_token_ids) == (ends if isinstance(ends, list) else [] if ends is None else [ends])
    assert ours.max_length == longest


@pytest.mark.parametrize("name", PUBLIC)
def test_positions_turn_as_in_transformers(tmp_path, name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields, _ = PUBLIC[name]
    ours = rope_tables(read_config(written(tmp_path, fields)), 4096, torch.float32)
    cos, sin = LlamaRotaryEmbedding(config=theirs(tmp_path))(torch.zeros(1), torch.arange(4096)[None])
    half = cos.shape[-1] // 2
    torch.testing.assert_close(ours["rope.cos"], cos[0])
    torch.testing.assert_close(ours["rope.sin"], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1))


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLIC)
def test_a_tiny_version_has_transformers_logits(tmp_path, name):
    from transformers import AutoModelForCausalLM

    fields = dict(PUBLIC[name][0])
    fields |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    fields |= {"eos_token_id": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2} if "num_key_value_heads" in fields else {}
    fields |= {"head_dim": 32} if "head_dim" in fields else {}
    model = AutoModelForCausalLM.from_config(theirs(written(tmp_path, fields)), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, weight in model.named_parameters():
        weight.normal_(1.0 if "norm" in parameter_name else 0.0, 0.1, generator=generator)
    model.save_pretrained(tmp_path)
    written(tmp_path, fields)
    ours = Ours(tmp_path)
    assert_close(ours.prefill(PROMPT, ours.cache(1)), model(PROMPT[None]).logits[0, -1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, name):
    fields, words = REFUSED[name]
    with pytest.raises(ModelError, match=words) as refused:
        read_config(written(tmp_path, fields))
    assert refused.value.fix


def test_a_checkpoint_that_modelopt_quantized_is_refused_for_dummy_weights_too(tmp_path):
    """vLLM and TensorRT-LLM would compute in fp8 under the name of bf16."""
    written(tmp_path, QWEN25)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ModelError, match="already quantized"):
        find_checkpoint(f"dummy:{tmp_path}")


def test_either_name_of_the_position_encoding_is_read_by_every_transformers(tmp_path):
    """The pytorch backend too, which is given the same configuration."""
    older = {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}
    newer = {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0}}
    both = {"rope_theta": 10000.0, "rope_scaling": newer["rope_parameters"]}
    shape = config_of("llama", 64, 96, 2, 4, 2, 131072, 128)
    turns, logits = [], []
    for fields in (older, newer, both):
        found = find_checkpoint(f"dummy:{written(tmp_path, shape | fields)}")
        turns.append(rope_tables(found.config, 100, torch.float32)["rope.cos"])
        logits.append(pytorch.load_model(found, torch.float32, "cpu")(PROMPT[None]).logits)
    assert all(torch.equal(turns[0], other) for other in turns)
    assert all(torch.equal(logits[0], other) for other in logits)


# What transformers' models, masks, caches and loading read of a configuration, and that changes no number here.
HARMLESS = {
    *("attention_dropout", "auto_map", "dtype", "fusion_config", "gradient_checkpointing", "initializer_range"),
    *("model_type", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "return_dict"),
    *("use_cache", "is_encoder_decoder", "pruned_heads", "distributed_config", "default_rope_type", "default_theta"),
    *("ignore_keys_at_rope_validation", "is_heterogeneous", "sub_configs", "vision_aspect_ratio"),
    *("vision_feature_layer", "vision_feature_select_strategy"),
    *("kv_sharing_modes", "num_kv_shared_layers"),  # with these, the models of these families do not run at all
    *(f"base_model_{kind}_plan" for kind in ("ep", "fsdp", "pp", "tp")),
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_field_that_transformers_reads_is_read_refused_or_changes_no_number(checkpoint, family, monkeypatch):
    """A newer transformers that reads one more field fails here."""
    import transformers

    kind, names = transformers.CONFIG_MAPPING[family], set()

    def noted(config, name):
        if Path(sys._getframe(1).f_code.co_filename).name != "configuration_utils.py":  # which copies all
            names.add(name)
        return super(kind, config).__getattribute__(name)

    monkeypatch.setattr(kind, "__getattribute__", noted)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family))
    model(PROMPT[None, :1], past_key_values=model(PROMPT[None]).past_key_values)
    own = {name for name in names if name.startswith("_") or callable(getattr(kind, name, None))}
    assert {"hidden_size", "rms_norm_eps"} <= names
    assert names - own - HARMLESS <= FIELDS | {*COMPUTED_OTHERWISE, "is_causal"}


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [2, 7]}, (2, 7)),
        (2, {"eos_token_id": 9}, (9,)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {"temperature": 0.6}, (2,)),
        (..., None, (2,)),  # LlamaConfig's default
        (None, None, ()),
    ],
    ids=str,
)
def test_end_tokens(tmp_path, in_config, in_generation_config, expected):
    written(tmp_path, PUBLIC["Llama-2-7b"][0])
    change_config(tmp_path, eos_token_id=in_config)
    if in_generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(in_generation_config))
    assert read_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, true]}', "\xff"])
def test_a_broken_generation_config_is_refused_before_a_build(tmp_path, content):
    written(tmp_path, PUBLIC["Llama-2-7b"][0])
    (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match="generation_config.json|eos_token_id") as refused:
        read_config(tmp_path)
    assert refused.value.fix


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"],
)
def test_a_link_to_nothing_is_no_missing_file(tmp_path, name):
    """As a pruned cache of the Hub leaves it: without the file, texts ended elsewhere or were other tokens."""
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match="No such file"):
        read_config(folder)
        load_tokenizer(folder)


# ---- what an engine keeps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_an_engine_reads_back_what_its_build_wrote(tmp_path, name):
    config = read_config(written(tmp_path, PUBLIC[name][0]))
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model_type": "llama"}', "\xff"])
def test_a_damaged_model_file_is_refused(tmp_path, content):
    (tmp_path / MODEL_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(EngineCorrupt, match="model.json"):
        load_config(tmp_path)


def test_finding_an_engine_and_loading_its_model_do_without_transformers(tmp_path, tiny_llama):
    save_config(find_checkpoint(str(tiny_llama)).config, tmp_path)
    code = """
import sys
from pathlib import Path
from helpers import BuildRecipe, engine, load
from helpers.backends.aot import engine as running
from helpers.errors import EngineNotFound
from helpers.model.config import load_config
try:
    engine.locate(BuildRecipe(sys.argv[1], max_input_len=16, max_seq_len=32))
except EngineNotFound:
    pass
load_config(Path(sys.argv[2]))
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tiny_llama, tmp_path], check=True, timeout=120)


# ---- hostile configurations -------------------------------------------------------------------------------

VALUES = [10**12, 10**400, -1, 0, True, "64", 1.5, [64], {}, None, "x" * 10000, float("inf"), 1e308, [[]] * 100]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_is_anothers_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir()
    written(tmp_path / "theirs", {"model_type": "llama"})
    (tmp_path / "theirs").chmod(0o644)  # its names may be read, but no file
    user = os.geteuid()
    for folder in (tmp_path, *tmp_path.parents):
        if user == 0 and folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    try:
        if user == 0:  # whom nothing is refused
            os.seteuid(65534)
        with pytest.raises(ModelError, match="may not look into 'theirs'"):
            find_checkpoint(str(tmp_path / "theirs"))
        with pytest.raises(ModelError, match=r"'theirs' cannot be opened: .*Permission denied"):
            find_checkpoint(str(tmp_path / "theirs" / "model"))
    finally:
        os.seteuid(user)
        (tmp_path / "theirs").chmod(0o755)


@pytest.mark.parametrize("field", [*SIZES, "max_window_layers", "sliding_window"])
@pytest.mark.parametrize("value", [10**12, 10**400, -1, True, "64", 1.5, [64], {}], ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_size_that_is_none_is_refused_at_once(tmp_path, field, value, kind):
    with pytest.raises(ModelError, match=field) as refused:
        find_checkpoint(f"dummy:{written(tmp_path, PUBLIC['Llama-2-7b'][0] | {'model_type': kind, field: value})}")
    assert refused.value.fix and len(str(refused.value)) < 1000


def test_a_full_disk_is_not_told_as_a_damaged_configuration(monkeypatch):
    """Whatever transformers imports for a family then finds no temporary folder."""

    class Full(dict):
        def __missing__(self, kind):
            raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr("transformers.CONFIG_MAPPING", Full())
    with pytest.raises(BackendUnavailable, match="disk is full"):
        read_config(BUNDLED)


def test_mutated_configurations_are_read_or_refused(tmp_path):
    """Any field, any value: a ModelConfig whose sizes are bounded, or a ModelError."""
    draw = random.Random(7)
    families = [PUBLIC[name][0] for name in ("Llama-3.1-8B", "Mistral-7B-v0.1", "Qwen2.5-0.5B", "Qwen3-0.6B")]
    read = 0
    for _ in range(400):
        fields = json.loads(json.dumps(draw.choice(families)))
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            name = draw.choice(sorted({*fields, *FIELDS, "num_labels", "id2label", "dtype", "attn_implementation"}))
            rope = fields.get("rope_scaling")
            if isinstance(rope, dict) and draw.random() < 0.3:
                rope[draw.choice([*LLAMA3, "rope_type", "rope_theta"])] = draw.choice(VALUES)
            else:
                fields[name] = draw.choice(VALUES)
        try:
            config = read_config(written(tmp_path, fields))
        except ModelError as error:
            assert error.fix and len(str(error)) < 1500
        else:
            read += 1
            assert all(1 <= getattr(config, name) <= most for name, most in SIZES.items())
            assert rope_tables(replace(config, num_hidden_layers=1), 8, torch.float32)["rope.cos"].isfinite().all()
    assert 40 < read < 360


@pytest.mark.parametrize(
    "text", ["[" * 200000, '{"hidden_size": ' + "9" * 5000 + "}", '{"rms_norm_eps": NaN}', " " * (1 << 27)], ids=len
)
def test_hostile_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="not valid JSON"):
        read_config(tmp_path)


def test_weights_that_fit_nowhere_are_refused_before_they_are_made(tmp_path):
    largest = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 1 << 10}
    written(tmp_path, PUBLIC["Llama-2-7b"][0] | largest)
    with pytest.raises(OutOfMemory, match="GB are free"):
        load(BuildRecipe(f"dummy:{tmp_path}", backend="pytorch", device="cpu", max_input_len=8, max_seq_len=16))


@torch.no_grad()
def test_what_a_configuration_asks_of_transformers_is_not_done(checkpoint, tmp_path):
    """Another attention (which may be code from the Hub), other code, a trillion labels."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    expected = reference(folder)(PROMPT[None]).logits[0, -1]
    change_config(
        folder,
        attn_implementation="nobody/no-kernel",
        _attn_implementation="nobody/no-kernel",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        num_labels=10**12,
        dtype="hub",
        torch_dtype="hub",
    )
    (folder / "code.py").write_text("raise SystemExit('the checkpoint ran code')")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": -1, "num_beams": 0}))
    recipe = BuildRecipe(str(folder), backend="pytorch", device="cpu", max_input_len=48, max_seq_len=64)
    with load(recipe) as engine:
        assert engine.model.config._attn_implementation == "sdpa"
        assert_close(engine.logits(PROMPT.tolist()), expected)


# ---- the files that hold the weights ----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "dummy:"])
@pytest.mark.parametrize("name", ["stories", "m", "m/", "smollm2"])
def test_a_folders_name_means_the_same_after_a_change_of_folder(checkpoint, tmp_path, monkeypatch, prefix, name):
    """Also where it is also one of the course's names, as long as it is given as a path."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / Path(name).name)
    monkeypatch.chdir(tmp_path)
    found = find_checkpoint(f"{prefix}./{name}")
    monkeypatch.chdir("/")
    again = find_checkpoint(found.name)
    assert (again.folder, again.dummy) == (found.folder, found.dummy) == (folder, prefix != "")
    assert found.short_name == f"{prefix}{folder.name}"


def test_an_adapter_beside_the_model_is_refused(checkpoint, tmp_path):
    """transformers, where peft is installed, would load what adapter_config.json names, and the adapter on top."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other"}')
    with pytest.raises(ModelError, match="adapter") as refused:
        find_checkpoint(str(folder)).check(16)
    assert "merge_and_unload" in refused.value.fix
    find_checkpoint(f"dummy:{folder}").check(16)


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(("family", "more"), [("llama", BIASES), ("mistral", {}), ("qwen2", {}), ("qwen3", {})])
def test_parameters_are_counted_as_transformers_does(checkpoint, family, more):
    folder = checkpoint(family, **more)
    assert find_checkpoint(str(folder)).config.parameter_count() == reference(folder).num_parameters()


@pytest.fixture
def sharded(checkpoint, tmp_path):
    """A checkpoint in several shards, and its model."""
    model = reference(checkpoint("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded", model


def assert_as_transformers(folder):
    ours, model = tensors_of(find_checkpoint(str(folder))), reference(folder).state_dict()
    assert ours.keys() <= model.keys() and all(torch.equal(ours[name], model[name]) for name in ours)


def test_shards_of_an_earlier_save_are_ignored(sharded):
    folder, model = sharded
    before = find_checkpoint(str(folder)).digest()
    earlier = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    save_file(earlier, folder / "model-00001-of-00099.safetensors", metadata={"format": "pt"})
    save_file(earlier, folder / "consolidated.safetensors", metadata={"format": "pt"})
    assert_as_transformers(folder)
    assert find_checkpoint(str(folder)).digest() == before


@pytest.mark.parametrize("metadata", ["missing", None, "text"])
def test_an_index_that_transformers_does_not_read_is_told_in_words(sharded, metadata):
    """Some writers leave its table "metadata" out; the course's own reader needs none."""
    folder, _ = sharded
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"] = metadata
    if metadata == "missing":
        del index["metadata"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = find_checkpoint(str(folder))
    found.check(8)
    with pytest.raises(ModelError, match="transformers does not read the weights of 'sharded'") as refused:
        pytorch.load_model(found, torch.float32, "cpu")
    assert '"metadata": {}' in refused.value.fix
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": {}}))
    assert pytorch.load_model(found, torch.float32, "cpu")


def test_a_transformers_that_is_too_old_is_not_told_as_a_faulty_checkpoint(monkeypatch):
    def old(*_, **__):
        raise TypeError("LlamaForCausalLM.__init__() got an unexpected keyword argument 'dtype'")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", old)
        with pytest.raises(ModelError, match="unexpected keyword") as refused:
            pytorch.load_model(find_checkpoint("stories"), torch.float32, "cpu")
    assert "version" in refused.value.cause and "index" not in refused.value.fix
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {})
    with pytest.raises(BackendUnavailable, match="does not know models of type 'llama'"):
        read_config(BUNDLED)


def test_a_file_one_folder_down_is_no_hub_id(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint("llama").parent)
    with pytest.raises(ModelError, match="no folder here"):
        find_checkpoint(f"{checkpoint('llama').name}/model.safetensors")


def test_a_backup_beside_the_model_is_ignored(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    earlier = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in ("model_old.safetensors", "a.safetensors", "z.safetensors"):
        save_file(earlier, folder / name, metadata={"format": "pt"})
    assert_as_transformers(folder)


@pytest.mark.parametrize("backend", ["vllm", "tensorrt_llm", "tensorrt_llm_pytorch"])
def test_a_backup_is_refused_for_libraries_that_list_the_folder(checkpoint, tmp_path, backend):
    """vLLM's default_loader.py and TensorRT-LLM's model_weights_loader.py, which glob *.safetensors."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")  # Mistral's names differ
    (folder / "._model.safetensors").touch()  # as macOS puts one beside every file
    found = find_checkpoint(str(folder))
    found.check_sole_weights("vLLM")
    shutil.copy(folder / "model.safetensors", folder / "model_old.safetensors")
    replace(found, dummy=True).check_sole_weights("vLLM")
    recipe = BuildRecipe(model=str(folder), backend=backend, precision="bf16", max_input_len=16, max_seq_len=48)
    module = backends.module(backend)
    with pytest.raises(ModelError, match="model_old.safetensors"):
        module.build(recipe, found, tmp_path, None) if backend == "tensorrt_llm" else module.load(recipe)


SCALED = {**LLAMA3, "rope_type": "llama3"}


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({}, True),
        ({"rope_theta": 500000, "rope_scaling": SCALED}, True),
        ({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, True),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, False),
        ({"rope_theta": 500000.0, "rope_parameters": {**SCALED, "rope_theta": 500000.0}}, False),
        ({"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, False),
        ({"rope_scaling": {**SCALED, "rope_theta": 500000.0}}, False),
    ],
    ids=str,
)
def test_a_position_encoding_that_tensorrt_llm_would_read_otherwise_is_refused(tmp_path, monkeypatch, fields, seen):
    """It reads the folder with transformers 4, which knows rope_theta and rope_scaling."""
    module = backends.module("tensorrt_llm")
    monkeypatch.setattr(module, "machine", lambda: {"compute_capability": "7.5"})  # too old: refused next
    shape = config_of("llama", 64, 96, 2, 4, 2, 131072, 128)
    recipe = BuildRecipe(f"dummy:{written(tmp_path, shape | fields)}", backend="tensorrt_llm", precision="bf16")
    with pytest.raises(BackendUnavailable if seen else ModelError, match="capability" if seen else "position encoding"):
        module.build(recipe, find_checkpoint(recipe.model), tmp_path, None)


def test_a_single_file_wins_over_an_index_as_in_transformers(sharded):
    folder, model = sharded
    save_file(
        {name: tensor * 2 for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert_as_transformers(folder)


def test_a_tensor_in_two_shards_is_the_later_ones_as_in_transformers(sharded):
    folder, model = sharded
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, factor in (("aaa.safetensors", 2), ("zzz.safetensors", 3)):
        save_file({"model.norm.weight": model.model.norm.weight * factor}, folder / name, metadata={"format": "pt"})
        index["weight_map"][name] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    "shard", ["gone.safetensors", "../model.safetensors", "/etc/passwd", "", ".", 3, None, "a\\b", "sub/x.safetensors"]
)
def test_an_index_that_names_no_file_of_the_folder_is_refused(sharded, shard):
    folder, _ = sharded
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"] | {"x": shard}}))
    with pytest.raises(ModelError, match="which is no file of this folder") as refused:
        find_checkpoint(str(folder)).digest()
    assert refused.value.fix


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_a_broken_index_is_refused(sharded, content):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError) as refused:
        find_checkpoint(str(folder)).check(32)
    assert refused.value.fix


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_head_beside_tied_embeddings_counts_where_it_is_another(checkpoint, tmp_path, factor):
    """As transformers 5 computes it; and the pytorch backend does with every version."""
    folder = shutil.copytree(checkpoint("llama", tie_word_embeddings=True), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = find_checkpoint(str(folder))
    found.check(32)
    assert found.config.tie_word_embeddings == (factor == 1.0)
    ours = Ours(folder)
    logits = ours.prefill(PROMPT, ours.cache(1))
    hidden = reference(folder).model(PROMPT[None])[0][0, -1]
    assert_close(logits, torch.nn.functional.linear(hidden, tensors["lm_head.weight"]))
    assert_close(pytorch.load_model(found, torch.float32, "cpu")(PROMPT[None]).logits[0, -1], logits)


# ---- identity ---------------------------------------------------------------------------------------------


def test_another_end_token_is_another_engine(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    seen = set()
    for content in ('{"eos_token_id": 2}', '{"eos_token_id": [2, 3]}', None):
        path = folder / "generation_config.json"
        path.write_text(content) if content else path.unlink()
        seen |= {find_checkpoint(str(folder)).digest(), find_checkpoint(f"dummy:{folder}").digest()}
    assert len(seen) == 6


def test_the_digest_counts_every_file_that_is_read_and_no_other(sharded):
    folder, _ = sharded
    seen = [find_checkpoint(str(folder)).digest()]
    for path in [folder / "config.json", *checkpoints.weight_files(folder)]:
        original = path.read_bytes()
        path.write_bytes(original.replace(b"silu", b"gelu") if path.suffix == ".json" else original[:-1] + b"x")
        seen.append(find_checkpoint(str(folder)).digest())
        path.write_bytes(original)
    assert len(set(seen)) == len(seen)
    (folder / "README.md").write_text("new")
    assert find_checkpoint(str(folder)).digest() == seen[0]


# ---- what a notebook has set ------------------------------------------------------------------------------


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def defaults(request):
    """torch's default type or device is another one."""
    before = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield request.param
    torch.set_default_dtype(before)
    torch.set_default_device(None)


class Plain:
    """What the functions give while nothing is set, computed before `defaults` sets it."""

    def __init__(self, folder):
        self.dummy = tensors_of(find_checkpoint(f"dummy:{folder}"))
        self.real = tensors_of(find_checkpoint(str(folder)))
        self.rope = rope_tables(find_checkpoint(str(folder)).config, 16, torch.float32)
        self.draws = Sampler(SamplingParams(seed=5), [[1], [2]])(torch.zeros(2, 97, device="cpu", dtype=torch.float32))
        with load(self.recipe(folder)) as engine:
            self.logits = engine.logits(PROMPT.tolist())

    @staticmethod
    def recipe(folder):
        return BuildRecipe(str(folder), backend="pytorch", device="cpu", max_input_len=48, max_seq_len=64)


@pytest.fixture(scope="module")
def plain(checkpoint):
    folder = checkpoint("llama")
    return folder, Plain(folder)


def test_torchs_defaults_change_nothing(plain, defaults):
    folder, expected = plain
    changed = Plain(folder)
    for name in ("dummy", "real", "rope"):
        one, other = getattr(expected, name), getattr(changed, name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert torch.equal(expected.draws, changed.draws)
    assert torch.equal(expected.logits, changed.logits)


@pytest.mark.parametrize("prefix", ["", "dummy:"])
def test_loading_a_model_leaves_the_random_numbers_of_the_user_alone(checkpoint, prefix):
    found = find_checkpoint(f"{prefix}{checkpoint('llama')}")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = pytorch.load_model(found, torch.float32, "cpu").state_dict()
    assert torch.equal(torch.rand(4), expected)
    other = pytorch.load_model(found, torch.float32, "cpu").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("room", range(4))
def test_a_process_without_file_handles_is_told_so(tmp_path, room):
    """Each file is opened by Python, by safetensors and by torch: any of them may be the one that gets no handle."""
    resource = pytest.importorskip("resource")
    folder = write_checkpoint(tmp_path / "model", "llama")
    config = read_config(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]  # the lowest that is free, and so the highest number in use
    told = []
    for call in (
        lambda: read_config(folder),
        lambda: check_weights(folder, config),
        lambda: dict(read_tensors(find_checkpoint(str(folder)), config)),
    ):
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + room, hard))
        try:
            call()
        except ModelError as error:
            told.append(error.what)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(taken[0])
    assert len(told) == (3 if room == 0 else len(told)) and all("Too many open files" in what for what in told)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name on this system")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_or_a_device_in_a_files_place_is_not_waited_for(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model", "llama")
    shutil.copy(BUNDLED / "tokenizer.json", folder)
    config = read_config(folder)
    found = find_checkpoint(str(folder))
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        put(folder / name)
        told = []
        for call in (found.digest, found.tokenizer_digest, lambda: check_weights(folder, config),
                     lambda: load_tokenizer(folder), lambda: find_checkpoint(str(folder))):  # fmt: skip
            try:
                call()
            except ModelError as error:
                told.append(str(error))
        assert told and all("a pipe or a device" in words for words in told)


def test_an_adapter_that_is_laid_into_a_checkpoints_folder_makes_it_another(tmp_path):
    """A build would refuse it; an engine from before must not be found in its place."""
    folder = write_checkpoint(tmp_path / "model", "llama")
    before = find_checkpoint(str(folder)).digest()
    (folder / "adapter_config.json").write_text("{}")
    assert find_checkpoint(str(folder)).digest() != before


def test_threads_that_read_configurations_leave_transformers_as_talkative_as_it_was(tmp_path):
    from transformers.utils import logging

    write_checkpoint(tmp_path / "model", "llama")
    before = logging.get_verbosity()
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: read_config(tmp_path / "model").hidden_size, range(200)))) == 1
    assert logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("given", "text"),
    [("stories", "stories"), (Path("stories"), "./stories"), (Path("/a/stories"), "/a/stories"), (Path(), ".")],
)
def test_a_path_names_a_folder_and_no_model(given, text):
    assert name_of_folder(given) == text


@pytest.mark.parametrize("name", ["smollm2", "owner/name"])
def test_a_model_that_is_here_and_not_for_this_user_is_not_called_missing(monkeypatch, name):
    """Its administrator fetched it with umask 077; to fetch it again would be gigabytes."""
    stat = Path.stat

    def refuse(self, **settings):
        if {"smollm2", "models--owner--name"} & set(self.parts):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return stat(self, **settings)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ModelError, match="cannot be opened.*\n.*another user"):
        find_checkpoint(name)


def test_a_folder_that_is_not_here_and_looks_like_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"none of that name is in .*\n.*whole path"):
        find_checkpoint("checkpoints/my-llama")
