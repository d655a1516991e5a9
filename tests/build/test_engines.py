"""Every backend beside transformers: the same tokens, whatever the batch, the phase or the way of asking."""

import contextlib
import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GREEDY, PROMPTS, STORIES, Scripted, limits
from safetensors.torch import load_file, save_file

from helpers import BuildRecipe, SamplingParams, load
from helpers.errors import (
    BackendUnavailable,
    BuildError,
    EngineMismatch,
    InputError,
    LimitError,
    ModelError,
    NumericsError,
    OutOfMemory,
)
from helpers.model.checkpoint import BUNDLED, find_checkpoint
from helpers.paths import PROJECT


def test_the_recipe_of_an_engine_that_was_not_built_names_its_model_from_any_folder(tmp_path, monkeypatch):
    shutil.copytree(BUNDLED, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    with load(BuildRecipe(model="m", backend="pytorch", device="cpu")) as engine:
        monkeypatch.chdir(tmp_path / "m")
        assert find_checkpoint(engine.recipe.model).folder == tmp_path / "m"


@pytest.fixture(scope="module", params=["aot", "pytorch", "torch_compile"])
def engine(request):
    """Each backend that runs in this process, on the bundled model in fp32."""
    if request.param == "aot":
        yield request.getfixturevalue("aot")
    else:
        # Each batch size is compiled for, however many there were before: torch alone would refuse the second one here.
        limited = torch._dynamo.config.patch(recompile_limit=1)
        with limited, load(BuildRecipe(backend=request.param, **limits())) as engine:
            yield engine


def batches(engine) -> tuple[int, ...]:
    """Batch sizes to try; torch_compile compiles anew for each, half a minute a time."""
    return (2,) if engine.recipe.backend == "torch_compile" else (2, 3, 4)


# ---- the same tokens --------------------------------------------------------------------------------------


def test_greedy_tokens_are_transformers_own_for_twenty_prompts(engine, stories_reference):
    model, tokenizer = stories_reference
    for prompt in PROMPTS if engine.recipe.backend != "torch_compile" else PROMPTS[::5]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = model.generate(ids, do_sample=False, min_new_tokens=24, max_new_tokens=24)[0, ids.shape[1] :]
        (answer,) = engine.generate(prompt, GREEDY)
        assert answer.prompt_token_ids == ids[0].tolist()
        if 2 not in answer.token_ids:  # min_new_tokens forbids the end token, ignore_eos goes on after it
            assert answer.token_ids == expected.tolist(), prompt
            assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_logits_are_transformers_own(engine, stories_reference):
    model, tokenizer = stories_reference
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


@pytest.mark.parametrize("backend", ["aot.engine", "pytorch"])
def test_loading_is_shown_where_it_takes_long(backend, tiny_engine, tiny_llama, monkeypatch):
    titles = []
    shown = f"helpers.backends.{backend}.shown_if_slow"
    monkeypatch.setattr(shown, lambda title, phase: titles.append(title) or contextlib.nullcontext())
    recipe = BuildRecipe(model=str(tiny_llama), backend="pytorch", max_input_len=16, max_seq_len=48)
    with load(recipe if backend == "pytorch" else tiny_engine):
        assert len(titles) == 1 and titles[0].startswith("Loading tiny-llama")


def test_a_checkpoint_that_takes_long_to_read_is_shown_as_loading(monkeypatch, capsys):
    """The first time in a process, transformers is imported for it."""

    def slow(name):
        time.sleep(0.3)
        raise ModelError("It is none.")

    monkeypatch.setattr("helpers.backends.pytorch.find_checkpoint", slow)
    monkeypatch.setattr("helpers.progress.SILENT_S", 0.1)
    with pytest.raises(ModelError):
        load(BuildRecipe(backend="pytorch"))
    assert "Loading stories-pytorch-fp32-b1" in capsys.readouterr().err


# ---- prompts ----------------------------------------------------------------------------------------------


def test_the_shortest_and_the_longest_prompt_are_answered(engine, stories_reference):
    model, tokenizer = stories_reference
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
        (b"Once", r"decode\(\)"),
        (np.frombuffer(b"Once", np.uint8), r"decode\(\)"),
        (torch.tensor(list(b"Once"), dtype=torch.uint8), r"decode\(\)"),
        ({"input_ids": [1]}, "input_ids"),
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


def test_an_end_token_at_once_is_an_empty_answer():
    engine = Scripted([2])
    (answer,) = engine.generate("x", SamplingParams(temperature=0, max_tokens=5))
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "stop")
    assert list(engine.stream("x", SamplingParams(temperature=0))) == []


