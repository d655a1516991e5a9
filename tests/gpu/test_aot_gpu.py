"""The engine on an NVIDIA GPU: run these with `make test-gpu`."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import GREEDY, limits

from helpers import BuildRecipe, SamplingParams, inspect, load, store
from helpers.backends.aot import early_start
from helpers.backends.aot import engine as aot_engine
from helpers.machine import hardware
from helpers.model.config import load_config
from helpers.model.stories import draw_corpus
from helpers.model.weights import GROUP, convert, dense

pytestmark = pytest.mark.gpu

STORIES = draw_corpus(4, "gpu")
PROMPTS = [" ".join(story.text.split()[: 2 + 5 * i]) for i, story in enumerate(STORIES)]


@pytest.fixture(scope="module")
def folders(checkpoint):
    """Checkpoints that are not the bundled one."""
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 32000}
    return {"qwen2": checkpoint("qwen2"), "qwen3": checkpoint("qwen3"), "large": checkpoint("llama", **large)}


@pytest.fixture(scope="module")
def engine_of(built, folders):
    """engine_of(model, precision): its folder, or what its build raised. Several builds at a time: each waits for the
    processes of its graphs."""

    def recipe(model, precision):
        if model == "stories":
            return BuildRecipe(model, precision=precision, **limits(device="cuda"))
        return BuildRecipe(str(folders[model]), precision=precision, device="cuda", max_input_len=16, max_seq_len=48)

    wanted = [("stories", "fp32"), ("stories", "bf16"), ("stories", "int8"), ("stories", "int4"), ("large", "bf16")]
    wanted += [(family, precision) for family in ("qwen2", "qwen3") for precision in ("fp32", "int8")]
    with ThreadPoolExecutor(max(1, hardware.free_cores() // 4)) as pool:
        building = {each: pool.submit(built, recipe(*each)) for each in wanted}
    return lambda *each: building[each].result()


@pytest.fixture(scope="module")
def fp32(engine_of):
    with load(engine_of("stories", "fp32")) as engine:
        yield engine


def test_greedy_tokens_are_those_of_transformers_on_the_cpu(fp32, stories_reference):
    reference, _ = stories_reference
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


def test_the_shortest_and_longest_prompts_and_a_full_cache(fp32, stories_reference):
    reference, _ = stories_reference
    story = fp32.tokenize(STORIES[0].text)
    for ids in (story[:1], story[:2], story[:64]):
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0, -1]
        assert ((fp32.logits(ids) - expected).abs().max() / expected.abs().max()).item() < 1e-3
        full = SamplingParams(temperature=0, max_tokens=256 - len(ids), ignore_eos=True)
        assert len(fp32.generate(ids, full)[0].token_ids) == 256 - len(ids)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_kernels_that_start_early_change_no_token(engine_of, monkeypatch, precision):
    """What a kernel reads before it waits must be nobody's work of this step."""
    if torch.cuda.get_device_capability() < early_start.CAPABILITY:
        pytest.skip("this GPU has no programmatic dependent launch (compute capability 9.0)")
    folder, edges, long = engine_of("stories", precision), [], SamplingParams(0, max_tokens=190, ignore_eos=True)
    monkeypatch.setattr(aot_engine, "start_early", lambda graph: 0)
    with load(folder) as plain:
        monkeypatch.setattr(aot_engine, "start_early", lambda graph: edges.append(early_start.start_early(graph)))
        with load(folder) as early:
            for prompts in (PROMPTS[:1], PROMPTS):
                reference = [answer.token_ids for answer in plain.generate(prompts, long)]
                for _ in range(5):
                    assert [answer.token_ids for answer in early.generate(prompts, long)] == reference
    layers = load_config(folder).num_hidden_layers
    assert edges[0] == 5 * layers  # five kernels a layer and the head: between each two of them


def test_each_sequence_stops_at_its_own_end_token(fp32):
    ending = [1, *fp32.tokenize(STORIES[0].text)[-12:]]
    ended, other = fp32.generate([ending, PROMPTS[0]], SamplingParams(temperature=0, max_tokens=60))
    assert ended.finish_reason == "stop" and 2 not in ended.token_ids
    assert other.finish_reason == "length" and len(other.token_ids) == 60
    stream = [t.token_id for t in fp32.stream(ending, SamplingParams(temperature=0, max_tokens=60))]
    assert stream == ended.token_ids


def close(ours, reference, share=2e-2):
    assert ((ours.float() - reference.float()).abs().max() / reference.float().abs().max()).item() < share


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_lower_precision_keeps_logits_close_in_both_phases(engine_of, fp32, precision):
    with load(engine_of("stories", precision)) as engine:
        for prompt in PROMPTS:
            ids = fp32.tokenize(prompt)
            exact = fp32.logits(ids)
            close(engine.logits(ids), exact, 0.06)
            for others in ([], PROMPTS[:2]):  # alone, and as one of a batch: two decode graphs
                engine.prefill([ids[:-1], *map(fp32.tokenize, others)])
                tokens = torch.tensor([ids[-1]] + [5] * len(others), device="cuda")
                close(engine.decode(tokens)[0].cpu(), exact, 0.06)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # biases; norms of queries and keys
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_decode_step_gives_what_prefill_gives_for_other_families(engine_of, folders, family, precision):
    with load(engine_of(family, precision)) as engine:
        ids = [3, 14, 15, 92, 65]
        expected = engine.logits(ids)
        engine.prefill([ids[:-1]])
        share = 1e-3 if precision == "fp32" else 0.06
        close(engine.decode(torch.tensor(ids[-1:], device="cuda"))[0].cpu(), expected, share)
        if precision == "fp32":
            from transformers import AutoModelForCausalLM

            with torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
                close(expected, model(torch.tensor([ids])).logits[0, -1], 1e-3)


