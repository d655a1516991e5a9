"""Every backend beside transformers: the same tokens, whatever the batch, the phase or the way of asking."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from conftest import limits

from helpers import BuildRecipe, SamplingParams, build, inspect, load, store
from helpers.errors import EngineMismatch, InputError, LimitError, WorkerError
from helpers.models import BUNDLED
from helpers.stories import draw_corpus

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
STORIES = draw_corpus(20, "engines")
# Twenty beginnings, from one word to a third of a story.
PROMPTS = [" ".join(story.text.split()[: 1 + 2 * i]) for i, story in enumerate(STORIES)]


@pytest.fixture(scope="module")
def reference():
    """transformers' own model and tokenizer, used as its documentation says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def aot(stories_fp32):
    with load(stories_fp32) as engine:
        yield engine


@pytest.fixture(scope="module", params=["aot", "pytorch", "torch_compile"])
def engine(request):
    """Each backend that runs in this process, on the bundled model in fp32."""
    if request.param == "aot":
        yield request.getfixturevalue("aot")
    else:
        with load(BuildRecipe(backend=request.param, **limits())) as engine:
            yield engine


def batches(engine) -> tuple[int, ...]:
    """Batch sizes to try; torch_compile compiles anew for each, half a minute a time."""
    return (2,) if engine.recipe.backend == "torch_compile" else (2, 3, 4)


@pytest.fixture(scope="module")
def int8_folder(built):
    return built(BuildRecipe(precision="int8", **limits(max_batch_size=1)))


@pytest.fixture(scope="module")
def bf16_folder(built):
    return built(BuildRecipe(precision="bf16", optimization_level=0, **limits(max_batch_size=1)))


@pytest.fixture(scope="module")
def int8(int8_folder):
    with load(int8_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def bf16(bf16_folder):
    with load(bf16_folder) as engine:
        yield engine


# ---- the same tokens --------------------------------------------------------------------------------------


def test_greedy_tokens_are_transformers_own_for_twenty_prompts(engine, reference):
    model, tokenizer = reference
    for prompt in PROMPTS if engine.recipe.backend != "torch_compile" else PROMPTS[::5]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = model.generate(ids, do_sample=False, min_new_tokens=24, max_new_tokens=24)[0, ids.shape[1] :]
        (answer,) = engine.generate(prompt, GREEDY)
        assert answer.prompt_token_ids == ids[0].tolist()
        if 2 not in answer.token_ids:  # min_new_tokens forbids the end token, ignore_eos goes on after it
            assert answer.token_ids == expected.tolist(), prompt
            assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_logits_are_transformers_own(engine, reference):
    model, tokenizer = reference
    for prompt in PROMPTS[::7]:
        with torch.inference_mode():
            expected = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
        assert ((engine.logits(prompt) - expected).abs().max() / expected.abs().max()).item() < 1e-4


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=11, max_tokens=24)],
    ids=["greedy", "sampled"],
)
def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(engine, sampling):
    for size in batches(engine):
        prompts = [PROMPTS[0], PROMPTS[15], PROMPTS[3], PROMPTS[8]][:size]
        together = engine.generate(prompts, sampling)
        alone = [engine.generate([prompt], sampling)[0] for prompt in prompts]
        assert [a.token_ids for a in together] == [a.token_ids for a in alone]
        assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]


def test_backends_sample_the_same_tokens_from_the_same_seed(engine, aot):
    sampling = SamplingParams(temperature=0.8, top_k=50, seed=4, max_tokens=16)
    prompts = PROMPTS[: batches(engine)[-1]]
    answers = [e.generate(prompts, sampling) for e in (engine, aot)]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]


def test_an_engine_answers_the_same_however_often_and_whatever_it_did_before(aot):
    """Three of four rows in use, 400 steps in all: more than the cache is long."""
    prompts = PROMPTS[:3]
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    first = [a.token_ids for a in aot.generate(prompts, long)]
    for _ in range(3):
        assert [a.token_ids for a in aot.generate(prompts, long)] == first
    assert aot.generate(prompts[0], long)[0].token_ids == first[0]


def test_two_engines_at_once_do_not_disturb_each_other(aot, stories_fp32):
    with load(stories_fp32) as other:
        mixed = zip(aot.stream(PROMPTS[1], GREEDY), other.stream(PROMPTS[2], GREEDY), strict=True)
        first, second = ([token.token_id for token in tokens] for tokens in zip(*mixed, strict=True))
    assert first == aot.generate(PROMPTS[1], GREEDY)[0].token_ids
    assert second == aot.generate(PROMPTS[2], GREEDY)[0].token_ids


