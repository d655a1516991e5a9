"""An engine of smollm2, the real chat model: cut to its first layers, so that the build stays short."""

import json
import shutil

import pytest
import torch
from conftest import limits
from safetensors.torch import load_file, save_file

from helpers import BuildRecipe, SamplingParams, load, store
from helpers.engine import locate
from helpers.model.checkpoint import TOKENIZER_FILES, find_checkpoint

pytestmark = pytest.mark.real_model

LAYERS = 2
PROMPTS = [
    "The capital of France is",
    "In 2024,  12 cats and",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A machine whose "smollm2" is the first layers of it, with its own embedding, last norm and tokenizer."""
    folder, source = tmp_path / "smollm2", find_checkpoint("smollm2").folder
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    tensors = load_file(source / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.") or int(n.split(".")[2]) < LAYERS}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("COURSE_MODELS", str(tmp_path))
    return folder


def test_an_engine_of_the_real_model_gives_transformers_greedy_tokens(cut, built):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cut)
    model = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32).eval()
    recipe = BuildRecipe(model="smollm2", optimization_level=0, num_threads=1, **limits(max_batch_size=1, max_seq_len=128))
    folder = built(recipe)
    assert folder.name.startswith("smollm2-aot-fp32-b1-") and locate(recipe) == folder
    assert store.read_manifest(folder)["recipe"]["model"] == "smollm2"
    with load(folder) as engine:
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                expected = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, eos_token_id=-1
                )[0, ids.shape[1] :]
            answer = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))[0]
            assert answer.prompt_token_ids == ids[0].tolist()
            assert answer.token_ids == expected.tolist(), prompt
