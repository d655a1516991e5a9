"""Every public function, called with arguments of many wrong kinds: it works, or refuses in our words.

What passes: a CourseError, and TypeError for a call whose arguments have the wrong names or number. Nothing here
builds: what would be a valid build is answered by a stand-in.
"""

import dataclasses
import errno
import functools
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Scripted
from promises import NIGHTLY, how_many

torch = pytest.importorskip("torch")
import safetensors.torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import helpers
from helpers import BuildRecipe, SamplingParams, engine, store
from helpers import recipe as recipes
from helpers.bench import claims, quality, records, tables
from helpers.bench import run as benchmark
from helpers.course import edge_llm, experiments, memory, onnx_tables, pictures, timing, troubles, widgets
from helpers.course.batching import compare_batching, measured_steps
from helpers.course.cards import explain
from helpers.course.exercises import check, freeze, hint, solution
from helpers.course.lab import pictures as drawn
from helpers.course.lab import profile
from helpers.course.lab.binary import compiled_for
from helpers.course.lab.code import beside, generated_loops
from helpers.course.lab.compiled import compile_module
from helpers.course.predict import predict, reveal
from helpers.course.recorded import recorded
from helpers.errors import CourseError, EngineCorrupt, InputError
from helpers.machine import hardware
from helpers.model import fetch
from helpers.model.checkpoint import find_checkpoint
from helpers.recipe.fields import Fusion, RecipeFields
from helpers.recipe.tensorrt import KINDS, make_options
from helpers.recipe.tensorrt_llm import PLUGINS, PYTORCH_SETTINGS, REFUSED, SETTINGS


class Hostile:
    """Whatever is asked of it fails."""

    def __repr__(self):
        raise RuntimeError("no")