# ---- prompts ----------------------------------------------------------------------------------------------


def test_the_shortest_and_the_longest_prompt_are_answered(engine, reference):
    model, tokenizer = reference
    story = tokenizer(STORIES[0].text).input_ids
    for ids in (story[:1], story[:2], story[:64]):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        assert engine.generate(ids, SamplingParams(temperature=0, max_tokens=1))[0].token_ids == [expected]


def test_the_cache_can_be_filled_to_its_last_entry(aot):
    ids = aot.tokenize(PROMPTS[0])
    full = SamplingParams(temperature=0, max_tokens=256 - len(ids), ignore_eos=True)
    (answer,) = aot.generate(ids, full)
    assert len(answer.token_ids) == 256 - len(ids)
    assert aot.generate(ids, GREEDY)[0].token_ids == answer.token_ids[:24]


def test_prompts_read_together_answer_as_alone(built, checkpoint, monkeypatch):
    """What engines on a GPU do, by the same graph compiled for a CPU: three at once, of up to five."""
    for module in ("aot", "aot_compile"):
        monkeypatch.setattr(f"helpers.backends.{module}.prefill_batch", lambda recipe, device: 3)
    recipe = BuildRecipe(str(checkpoint("llama")), **limits(max_batch_size=5, max_input_len=16, max_seq_len=48))
    prompts = [[3, 14, 15], [92], [65, 35, 89, 79, 3, 23, 84, 62], [6], [4, 33]]
    tokens = torch.tensor([31, 41, 59, 26, 5])
    with load(built(recipe)) as engine:
        for batch, groups in ((prompts, [3, 2]), (prompts[:4], [3, 1]), (prompts[1:3], [2]), (prompts[:1], [1])):
            assert [len(rows) for rows in engine._read(batch)] == groups
            together = engine.prefill(batch), engine.decode(tokens[: len(batch)])
            for row, prompt in enumerate(batch):
                for ours, alone in zip(together, (engine.prefill([prompt]), engine.decode(tokens[[row]])), strict=True):
                    torch.testing.assert_close(ours[row], alone[0], rtol=1e-4, atol=1e-4)


def test_graphs_compiled_side_by_side_make_the_same_engine(tiny_engine, tiny_llama, tmp_path, monkeypatch):
    """On machines with many cores; here two at a time, whatever the cores."""
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr("helpers.backends.aot._jobs", lambda *_: 2)
    limited = limits(max_batch_size=1, max_input_len=16, max_seq_len=48)
    folder = build(BuildRecipe(model=str(tiny_llama), **limited), quiet=True)
    assert folder.name == tiny_engine.name and folder != tiny_engine
    ours, other = inspect(folder), inspect(tiny_engine)
    assert (ours.operations, ours.kernels, ours.removed) == (other.operations, other.kernels, other.removed)
    with load(folder) as one, load(tiny_engine) as two:
        assert one.generate([3, 14, 15], GREEDY)[0].token_ids == two.generate([3, 14, 15], GREEDY)[0].token_ids


def test_a_graph_that_fails_in_its_process_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr("helpers.backends.aot._jobs", lambda *_: 2)
    monkeypatch.setattr("helpers.backends.aot.graph_names", lambda *_: ["prefill", "decode_bX"])
    limited = limits(max_batch_size=1, max_input_len=16, max_seq_len=48)
    with pytest.raises(WorkerError, match="invalid literal"):
        build(BuildRecipe(model=str(tiny_llama), **limited), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]
    assert not [child for child in psutil.Process().children() if "aot_compile" in " ".join(child.cmdline())]


def test_text_and_its_token_ids_are_the_same_prompt(engine):
    text = "Once upon a time"
    by_text, by_ids = engine.generate(text, GREEDY), engine.generate(engine.tokenize(text), GREEDY)
    assert len(by_text) == len(by_ids) == 1
    assert by_text[0].token_ids == by_ids[0].token_ids
    mixed = engine.generate([text, engine.tokenize(text)], GREEDY)
    assert mixed[0].token_ids == mixed[1].token_ids == by_text[0].token_ids


