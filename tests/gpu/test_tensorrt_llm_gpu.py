"""TensorRT-LLM itself, where it is installed: the first machine that has it proves the backend with `make gpu-check`.

Nobody has run these tests yet: no machine of ours could install TensorRT-LLM. The contract tests run everywhere.
"""

import pytest

from helpers import BuildRecipe, SamplingParams, inspect, load, store
from helpers.backends.tensorrt_llm import backend as tensorrt_llm
from helpers.engine import recipe_of
from helpers.machine import environments
from helpers.model.checkpoint import find_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        environments.python_of("trtllm") is None, reason="needs TensorRT-LLM 1.2.1: helpers env create trtllm"
    ),
]
PROMPTS = ["Once upon a time", "Hello, my name is", "Long ago", "The old man"]
GREEDY = SamplingParams(temperature=0, max_tokens=16)
TOLERANCE = 6e-2  # of the largest logit, as for the other backends in bf16


def recipe(**changes):
    limits = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 256}
    return BuildRecipe(**{"backend": "tensorrt_llm", "precision": "bf16", "device": "cuda", **limits, **changes})


@pytest.fixture(scope="module")
def folder(built):
    return built(recipe(options={"gather_generation_logits": True}))


@pytest.fixture(scope="module")
def reference():
    """transformers in fp32: the logits after each prompt."""
    with load(recipe(backend="pytorch", precision="fp32")) as model:
        return [model.logits(prompt) for prompt in PROMPTS]


def test_logits_are_those_of_transformers(folder, reference):
    with load(folder) as engine:
        for prompt, wanted in zip(PROMPTS, reference, strict=True):
            found = engine.logits(prompt)
            assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def test_generate_stream_and_batches_agree(folder):
    with load(folder) as engine:
        answers = engine.generate(PROMPTS, GREEDY)
        assert all(0 < len(a.token_ids) <= 16 for a in answers)
        streamed = [token.token_id for token in engine.stream(PROMPTS[0], GREEDY)]
        assert streamed == engine.generate(PROMPTS[0], GREEDY)[0].token_ids
        assert all(0 < a.metrics.ttft_s <= a.metrics.e2e_s for a in answers)
        drawn = SamplingParams(temperature=0.8, seed=7, max_tokens=16)
        assert engine.generate(PROMPTS[0], drawn)[0].token_ids == engine.generate(PROMPTS[0], drawn)[0].token_ids


@pytest.mark.parametrize("cpp", [False, True])
def test_model_runner_begins_as_the_llm_api_does(folder, cpp):
    with load(folder) as engine:
        ids = [engine.tokenize(prompt) for prompt in PROMPTS]
        wanted = [answer.token_ids for answer in engine.generate(ids, GREEDY)]
    answers = tensorrt_llm.model_runner(recipe_of(folder), folder, ids, GREEDY, cpp=cpp)
    assert [a[:1] for a in answers] == [w[:1] for w in wanted]


def test_the_layer_report_shows_a_plugin_for_the_attention_of_each_layer(folder):
    report = inspect(folder)
    plugins = [k for k in report.kernels if "gpt_attention" in k.name.lower() or "gptattention" in k.name.lower()]
    assert len(plugins) >= find_checkpoint("stories").config.num_hidden_layers
    assert len(report.kernels) == store.read_manifest(folder)["details"]["layers"]


def test_int8_weights_make_a_smaller_engine(folder, built):
    assert store.size(built(recipe(precision="int8"))) < store.size(folder)


def test_a_plugin_is_a_setting_that_builds(built):
    quick = built(recipe(options={"gemm_plugin": "auto", "use_fused_mlp": False}))
    with load(quick) as engine:
        assert engine.generate(PROMPTS[0], GREEDY)[0].token_ids


def test_its_pytorch_backend_gives_the_likeliest_token(reference):
    with load(recipe(backend="tensorrt_llm_pytorch")) as engine:
        for prompt, wanted in zip(PROMPTS, reference, strict=True):
            token = engine.generate(prompt, GREEDY)[0].token_ids[0]
            assert wanted[token] >= wanted.max() - TOLERANCE * wanted.abs().max()