def test_any_of_several_end_tokens_stops():
    engine = Scripted([50, 60, 7, 7], end_ids=(9, 60))
    (answer,) = engine.generate("x", SamplingParams(temperature=0, max_tokens=5))
    assert (answer.token_ids, answer.finish_reason) == ([50], "stop")


def test_a_stop_string_ends_a_text_where_it_first_stands(engine):
    prompt, sampling = "Once upon a time", SamplingParams(temperature=0, max_tokens=60)
    (whole,) = engine.generate(prompt, sampling)
    (answer,) = engine.generate(prompt, replace(sampling, stop="."))
    assert answer.text == whole.text.partition(".")[0] and answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert "".join(token.text for token in engine.stream(prompt, replace(sampling, stop="."))) == answer.text


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


# ---- numbers that are none --------------------------------------------------------------------------------


class Overflowing:
    """A backend whose logits, for one sequence of the batch and from one step on, are not all finite numbers."""

    def __new__(cls, value, row, step):
        engine = Scripted([7, 8, 2, 9, 9, 9])
        plain = engine._decode

        def decode(tokens):
            logits = plain(tokens)
            if engine.at[0] > step:
                logits[row, 100] = value
            return logits

        engine._decode = decode
        return engine


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=1, repetition_penalty=1.2, ignore_eos=True)])
def test_logits_that_are_no_numbers_are_an_error_and_no_answer(value, sampling):
    for step in (0, 2):
        engine = Overflowing(value, 1, step)
        with pytest.raises(NumericsError, match="not finite") as refused:
            engine.generate([[3, 4], [5]], sampling)
        assert "bf16" in refused.value.fix
        stream = Overflowing(value, 0, step).stream([3, 4], sampling)
        assert len([next(stream) for _ in range(step)]) == step
        with pytest.raises(NumericsError):
            next(stream)


def test_numbers_behind_the_end_of_an_answer_do_not_matter():
    answers = Overflowing(float("nan"), 0, 3).generate([[3], [4]], SamplingParams(temperature=0, max_tokens=8))
    assert [answer.token_ids for answer in answers] == [[7, 8], [7, 8]]


def test_what_an_earlier_request_left_in_the_cache_does_not_matter(aot):
    prompts = [PROMPTS[0], PROMPTS[15], PROMPTS[3]]
    expected = [answer.token_ids for answer in aot.generate(prompts, GREEDY)]
    for entries in aot.cache:
        entries.fill_(float("nan"))
    assert [answer.token_ids for answer in aot.generate(prompts, GREEDY)] == expected


def test_what_fills_up_a_prompt_is_no_token_of_another(tiny_llama):
    """The numbers of token 0 are none: those of its embedding, not of the head that it is tied to."""
    recipe = BuildRecipe(model=str(tiny_llama), backend="pytorch", **limits(max_input_len=16, max_seq_len=48))
    with load(recipe) as engine:
        embedding = engine.model.model.embed_tokens
        embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        embedding.weight.data[0] = float("nan")
        assert not engine.logits([0]).isfinite().any()
        assert all(len(answer.token_ids) == 24 for answer in engine.generate([[5], [5, 6, 7]], GREEDY))


