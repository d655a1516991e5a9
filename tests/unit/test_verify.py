"""The check after compiling sees every part of a graph: each is damaged in turn, and the check must refuse it.

Nothing is compiled. What is checked is the module that would be, run by PyTorch, in every form of its products.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from helpers import BuildRecipe
from helpers.backends.aot.graphs import empty_cache
from helpers.backends.aot.products import TILE, Decode, Prefill
from helpers.backends.aot.stored import convert_weights, packed
from helpers.backends.aot.verify import check_graph, relative_error
from helpers.errors import BuildError
from helpers.model import llama
from helpers.model.config import ModelConfig

CONFIG = ModelConfig(
    model_type="qwen3",  # its heads have norms too
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope={"rope_type": "default", "rope_theta": 10000.0},
    sliding_window=None,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    eos_token_ids=(2,),
)
LONGEST = 1200
PHASES = [(Prefill, "library"), (Prefill, "packed"), (Decode, "library"), (Decode, "rows"), (Decode, "packed")]


def weights_of(precision):
    from helpers.model.checkpoint import expected_shapes
    from helpers.model.weights import rope_tables

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape).normal_(float("norm" in name), 0.2, generator=generator)
        for name, shape in expected_shapes(CONFIG).items()
    }
    recipe = BuildRecipe(precision=precision, device="cpu")
    weights = convert_weights(recipe, tensors.items(), CONFIG, "cpu")
    return weights | rope_tables(CONFIG, LONGEST, weights["norm"].dtype)


def check(kind, product, precision="fp32", damage=None, batch=3, limit=32, swap=None):
    """Check a module, with some of its weights damaged, against the decoder with the right ones."""
    weights = weights_of(precision)
    module = kind(CONFIG, product, True)
    for name, function in (swap or {}).items():
        setattr(module, name, function(module))
    recipe = BuildRecipe(precision=precision, device="cpu", max_input_len=32, max_seq_len=LONGEST)
    damaged = dict(weights)
    for name, value in (damage(weights) if damage else {}).items():
        assert name in weights and not torch.equal(value, weights[name])
        damaged[name] = value
    if product == "packed":
        damaged = packed(damaged, recipe, "cpu")

    def run(*inputs):
        return module(damaged, *inputs)

    cache = empty_cache(recipe, CONFIG, "cpu", weights["norm"].dtype, batch)
    reference = (llama.Prefill if kind is Prefill else llama.Decode)(CONFIG)
    with torch.no_grad():
        check_graph("graph", run, reference, weights, cache, limit)


@pytest.mark.parametrize(("kind", "product"), PHASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_right_graph_passes(kind, product, precision, batch):
    for limit in (1, 2, 3, 32) if kind is Prefill else (3, 32):
        check(kind, product, precision, batch=batch, limit=limit)


# ---- damaged weights --------------------------------------------------------------------------------------


def scaled(name, factor=1.2):
    return lambda weights: {name: weights[name] * factor}


def upside_down(name):
    return lambda weights: {name: weights[name].flip(0)}


def one_row_of_scales(weights):
    scale = weights["layers.1.down.scale"].clone()
    scale[5] *= 2
    return {"layers.1.down.scale": scale}


DAMAGED_WEIGHTS = {
    "rotation backwards": lambda weights: {"rope.sin": -weights["rope.sin"]},
    "rotation off by one": lambda weights: {name: weights[name].roll(1, 0) for name in ("rope.cos", "rope.sin")},
    "no rotation": lambda w: {"rope.cos": torch.ones_like(w["rope.cos"]), "rope.sin": torch.zeros_like(w["rope.sin"])},
    **{
        f"weight {name}": upside_down(f"{name}.weight")
        for name in ("layers.0.qkv", "layers.1.o", "layers.0.gate_up", "head")
    },
    **{f"bias {name}": scaled(f"{name}.bias") for name in ("layers.0.qkv", "layers.1.down")},
    **{f"norm {name}": scaled(name) for name in ("layers.1.attention_norm", "layers.0.mlp_norm", "norm")},
    **{f"norm of heads {name}": scaled(f"layers.1.{name}") for name in ("q_norm", "k_norm")},
    "embedding": lambda weights: {"embedding": weights["embedding"].roll(1, 0)},
}


@pytest.mark.parametrize(("kind", "product"), PHASES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("what", DAMAGED_WEIGHTS)
def test_a_damaged_weight_is_refused(kind, product, batch, what):
    with pytest.raises(BuildError, match="computes something else"):
        check(kind, product, damage=DAMAGED_WEIGHTS[what], batch=batch)


@pytest.mark.parametrize(("kind", "product"), PHASES)
def test_one_damaged_scale_of_int8_weights_is_refused(kind, product):
    with pytest.raises(BuildError, match="computes something else"):
        check(kind, product, "int8", damage=one_row_of_scales)


def int4_damaged(kind, change):
    """One number that a group of int4 weights shares, or one word of it."""

    def damage(weights):
        tensor = weights[f"layers.1.down.{kind}"].clone()
        tensor[5, 1] = change(tensor[5, 1])
        return {f"layers.1.down.{kind}": tensor}

    return damage


@pytest.mark.parametrize(("kind", "product"), PHASES)
@pytest.mark.parametrize(
    "damage",
    [
        int4_damaged("weight", lambda word: word.bitwise_not()),
        int4_damaged("step", lambda step: step * 2),
        int4_damaged("least", lambda least: -least),
    ],
    ids=["weight", "step", "least"],
)
def test_one_damaged_group_of_int4_weights_is_refused(kind, product, damage):
    with pytest.raises(BuildError, match="computes something else"):
        check(kind, product, "int4", damage=damage)


# ---- damaged arithmetic -----------------------------------------------------------------------------------


def attention_with(**changed):
    """The module's attention, where one function that it calls is another."""

    def make(module):
        plain = module.attention

        def attention(*inputs):
            with pytest.MonkeyPatch.context() as patch:
                for name, function in changed.items():
                    owner = F if name == "scaled_dot_product_attention" else torch.Tensor
                    patch.setattr(owner, name, function(getattr(owner, name)))
                return plain(*inputs)

        return attention

    return make


