"""Small random checkpoints of every family, beside transformers; and what is refused before anything is compiled."""

import json
import math
import shutil

import pytest
import torch

from helpers import BuildRecipe, build
from helpers.backends.aot import products
from helpers.backends.aot.products import matmul, pack
from helpers.errors import BuildError, ModelError
from helpers.model.checkpoint import find_checkpoint, read_tensors, weight_files
from helpers.model.weights import convert, dense, rope_tables

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama llama3 rope": ("llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama one KV head, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama KV head a head, theta": ("llama", {"num_key_value_heads": 4, "rope_theta": 500.0, "rms_norm_eps": 1e-3}),
    "mistral": ("mistral", {}),
    "mistral wide window": ("mistral", {"sliding_window": 64}),  # as wide as the model is long: full attention
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}
PROMPT = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def folder(request, checkpoint):
    family, changes = FAMILIES[request.param]
    return checkpoint(family, **changes)


def reference(folder):
    """transformers' model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors_of(checkpoint):
    return dict(read_tensors(checkpoint, checkpoint.config))


class Ours:
    """Prefill and Decode run by PyTorch as they are, without a compiler."""

    def __init__(self, folder, product="library", length=64, qkv=True, gate_up=True):
        checkpoint = find_checkpoint(str(folder))
        self.config = c = checkpoint.config
        converted = convert(read_tensors(checkpoint, c), c, torch.float32, qkv=qkv, gate_up=gate_up)
        self.weights = dict(converted) | rope_tables(c, length, torch.float32)
        self.weights.setdefault("head.weight", self.weights["embedding"])
        if product == "packed":
            for name in [n for n in self.weights if n.endswith(".weight")]:
                self.weights |= pack(self.weights, name.removesuffix(".weight"))
        self.prefill_phase, self.decode = products.Prefill(c, "library", False), products.Decode(c, product, True)
        self.span = torch.arange(length)

    def prefill(self, ids, cache):
        """Logits [V] of one prompt's last token."""
        return self.prefill_phase(self.weights, ids[None], torch.tensor([len(ids)]), cache)[0]

    def cache(self, batch):
        c = self.config
        shape = (batch, c.num_key_value_heads, len(self.span) + 1, c.head_dim)
        return [torch.full(shape, math.nan) for _ in range(2 * c.num_hidden_layers)]  # what lies there must not matter


def assert_close(ours, theirs):
    """Within 1e-4 of the largest logit."""
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


@torch.no_grad()
def test_prefill_gives_transformers_logits_at_every_length(folder):
    theirs = reference(folder)(PROMPT[None]).logits[0]
    ours = Ours(folder)
    for length in (1, 2, 3, 17, 40):
        assert_close(ours.prefill(PROMPT[:length], ours.cache(1)), theirs[length - 1])


@torch.no_grad()
def test_prompts_read_together_give_what_each_gives_alone(folder):
    """What fills up the shorter ones touches neither their logits nor what decode then makes of their caches."""
    ours = Ours(folder)
    prompts = [PROMPT[:9], PROMPT[3:4], PROMPT[20:26]]
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=5)
    together, alone = ours.cache(3), ours.cache(3)
    logits = ours.prefill_phase(ours.weights, padded, lengths, together)
    for row, prompt in enumerate(prompts):
        assert_close(logits[row], ours.prefill(prompt, [c[row : row + 1] for c in alone]))
    tokens = torch.tensor([11, 12, 13])
    for step in range(4):
        args = (ours.weights, tokens + step, lengths + step, ours.span[: int(lengths.max()) + step + 1])
        assert_close(ours.decode(*args, together), ours.decode(*args, alone))


