"""Families of models, compiled: the greedy tokens of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import BuildRecipe, SamplingParams, load

PROMPT = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_compiled_engine_gives_transformers_greedy_tokens(family, built, tiny_llama, tiny_engine, checkpoint):
    if family == "llama":
        folder, engine = tiny_llama, tiny_engine
    else:
        folder = checkpoint("qwen3", num_hidden_layers=1)
        limits = {"max_input_len": 16, "max_seq_len": 48, "device": "cpu", "optimization_level": 1, "num_threads": 1}
        engine = built(BuildRecipe(model=str(folder), **limits))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with load(engine) as running:
        for length in (1, 2, 16):
            prompt = PROMPT[:length]
            expected = list(prompt)
            for _ in range(20):
                with torch.no_grad():
                    expected.append(model(torch.tensor([expected])).logits[0, -1].argmax().item())
            assert running.generate(prompt, greedy)[0].token_ids == expected[length:]