HUGE = 10**5000  # which Python refuses to spell out
NESTED: list = []
NESTED.append(NESTED)
ODD = [
    None, True, False, 0, -1, 1, 2**63, HUGE, -HUGE, 0.0, -0.5, 1e308, math.nan, math.inf, 1j, "", " ", "\0",
    "x" * 5000, "../..", "/", "~nobody/x", "caf\udce9", "\ud800", "stories", "dummy:", "a/b", "owner/name/more",
    b"stories", b"", [], [1], ["x"], [None], NESTED, {}, {"x": 1}, {1: 2}, {"model": {}}, (), (1, 2), {1}, object(),
    Hostile(), Hostile, len, Path("nowhere"), Path("x" * 300), Path(), Path("/dev/null"), torch.zeros(2),
    torch.nn.Linear(2, 2), Fusion(kernels=5), SamplingParams(), range(3), iter([1]), Exception("x"),
]  # fmt: skip
odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=20)
odd = odd | st.lists(odd, max_size=3) | st.dictionaries(st.text(max_size=5), odd, max_size=3)
SHORT = SamplingParams(temperature=0, max_tokens=2)
SETTINGS_OF_A_WALK = settings(
    max_examples=how_many(150, 10_000),
    deadline=None,
    derandomize=not NIGHTLY,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _no_builds(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "_run", lambda job, force: store.name_of(job.short_name, job.identity))


def refuses_in_our_words(call, *arguments, **named):
    try:
        return call(*arguments, **named)
    except CourseError as error:
        assert error.what and str(error).isprintable() or "\n" in str(error)
        return None


TAKE_ONE = {
    "build": helpers.build,
    "load": helpers.load,
    "load with tokenizer": lambda value: helpers.load("stories", tokenizer=value),
    "inspect": helpers.inspect,
    "locate": engine.locate,
    "recipe_of": engine.recipe_of,
    "load_plan": engine.load_plan,
    "build_onnx": engine.build_onnx,
    "build_module": lambda value: engine.build_module(value, (torch.zeros(2, 2),)),
    "find": store.find,
    "remove": store.remove,
    "read": recipes.read,
    "write": lambda value: recipes.write(value, "r.toml"),
    "write to": lambda value: recipes.write(BuildRecipe(), value),
    "from_dict": recipes.from_dict,
    "explain": explain,
    "find_checkpoint": find_checkpoint,
    "build force": lambda value: helpers.build(BuildRecipe(), force=value, quiet=True),
    "replace": lambda value: BuildRecipe().replace(model=value, max_batch_size=value),
    "Fusion": lambda value: Fusion(qkv=value),
    "build_onnx precision": lambda value: engine.build_onnx("x.onnx", value),
    "read_manifest": store.read_manifest,
    "model get": fetch.get,
    "Workload": records.Workload,
    "Workload's numbers": lambda value: records.Workload(input_len=value, repeats=value, decode_batch_sizes=value),
    "record": records.read,
    "record to": records.keeper,
    "batch sizes": benchmark.batch_sizes,
    "contenders": lambda value: benchmark.run(records.Workload(), value, quiet=True),
    "check": lambda value: check(value, 1),
    "answer": lambda value: check("00.3", value),
    "hint": hint,
    "solution": solution,
    "freeze": freeze,
    "predict": lambda value: predict("x", times=value),
    "predict choice": lambda value: predict("x", choice=value, of=["a", "b"]),
    "reveal": lambda value: (predict("y", times=1), reveal("y", times=value)),
}


@pytest.mark.parametrize("call", TAKE_ONE.values(), ids=TAKE_ONE)
def test_functions_of_one_argument(call):
    for value in ODD:
        refuses_in_our_words(call, value)


ENGINE_CALLS = {
    "generate": lambda e, value: e.generate(value, SHORT),
    "stream": lambda e, value: list(e.stream(value, SHORT)),
    "prefill": lambda e, value: e.prefill(value),
    "logits": lambda e, value: e.logits(value),
    "decode": lambda e, value: (e.prefill([[1]]), e.decode(value)),
    "tokenize": lambda e, value: e.tokenize(value),
    "detokenize": lambda e, value: e.detokenize(value),
    "detokenize after": lambda e, value: e.detokenize([1], value),
    "chat": lambda e, value: e.chat(value, SHORT),
    "stream_chat": lambda e, value: list(e.stream_chat(value, SHORT)),
    "stream_choices": lambda e, value: list(widgets.stream_choices(e, [1], SHORT, value)),
}
OF_A_NOTEBOOK = {  # the folder in place of the engine, the engine in place of its report
    "sampling_explorer": widgets.sampling_explorer,
    "chat": widgets.chat,
    "score": lambda value: quality.score(value, "Once upon a time"),
    "plan": memory.plan,
    "memory_table": memory.memory_table,
    "kernels": pictures.kernels,
    "operations": pictures.operations,
    "fusion_replay": widgets.fusion_replay,
    "one of several reports": lambda value: pictures.fusion({"fp32": value}),
    "sizes": lambda value: pictures.sizes({"fp32": value}),
    "profile": profile.profile,
    "costs": profile.costs,
    "moved": profile.moved,
    "clusters": drawn.clusters,
    "replay": drawn.replay,
    "roofline": lambda value: drawn.roofline(value, 1e9),
    "time_by_work": lambda value: drawn.time_by_work({"fp32": value}),
    "beside": lambda value: beside(value, value),
    "operators": onnx_tables.operators,
    "plugin_node": onnx_tables.plugin_node,
    "interface": onnx_tables.interface,
    "distributions": lambda value: pictures.distributions(value, "x", {}),
    "stream_choices": lambda value: list(widgets.stream_choices(value, "x", SHORT)),
    "compare_batching": lambda value: compare_batching([], value, max_batch=1, cache_tokens=64, max_seq_len=64),
    "bytes_per_step": lambda value: benchmark.bytes_per_step(value, "fp32", 1),
    "measured_steps": lambda value: measured_steps(value, "aot fp32"),
}
TENSORS = [
    torch.empty(2, dtype=torch.long, device="meta"), torch.eye(2, dtype=torch.long).to_sparse(), torch.long,
    torch.tensor(1), torch.tensor([[1]]), torch.tensor([1.0]), torch.tensor([True]), torch.tensor([-1]), np.int64,
    np.zeros(1, dtype=[("x", int)]), np.array(["x"]), np.array([None]), np.array([]), [10**30],
]  # fmt: skip


@pytest.mark.parametrize("call", ENGINE_CALLS.values(), ids=ENGINE_CALLS)
def test_what_an_engine_is_asked(call):
    for value in ODD + TENSORS:
        refuses_in_our_words(call, Scripted([1]), value)


@pytest.mark.parametrize("call", OF_A_NOTEBOOK.values(), ids=OF_A_NOTEBOOK)
def test_what_another_cell_holds_is_refused_by_name(call):
    for value in (*ODD, SamplingParams()):
        with pytest.raises(InputError, match="is asked for, not"):
            call(value)


def test_what_the_laboratory_cannot_find_is_said_with_what_there_is(tmp_path):
    folder = recorded("block", "fp32")
    (tmp_path / "decode_b1.pt2").touch()
    report = helpers.inspect(folder)
    again = [dataclasses.replace(operation, graph="again") for operation in report.operations]
    two = dataclasses.replace(report, operations=[*report.operations, *again])
    for call, words in {
        lambda: generated_loops(tmp_path, "decode"): "There are: decode_b1",
        lambda: generated_loops(folder, "decode_b1"): "none that PyTorch compiled",
        lambda: compiled_for(folder): "no file",
        lambda: compiled_for(tmp_path / "none"): "no file",
        lambda: compile_module(torch.nn.GELU(), torch.zeros(2)): r"\(x,\)",
        lambda: compile_module(torch.nn.functional.gelu, (torch.zeros(2),)): "Module is asked for",
        lambda: profile.profile(Scripted([1]), two): "the report is of module, again",
    }.items():
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(EngineCorrupt, match="cannot be read: File is not a zip"):
        generated_loops(tmp_path, "decode_b1")


def test_a_binary_in_a_folder_that_is_closed_to_the_user_is_told(monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match="another user"):
        compiled_for(Path("x.so"))


def test_what_a_learner_mixes_up_in_a_notebook_is_told(tmp_path):
    folder, record = recorded("block", "fp32"), records.references()[0]
    report, manifest, row = helpers.inspect(folder), store.read_manifest(folder), record.measured()[0]
    engine, (graph, _) = Scripted([1]), onnx_tables.course_graphs("stories")
    safetensors.torch.save_file({"down.scale": torch.ones(1)}, tmp_path / "weights.safetensors")
    scores = quality.Scores(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    open_ended = dataclasses.replace(report.kernels[0], details={})
    for call, words in {
        lambda: beside(report.kernels[0], report): "holds no code of kernel",
        lambda: report.of("modul"): "There are: module",
        lambda: drawn.roofline(dataclasses.replace(report, kernels=[open_ended]), 1e9): "bytes that these kernels",
        lambda: onnx_tables.plugin_node(graph): "has no plugin",
        lambda: onnx_tables.compare({"this course": graph}): "Give a list of graphs",
        lambda: widgets.batching_simulator(record): "measured_steps",
        lambda: widgets.experiment_runner(
            lambda a: {"ms": 1.0}, {"a": 4}, tmp_path / "r.json", "ms"
        ): "This is no grid",
        lambda: pictures.show_text(engine.generate([1], SHORT)[0]): "Give the text of an answer",
        lambda: pictures.distributions(engine, [1], SHORT): "Give each setting with a name",
        lambda: pictures.phases(manifest): "seconds",
        lambda: benchmark.bytes_per_step(record.workload, "FP32", 1): "one of fp32",
        lambda: claims.aspects(record, tables.Programs({row.backend: "x"})): "programs.lines",
        lambda: troubles.wrong_scale(tmp_path, "layers.9.down", 2): "There are down",
        lambda: troubles.wrong_scale(find_checkpoint("stories").folder, "layers.0.down", 2): "no int8",
        lambda: troubles.copy_of(folder.name): "no folder",
        lambda: troubles.copy_of(engine): "names no file",
        lambda: troubles.other_tokenizer("dummy:tinyllama-1.1b"): "no tokenizer",
        lambda: edge_llm.files(folder): "no export",
        lambda: benchmark.run(record.workload, ["pytorch"], [1], keep="record.json"): "records.keeper",
        lambda: compile_module(torch.nn.GELU(), (torch.ones(2),), options={"cpp.simdln": 256}): "mean 'cpp.simdlen'",
        lambda: compile_module(torch.nn.Linear(4, 4), (torch.ones(2, 8),)): "cannot export",
        lambda: experiments.rows_table(experiments.run_grid(dict, {"a": [1]}, tmp_path / "r.json"), "x"): r"\*_, rows",
        lambda: experiments.rows_picture((row for row in ()), {"a": [1]}, "ms"): r"\*_, rows",
        lambda: pictures.kernels(report, "module"): r"report\.of",
        lambda: pictures.operations(report, 0, "module"): r"report\.of",
        lambda: pictures.versions(torch): "package's name",
        lambda: timing.compare({"a": 1.0, "b": 2.0}, "a", "b"): "no medians",
        lambda: row.median("tpot"): "Give one of ttft_s, tpot_s",
        lambda: row.spread("name"): "Give one of ttft_s, tpot_s",
        lambda: record.throughput(row.name): "Give a row",
        lambda: troubles.source_checkout("nosuchpackage"): "not installed",
        lambda: hardware.least_time(64, "gpu", 1): "no device 'gpu'",
        lambda: measured_steps(record, row.name).of_batch(99): "no step time",
        lambda: scores.kl({"aot fp32": scores}): "scores of one engine",
        lambda: pictures.timings({"fp32": 1.0, "int8": 2.0}): "no medians",
        lambda: next(experiments.run_grid({"ms": 1.0}, {"a": [1]}, tmp_path / "r.json")): "the function itself",
        lambda: next(experiments.run_grid(lambda a: {}, {"a": [1], "b": [2]}, tmp_path / "r.json")): "with a, b: ",
        lambda: beside(report.kernels[0], report, ["for(...)"]): r"loops\[0\]",
        lambda: profile.by_work(report): "has a time",
        lambda: helpers.backends.prefer("trtllm"): "no backend 'trtllm'",
        lambda: helpers.backends.prefer("aot", otherwise="trt"): "no backend 'trt'",
    }.items():
        with pytest.raises(CourseError, match=words):
            call()


def test_numbers_name_settings_and_reports_too():
    reports = {0: helpers.inspect(recorded("block", "fp32")), 3: helpers.inspect(recorded("block", "fp16"))}
    pictures.fusion(reports)
    pictures.distributions(Scripted([1]), "Once", {t: SamplingParams(temperature=t) for t in (0.5, 1.0)})
    predict("the best batch size", choice=None, of=[1, 2, 4])
    assert reveal("the best batch size", choice=2).result == "2"


@pytest.mark.parametrize("value", [{}, {"temperature": 0}, 0, False, [], "", "greedy", SamplingParams], ids=repr)
def test_what_only_looks_like_sampling_settings_is_refused(value):
    for call in (Scripted([1]).generate, Scripted([1]).stream):
        with pytest.raises(InputError, match="SamplingParams"):
            call([1], value)
    with pytest.raises(InputError, match="SamplingParams"):
        next(widgets.stream_choices(Scripted([1]), [1], value))


def fields_of(kind):
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.promise("Any argument works or is refused in our words", 150, 10_000)
@SETTINGS_OF_A_WALK
@given(st.dictionaries(st.sampled_from(fields_of(SamplingParams)), odd, max_size=3))
@example({"temperature": HUGE})
@example({"temperature": 2**64})
@example({"seed": HUGE})
@example({"top_p": -HUGE})
def test_sampling_params(fields):
    params = refuses_in_our_words(SamplingParams, **fields)
    if params is not None:  # and then a sampler takes them
        from helpers.model.sampling import next_token_distribution

        next_token_distribution(torch.randn(8), params, [1])


@pytest.mark.promise("Any argument works or is refused in our words", 150, 10_000)
@SETTINGS_OF_A_WALK
@given(st.dictionaries(st.sampled_from(fields_of(RecipeFields)), odd, max_size=4))
def test_recipes(fields):
    recipe = refuses_in_our_words(BuildRecipe, **fields)
    if recipe is not None:
        hash(recipe)
        assert recipes.from_dict(recipe.to_dict()) == recipe
        if refuses_in_our_words(recipes.write, recipe, "r.toml"):
            assert recipes.read("r.toml") == recipe
        refuses_in_our_words(helpers.build, recipe, quiet=True)


BACKENDS_OPTIONS = {
    "tensorrt": list(KINDS),
    "tensorrt_llm": [*PLUGINS, *REFUSED, *SETTINGS],
    "tensorrt_llm_pytorch": list(PYTORCH_SETTINGS),
    "vllm": list(recipes.options.VLLM),
    "aot": ["x"],
}


@pytest.mark.parametrize("backend", BACKENDS_OPTIONS)
@pytest.mark.promise("Any argument works or is refused in our words", 150, 2000)
@settings(SETTINGS_OF_A_WALK, max_examples=how_many(150, 2000))
@given(data=st.data())
def test_options_of_each_backend(backend, data):
    options = data.draw(st.dictionaries(st.sampled_from(BACKENDS_OPTIONS[backend]), odd, max_size=3))
    refuses_in_our_words(BuildRecipe, backend=backend, precision="bf16", options=options)
    if backend == "tensorrt":
        refuses_in_our_words(make_options, options)


@pytest.mark.promise("Any argument works or is refused in our words", 150, 10_000)
@SETTINGS_OF_A_WALK
@given(
    st.fixed_dictionaries(
        {},
        optional={"precision": odd, "name": odd, "time_limit": odd, **dict.fromkeys(("profiles", "mark_outputs"), odd)},
    )
)
def test_modules(named):
    refuses_in_our_words(engine.build_module, torch.nn.ReLU(), (torch.zeros(2, 2),), **named)


@pytest.mark.promise("Any argument works or is refused in our words", 150, 10_000)
@SETTINGS_OF_A_WALK
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@example(b"max_batch_size = " + b"9" * 5000)
@example(b"fusion = 1979-05-27")
@example(b"[aot]\n[tensorrt]")
def test_recipe_files(content):
    Path("fuzzed.toml").write_bytes(content)
    refuses_in_our_words(recipes.read, "fuzzed.toml")


def test_a_wrong_name_is_a_type_error():
    for call in (BuildRecipe, SamplingParams, functools.partial(helpers.build, BuildRecipe())):
        with pytest.raises(TypeError, match="nonsense"):
            call(nonsense=1)