def sees_everything(module):
    if isinstance(module, Prefill):
        return attention_with(
            scaled_dot_product_attention=lambda plain: lambda q, k, v, is_causal: plain(q, k, v, is_causal=False)
        )(module)
    return attention_with(masked_fill=lambda plain: lambda scores, mask, value: scores)(module)


def forgets_what_lies_far_back(module, reach=20):
    if isinstance(module, Prefill):

        def near(plain):
            def attention(q, k, v, is_causal):
                back = torch.arange(q.shape[-2])[:, None] - torch.arange(q.shape[-2])
                return plain(q, k, v, attn_mask=(back >= 0) & (back < reach))

            return attention

        return attention_with(scaled_dot_product_attention=near)(module)

    def attention(q, k, v, keys, values, positions, hidden):
        far = torch.arange(hidden.shape[1]) <= positions[:, None] - reach
        return type(module).attention(module, q, k, v, keys, values, positions, hidden | far)

    return attention


@pytest.mark.parametrize(("kind", "reach"), [(Prefill, 200), (Prefill, 700), (Decode, 200), (Decode, 700)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_that_goes_wrong_only_far_into_a_text_is_refused(kind, reach, batch):
    """As where a long cache is read in pieces side by side, and the later ones are lost."""
    swap = {"attention": lambda module: forgets_what_lies_far_back(module, reach)}
    with pytest.raises(BuildError, match="computes something else"):
        check(kind, "library", batch=batch, limit=LONGEST, swap=swap)


def loses_itself_in_the_last_layer(slot):
    """One row of each tile of a prompt does not see its own token, where only its logits can tell."""

    def make(module):
        plain, layers = module.attention, itertools.cycle([False] * (CONFIG.num_hidden_layers - 1) + [True])

        def others(sdpa):
            def attention(q, k, v, is_causal):
                at = torch.arange(q.shape[-2])
                return sdpa(q, k, v, attn_mask=(at[:, None] >= at) & ~((at[:, None] == at) & (at % TILE == slot)))

            return attention

        damaged = attention_with(scaled_dot_product_attention=others)(module)
        return lambda *inputs: (damaged if next(layers) else plain)(*inputs)

    return {"attention": make}


def always_the_last_but_one(module):
    return lambda weights, x, lengths: module.logits(weights, x[:, -2])


def no_whole_register(module):
    """Loops over a length take 16 numbers at a time, and what is left over gets lost."""

    def prefill(q, k, v, keys, values, positions):
        return type(module).attention(module, q, k, v, keys, values, positions) * (1 if len(positions) % 16 == 0 else 2)

    def decode(q, k, v, keys, values, positions, hidden):
        left_over = torch.arange(hidden.shape[1]) >= max(1, hidden.shape[1] // 16 * 16)
        return type(module).attention(module, q, k, v, keys, values, positions, hidden | left_over)

    return prefill if isinstance(module, Prefill) else decode


@pytest.mark.parametrize(
    ("kind", "swap"),
    [
        *[(Prefill, loses_itself_in_the_last_layer(slot)) for slot in range(TILE)],
        (Prefill, {"end": always_the_last_but_one}),
        (Prefill, {"attention": no_whole_register}),
        (Decode, {"attention": no_whole_register}),
    ],
    ids=[*[f"row {slot} of a tile" for slot in range(TILE)], "end of a prompt", "odd prompt", "odd cache"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_that_is_right_for_some_lengths_is_refused(kind, swap, batch):
    with pytest.raises(BuildError, match="computes something else"):
        check(kind, "library", batch=batch, swap=swap)


def scaled_wrongly(module):
    if isinstance(module, Prefill):
        return attention_with(
            scaled_dot_product_attention=lambda plain: lambda *qkv, is_causal: plain(*qkv, is_causal=is_causal, scale=1)
        )(module)
    return lambda q, *rest: type(module).attention(module, q * math.sqrt(2), *rest)


def groups_mixed_up(module):
    """Query heads 0 1 2 3 read the keys and values of heads 0 1 0 1, not 0 0 1 1."""
    return lambda q, *rest: type(module).attention(module, q[:, [0, 2, 1, 3]], *rest)


def writes_elsewhere(module):
    def attention(q, k, v, keys, values, positions, *rest):
        return type(module).attention(module, q, k, v, keys, values, positions.flip(0), *rest)

    return attention


def no_values_kept(module):
    def attention(q, k, v, keys, values, *rest):
        return type(module).attention(module, q, k, v, keys, values.clone(), *rest)

    return attention


DAMAGED_ARITHMETIC = {
    "mask": {"attention": sees_everything},
    "reach": {"attention": forgets_what_lies_far_back},
    "scale": {"attention": scaled_wrongly},
    "grouping of heads": {"attention": groups_mixed_up},
    "positions in the cache": {"attention": writes_elsewhere},
    "values in the cache": {"attention": no_values_kept},
    "residual": {
        "add": lambda module: lambda w, name, h, x: module.matmul(w, name, h) + (x if name.endswith(".o") else 0)
    },
    "gate": {"gated": lambda module: lambda *inputs: type(module).gated(module, *inputs).neg()},
}


@pytest.mark.parametrize(("kind", "product"), [(Prefill, "library"), (Prefill, "packed"), (Decode, "library")])
@pytest.mark.parametrize("what", DAMAGED_ARITHMETIC)
def test_damaged_arithmetic_is_refused(kind, product, what):
    with pytest.raises(BuildError, match="computes something else"):
        check(kind, product, swap=DAMAGED_ARITHMETIC[what])


def test_logits_of_another_token_are_refused():
    def one_too_early(module):
        return lambda weights, x: Prefill.logits(module, weights, x.roll(1, 0))

    with pytest.raises(BuildError, match="computes something else"):
        check(Prefill, "library", swap={"logits": one_too_early})


# ---- numbers that are no measure --------------------------------------------------------------------------


def test_a_row_of_zeros_in_the_embedding_and_a_model_of_zeros_are_no_fault():
    """transformers starts the padding token's embedding at zero: its logits are all 0, and 0/0 is no error."""
    zero = torch.zeros(3, 5)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 0.5, zero) == 0.5
    assert relative_error(zero.log() - zero.log(), zero) == math.inf  # NaN


def test_a_graph_that_gives_no_numbers_is_refused():
    with pytest.raises(BuildError, match="computes something else"):
        check(Decode, "rows", damage=scaled("norm", math.nan))


def test_weights_that_are_no_numbers_are_refused_by_name():
    reference = llama.Decode(CONFIG)
    weights = weights_of("fp32")
    weights["norm"] = weights["norm"] * math.nan
    cache = [torch.zeros(1, 2, 49, 16) for _ in range(4)]
    with torch.no_grad(), pytest.raises(BuildError, match="not finite"):
        check_graph("graph", lambda *inputs: reference(weights, *inputs), reference, weights, cache, 32)