# ---- phases by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[7], [7, 8, 9], [7, -1], [7, 2048], [7.0, 8.0], [[7], [8]], "ab", 7, None])
def test_tokens_that_cannot_be_appended_are_refused_and_the_right_ones_go_on(tokens):
    engine = Scripted([7, 8])
    engine.prefill([[3], [4]])
    for given in (tokens, torch.tensor(tokens) if isinstance(tokens, (list, int)) else tokens):
        with pytest.raises(InputError):
            engine.decode(given)
    assert engine.decode(torch.tensor([7, 7])).argmax(-1).tolist() == [8, 8]


def test_an_engine_is_not_copied_nor_sent_to_another_process():
    """A copy would use the same cache and know nothing of the other's requests."""
    for send in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="copied"):
            send(Scripted([7]))


def test_logits_by_hand_stay_as_they_are_when_the_next_come():
    engine = Scripted([7, 8, 9])
    plain, memory = engine._decode, torch.empty(1, 2048)
    engine._decode = lambda tokens: memory.copy_(plain(tokens))  # as a GPU's recorded step does
    engine.prefill([[3]])
    chosen = [engine.decode([7]), engine.decode([8])]
    assert [logits.argmax().item() for logits in chosen] == [8, 9]


def test_after_an_interrupted_step_by_hand_no_other_goes_on():
    """Nobody knows whether the cache holds that step's token."""
    engine = Scripted([7, 8, 9])
    plain = engine._decode

    def interrupted(tokens):
        plain(tokens)
        raise KeyboardInterrupt

    engine.prefill([[3]])
    engine._decode = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.decode([7])
    engine._decode = plain
    with pytest.raises(InputError, match="nothing to append"):
        engine.decode([7])


def test_an_observer_that_uses_the_engine_ends_the_stream():
    engine = Scripted([7])
    with pytest.raises(InputError, match="answers another prompt"):
        next(engine.stream([3], GREEDY, observe=lambda logits: engine.logits([4])))


# ---- one engine, several threads and processes ------------------------------------------------------------


def test_what_one_thread_began_by_hand_another_does_not_go_on_with():
    engine = Scripted([7])
    engine.prefill([[3]])
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InputError, match="nothing to append"):
            pool.submit(engine.decode, torch.tensor([7])).result()
        pool.submit(engine.prefill, [[4]]).result()
    with pytest.raises(InputError, match="nothing to append"):
        engine.decode(torch.tensor([7]))