@pytest.mark.parametrize(
    "prompt",
    [
        "héllo 你好 \N{PARTY POPPER}",
        "\n\n\tx",
        "<|bos|>",
        "a" * 40,
    ],
)
def test_any_text_is_answered(aot, prompt):
    (answer,) = aot.generate(prompt, GREEDY)
    assert len(answer.token_ids) == 24


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ([], "no prompts"),
        ([[]], "no tokens"),
        (["fine", ""], "empty"),
        ([2048], "vocabulary of 2048"),
        ([[1, 2], [-1]], "vocabulary of 2048"),
        ([1.5], "token ids"),
        ([True], "token ids"),
        (["fine", None], "token ids"),
        (None, "token ids"),
        (7, "token ids"),
    ],
)
def test_a_bad_prompt_is_refused(engine, prompts, words):
    with pytest.raises(InputError, match=words):
        engine.generate(prompts, GREEDY)


@pytest.mark.parametrize(
    ("prompts", "sampling", "words"),
    [
        ([[1] * 65], GREEDY, r"65 tokens.*max_input_len=64"),
        ([[1] * 64], SamplingParams(max_tokens=193), r"257 tokens.*max_seq_len=256"),
        ([[1]] * 5, GREEDY, r"5 prompts.*max_batch_size=4"),
    ],
)
def test_more_than_the_engine_was_built_for_is_refused(engine, prompts, sampling, words):
    with pytest.raises(LimitError, match=words) as refused:
        engine.generate(prompts, sampling)
    assert refused.value.cause and refused.value.fix


def test_limits_hold_for_streams_before_the_first_token_is_asked_for(engine):
    with pytest.raises(LimitError):
        engine.stream([1] * 65, GREEDY)
    with pytest.raises(InputError):
        engine.stream("", GREEDY)
    with pytest.raises(LimitError):
        engine.logits([1] * 65)


# ---- stopping and streaming -------------------------------------------------------------------------------


def test_each_sequence_stops_at_its_own_end_token_or_goes_on_if_told(engine):
    """The end of a story is an end token; another prompt of the batch goes on."""
    ending = engine.tokenize(STORIES[0].text)[-12:]
    stop = SamplingParams(temperature=0, max_tokens=60)
    ended, other = engine.generate([[1, *ending], PROMPTS[4]], stop)
    assert ended.finish_reason == "stop" and 2 not in ended.token_ids and len(ended.token_ids) < 60
    assert other.finish_reason == "length" and len(other.token_ids) == 60
    (on,) = engine.generate([[1, *ending]], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert on.finish_reason == "length" and len(on.token_ids) == 60
    assert on.token_ids[: len(ended.token_ids) + 1] == [*ended.token_ids, 2]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=3, max_tokens=200)], ids=["greedy", "to the end"])
def test_a_stream_gives_the_tokens_and_the_text_of_generate(engine, sampling):
    tokens = list(engine.stream(PROMPTS[2], sampling))
    (answer,) = engine.generate(PROMPTS[2], sampling)
    assert [token.token_id for token in tokens] == answer.token_ids
    assert "".join(token.text for token in tokens) == answer.text
    elapsed = [token.elapsed_s for token in tokens]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0


class Scripted:
    """A backend whose next tokens are given, to see what the loop around it makes of them."""

    def __new__(cls, script, end_ids=(2,)):
        from helpers.backends.base import Engine, load_tokenizer

        class Engine_(Engine):
            def prefill(self, prompts):
                self.at = [0] * len(prompts)
                return self.decode(None)

            def decode(self, tokens):
                wanted = torch.tensor([script[min(at, len(script) - 1)] for at in self.at])
                self.at = [at + 1 for at in self.at]
                return torch.nn.functional.one_hot(wanted, 2048) * 100.0

        return Engine_(BuildRecipe(**limits()), load_tokenizer(BUNDLED), end_ids, 2048)


def test_a_streamed_character_of_several_tokens_comes_whole():
    engine = Scripted([])
    script = [i for i in engine.tokenize("naïve 你好 \N{PARTY POPPER}!") if i > 2]
    engine = Scripted(script)
    tokens = list(engine.stream("x", SamplingParams(temperature=0, max_tokens=len(script))))
    assert len(tokens) > len({token.text for token in tokens}), "no character of this text spans tokens"
    assert "".join(token.text for token in tokens).strip() == "naïve 你好 \N{PARTY POPPER}!"
    assert not any("\ufffd" in token.text for token in tokens)


def test_a_stream_cut_within_a_character_still_gives_the_text_of_generate():
    script = [i for i in Scripted([]).tokenize("好") if i > 2][:-1]
    cut = SamplingParams(temperature=0, max_tokens=len(script))
    assert script
    streamed = "".join(token.text for token in Scripted(script).stream("x", cut))
    assert streamed == Scripted(script).generate("x", cut)[0].text


