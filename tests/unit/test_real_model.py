"""smollm2 as `helpers model get` brought it, from wherever: a chat model that nobody here trained."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import BuildRecipe, SamplingParams, load
from helpers.backends.aot.graphs import empty_cache
from helpers.backends.aot.products import Decode
from helpers.backends.aot.stored import convert_weights, packed
from helpers.backends.aot.verify import check_graph
from helpers.errors import BuildError
from helpers.model import llama
from helpers.model.checkpoint import find_checkpoint, read_tensors
from helpers.model.tokenizer import load_tokenizer
from helpers.model.weights import rope_tables

pytestmark = pytest.mark.real_model

TEXTS = [
    "The capital of France is",
    "In 2024,  12 cats\n\n 345 dogs\t6\n7.",
    "Größe ½ ² 漢字 😀 👩‍🚀 naïve",
    "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return x  # it's 3 spaces:   .",
    "",
]


@pytest.fixture(scope="module")
def folder():
    return find_checkpoint("smollm2").folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' own model and tokenizer, used as its documentation says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_it_is_the_model_that_its_authors_describe():
    """Their card and their config.json on the Hub."""
    checkpoint = find_checkpoint("smollm2")
    checkpoint.check(8192)
    config = checkpoint.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.head_dim)
    assert (config.model_type, *shape) == ("llama", 30, 576, 1536, 64)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert config.rope == {"rope_type": "default", "rope_theta": 100000.0} and config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings and config.max_position_embeddings == 8192 and config.eos_token_ids == (2,)
    assert config.parameter_count() == 134_515_008


def test_transformers_cuts_texts_as_we_do(theirs, tokenizer):
    for text in TEXTS:
        assert theirs[1](text)["input_ids"] == tokenizer.encode(text), text


def test_special_tokens_are_what_the_model_was_trained_with(tokenizer):
    ids = tokenizer.encode("<|endoftext|><|im_start|>user<|im_end|>")
    assert (ids[:2], ids[-1]) == ([0, 1], 2) and tokenizer.decode(ids) == "user"


# Without digits. Its vocabulary lacks some control characters, and bytes that no assigned character has.
WORDS = st.text(st.sampled_from(" \n\ta'sé漢😀.") | st.characters(exclude_categories=["N", "Cs", "Cc", "Cn"]))


@given(WORDS, WORDS, st.integers(0, 9))
@settings(deadline=None)
def test_every_digit_stands_alone(tokenizer, before, after, digit):
    """The rule by which SmolLM's tokenizer was trained; a text comes back as it was."""
    text = f"{before}{digit}{after}"
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode(before) + tokenizer.encode(str(digit)) + tokenizer.encode(after)
    assert tokenizer.decode(ids) == text


def test_it_knows_what_such_a_model_knows(theirs):
    """A wrong weight, norm or rotation makes it talk nonsense."""
    model, tokenizer = theirs
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_the_backend_pytorch_answers_as_transformers(theirs):
    model, tokenizer = theirs
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    recipe = BuildRecipe(model="smollm2", backend="pytorch", device="cpu", max_input_len=64, max_seq_len=128)
    with load(recipe) as engine:
        answer = engine.generate([TEXTS[0]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0]
    assert answer.token_ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_the_check_of_a_build_takes_rounding_for_what_it_is(folder, precision):
    """Thirty layers make a last bit large, behind a cache of random numbers in bf16 a tenth to half of the largest
    logit. Behind one that the model has filled it is hundredths, and what is wrong by little is more."""
    checkpoint = find_checkpoint("smollm2")
    config, recipe = (
        checkpoint.config,
        BuildRecipe(precision=precision, device="cpu", max_input_len=64, max_seq_len=128),
    )
    weights = convert_weights(recipe, read_tensors(checkpoint, config), config, "cpu")
    weights |= rope_tables(config, 128, weights["norm"].dtype)
    cache = empty_cache(recipe, config, "cpu", weights["norm"].dtype, 1)
    module, right = Decode(config, "packed", True), packed(dict(weights), recipe, "cpu")
    with torch.no_grad():
        check_graph("right", lambda *inputs: module(right, *inputs), llama.Decode(config), weights, cache, 128)
        wrong = right | {"norm": weights["norm"] * 1.2}
        with pytest.raises(BuildError, match="computes something else"):
            check_graph("wrong", lambda *inputs: module(wrong, *inputs), llama.Decode(config), weights, cache, 128)