def test_closing_waits_for_the_request_that_is_answered_and_refuses_the_ones_that_wait(tiny_engine):
    engine = load(tiny_engine)
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

    def ask(_):
        try:
            return len(engine.generate([5, 6], long)[0].token_ids)
        except InputError as error:
            return error.what

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, i) for i in range(40)]
        answers[0].result()
        engine.close()
        assert {answer.result() for answer in answers} <= {40, "This engine is closed."}
    assert ask(0) == "This engine is closed."


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_is_refused_the_engine_of_its_parent(tiny_engine):
    """Its threads were not copied: a product of the library would wait for them for ever."""
    engine = load(tiny_engine)
    stream = engine.stream([5, 6], GREEDY)
    next(stream)
    held = threading.Event()
    let_go = threading.Event()

    def hold():
        with engine._lock:
            held.set()
            let_go.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (
            lambda: engine.generate([5]),
            lambda: engine.prefill([[5]]),
            lambda: engine.decode(torch.tensor([5])),
            lambda: engine.logits([5]),
            lambda: next(stream),
            lambda: load(tiny_engine),
        ):
            try:
                use()
            except InputError as error:
                refused += "fork" in error.what
        engine.close()
        os._exit(refused)
    try:
        for _ in range(300):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
        assert done and os.waitstatus_to_exitcode(status) == 6
    finally:
        let_go.set()
        holder.join()
    assert len(engine.generate([5, 6], GREEDY)[0].token_ids) == 24
    engine.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_of_a_process_where_pytorch_has_worked_is_refused_its_first_engine():
    """It hung at its first product, as other threads of the library are not there."""
    code = """if True:
        import os, signal, torch
        from helpers import BuildRecipe, CourseError, load

        torch.ones(1 << 22).exp().sum()
        if child := os.fork():
            raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        signal.alarm(60)
        try:
            with load(BuildRecipe(model="stories", backend="pytorch")) as engine:
                engine.logits([5])
        except CourseError as error:
            os._exit(0 if "fork" in error.what else 2)
        os._exit(3)
    """
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=PROJECT, check=False).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    ("work", "end"),
    [
        ("build_module(torch.nn.Linear(2048, 2048), [torch.ones(4, 2048)], 'fp16')", 5),
        ("build_onnx('model.onnx')", 5),
        ("has_own_head(Path(sys.argv[1]))", 0),
    ],
)
def test_what_torch_would_compute_with_threads_hangs_in_no_fork(tmp_path, work, end):
    weights = load_file(BUNDLED / "model.safetensors")
    head = weights["model.embed_tokens.weight"].repeat(8, 1).clone()  # as large as torch takes threads for
    save_file({"model.embed_tokens.weight": head, "lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    code = f"""if True:
        import os, signal, sys, torch
        from pathlib import Path
        from helpers import CourseError
        from helpers.engine import build_module, build_onnx
        from helpers.model.checkpoint import has_own_head

        torch.ones(1 << 22).exp().sum()
        if child := os.fork():
            raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        signal.alarm(60)
        try:
            {work}
        except CourseError as error:
            os._exit(5 if "fork" in error.what else 2)
        os._exit(0)
    """
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=PROJECT, check=False).returncode == end


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
        lambda: list(stream),
    ):
        with pytest.raises(InputError, match="closed"):
            use()
    assert "closed" in repr(engine)


def test_an_engine_loads_by_folder_name_start_and_recipe(tiny_engine, tiny_llama):
    recipe = BuildRecipe(model=str(tiny_llama), **limits(max_batch_size=1, max_input_len=16, max_seq_len=48))
    for given in (tiny_engine, str(tiny_engine), tiny_engine.name, tiny_engine.name[:-3], recipe):
        with load(given) as engine:
            assert len(engine.generate([5, 6], GREEDY)[0].token_ids) == 24


def test_loading_a_checkpoint_draws_no_random_number():
    """Nor does it put the generator back: another thread may draw from it meanwhile."""
    state = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.random, "set_rng_state", lambda *_: pytest.fail("it was put back"))
        load(BuildRecipe(model="stories", backend="pytorch")).close()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_another_tokenizer_is_refused_and_its_own_is_not(tiny_engine, tiny_llama, checkpoint, tmp_path):
    load(tiny_engine, tokenizer=tiny_llama).close()
    load(tiny_engine, tokenizer="stories").close()  # the same file elsewhere
    with pytest.raises(EngineMismatch, match="tokenizer"):
        load(tiny_engine, tokenizer=checkpoint("llama"))
    shutil.copytree(tiny_llama, tmp_path / "own")  # with a template that this engine would not use
    (tmp_path / "own/chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(EngineMismatch, match="chat template"):
        load(tiny_engine, tokenizer=tmp_path / "own")


def test_a_folder_without_a_tokenizer_is_not_told_as_another_one(tiny_engine, tmp_path):
    with pytest.raises(EngineMismatch, match="has no tokenizer.json"):
        load(tiny_engine, tokenizer=tmp_path)


def test_a_model_without_tokenizer_takes_ids_only(checkpoint):
    with load(
        BuildRecipe(model=str(checkpoint("llama")), backend="pytorch", max_input_len=8, max_seq_len=16)
    ) as engine:
        (answer,) = engine.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(answer.token_ids) == 3 and answer.text == ""
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            engine.generate("text")


def test_engines_of_transformers_are_loaded_side_by_side_in_threads():
    """transformers changes itself while it loads: another thread's load failed, and then all later ones."""
    recipes = [BuildRecipe(backend="pytorch", device="cpu", precision=precision) for precision in ("fp32", "bf16")]

    def answer(recipe):
        with load(recipe) as engine:
            return engine.generate([3, 14], replace(GREEDY, max_tokens=3))[0].token_ids

    alone = [answer(recipe) for recipe in recipes]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, recipes * 8)) == alone * 8