@torch.no_grad()
@pytest.mark.parametrize("product", ["library", "rows", "packed"])
def test_decode_gives_transformers_logits_and_greedy_tokens(folder, product):
    """Two sequences of different lengths in one batch, 12 steps each."""
    model, ours = reference(folder), Ours(folder, product)
    sequences = [PROMPT[:5], PROMPT[7:30]]
    cache = ours.cache(2)
    for row, ids in enumerate(sequences):
        ours.prefill(ids[:-1], [c[row : row + 1] for c in cache])
    for _ in range(12):
        tokens = torch.stack([ids[-1] for ids in sequences])
        positions = torch.tensor([len(ids) - 1 for ids in sequences])
        span = ours.span[: int(positions.max()) + 1]
        logits = ours.decode(ours.weights, tokens, positions, span, cache)
        theirs = torch.stack([model(ids[None]).logits[0, -1] for ids in sequences])
        assert_close(logits, theirs)
        chosen = theirs.argmax(-1)
        assert torch.equal(logits.argmax(-1), chosen)
        sequences = [torch.cat([ids, token[None]]) for ids, token in zip(sequences, chosen, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("joined", [{"qkv": False}, {"gate_up": False}], ids=str)
def test_joining_projections_changes_no_logit(checkpoint, joined):
    folder = checkpoint("llama", attention_bias=True, mlp_bias=True)
    whole, parts = Ours(folder), Ours(folder, **joined)
    results = [o.prefill(PROMPT, o.cache(1)) for o in (whole, parts)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 8])  # of x: a packed product takes four, two or one at once
@pytest.mark.parametrize("columns", [32, 30])  # a whole number of 32-bit words of int8, and not
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("vectors", ["AVX512", "AVX2"])
@pytest.mark.parametrize("product", ["library", "rows", "packed"])
def test_the_forms_of_a_product_give_the_same(product, vectors, dtype, columns, rows, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    stored = torch.randint(-127, 128, (48, columns)).to(dtype)
    stored[:, :4], stored[:, 4:8] = torch.tensor([-127, 127, -1, 0]), torch.tensor([0, -127, 127, -1])
    weights = {"it.weight": stored, "it.bias": torch.randn(48)}
    scale = torch.ones(48)
    if dtype == torch.int8:
        weights["it.scale"] = scale = torch.rand(48)
    if product == "packed":
        weights |= pack(weights, "it")
        packed = weights["it.weight.packed"]
        assert packed.shape[-1] == (8 if vectors == "AVX2" and packed.dtype == torch.float32 else 16)
    x = torch.randn(rows, columns)
    expected = torch.nn.functional.linear(x, stored * scale[:, None], weights["it.bias"])
    torch.testing.assert_close(matmul(weights, "it", x, product), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_weight_whose_rows_fill_no_blocks_is_multiplied_as_it_is(rows):
    weights, x = {"it.weight": torch.randn(50, 32)}, torch.randn(rows, 32)
    assert not pack(weights, "it")
    torch.testing.assert_close(matmul(weights, "it", x, "packed"), x @ weights["it.weight"].T, rtol=1e-5, atol=1e-4)


def test_int8_weights_are_off_by_at_most_half_a_step(checkpoint):
    found = find_checkpoint(str(checkpoint("llama", tie_word_embeddings=True)))
    settings = {"qkv": False, "gate_up": False}
    config = found.config
    plain = dict(convert(read_tensors(found, config), config, torch.float32, **settings))
    int8 = dict(convert(read_tensors(found, config), config, torch.float32, bits=8, **settings))
    scales = [name for name in int8 if name.endswith(".scale")]
    assert len(scales) == 7 * 2 + 1  # every product of two layers, and the head
    for name in scales:
        owner = name.removesuffix(".scale")
        weight = plain.get(f"{owner}.weight", plain["embedding"])
        step = weight.abs().amax(1, keepdim=True) / 127
        error = (int8[f"{owner}.weight"] * int8[name][:, None] - weight).abs()
        assert int8[f"{owner}.weight"].dtype == torch.int8
        assert (error <= step * 0.501).all()


@pytest.mark.parametrize("rows", [1, 3, 6, 8])
@pytest.mark.parametrize("vectors", ["AVX512", "AVX2"])
@pytest.mark.parametrize("product", ["library", "rows", "packed"])
def test_the_forms_of_a_product_with_int4_weights_give_the_same(product, vectors, rows, monkeypatch):
    """Every number from 0 to 15 stands at every place of a word, and groups differ in step and least value."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    numbers = (torch.arange(48)[:, None] + 5 * torch.arange(96)) % 16  # [N, K]; 5 and 16 have no common factor
    step, least = (torch.randint(1, 9, (48, 3)).half() / 8 for _ in range(2))
    step[0], least[1] = 0, 0
    words = sum(numbers.view(48, 12, 8)[..., place] << 4 * place for place in range(8))
    words = words.to(torch.uint32).view(torch.int32)
    weights = {"it.weight": words, "it.step": step, "it.least": -least, "it.bias": torch.randn(48)}
    if product == "packed":
        weights |= pack(weights, "it")
        assert weights["it.weight.packed"].shape[-1] == (8 if vectors == "AVX2" else 16)
    x = torch.randn(rows, 96)
    plain = (numbers.view(48, 3, 32) * step[..., None].float() - least[..., None].float()).flatten(1)
    torch.testing.assert_close(dense(weights, "it", torch.float32), plain, rtol=0, atol=0)
    expected = torch.nn.functional.linear(x, plain, weights["it.bias"])
    torch.testing.assert_close(matmul(weights, "it", x, product), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["step", "least"])
def test_every_fp16_number_that_int4_weights_share_keeps_its_value_when_packed(kind):
    """Those below fp16's least normal number too. All numbers of a weight are 1, and each input sees one column."""
    shared = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    shared = shared[shared.isfinite()].view(2048, 31)  # [N, K/32]
    other = "least" if kind == "step" else "step"
    weights = {"it.weight": torch.full((2048, 124), 0x11111111, dtype=torch.int32)}
    weights |= {f"it.{kind}": shared, f"it.{other}": torch.zeros_like(shared)}
    y = matmul(weights | pack(weights, "it"), "it", torch.eye(992)[::32], "packed")  # [31, N]
    assert torch.equal(y.T, shared.float())


def test_int4_weights_are_off_by_about_half_a_step_and_exact_where_they_lie_on_it(checkpoint):
    """Half a step of the group's range, and what fp16 rounds off step and least value."""
    found = find_checkpoint(str(checkpoint("llama", tie_word_embeddings=True)))
    config, settings = found.config, {"qkv": False, "gate_up": False}
    plain = dict(convert(read_tensors(found, config), config, torch.float32, **settings))
    int4 = dict(convert(read_tensors(found, config), config, torch.float32, bits=4, **settings))
    narrow = [name for name in int4 if int4[name].dtype == torch.int32]
    assert len(narrow) == 7 * 2 and int4["head.weight"].dtype == torch.int8  # every product of two layers
    for name in narrow:
        groups = plain[name].unflatten(1, (-1, 32))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        rounded = 2**-10 * torch.maximum(low.abs(), high - low)
        error = (dense(int4, name.removesuffix(".weight"), torch.float32).view_as(groups) - groups).abs()
        assert (error <= 0.501 * (high - low) / 15 + 2 * rounded).all()
    grid = (torch.arange(64 * 64).view(64, 64) * 7 % 16 - 3) / 4
    again = dict(convert([("model.layers.0.mlp.down_proj.weight", grid)], config, torch.float32, bits=4, **settings))
    assert torch.equal(dense(again, "layers.0.down", torch.float32), grid)


def test_rows_that_are_no_whole_number_of_groups_are_refused_as_int4(checkpoint):
    config = find_checkpoint(str(checkpoint("llama"))).config
    with pytest.raises(BuildError, match="multiple of 32") as refused:
        list(
            convert(
                [("model.layers.0.mlp.up_proj.weight", torch.zeros(4, 48))],
                config,
                torch.float32,
                bits=4,
                qkv=True,
                gate_up=False,
            )
        )
    assert "int8" in refused.value.fix


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_any_stored_type_of_weights_is_read(checkpoint, precision):
    from safetensors.torch import load_file, save_file

    folder = checkpoint("llama")
    path = folder / "model.safetensors"
    save_file({k: v.to(getattr(torch, precision)) for k, v in load_file(path).items()}, path)
    ours = Ours(folder)
    logits = ours.prefill(PROMPT, ours.cache(1))
    with torch.no_grad():
        assert_close(logits, reference(folder)(PROMPT[None]).logits[0, -1])


def test_weights_in_several_files_are_one_checkpoint(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(weight_files(tmp_path)) > 1
    whole, sharded = (tensors_of(find_checkpoint(str(f))) for f in (folder, tmp_path))
    assert whole.keys() == sharded.keys() and all(torch.equal(whole[k], sharded[k]) for k in whole)
    weight_files(tmp_path)[1].unlink()
    with pytest.raises(ModelError, match="is no file of this folder"):
        find_checkpoint(str(tmp_path)).check(64)


def test_dummy_weights_have_the_checkpoints_shapes_and_are_always_the_same(checkpoint):
    folder = checkpoint("qwen3")
    real = {name: tuple(t.shape) for name, t in tensors_of(find_checkpoint(str(folder))).items()}
    (folder / "model.safetensors").unlink()
    dummy = find_checkpoint(f"dummy:{folder}")
    one, other = tensors_of(dummy), tensors_of(dummy)
    assert {name: tuple(t.shape) for name, t in one.items()} == real
    assert all(torch.equal(one[name], other[name]) for name in real)
    assert dummy.config.parameter_count() == sum(torch.Size(shape).numel() for shape in real.values())


# ---- refused ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(checkpoint):
    return checkpoint("llama")


@pytest.fixture
def spoilt(good, tmp_path, monkeypatch):
    """A copy of a good checkpoint to spoil; compiling anything fails the test."""
    from helpers.backends.aot import backend as aot

    def never(*_):
        raise AssertionError("the build was started")

    monkeypatch.setattr(aot, "build", never)
    return shutil.copytree(good, tmp_path / "spoilt")


def change_config(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding window of 32"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part of each head"),
        ({"hidden_size": ...}, "asks for .128, 4096."),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "divide"),
        ({"hidden_size": 128}, "has shape"),
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+ of 'spoilt' is missing"),
        ({"attention_bias": True}, r"q_proj\.bias\S* of 'spoilt' is missing"),
        ({"model_type": "qwen3"}, "norm.* is missing"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_supported_is_refused_before_compiling(spoilt, changes, words):
    change_config(spoilt, **changes)
    with pytest.raises(ModelError, match=words) as refused:
        build(BuildRecipe(model=str(spoilt)), quiet=True)
    assert refused.value.fix


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)


def store_as_int8(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({k: v.to(torch.int8) for k, v in load_file(path).items()}, path)


def as_for_embeddings(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"pickles \(\*\.bin\)"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"),
            "git lfs pull",
        ),
        (truncate, "cannot be read"),
        (as_for_embeddings, "saved for embeddings"),
        (drop_tensor, r"layers\.1\.mlp\.up_proj\.weight' of 'spoilt' is missing"),
        (store_as_int8, "type I8"),
    ],
)
def test_damaged_files_are_refused_before_compiling(spoilt, spoil, words):
    spoil(spoilt)
    with pytest.raises(ModelError, match=words) as refused:
        build(BuildRecipe(model=str(spoilt)), quiet=True)
    assert refused.value.fix


@pytest.mark.parametrize(
    "name",
    ["storeis", "no/such-model", "a/b/c", "./nowhere", "~nobody-here/x/y", "x" * 5000, "a\0b", "dummy:no/such", "-/-"],
)
def test_an_unknown_model_is_refused_with_a_way_out(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError) as refused:
        build(BuildRecipe(model=name), quiet=True)
    assert refused.value.cause and refused.value.fix


def test_more_positions_than_the_model_has_are_refused_before_compiling(spoilt):
    with pytest.raises(ModelError, match="64 positions"):
        build(BuildRecipe(model=str(spoilt), max_input_len=32, max_seq_len=65), quiet=True)
