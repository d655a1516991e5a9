"""Contract tests: what a recipe may ask of TensorRT-LLM 1.2.1, and how sampling is said to it. The names are compared
with those of the stand-in (contract/README.md); TensorRT-LLM itself did not run."""

import json

import pytest
from conftest import in_standin, trtllm_recipe

from helpers import recipe as recipes
from helpers.backends.tensorrt_llm.worker import runner_settings, sampling_settings
from helpers.errors import RecipeError
from helpers.recipe import tensorrt_llm as options

# Recipes


def test_every_field_of_plugin_config_is_taken_or_refused_with_a_reason():
    """plugin/plugin.py: PluginConfig drops unknown names without a word (extra="ignore")."""
    code = "import json; from tensorrt_llm.plugin import PluginConfig as P; print(json.dumps(list(P.model_fields)))"
    fields = set(json.loads(in_standin(code).splitlines()[-1]))  # the first line is the library's own, as for real
    assert fields == set(options.PLUGINS) | set(options.REFUSED)
    assert not set(options.PLUGINS) & set(options.REFUSED)
    assert in_standin("from tensorrt_llm.plugin import PluginConfig as P; P(gemm_plugn='auto'); print('silent')")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"gemm_plugn": "auto"}}, "Did you mean 'gemm_plugin'"),
        ({"options": {"gemm_plugin": "fp17"}}, "bfloat16"),
        ({"options": {"context_fmha": "enable"}}, "true or false"),
        ({"options": {"reduce_fusion": True}}, "several GPUs"),
        ({"options": {"norm_quant_fusion": True}}, "NVFP4"),
        ({"options": {"gemm_swiglu_plugin": "fp8"}}, "precision='fp8'"),
        ({"options": {"use_fused_mlp": True}, "fusion": {"gate_up": False}}, "contradicts"),
        ({"options": {"calib_dataset": "cnn_dailymail"}}, "not calibrated"),
        ({"precision": "int8", "options": {"calib_batches": 8}}, "not calibrated"),
        ({"precision": "fp8", "model": "dummy:stories", "options": {"calib_batches": 8}}, "not calibrated"),
        ({"options": {"kv_cache_quant_algo": "INT8"}}, "calibrate this precision too"),
        ({"precision": "int8", "options": {"kv_cache_quant_algo": "FP8", "calib_batches": 8}}, "this precision too"),
        ({"precision": "int4", "options": {"calib_batches": 33}}, "32 at most"),
        ({"options": {"streamingllm": True, "use_paged_context_fmha": True}}, "would do nothing"),
        ({"precision": "fp8", "optimization_level": 0, "options": {"manage_weights": False}}, "would do nothing"),
        ({"options": {"max_num_tokens": 8}}, "64 or more"),
        ({"options": {"free_gpu_memory_fraction": 1.5}}, "between 0 and 1"),
        ({"fusion": {"kernels": False}}, "no switch"),
        ({"decode_batch_sizes": [2]}, "decode_batch_sizes"),
        ({"optimization_level": 2}, "fast_build"),
        ({"device": "cpu"}, "aot"),
    ],
)
def test_what_tensorrt_llm_cannot_do_is_refused_when_the_recipe_is_made(changes, words):
    with pytest.raises(RecipeError) as caught:
        trtllm_recipe(**changes)
    assert words in str(caught.value)


def test_options_stand_in_a_section_named_after_the_backend(tmp_path):
    made = trtllm_recipe(options={"gemm_plugin": "auto", "multiple_profiles": True})
    text = recipes.write(made, tmp_path / "r.toml").read_text()
    assert "[tensorrt_llm]" in text
    assert recipes.read(tmp_path / "r.toml") == made
    (tmp_path / "r.toml").write_text(text.replace('backend = "tensorrt_llm"', 'backend = "aot"'))
    with pytest.raises(RecipeError, match="does not belong"):
        recipes.read(tmp_path / "r.toml")


# Sampling


def test_greedy_and_drawing_are_said_so_that_both_mean_what_we_mean():
    """sampling_params.py, _greedy_decoding: without top_k and top_p it is greedy at any temperature; seed None is 0."""
    fields = {
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "max_tokens": 5,
        "ignore_eos": False,
        "end_ids": [2, 3],
    }
    greedy = sampling_settings({**fields, "temperature": 0.0, "seed": None})
    assert greedy["top_k"] == 1 and "temperature" not in greedy
    drawn = [sampling_settings({**fields, "temperature": 0.8, "seed": None}) for _ in range(2)]
    assert (drawn[0]["top_k"], drawn[0]["top_p"], drawn[0]["temperature"]) == (0, 1.0, 0.8)
    assert drawn[0]["seed"] != drawn[1]["seed"]  # without a seed, a new one each time
    assert sampling_settings({**fields, "temperature": 0.8, "seed": 7})["seed"] == 7
    assert (greedy["end_id"], greedy["stop_token_ids"]) == (2, [3])


def test_every_sampling_setting_is_a_field_of_sampling_params():
    """api_stability/references_committed/sampling_params.yaml; runtime/generation.py."""
    fields = {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "max_tokens": 5, "ignore_eos": False, "end_ids": [2]}
    for temperature in (0.0, 0.7):
        ours = {**fields, "temperature": temperature, "seed": 1}
        code = f"from tensorrt_llm import SamplingParams; print(SamplingParams(**{sampling_settings(ours)!r}))"
        assert "SamplingParams(" in in_standin(code)
        code = f"from tensorrt_llm.runtime import SamplingConfig as C; print(C(**{runner_settings(ours)!r}))"
        assert "end_id=2" in in_standin(code)
