"""Contract tests of the TensorRT-LLM backends: our side runs its whole life against a stand-in (contract/README.md),
through a real worker process. They do not say that TensorRT-LLM ran; it never did on a machine of ours.

Each test names the file of github.com/NVIDIA/TensorRT-LLM, around version 1.2.1, that the fact was read in.
"""

import inspect as python_inspect
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import in_standin, whole
from conftest import trtllm_recipe as recipe

from helpers import SamplingParams, build, inspect, load, store
from helpers import recipe as recipes
from helpers.cli import main
from helpers.errors import (
    BackendUnavailable,
    BuildError,
    EngineCorrupt,
    EngineMismatch,
    InputError,
    LimitError,
    RecipeError,
    WorkerError,
)
from helpers.model.checkpoint import BUNDLED
from helpers.paths import engines_folder

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def built(**changes):
    """The engine's folder, and config.json as the stand-in's build wrote it."""
    folder = build(recipe(**changes), quiet=True)
    return folder, json.loads((folder / "tensorrt_llm" / "config.json").read_text())


# Build and save


@pytest.mark.parametrize("form", ["pydantic", "dataclass"])
def test_limits_and_plugins_arrive_in_both_forms_of_build_config(standin, form):
    """builder.py, before and after pull request 8330; plugin/plugin.py."""
    standin(BUILD_CONFIG=form)
    chosen = {"gemm_plugin": "auto", "gpt_attention_plugin": "bfloat16", "context_fmha": False}
    chosen |= {"use_fused_mlp": False, "multiple_profiles": True}
    _, config = built(options=chosen)
    wrote = config["build_config"]
    assert [wrote[n] for n in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")] == [4, 64, 256, 256]
    assert {name: wrote["plugin_config"][name] for name in chosen} == chosen
    assert wrote["profiling_verbosity"] == "detailed"  # or the inspector gives names only
    assert config["pretrained_config"]["dtype"] == wrote["plugin_config"]["dtype"] == "bfloat16"


def test_a_plugin_is_switched_off_with_the_word_disable(standin):
    """plugin/plugin.py: "disable" means None; a recipe file has no None."""
    _, config = built(options={"gpt_attention_plugin": "disable"})
    assert config["build_config"]["plugin_config"]["gpt_attention_plugin"] is None


def test_the_engine_is_published_with_our_manifest(standin):
    """builder.py, EngineConfig.to_dict: config.json has three keys, none of them TensorRT's version or the GPU."""
    folder, config = built()
    assert set(config) == {"version", "pretrained_config", "build_config"}
    identity = whole(folder)["identity"]
    assert identity["versions"] == {**identity["versions"], "tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48.post1"}
    assert (identity["architecture"], identity["device_name"]) == ("sm_90", "Stand-in GPU")
    assert {"tensorrt_llm/config.json", "tensorrt_llm/rank0.engine"} <= store.read_manifest(folder)["files"].keys()


def test_a_second_build_is_a_cache_hit_and_another_gpu_or_version_is_not(standin, capsys):
    folder = build(recipe(), quiet=True)
    assert build(recipe()) == folder
    assert "Cache hit" in capsys.readouterr().err
    standin(GPU="8.6")
    assert build(recipe()) != folder
    assert "architecture: sm_90 -> sm_86" in capsys.readouterr().err


def test_the_timing_cache_does_not_land_in_the_current_folder(standin, tmp_path, monkeypatch):
    """builder.py: output_timing_cache is 'model.cache', relative to wherever the process stands."""
    monkeypatch.chdir(tmp_path)
    build(recipe(), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["engines"]


@pytest.mark.parametrize(
    ("precision", "quantization"),
    [
        ("fp32", {"quant_algo": None, "kv_cache_quant_algo": None}),
        ("fp16", {"quant_algo": None, "kv_cache_quant_algo": None}),
        ("int8", {"quant_algo": "W8A16", "kv_cache_quant_algo": None}),
        ("int4", {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None}),
        ("fp8", {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}),
    ],
)
def test_precision_becomes_quant_config(standin, texts, precision, quantization):
    """examples/llm-api/_tensorrt_engine/llm_quantization.py; quantization/mode.py."""
    chosen = {"calib_dataset": str(texts)} if precision in ("int4", "fp8") else {}
    _, config = built(precision=precision, options=chosen)
    assert config["pretrained_config"]["quantization"] == quantization


def test_fp8_without_an_fp8_cache(standin, texts):
    """Whoever looks for the cause of bad answers switches it off first; llm_quantization.py gives both."""
    _, config = built(precision="fp8", options={"calib_dataset": str(texts), "kv_cache_quant_algo": ""})
    assert config["pretrained_config"]["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": None}


@pytest.fixture
def texts(tmp_path):
    """A data set in the one layout that calibrates."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "Once upon a time"}\n')
    return folder


def test_calibration_downloads_nothing_without_being_asked(standin, texts):
    """llmapi/llm_utils.py: FP8 and AWQ run ModelOpt, whose default dataset comes from the Hub."""
    with pytest.raises(RecipeError, match="calibrated"):
        build(recipe(precision="fp8"), quiet=True)
    folder, _ = built(model="dummy:stories", precision="fp8")  # random weights need none
    assert folder.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: folder / "nowhere", "no folder"),
        (lambda folder: folder.rename(folder.with_name("my-cnn_dailymail")), "stands for a layout"),
        (lambda folder: folder.rename(folder.with_name("ScienceQA")), "stands for a layout"),
        (lambda folder: folder.rename(folder.with_name("text[s]")), "stands for other folders"),
        (lambda folder: (folder / "texts.py").touch(), "texts.py"),  # load_dataset would run it
        (lambda folder: (folder / "README.md").touch(), "README.md"),  # its header can name any file
        (lambda folder: (folder / "test.jsonl").touch(), "test.jsonl"),
        (lambda folder: (folder / "train.jsonl").unlink(), "no readable"),
        (lambda folder: Path("~nobody-of-that-name/texts"), "cannot be read"),
        (lambda folder: folder / ("a" * 300), "cannot be read"),
        (lambda folder: (folder / "train.jsonl").write_text(""), "entry 1"),
        (
            lambda folder: (folder / "train.jsonl").write_text('{"article": "A"}\n'),
            "entry 1 .* has no text under 'text'",
        ),
        (lambda folder: (folder / "train.jsonl").write_text('{"text": "A"}\n{"txt": "B"}\n'), "entry 2"),
        (lambda folder: (folder / "train.jsonl").write_text('{"text": "A"}\n{"text": " "}\n'), "entry 2"),
        (lambda folder: (folder / "train.jsonl").write_text('{"text": "A"}\nB\n'), "no readable"),
        (
            lambda folder: (folder / "train.jsonl").write_text('{"text": "A"}\n{"text": "B", "id": 1}\n'),
            "entry 2 .* more",
        ),
        (lambda folder: (folder / "train.jsonl").write_text('{"text": "A\\ud800"}\n'), "half a character"),
    ],
)
def test_a_data_set_that_cannot_work_or_would_run_code_is_refused_before_the_build(standin, texts, change, words):
    """quantization/quantize_by_modelopt.py, get_calib_dataloader: it goes by the name, with trust_remote_code=True."""
    changed = change(texts)
    dataset = changed if isinstance(changed, Path) else texts
    with pytest.raises(RecipeError, match=words) as refused:
        build(recipe(precision="fp8", options={"calib_dataset": str(dataset)}), quiet=True)
    assert "train.jsonl" in refused.value.fix
    assert not store.list_engines()


def test_more_texts_than_there_are_cannot_be_asked_for(standin, texts):
    """get_calib_dataloader takes what is there, without a word."""
    (texts / "train.jsonl").write_text('{"text": "Once"}\n\n{"text": "Twice"}\n')
    options = {"calib_dataset": str(texts), "calib_batches": 3}
    with pytest.raises(RecipeError, match="2 at most"):
        build(recipe(precision="fp8", options=options), quiet=True)
    assert built(precision="fp8", options=options | {"calib_batches": 2})[0].exists()


def test_other_texts_make_another_engine(standin, texts):
    """The texts decide the scales, so they are a part of what the engine depends on."""
    options = {"calib_dataset": str(texts)}
    folder, _ = built(precision="fp8", options=options)
    (texts / "train.jsonl").write_text('{"text": "Long ago"}\n')
    assert built(precision="fp8", options=options)[0] != folder


@pytest.mark.parametrize("name", ["pileval", "derek-thomas/ScienceQA", "wikitext", "someone/cnn_dailymail"])
def test_other_names_on_the_hub_are_refused(standin, name):
    with pytest.raises(RecipeError, match="no folder"):
        build(recipe(precision="int4", options={"calib_dataset": name}), quiet=True)


def test_the_one_name_on_the_hub_is_taken_unless_something_here_has_it(standin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert built(precision="fp8", options={"calib_dataset": "cnn_dailymail"})[0].exists()
    (tmp_path / "cnn_dailymail").mkdir()
    with pytest.raises(RecipeError, match="would be taken for it"):
        build(recipe(precision="fp8", options={"calib_dataset": "cnn_dailymail"}), quiet=True, force=True)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("modeling.py", ""),
        ("custom_generate/generate.py", ""),  # from_pretrained runs it
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'),
        ("tokenizer_config.json", '{"\\u0061uto_map": {"AutoTokenizer": ["x.Y", null]}}'),
    ],
)
def test_a_checkpoint_with_code_of_its_own_is_not_calibrated(standin, texts, tmp_path, file, text):
    model = shutil.copytree(BUNDLED, tmp_path / "model")
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text(text)
    with pytest.raises(RecipeError, match="code of its own"):
        build(recipe(model=str(model), precision="fp8", options={"calib_dataset": str(texts)}), quiet=True)


@pytest.mark.parametrize("folder", ["attempt-2", "savila"])
def test_a_path_by_which_another_kind_of_model_would_be_calibrated_is_refused(standin, texts, tmp_path, folder):
    """quantization/quantize_by_modelopt.py, get_hf_config and get_model: "mpt" in the path makes an MPT model of it, of
    random weights where the checkpoint is a Llama's."""
    model = shutil.copytree(BUNDLED, tmp_path / folder)
    with pytest.raises(RecipeError, match="another kind of model"):
        build(recipe(model=str(model), precision="fp8", options={"calib_dataset": str(texts)}), quiet=True)


def test_fused_mlp_and_fast_build_follow_from_the_common_fields(standin):
    """llmapi/llm_args.py: fast_build; plugin/plugin.py: use_fused_mlp."""
    _, config = built(fusion={"kernels": True, "qkv": True, "gate_up": False}, optimization_level=0)
    assert config["build_config"]["plugin_config"]["use_fused_mlp"] is False


@pytest.mark.parametrize(
    ("gpu", "changes", "kind", "words"),
    [
        ("7.5", {}, BackendUnavailable, "begins with 8.0"),
        ("8.0", {"precision": "fp8", "options": {"calib_dataset": "x"}}, BuildError, "8.9"),
        ("10.0", {"precision": "int8"}, BuildError, "INT8"),
        (
            "8.9",
            {"precision": "fp8", "options": {"calib_dataset": "x", "gemm_swiglu_plugin": "fp8"}},
            BuildError,
            "Hopper",
        ),
        ("none", {}, BackendUnavailable, "needs an NVIDIA GPU"),
    ],
)
def test_what_the_gpu_cannot_do_is_refused_before_the_build(standin, gpu, changes, kind, words):
    """Issues 199, 1428; models/modeling_utils.py (SM>=100); plugin/plugin.py (gemm_swiglu_plugin)."""
    standin(GPU=gpu)
    with pytest.raises(kind, match=words) as caught:
        build(recipe(**changes), quiet=True)
    assert caught.value.fix
    assert not store.list_engines()


def test_a_worker_that_dies_in_the_middle_leaves_nothing_half_built(standin):
    """Builds die: `Killed` is what Linux says when the host's memory runs out (issue 2451)."""
    standin(FAIL={"at": "build", "type": "SystemExit", "text": "137"})
    with pytest.raises(WorkerError, match="ended unexpectedly"):
        build(recipe(), quiet=True)
    assert [p.name for p in engines_folder().iterdir() if p.name != ".locks"] == []


def test_the_command_line_builds_inspects_lists_and_generates(standin, tmp_path, capsys):
    file = recipes.write(recipe(options={"gemm_plugin": "auto"}), tmp_path / "r.toml")
    assert main(["build", str(file)]) == 0
    name = capsys.readouterr().out.strip()
    assert main(["list"]) == 0
    assert main(["inspect", name]) == 0
    assert main(["generate", name, "Once", "--max-tokens", "3", "--temperature", "0"]) == 0
    shown = capsys.readouterr().out
    assert name in shown and "PLUGIN_V2_GPTAttention" in shown and "3 tokens, length" in shown


# Load, generate, stream


@pytest.fixture
def folder(standin) -> Path:
    return build(recipe(), quiet=True)


@pytest.mark.parametrize("end_token", ["excluded", "included"])
def test_generate_stops_at_the_end_token_whether_the_answer_holds_it_or_not(standin, folder, end_token):
    """executor/result.py: token_ids_diff, finish_reason. Whether the end token is among the ids was not read."""
    standin(END_TOKEN=end_token)
    with load(folder) as engine:
        long, short = engine.generate([[10, 11], [2046, 2047]], GREEDY)  # the stand-in counts up; 2 is the end token
        assert (long.token_ids, long.finish_reason) == ([12, 13, 14, 15], "length")
        assert (short.token_ids, short.finish_reason) == ([0, 1], "stop")
        assert 0 < long.metrics.ttft_s <= long.metrics.e2e_s
        assert long.metrics.tpot_s == pytest.approx((long.metrics.e2e_s - long.metrics.ttft_s) / 3)
        going_on = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        assert engine.generate([2047], going_on)[0].token_ids == [0, 1, 2, 3]
        assert engine.generate([1], GREEDY)[0].token_ids == []


def test_text_goes_in_and_out_by_the_engines_own_tokenizer(folder, capsys):
    with load(folder) as engine:
        assert "Starting TensorRT-LLM, which can take minutes" in capsys.readouterr().err
        ids = engine.tokenize("Once upon a time")
        answer = engine.generate("Once upon a time", GREEDY)[0]
        assert engine.versions["tensorrt_llm"] == "1.2.1"  # what a benchmark's record says of it
        assert answer.prompt_token_ids == ids
        assert answer.text == engine.detokenize(answer.token_ids)


def test_a_stop_string_ends_an_answer_and_the_next_request_waits_for_the_rest(folder):
    with load(folder) as engine:
        texts = [engine.detokenize([token], [10]) for token in range(11, 20)]
        sampling = SamplingParams(temperature=0, max_tokens=9, stop=texts[2] + texts[3])
        for answer in [*engine.generate([[10], [10]], sampling), *engine.generate([10], sampling)]:
            assert (answer.text, answer.token_ids) == ("".join(texts[:2]), [11, 12, 13, 14])
            assert answer.finish_reason == "stop"
        tokens = list(engine.stream([10], sampling))
        assert [token.text for token in tokens] == [*texts[:2], "", ""]
        assert engine.generate([10], GREEDY)[0].token_ids == [11, 12, 13, 14]


def test_a_stream_hands_out_what_generate_returns(folder):
    with load(folder) as engine:
        tokens = list(engine.stream("Once", GREEDY))
        answer = engine.generate("Once", GREEDY)[0]
        assert [t.token_id for t in tokens] == answer.token_ids
        assert "".join(t.text for t in tokens) == answer.text
        assert [t.elapsed_s for t in tokens] == sorted(t.elapsed_s for t in tokens)
        # Of a batch, they are handed over when all are there: that takes time, and its steps are timed.
        sampling = {**vars(GREEDY), "end_ids": [2]}
        engine.memory()  # waits for the end of the request before
        events = {n: list(engine.worker.stream("generate", prompts=[[10]] * n, sampling=sampling)) for n in (1, 3)}
        assert [len(events[n]) for n in (1, 3)] == [len(answer.token_ids), 1] and len(events[3][0]) == 12


def test_a_stream_that_is_left_does_not_disturb_the_next_request(folder):
    with load(folder) as engine:
        left = engine.stream([10], SamplingParams(temperature=0, max_tokens=200))
        next(left)
        assert engine.generate([20], GREEDY)[0].token_ids == [21, 22, 23, 24]
        with pytest.raises(InputError, match="answers another prompt"):
            next(left)
        dropped = engine.stream([10], GREEDY)
        next(dropped)
        dropped.close()
        assert engine.generate([30], GREEDY)[0].token_ids == [31, 32, 33, 34]
    with pytest.raises(InputError, match="closed"):
        engine.generate([1])


def test_our_limits_are_checked_before_the_worker_is_asked(folder):
    with load(folder) as engine:
        with pytest.raises(LimitError, match="max_input_len"):
            engine.generate([5] * 65)
        with pytest.raises(LimitError, match="max_batch_size"):
            engine.generate([[5]] * 5)


def test_single_steps_are_refused_and_logits_have_to_be_built_in(standin, folder):
    """llmapi/llm.py: logits need gather_generation_logits, in the engine and in LLM()."""
    with load(folder) as engine:
        with pytest.raises(InputError, match="no single steps"):
            engine.prefill([[1]])
        with pytest.raises(InputError, match="gather_generation_logits"):
            engine.logits([7])
        assert engine.generate([10], GREEDY)[0].token_ids == [11, 12, 13, 14]  # the worker goes on
    with load(build(recipe(options={"gather_generation_logits": True}), quiet=True)) as engine:
        scores = engine.logits([7])
        assert scores.shape == (2048,) and scores.argmax() == 8


def test_the_pytorch_backend_needs_no_build(standin):
    """llmapi/llm.py, _TorchLLM: settings of engines are refused there, so none is given."""
    with load(recipe(backend="tensorrt_llm_pytorch", options={"cuda_graphs": False})) as engine:
        assert engine.generate([10], GREEDY)[0].token_ids == [11, 12, 13, 14]
        assert engine.logits([7]).argmax() == 8
    with pytest.raises(BuildError, match="nothing to build"):
        build(recipe(backend="tensorrt_llm_pytorch"))


# ModelRunner


@pytest.mark.parametrize("cpp", [False, True])
def test_the_older_interface_answers_the_same(folder, cpp):
    """runtime/model_runner.py and model_runner_cpp.py: what each reads from where; the result holds the prompt."""
    from helpers.backends.tensorrt_llm.backend import model_runner

    answers = model_runner(
        recipe(), folder, [[10, 11, 12], [2046]], SamplingParams(temperature=0, max_tokens=5), cpp=cpp
    )
    assert answers == [[13, 14, 15, 16, 17], [2047, 0, 1]]
    with pytest.raises(LimitError, match="Input batch size"):
        model_runner(recipe(), folder, [[1]] * 5, GREEDY, cpp=cpp)


def test_the_c_runners_traps_are_in_the_stand_in():
    """model_runner_cpp.py: max_new_tokens is 1 unless given; ids are read from keywords."""
    code = "from tensorrt_llm.runtime import ModelRunnerCpp as R; import inspect; print(inspect.signature(R.generate))"
    assert "max_new_tokens: int = 1" in in_standin(code)


# The layer report


@pytest.mark.parametrize("form", ["10", "11", "names"])
def test_the_layer_report_of_the_engine(standin, form):
    """TensorRT 10.16 and 11 documentation, engine tools: JSON keys; names alone without detailed verbosity."""
    standin(INSPECTOR=form)
    folder = build(recipe(), quiet=True)
    report = inspect(folder)
    assert len(report.kernels) == store.read_manifest(folder)["details"]["layers"] == 6
    plugin = next(k for k in report.kernels if "GPTAttention" in k.name)
    assert plugin.fused == (plugin.name,)  # a plugin stays a layer of its own
    merged = [k for k in report.kernels if len(k.fused) > 1]
    assert [len(k.fused) for k in merged] == [2, 3]
    assert {name for k in report.kernels for name in k.fused} == {o.name for o in report.operations}
    if form != "names":
        assert {k.dtype for k in report.kernels} == {"float16"}


def test_a_plan_with_plugins_needs_their_library(standin, folder):
    """plugin/plugin.py, _load_plugin_lib; issues 1913 and 3327 of NVIDIA/TensorRT."""
    from helpers.machine.worker import Worker

    plan = str(folder / "tensorrt_llm" / "rank0.engine")
    with Worker("helpers.backends.tensorrt.api") as worker:
        with pytest.raises(BackendUnavailable, match="IPluginCreator"):
            worker.call("inspect", plan=plan, provider="tensorrt")
        assert worker.call("inspect", plan=plan, provider="tensorrt", plugins="tensorrt_llm")["layers"] == 6


def test_an_engine_whose_layers_cannot_be_read_is_kept(standin, capsys):
    from helpers.backends.tensorrt_llm import backend as tensorrt_llm

    folder = build(recipe(), quiet=True)
    (folder / "tensorrt_llm" / "rank0.engine").write_bytes(b"another version's plan")
    report, said = tensorrt_llm.layer_report(folder)
    assert report.kernels == [] and "Version tag" in said
    assert "its layers cannot be shown" in capsys.readouterr().err


# Another machine, another version, a damaged folder


def test_an_engine_of_another_gpu_or_version_is_refused_in_our_words(standin, folder):
    """Issue 3031, tensorrtllm_backend issue 531: TensorRT itself finds it when it reads the plan."""
    standin(GPU="8.9")
    with pytest.raises(EngineMismatch, match="sm_90; this machine has sm_89"):
        load(folder)
    standin(GPU="9.0", VERSION="1.2.0")
    with pytest.raises(EngineMismatch, match="tensorrt_llm 1.2.1; this machine has 1.2.0"):
        load(folder)


def test_a_damaged_plan_is_found_before_it_is_loaded(folder):
    (folder / "tensorrt_llm" / "rank0.engine").write_bytes(b"cut")
    with pytest.raises(EngineCorrupt, match="rank0.engine"):
        load(folder)


def test_versions_without_engines_say_so(standin):
    """NVIDIA's guide on the removal of the TensorRT backend (docs/source/legacy/tensorrt-backend-removal.md)."""
    standin(VERSION="1.3.0")
    with pytest.raises(BackendUnavailable, match="_tensorrt_engine") as caught:
        build(recipe(), quiet=True)
    assert "1.2.1" in caught.value.fix


def test_without_the_environment_it_is_said_in_one_line(monkeypatch, capsys):
    from helpers import backends

    monkeypatch.delenv("COURSE_TRTLLM_PYTHON", raising=False)
    monkeypatch.setattr("helpers.machine.environments.python_of", lambda name: None)
    assert backends.prefer("tensorrt_llm", otherwise="aot") == "aot"
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(BackendUnavailable, match="not here"):
        build(recipe(), quiet=True)


def test_where_it_is_there_notebooks_prefer_it(standin):
    from helpers import backends

    assert backends.prefer("tensorrt_llm", otherwise="aot") == "tensorrt_llm"
    assert backends.installed()["tensorrt_llm"]


def test_asking_the_library_what_it_is_is_shown_where_it_takes_long(monkeypatch, capsys):
    from helpers.backends.tensorrt_llm import backend

    def slow():
        time.sleep(0.3)
        raise WorkerError("It does not start.")

    monkeypatch.setattr(backend, "start_worker", slow)
    monkeypatch.setattr("helpers.progress.SILENT_S", 0.1)
    with pytest.raises(WorkerError):
        backend.machine()
    assert "Asking TensorRT-LLM, once in a process" in capsys.readouterr().err


def test_the_notebooks_side_imports_nothing_of_tensorrt_llm():
    import helpers.backends.tensorrt_llm as ours

    assert "import tensorrt_llm\n" not in python_inspect.getsource(ours)
    assert "tensorrt_llm" not in sys.modules


def test_the_worker_needs_nothing_but_python_and_tensorrt_llm():
    """Its environment has TensorRT-LLM's packages, not the course's; without site-packages every other import fails."""
    modules = ("helpers.machine.worker", "helpers.backends.tensorrt_llm.worker", "helpers.backends.tensorrt.api")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