def test_an_end_token_at_once_is_an_empty_answer():
    engine = Scripted([2])
    (answer,) = engine.generate("x", SamplingParams(temperature=0, max_tokens=5))
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "stop")
    assert list(engine.stream("x", SamplingParams(temperature=0))) == []


def test_any_of_several_end_tokens_stops():
    engine = Scripted([50, 60, 7, 7], end_ids=(9, 60))
    (answer,) = engine.generate("x", SamplingParams(temperature=0, max_tokens=5))
    assert (answer.token_ids, answer.finish_reason) == ([50], "stop")


def test_a_stream_that_was_overtaken_is_refused_instead_of_mixing_two_texts(engine):
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    engine.generate(PROMPTS[1], GREEDY)
    with pytest.raises(InputError, match="answers another prompt"):
        next(stream)


def test_metrics_obey_their_definitions(engine):
    for answer in engine.generate(PROMPTS[:2], GREEDY):
        m = answer.metrics
        assert 0 < m.ttft_s < m.e2e_s
        assert m.tpot_s == pytest.approx((m.e2e_s - m.ttft_s) / 23)
    assert engine.generate(PROMPTS[0], SamplingParams(max_tokens=1))[0].metrics.tpot_s == 0


# ---- precision --------------------------------------------------------------------------------------------


def loss_of(engine, texts) -> float:
    """Nats per token of held-out stories, each token fed through the engine's decode."""
    total = count = 0
    for text in texts:
        ids = [*engine.tokenize(text), 2]
        logits = engine.prefill([ids[:1]])
        for token in ids[1:]:
            total -= logits[0].float().log_softmax(-1)[token].item()
            count += 1
            logits = engine.decode(torch.tensor([token]))
    return total / count


def test_lower_precision_keeps_the_held_out_loss(aot, int8, bf16, reference):
    from helpers.stories.evaluate import held_out_loss

    stories = STORIES[:4]
    exact, _ = held_out_loss(*reference, stories)
    texts = [story.text for story in stories]
    assert loss_of(aot, texts) == pytest.approx(exact, rel=1e-4)
    assert loss_of(int8, texts) == pytest.approx(exact, rel=0.01)
    assert loss_of(bf16, texts) == pytest.approx(exact, rel=0.01)


def test_lower_precision_keeps_logits_close(aot, int8, bf16):
    for prompt in PROMPTS[::4]:
        exact = aot.logits(prompt)
        for engine in (int8, bf16):
            error = ((engine.logits(prompt) - exact).abs().max() / exact.abs().max()).item()
            assert 0 < error < 0.05, engine


def test_lower_precision_is_smaller(stories_fp32, int8_folder, bf16_folder):
    """Half the bytes in bf16; in int8 a quarter and the embedding, a tenth of this model's weights, in fp32."""
    fp32, int8, bf16 = (
        (folder / "weights.safetensors").stat().st_size for folder in (stories_fp32, int8_folder, bf16_folder)
    )
    assert bf16 < 0.52 * fp32
    assert int8 < 0.45 * fp32


def test_an_engine_is_no_larger_than_promised(stories_fp32):
    """2.2 times its weights, which are the model's parameters in fp32, and 15 MB."""
    from helpers import models

    parameters = models.find("stories").config.parameter_count()
    assert store.size(stories_fp32) <= 2.2 * 4 * parameters + 15e6


# ---- a process that only loads and generates --------------------------------------------------------------