def test_the_report_says_what_our_kernels_do(engine_of):
    """Of each layer four products and attention; and the head's product."""
    report = inspect(engine_of("stories", "fp32")).of("decode_b1")
    ours = [kernel for kernel in report.kernels if kernel.kind == "ours"]
    assert len(ours) == 5 * 6 + 1 and min(len(kernel.fused) for kernel in ours) > 2
    kinds = {operation.name: operation.op for operation in report.operations}
    done = [kinds[name] for kernel in ours for name in kernel.fused]
    assert done.count("rsqrt") == 2 * 6 + 1 and done.count("silu") == done.count("amax") == 6


def test_an_engine_holds_its_weights_once(engine_of):
    """1.1 times the weights: at a size where the graphs' own few megabytes are small beside them."""
    engine = engine_of("large", "bf16")
    weights = (engine / "weights.safetensors").stat().st_size
    assert store.size(engine) <= 1.1 * weights


def test_closing_gives_the_memory_back(engine_of):
    folder = engine_of("stories", "fp32")
    for turn in range(4):
        with load(folder) as engine:
            engine.generate(PROMPTS[:2], GREEDY)
        if turn == 0:  # cuBLAS keeps a workspace for each stream, for good
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() - before < 1e6


@pytest.mark.parametrize("columns, rows", [(2048, 256), (5632, 31), (100, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matvec_is_the_product_with_its_neighbours(columns, rows, dtype):
    from helpers.backends.aot import gpu_kernels
    from helpers.model import llama

    torch.manual_seed(0)
    x, norm, bias, residual, weight = (
        torch.randn(*shape, device="cuda", dtype=dtype)
        for shape in ((1, columns), (columns,), (2 * rows,), (1, rows), (2 * rows, columns))
    )
    share = 1e-4 if dtype == torch.float32 else 2e-2
    normed = llama.rms_norm(x, norm, 1e-5)
    gate, up = torch.nn.functional.linear(normed, weight, bias).chunk(2, -1)
    ours = gpu_kernels.matvec(x, weight, None, None, None, bias, norm, 1e-5, residual, True)
    close(ours, torch.nn.functional.silu(gate) * up + residual, share)
    # small weights; x is then taken as a 16-bit integer
    share, normed = max(share, 1e-3), llama.rms_norm(x.float(), norm.float(), 1e-5)
    narrow, scale = (weight * 30).round().clamp(-127, 127).to(torch.int8), torch.rand(2 * rows, device="cuda")
    kinds = [((narrow, scale, None, None), narrow.float() * scale[:, None])]
    if columns % GROUP == 0:
        source = [("model.layers.0.mlp.down_proj.weight", weight)]
        words = dict(convert(source, None, torch.float32, bits=4, qkv=False, gate_up=False))
        of_words = [words[f"layers.0.down.{kind}"] for kind in ("weight", "step", "least")]
        kinds += [((of_words[0], None, *of_words[1:]), dense(words, "layers.0.down", torch.float32))]
    for stored, wide in kinds:
        ours = gpu_kernels.matvec(x, *stored, None, None, 0.0, None, False)
        close(ours, x.float() @ wide.T, share)
        gate, up = torch.nn.functional.linear(normed, wide, bias.float()).chunk(2, -1)
        ours = gpu_kernels.matvec(x, *stored, bias, norm, 1e-5, residual, True)
        close(ours, torch.nn.functional.silu(gate) * up + residual, share)


@pytest.mark.parametrize("columns, rows", [(2048, 256), (5632, 31), (100, 7), (512, 20000)])
@pytest.mark.parametrize("batch", [2, 8, 33, 64])
def test_the_parts_of_a_split_product_add_up(columns, rows, batch):
    from helpers.backends.aot import gpu_kernels

    torch.manual_seed(0)
    x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    for stored in (weight, (weight * 30).round().clamp(-127, 127).to(torch.int8)):
        parts = gpu_kernels.split_matmul(x, stored)
        close(parts.sum(0), x.double() @ stored.double().T, 1e-4)


@pytest.mark.parametrize("heads, kv_heads, size", [(32, 4, 64), (6, 6, 128), (4, 1, 32)])
@pytest.mark.parametrize("length", [64, 257, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_is_that_of_the_decoder(heads, kv_heads, size, length, dtype):
    from helpers.backends.aot import gpu_kernels
    from helpers.model import llama

    torch.manual_seed(0)
    for positions in ([length - 1, 0, length // 2], [3]):
        at = torch.tensor(positions, device="cuda")
        projected, keys, values, cos, sin = (
            torch.randn(*shape, device="cuda", dtype=dtype)
            for shape in (
                (len(at), heads + 2 * kv_heads, size),
                *[(len(at), kv_heads, length, size)] * 2,
                *[(length, size)] * 2,
            )
        )
        copies = keys.clone(), values.clone()
        ours = gpu_kernels.decode_attention(projected.flatten(1), cos, sin, keys, values, at)
        q, k, v = projected.split((heads, kv_heads, kv_heads), 1)
        q, k = (llama.rotate(x, cos[at][:, None], sin[at][:, None]) for x in (q, k))
        future = torch.arange(length, device="cuda")[None] > at[:, None]
        reference = llama.Decode.attention(None, q, k, v, *copies, at, future)
        share = 1e-4 if dtype == torch.float32 else 2e-2
        for mine, other in ((ours, reference), (keys, copies[0]), (values, copies[1])):
            close(mine, other, share)