def test_transformers_makes_its_tensors_on_the_default_device_that_torch_starts_with():
    """As compiled code needs it too: on another one, torch_compile fails, after half a minute."""
    with load(BuildRecipe(backend="pytorch", device="cpu")) as engine:
        forward, devices = engine.forward, []
        engine.forward = lambda *given: devices.append(torch.get_default_device().type) or forward(*given)
        torch.set_default_device("meta")
        try:
            engine.generate([3, 14], replace(GREEDY, max_tokens=3))
        finally:
            torch.set_default_device(None)
    assert devices == ["cpu"] * 3


def test_torch_compile_does_not_run_where_nothing_would_be_compiled():
    recipe = BuildRecipe(backend="torch_compile", device="cpu")
    with load(recipe) as loaded, torch.compiler.set_stance("force_eager"):
        for use in (lambda: load(recipe), lambda: loaded.generate([3, 14], GREEDY)):
            with pytest.raises(BackendUnavailable, match="switched off"):
                use()


@pytest.mark.parametrize(("words", "kind"), [("No working C++ compiler", BuildError), ("out of memory", OutOfMemory)])
def test_what_torch_compile_cannot_compile_is_told_in_our_words(words, kind, monkeypatch):
    def fail(**_):
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError(words), None)

    titles = []
    with load(BuildRecipe(backend="torch_compile", device="cpu")) as engine:
        engine.compiled = fail
        shown = "helpers.backends.pytorch.shown_if_slow"
        monkeypatch.setattr(shown, lambda title, phase: titles.append(title) or contextlib.nullcontext())
        with pytest.raises(kind):
            engine.generate([3, 14], GREEDY)
    assert titles == ["torch.compile: the step for a batch of 1"]  # it can take a minute


def test_torch_compile_works_where_paths_have_a_space(tiny_llama, tmp_path):
    """In those of the temporary folder and of the environment."""
    libraries, temporary = tmp_path / "my env", tmp_path / "my temporary files"
    libraries.symlink_to(Path(torch.__file__).parents[1])
    temporary.mkdir()
    recipe = {"model": str(tiny_llama), "backend": "torch_compile", **limits(max_input_len=16, max_seq_len=48)}
    code = f"""
from helpers import BuildRecipe, SamplingParams, load
with load(BuildRecipe(**{recipe})) as engine:
    print(engine.generate([3, 14, 15], SamplingParams(max_tokens=3))[0].finish_reason)
"""
    variables = {**os.environ, "PYTHONPATH": f"{libraries}{os.pathsep}{PROJECT}", "TMPDIR": str(temporary)}
    variables.pop("TORCHINDUCTOR_CACHE_DIR", None)  # of an earlier test
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout == "length\n", done.stderr


def test_closing_an_engine_has_no_other_one_compiled_again(monkeypatch):
    resets = []
    first, second = (load(BuildRecipe(backend="torch_compile", device="cpu")) for _ in range(2))
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    first.close()
    assert not resets
    second.close()
    assert resets or first.in_use  # one of the module's own may still be open


@pytest.mark.parametrize("library", ["tokenizers", "filelock", "safetensors", "psutil"])
def test_a_file_in_the_place_of_a_library_is_not_taken_for_a_damaged_engine(stories_fp32, tmp_path, library):
    """Such as a learner's own tokenizers.py, beside the notebook: no engine is to be removed for it."""
    (tmp_path / f"{library}.py").touch()
    code = f"from helpers import load; load({str(stories_fp32)!r})"
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=tmp_path)
    told = done.stderr[done.stderr.rindex("BackendUnavailable") :]
    assert f"{tmp_path / library}.py" in told and "Rename" in told and "emove" not in told
