"""The vLLM backend against a stand-in with vLLM 0.25.1's signatures (tests/contract). vLLM itself runs on a GPU only:
its figures are in the reference records."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import pytest

from helpers import BuildRecipe, SamplingParams, load
from helpers.bench import run as benchmark
from helpers.bench.records import Workload
from helpers.errors import BackendUnavailable, InputError, LimitError, ModelError, OutOfMemory

LIMITS = {"backend": "vllm", "precision": "bf16", "max_batch_size": 4, "max_input_len": 32, "max_seq_len": 64}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Python that finds the stand-in where vLLM's own would find vLLM. Returns the file with LLM's arguments."""
    python = tmp_path / "python"
    folder = Path(__file__).parent / "standins"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{folder}:$PYTHONPATH"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("COURSE_VLLM_PYTHON", str(python))
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "settings.json"))
    return tmp_path / "settings.json"


def test_generate_stream_and_logits(stand_in, capsys):
    with load(BuildRecipe(**LIMITS)) as engine:
        assert "Starting vLLM, which can take minutes" in capsys.readouterr().err
        sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        answers = engine.generate(["Once", "Once upon a time"], sampling)
        assert [a.token_ids for a in answers] == [[3, 4, 5, 6, 7]] * 2
        assert all(a.finish_reason == "length" and len(a.metrics.gaps_s) == 4 for a in answers)
        assert [t.token_id for t in engine.stream("Once", sampling)] == [3, 4, 5, 6, 7]
        assert engine.logits("Once").tolist() == [-float(i) for i in range(2048)]
        assert engine.memory()["host"] > 10e6 and engine.versions["vllm"] == "0.25.1"
        with pytest.raises(LimitError):
            engine.generate(["Once"] * 5)