def test_running_an_engine_imports_no_model_code_and_no_compiler_and_stays_small(stories_fp32, engines_folder):
    script = """
        import sys
        from pathlib import Path
        from helpers import SamplingParams, load
        with load(sys.argv[1]) as engine:
            engine.generate(["Once upon a time", "One"], SamplingParams(seed=0, max_tokens=64))
        found = [m for m in ("transformers", "torch._dynamo", "torch._inductor", "sympy") if m in sys.modules]
        status = Path("/proc/self/status")  # the peak; getrusage's would count the parent of before exec
        lines = status.read_text().splitlines() if status.exists() else ["VmHWM: 0"]
        print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), found)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), stories_fp32.name],
        env={**os.environ, "COURSE_ENGINES": str(engines_folder)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    megabytes, found = done.stdout.strip().split(" ", 1)
    assert found == "[]", f"imported for nothing: {found}"
    if "+cu" not in torch.__version__:  # a CUDA build of torch brings its own libraries into memory
        assert int(megabytes) < 300


# ---- opening and closing ----------------------------------------------------------------------------------


def test_a_closed_engine_is_refused_and_closing_twice_is_fine(tiny_engine):
    engine = load(tiny_engine)
    stream = engine.stream([5, 6], SamplingParams(max_tokens=9, ignore_eos=True))
    next(stream)
    engine.close()
    engine.close()
    for use in (
        lambda: engine.generate([5]),
        lambda: engine.logits([5]),
        lambda: engine.stream([5]),
        lambda: next(stream),
    ):
        with pytest.raises(InputError, match="closed"):
            use()
    assert "closed" in repr(engine)


def test_an_engine_loads_by_folder_name_start_and_recipe(tiny_engine, tiny_llama):
    recipe = BuildRecipe(model=str(tiny_llama), **limits(max_batch_size=1, max_input_len=16, max_seq_len=48))
    for given in (tiny_engine, str(tiny_engine), tiny_engine.name, tiny_engine.name[:-3], recipe):
        with load(given) as engine:
            assert len(engine.generate([5, 6], GREEDY)[0].token_ids) == 24


def test_another_tokenizer_is_refused_and_its_own_is_not(tiny_engine, tiny_llama, checkpoint, tmp_path):
    load(tiny_engine, tokenizer=tiny_llama).close()
    load(tiny_engine, tokenizer="stories").close()  # the same file elsewhere
    with pytest.raises(EngineMismatch, match="tokenizer"):
        load(tiny_engine, tokenizer=checkpoint("llama"))


def test_a_model_without_tokenizer_takes_ids_only(checkpoint):
    with load(
        BuildRecipe(model=str(checkpoint("llama")), backend="pytorch", max_input_len=8, max_seq_len=16)
    ) as engine:
        (answer,) = engine.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(answer.token_ids) == 3 and answer.text == ""
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            engine.generate("text")


# ---- what is inside ---------------------------------------------------------------------------------------


def test_every_operation_is_in_a_kernel_or_listed_as_removed(stories_fp32):
    report = inspect(stories_fp32)
    assert report.graphs() == ["prefill", "decode_b1", "decode_b4"]
    for graph in report.graphs():
        part = report.of(graph)
        names = [operation.name for operation in part.operations]
        done = {name for kernel in part.kernels for name in kernel.fused}
        removed = {name.removeprefix(f"{graph}/") for name in part.removed}
        assert len(names) == len(set(names))
        assert set(names) == done | removed and not done & removed
        assert 0 < len(part.kernels) < len(names)
        assert all(kernel.fused for kernel in part.kernels)


def test_the_report_counts_what_the_model_has(stories_fp32):
    """Six layers with two norms each and one at the end; a softmax a layer in decode; one sine table for all."""
    part = inspect(stories_fp32).of("decode_b1")
    counts = part.operation_counts()
    assert counts["rsqrt"] == 13
    assert counts["silu"] == 6 or counts["sigmoid"] == 6 or counts["exp"] >= 6
    assert {o.dtype for o in part.operations} >= {"float32"}
    assert any("llama.py:" in o.source for o in part.operations)


def test_sizes_in_a_report_are_the_files_sizes(stories_fp32):
    report = inspect(stories_fp32)
    for name, size in report.sizes.items():
        assert (stories_fp32 / name).stat().st_size == size


def test_without_fusion_there_are_more_kernels_and_the_tokens_are_the_same(built, tiny_llama, tiny_engine):
    recipe = BuildRecipe(
        model=str(tiny_llama),
        fusion={"kernels": False, "qkv": False, "gate_up": False},
        **limits(max_batch_size=1, max_input_len=16, max_seq_len=48),
    )
    plain = built(recipe)
    for graph in ("prefill", "decode_b1"):
        assert len(inspect(plain).of(graph).kernels) > 1.5 * len(inspect(tiny_engine).of(graph).kernels)
    with load(plain) as unfused, load(tiny_engine) as fused:
        assert unfused.generate([5, 6, 7], GREEDY)[0].token_ids == fused.generate([5, 6, 7], GREEDY)[0].token_ids


def test_a_report_survives_writing_and_reading(stories_fp32, tmp_path):
    from helpers.inspection import read_report, write_report

    report = read_report(stories_fp32)
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert str(len(report.of("prefill").kernels)) in str(report)
    assert not math.isnan(len(report.largest(3)[0].fused))
