"""The engine on an NVIDIA GPU: run these with `make test-gpu`."""

import pytest
import torch
from conftest import limits

from helpers import BuildRecipe, SamplingParams, load, store
from helpers.models import BUNDLED
from helpers.stories import draw_corpus

pytestmark = pytest.mark.gpu

STORIES = draw_corpus(4, "gpu")
PROMPTS = [" ".join(story.text.split()[: 2 + 5 * i]) for i, story in enumerate(STORIES)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def fp32(built):
    with load(built(BuildRecipe(**limits(device="cuda")))) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


def test_greedy_tokens_are_those_of_transformers_on_the_cpu(fp32, reference):
    for prompt in PROMPTS:
        ids = fp32.tokenize(prompt)
        (answer,) = fp32.generate(prompt, GREEDY)
        expected = list(ids)
        with torch.no_grad():
            for _ in range(24):
                expected.append(reference(torch.tensor([expected])).logits[0, -1].argmax().item())
        assert answer.token_ids == expected[len(ids) :]


def test_a_batch_gives_what_each_prompt_gives_alone_however_often(fp32):
    for _ in range(4):
        for size in (2, 3, 4):
            together = fp32.generate(PROMPTS[:size], GREEDY)
            assert [a.token_ids for a in together] == [fp32.generate(p, GREEDY)[0].token_ids for p in PROMPTS[:size]]


def test_the_shortest_and_longest_prompts_and_a_full_cache(fp32, reference):
    story = fp32.tokenize(STORIES[0].text)
    for ids in (story[:1], story[:2], story[:64]):
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0, -1]
        assert ((fp32.logits(ids) - expected).abs().max() / expected.abs().max()).item() < 1e-3
        full = SamplingParams(temperature=0, max_tokens=256 - len(ids), ignore_eos=True)
        assert len(fp32.generate(ids, full)[0].token_ids) == 256 - len(ids)


def test_each_sequence_stops_at_its_own_end_token(fp32):
    ending = [1, *fp32.tokenize(STORIES[0].text)[-12:]]
    ended, other = fp32.generate([ending, PROMPTS[0]], SamplingParams(temperature=0, max_tokens=60))
    assert ended.finish_reason == "stop" and 2 not in ended.token_ids
    assert other.finish_reason == "length" and len(other.token_ids) == 60
    stream = [t.token_id for t in fp32.stream(ending, SamplingParams(temperature=0, max_tokens=60))]
    assert stream == ended.token_ids


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precision_keeps_logits_close(built, fp32, precision):
    with load(built(BuildRecipe(precision=precision, **limits(device="cuda", max_batch_size=1)))) as engine:
        for prompt in PROMPTS:
            exact = fp32.logits(prompt)
            assert ((engine.logits(prompt) - exact).abs().max() / exact.abs().max()).item() < 0.06


def test_an_engine_holds_its_weights_once(built, checkpoint):
    """1.1 times the weights: at a size where the graphs' own few megabytes are small beside them."""
    folder = checkpoint("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, vocab_size=32000)
    recipe = BuildRecipe(model=str(folder), precision="bf16", device="cuda", max_input_len=16, max_seq_len=48)
    engine = built(recipe)
    weights = (engine / "weights.safetensors").stat().st_size
    assert store.size(engine) <= 1.1 * weights


def test_closing_gives_the_memory_back(built):
    folder = built(BuildRecipe(**limits(device="cuda")))
    load(folder).close()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with load(folder) as engine:
            engine.generate(PROMPTS[:2], GREEDY)
    assert torch.cuda.memory_allocated() - before < 1e6