def test_the_end_token_stops_an_answer_and_is_not_part_of_it(stand_in, monkeypatch):
    monkeypatch.setenv("STANDIN_ENDS_AFTER", "3")
    with load(BuildRecipe(**LIMITS)) as engine:
        (answer,) = engine.generate("Once", SamplingParams(temperature=0, max_tokens=9))
        assert (answer.token_ids, answer.finish_reason) == ([3, 4], "stop")
        (answer,) = engine.generate("Once", SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        assert len(answer.token_ids) == 9


def test_an_end_token_that_only_the_tokenizer_names_stops_too(stand_in):
    """vLLM is loaded without the tokenizer. It went on to max_tokens, and the end token was left out in silence."""
    greedy = SamplingParams(temperature=0, max_tokens=9)
    with load(BuildRecipe(**LIMITS)) as engine:
        engine.end_ids = (2, 5)
        for answer in engine.generate(["Once", "Once upon a time"], greedy):
            assert (answer.token_ids, answer.finish_reason) == ([3, 4], "stop")
        assert [token.token_id for token in engine.stream("Once", greedy)] == [3, 4]
        (answer,) = engine.generate("Once", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert answer.token_ids == [3, 4, 5, 6]


def test_a_stop_string_ends_an_answer_and_the_next_request_waits_for_the_rest(stand_in):
    with load(BuildRecipe(**LIMITS)) as engine:  # the stand-in counts up from token 3, which is "!"
        sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, stop=["#$", "%"])
        for answer in engine.generate(["Once", "Once upon a time"], sampling):
            assert (answer.text, answer.token_ids, answer.finish_reason) == ('!"', [3, 4, 5, 6], "stop")
        tokens = list(engine.stream("Once", sampling))
        assert [token.text for token in tokens] == ["!", '"', "", ""]
        plain = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        assert engine.generate("Once", plain)[0].token_ids == [3, 4, 5]


def test_a_stream_left_early_does_not_disturb_the_next_request_which_says_what_it_waits_for(stand_in, monkeypatch):
    titles = []
    with load(BuildRecipe(**LIMITS)) as engine:
        stream = engine.stream("Once", SamplingParams(max_tokens=20))
        next(stream)
        stream.close()
        shown = "helpers.backends.remote.shown_if_slow"
        monkeypatch.setattr(shown, lambda title, phase: titles.append(title) or contextlib.nullcontext())
        assert engine.generate("Once", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids == [3, 4, 5]
    assert titles == ["The request before is still answered, to its last token"]


@pytest.mark.parametrize("ask", [lambda engine: engine.logits("Once"), lambda engine: engine.memory()])
def test_a_stream_that_another_call_has_overtaken_is_refused_and_the_engine_goes_on(stand_in, ask):
    """The worker was ended, and the library's version blamed."""
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with load(BuildRecipe(**LIMITS)) as engine:
        stream = engine.stream("Once", sampling)
        next(stream)
        ask(engine)
        with pytest.raises(InputError, match="stream cannot go on"):
            next(stream)
        assert engine.generate("Once", sampling)[0].token_ids == [3, 4, 5, 6, 7, 8]


def test_settings_are_fair_and_follow_the_recipe(stand_in):
    """Same limits, same type, same room for keys and values as an engine of these limits, no prefix cache."""
    load(BuildRecipe(**LIMITS)).close()
    settings = json.loads(stand_in.read_text())
    assert settings["dtype"] == "bfloat16" and settings["load_format"] == "safetensors"
    assert settings["max_model_len"] == 64 and settings["max_num_seqs"] == 4
    assert not settings["enable_prefix_caching"]
    from helpers.model.checkpoint import find_checkpoint

    needed = find_checkpoint("stories").config.kv_cache_bytes(4, 64, 2)
    assert needed < settings["kv_cache_memory_bytes"] < 2 * needed
    load(BuildRecipe(**{**LIMITS, "model": "dummy:tinyllama-1.1b", "precision": "fp8"})).close()
    settings = json.loads(stand_in.read_text())
    assert settings["load_format"] == "dummy" and settings["quantization"] == "fp8"


def test_what_cannot_run_says_why(stand_in, monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="positions"):
        load(BuildRecipe(**{**LIMITS, "max_seq_len": 100_000}))
    broken = tmp_path / "fails"
    broken.mkdir()
    (broken / "config.json").write_text((Path(benchmark.BUNDLED) / "config.json").read_text())
    for said, kind, words in (
        ("", BackendUnavailable, "Engine core initialization failed"),
        ("ERROR 11-28 [core.py] ValueError: Free memory on device is less than desired", OutOfMemory, "Free memory"),
        ("ERROR 11-28 [core.py] ValueError: No such attention\nRuntimeError: later", BackendUnavailable, "attention"),
    ):
        monkeypatch.setenv("STANDIN_CORE_SAYS", said)  # the engine core is another process, and has the log alone
        with pytest.raises(kind, match=words):
            load(BuildRecipe(**{**LIMITS, "model": f"dummy:{broken}"}))
    monkeypatch.setenv("STANDIN_GPU", "0")
    with pytest.raises(BackendUnavailable, match="NVIDIA"):
        load(BuildRecipe(**LIMITS))
    monkeypatch.setenv("COURSE_VLLM_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(BackendUnavailable, match="not here"):
        load(BuildRecipe(**LIMITS))
    monkeypatch.delenv("COURSE_VLLM_PYTHON")
    monkeypatch.setattr("helpers.machine.environments.python_of", lambda name: None)
    with pytest.raises(BackendUnavailable, match="not here"):
        load(BuildRecipe(**LIMITS))


def test_the_benchmark_measures_it_in_turn_with_the_others(stand_in):
    workload = Workload(input_len=8, output_len=8, repeats=2, warmup=1, start_together=True)
    record = benchmark.run(workload, ["vllm:bf16", "pytorch"], [1, 2], quiet=True)
    assert [row.status for row in record.rows] == ["ok"] * 4
    row = record.row("vllm bf16")
    assert row.versions["vllm"] == "0.25.1" and len(row.ttft_s) == 2 and len(row.itl_s) == 14
    assert row.gpu_busy_s == pytest.approx(0.0005) and row.gpu_handover_s == 0  # of a step, without the prefill
    assert record.row("vllm bf16", 2).gpu_busy_s == row.gpu_busy_s and record.row("pytorch fp32").gpu_busy_s is None
    assert not list(Path(tempfile.gettempdir()).glob("vllm-traces-*"))
    assert row.agrees is False and row.tokens_equal < 8  # the stand-in has seen no model


def test_where_nobody_may_look_at_the_gpu_nothing_else_is_lost(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("STANDIN_BLIND", "1")
    record = benchmark.run(Workload(input_len=8, output_len=8, repeats=1, warmup=1), ["vllm:bf16"])
    row = record.row("vllm bf16")
    assert row.gpu_busy_s is None and row.gpu_idle is None and len(row.tpot_s) == 1
    assert "The profiler saw no work on the GPU" in capsys.readouterr().err
