"""The aot engine itself: how its graphs are compiled and run, what lower precision costs, what is inside."""

import contextlib
import errno
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import filelock
import psutil
import pytest
import torch
from conftest import GREEDY, PROMPTS, STORIES, limits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import BuildRecipe, SamplingParams, build, inspect, load, store
from helpers.backends.aot.backend import SWITCHES
from helpers.backends.aot.stages import UNKNOWN
from helpers.bench import quality
from helpers.errors import BackendUnavailable, BuildError, EngineCorrupt, OutOfMemory, RecipeError, WorkerError


def tiny(model, **changes):
    return BuildRecipe(str(model), **limits(max_batch_size=1, max_input_len=16, max_seq_len=48, **changes))


@pytest.fixture(scope="module")
def int8_folder(built):
    return built(BuildRecipe(precision="int8", num_threads=1, **limits(max_batch_size=1)))


@pytest.fixture(scope="module")
def bf16_folder(built):
    return built(BuildRecipe(precision="bf16", optimization_level=0, num_threads=1, **limits(max_batch_size=1)))


@pytest.fixture(scope="module")
def int8(int8_folder):
    with load(int8_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def bf16(bf16_folder):
    with load(bf16_folder) as engine:
        yield engine


# ---- the graphs -------------------------------------------------------------------------------------------


def test_graphs_compiled_side_by_side_make_the_same_engine(built, tiny_llama, tmp_path, monkeypatch):
    """On machines with many cores; here two at a time, whatever the cores."""
    recipe = tiny(tiny_llama, num_threads=2, optimization_level=0)
    monkeypatch.setattr("helpers.backends.aot.backend._jobs", lambda *_: 1)
    alone = built(recipe)
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr("helpers.backends.aot.backend._jobs", lambda *_: 2)
    folder = build(recipe, quiet=True)
    assert folder.name == alone.name and folder != alone
    ours, other = inspect(folder), inspect(alone)
    assert (ours.operations, ours.kernels, ours.removed) == (other.operations, other.kernels, other.removed)
    with load(folder) as one, load(alone) as two:
        assert one.generate([3, 14, 15], GREEDY)[0].token_ids == two.generate([3, 14, 15], GREEDY)[0].token_ids


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_graph_that_fails_in_its_process_leaves_nothing(tiny_llama, tmp_path, monkeypatch, jobs):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr("helpers.backends.aot.backend._jobs", lambda *_: jobs)
    monkeypatch.setattr("helpers.backends.aot.backend.graph_names", lambda *_: ["prefill_bX", "decode_b1"])
    monkeypatch.setattr("helpers.backends.aot.backend._compile_seconds", lambda *_: 1)  # or it fails before its process
    with pytest.raises(WorkerError, match="invalid literal"):
        build(tiny(tiny_llama), quiet=True)
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != ".locks"]
    assert not [child for child in psutil.Process().children() if "aot.compile" in " ".join(child.cmdline())]


def test_a_limit_on_space_that_is_reached_while_a_build_verifies_is_told_of_the_store(tiny_llama, tmp_path, monkeypatch):
    """It loads what it compiled from a folder in the store: to name TMPDIR there would help nobody."""
    reached = f"The compiled graph prefill.pt2 cannot be unpacked: [Errno 122] {os.strerror(errno.EDQUOT)}."

    def fail(*_):
        raise BackendUnavailable(reached, fix="Set TMPDIR to a folder that has room.")

    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr("helpers.backends.aot.backend._Compilers.run", fail)
    with pytest.raises(BuildError, match="limit on space") as refused:
        build(tiny(tiny_llama), quiet=True)
    assert "TMPDIR" not in refused.value.fix


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in compiler is a shell script that kills its parent")
@pytest.mark.parametrize(
    ("compiler", "error", "what", "cause"),
    [
        ("grep -q aot.compile /proc/$PPID/cmdline && kill -SEGV $PPID", WorkerError, "SIGSEGV", "compiler"),
        ("echo 'x.h:1: fatal error: no such header' >&2; exit 1", BuildError, "no such header", "check 'C++ compiler'"),
    ],
    ids=["crash", "failure"],
)
def test_a_compiler_that_fails_is_looked_at_by_the_doctor_and_leaves_nothing(
    tiny_llama, tmp_path, monkeypatch, compiler, error, what, cause
):
    (tmp_path / "c++").write_text(f"#!/bin/sh\n{compiler}\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "engines"))
    with pytest.raises(error, match=what) as failed:
        build(tiny(tiny_llama), quiet=True)
    assert cause in failed.value.cause and "export CXX=" in failed.value.fix
    assert not [path.name for path in (tmp_path / "engines").iterdir() if path.is_dir() and path.name != ".locks"]


@pytest.mark.slow
def test_a_build_in_a_folder_with_a_space_under_odd_settings_leaves_nothing_behind(tiny_llama, tmp_path, monkeypatch):
    """A space in the paths of the engines, of the temporary folder and of the environment; autocast, another default
    type and another default device in the process that asks for the build."""
    libraries, temporary = tmp_path / "my env", tmp_path / "my temporary files"
    libraries.symlink_to(Path(torch.__file__).parents[1])
    temporary.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(libraries))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "my engines"))
    with odd_settings():
        folder = build(tiny(tiny_llama, optimization_level=0), quiet=True)
        with load(folder) as engine:
            under_odd_settings = engine.generate([3, 14, 15], GREEDY)[0].token_ids
    assert not list(temporary.iterdir())
    assert {path.name for path in folder.iterdir()} >= {"prefill.pt2", "decode_b1.pt2", "manifest.json"}
    assert not [path for path in folder.rglob("*") if path.is_dir()]
    monkeypatch.setenv("PYTHONPATH", "")
    with load(folder) as engine:
        assert engine.generate([3, 14, 15], GREEDY)[0].token_ids == under_odd_settings


def test_engines_at_work_in_two_threads_leave_torch_its_number_of_threads():
    from helpers.backends.aot.engine import AotEngine

    def number():
        numbers = []
        thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return numbers[0]

    def work():
        with AotEngine._own_threads(SimpleNamespace(num_threads=before + 1)):
            begun.set()
            first_is_done.wait()

    before, begun, first_is_done = number(), threading.Event(), threading.Event()
    with AotEngine._own_threads(SimpleNamespace(num_threads=before + 2)):
        thread = threading.Thread(target=work)
        thread.start()
        assert begun.wait(20)
    first_is_done.set()
    thread.join()
    assert number() == torch.get_num_threads() == before


def test_an_interrupt_before_the_work_leaves_no_engine_counted(monkeypatch):
    from helpers.backends.aot import engine

    @contextlib.contextmanager
    def interrupted():
        yield
        raise KeyboardInterrupt

    own_threads, before = (
        partial(engine.AotEngine._own_threads, SimpleNamespace(num_threads=1)),
        torch.get_num_threads(),
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_counting", interrupted())
        own_threads().__enter__()
    try:
        torch.set_num_threads(before + 1)  # as a learner does later
        with own_threads():
            pass
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_where_no_thread_can_start_the_compilers_end_all_the_same(monkeypatch):
    from helpers.backends.aot import backend

    ended = []
    with monkeypatch.context() as patch:
        compilers = backend._Compilers(1)
        compilers._workers.append(SimpleNamespace(kill=lambda: ended.append(1)))
        patch.setattr(
            threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("can't start new thread"))
        )
        with compilers:
            pass
    assert ended


def test_an_interrupt_while_the_compilers_are_ended_leaves_none_at_work(monkeypatch):
    """A terminal and a wrapper such as `uv run` send one each."""
    from helpers.backends.aot import backend

    ended = []
    both_at_work = threading.Barrier(2, action=lambda: os.kill(os.getpid(), signal.SIGINT))

    class Endless:
        def __init__(self, *_, **__):
            self.killed = threading.Event()

        def stream(self, *_, **__):
            yield "compile"
            both_at_work.wait()
            self.killed.wait()

        def kill(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            self.killed.set()
            ended.append(self)

    monkeypatch.setattr(backend, "Worker", Endless)
    with pytest.raises(KeyboardInterrupt), backend._Compilers(2) as compilers:
        compilers.run("compile", [{}, {}], lambda step: contextlib.nullcontext())
    for _ in range(500):  # the next interrupts come while this test waits
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(0.02 if len(ended) < 2 else 0)
    assert len(ended) == 2


def test_there_is_an_error_that_names_the_space_where_no_folder_is_without(tmp_path, monkeypatch):
    from helpers.backends.aot.backend import _scratch_folder

    folder = tmp_path / "my engines" / ".building-x"
    folder.mkdir(parents=True)
    with _scratch_folder(folder) as scratch:
        assert " " not in scratch and not Path(scratch).is_relative_to(folder)
    assert not Path(scratch).exists()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(BuildError, match="space") as refused, _scratch_folder(folder):
        pass
    assert "TMPDIR" in refused.value.fix


@pytest.mark.parametrize("prefix", [".compile-", "aot-engine-"])
def test_what_was_left_in_the_temporary_folder_by_a_killed_process_goes_with_the_next(
    tiny_engine, tmp_path, monkeypatch, prefix
):
    """Of a build, and of a load."""
    from helpers.backends.aot.backend import _scratch_folder
    from helpers.backends.aot.loader import Graph

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "my engines" / ".building-x"
    folder.mkdir(parents=True)
    killed, new, running = (tmp_path / f"{prefix}{name}" for name in ("killed", "new", "running"))
    for left in (killed, new, running):
        left.mkdir()
        (left / "kernel.so").touch()
        (left / ".lock").touch()
    with filelock.FileLock(running / ".lock"):
        for left in (killed, running):
            os.utime(left, (0, 0))
        if prefix == ".compile-":
            with _scratch_folder(folder) as scratch:
                assert Path(scratch).parent == tmp_path
        else:
            Graph(Path(shutil.copy(tiny_engine / "decode_b1.pt2", folder)), "cpu").close()
        assert sorted(tmp_path.glob(f"{prefix}*")) == [new, running]


@contextlib.contextmanager
def odd_settings():
    """What a notebook may have set for its own tensors."""
    torch.set_default_dtype(torch.float16)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode(), FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def other_products():
    """float32 products with bfloat16 inside, and an attention that this machine does not have."""
    torch.set_float32_matmul_precision("medium")
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("backend", ["aot", "pytorch"])
def test_what_a_notebook_chose_for_its_own_products_changes_no_logits(aot, backend):
    with load(BuildRecipe(backend="pytorch", **limits())) if backend == "pytorch" else contextlib.nullcontext(aot) as e:
        exact = e.logits(PROMPTS[0])
        with other_products():
            assert torch.equal(e.logits(PROMPTS[0]), exact)
            assert torch.get_float32_matmul_precision() == "medium" and not torch.backends.cuda.math_sdp_enabled()


def test_settings_of_the_notebook_change_no_answer(tiny_engine):
    with load(tiny_engine) as engine:
        exact = [engine.generate([3, 14, 15], s)[0].token_ids for s in (GREEDY, SamplingParams(seed=1, max_tokens=9))]
        with odd_settings():
            same = [
                engine.generate([3, 14, 15], s)[0].token_ids for s in (GREEDY, SamplingParams(seed=1, max_tokens=9))
            ]
    assert exact == same
    with odd_settings():
        loaded = load(tiny_engine)
    assert loaded.generate([3, 14, 15], GREEDY)[0].token_ids == exact[0]
    loaded.close()


# Each field at the ends of what it may be, beside others at theirs.
CORNERS = [
    {"max_input_len": 1, "max_seq_len": 3, "precision": "int8", "optimization_level": 3, "num_threads": 1},
    {"max_input_len": 2, "max_seq_len": 3, "max_batch_size": 5, "optimization_level": 0, "num_threads": 1},
    {"max_input_len": 3, "max_seq_len": 4, "optimization_level": 1},
    {"max_input_len": 4, "max_seq_len": 5, "max_batch_size": 2, "precision": "bf16", "optimization_level": 2},
    {"max_input_len": 5, "max_seq_len": 6, "precision": "fp16"},
    {"max_input_len": 6, "max_seq_len": 7, "max_batch_size": 8, "decode_batch_sizes": [2, 8]},
    {"max_input_len": 1, "max_seq_len": 64, "fusion": {"kernels": False, "qkv": False, "gate_up": False}},
    {"max_input_len": 63, "max_seq_len": 64, "fusion": {"qkv": False}, "max_batch_size": 3, "precision": "int8"},
]


@pytest.fixture
def exported(checkpoint, monkeypatch):
    """exported(recipe): each graph's name, what an engine runs for it, the weights before they are packed, a cache.
    Nothing is compiled: the libraries are torch.export's programs."""
    from torch.utils._pytree import tree_structure, tree_unflatten

    from helpers.backends.aot import graphs, phase, stored
    from helpers.model.checkpoint import find_checkpoint, read_tensors
    from helpers.model.weights import rope_tables

    programs = {}

    class Program:
        def __init__(self, package, device):
            self.program, self.structure = programs[package.name]

        def run(self, inputs):
            return [self.program(*tree_unflatten(inputs, self.structure))]

    monkeypatch.setattr(phase, "Graph", Program)

    def graphs_of(recipe):
        found = find_checkpoint(recipe.model)
        weights = stored.convert_weights(recipe, read_tensors(found, found.config), found.config, "cpu")
        dtype = weights["norm"].dtype
        weights |= rope_tables(found.config, graphs.cache_length(recipe, "cpu"), dtype)
        packed = stored.packed(dict(weights), recipe, "cpu")
        for name in graphs.graph_names(recipe, "cpu"):
            cache = graphs.empty_cache(recipe, found.config, "cpu", dtype, graphs.sequences(name))
            parts = graphs.parts_of(name, recipe, found.config, packed, cache)
            for part in parts:
                inputs = (dict.fromkeys(part.calls[0], 0), *part.inputs)
                programs[f"{part.file}.pt2"] = part.export(packed).module(), tree_structure(inputs)
            entry = {"parts": {part.file: part.calls for part in parts}}
            yield name, entry, phase.Phase(Path(), name, entry, found.config, packed), weights, cache

    return graphs_of


@pytest.mark.parametrize("run", [0, 1, 2])
@pytest.mark.parametrize("corner", CORNERS, ids=lambda corner: f"{corner['max_input_len']}-{corner['max_seq_len']}")
def test_every_recipe_can_be_exported_and_serves_all_its_lengths(checkpoint, exported, corner, run, monkeypatch):
    """As far as torch.export: its program is run at both ends of each open length. run: so many layers of the model's
    four are in one part; 0: compiled whole."""
    from helpers.backends.aot import graphs
    from helpers.backends.aot.verify import check_graph
    from helpers.model import llama
    from helpers.model.checkpoint import find_checkpoint

    if run:
        monkeypatch.setattr(graphs, "LAYERS_OF_A_WHOLE_GRAPH", 3)
        monkeypatch.setattr(graphs, "LAYERS_OF_A_RUN", run)
    recipe = BuildRecipe(str(checkpoint("llama", num_hidden_layers=4)), device="cpu", **corner)
    config = find_checkpoint(recipe.model).config
    for name, entry, graph, weights, cache in exported(recipe):
        prefill = name.startswith("prefill")
        layers = 1 if prefill and graphs.packs(recipe, "cpu") else run
        assert [len(calls) for calls in entry["parts"].values()] == ([4 // layers, 1] if layers else [1])
        reference = (llama.Prefill if prefill else llama.Decode)(config)
        widths = {graphs.prefill_width(recipe, "cpu", length) for length in (1, 2, recipe.max_input_len)}
        for limit in widths if prefill else {2, 3, recipe.max_seq_len}:
            with torch.no_grad():
                check_graph(name, graph.run, reference, weights, cache, limit)


def test_a_run_of_layers_with_another_runs_weights_is_refused(checkpoint, exported, monkeypatch):
    from helpers.backends.aot import graphs
    from helpers.backends.aot.phase import Phase
    from helpers.backends.aot.verify import check_graph
    from helpers.model import llama
    from helpers.model.checkpoint import find_checkpoint

    monkeypatch.setattr(graphs, "LAYERS_OF_A_WHOLE_GRAPH", 1)
    monkeypatch.setattr(graphs, "LAYERS_OF_A_RUN", 1)
    recipe = tiny(checkpoint("llama"))
    config = find_checkpoint(recipe.model).config
    for name, entry, graph, weights, cache in exported(recipe):
        first, second = entry["parts"][name]
        assert first != second
        entry["parts"][name] = [second, first]
        reference = (llama.Prefill if name == "prefill" else llama.Decode)(config)
        with torch.no_grad(), pytest.raises(BuildError, match="computes something else"):
            check_graph(name, Phase(Path(), name, entry, config, graph.all_weights).run, reference, weights, cache, 16)


def test_layers_that_differ_in_more_than_numbers_are_compiled_whole(checkpoint, exported, monkeypatch):
    from helpers.backends.aot import graphs, stored

    def one_in_bf16(*inputs):
        weights = convert(*inputs)
        return weights | {"layers.1.o.weight": weights["layers.1.o.weight"].bfloat16()}

    convert = stored.convert_weights
    monkeypatch.setattr(graphs, "LAYERS_OF_A_WHOLE_GRAPH", 1)
    monkeypatch.setattr(graphs, "LAYERS_OF_A_RUN", 1)
    recipe = tiny(checkpoint("llama"), optimization_level=0)
    assert [len(entry["parts"]) for _, entry, *_ in exported(recipe)] == [2, 2]
    monkeypatch.setattr(stored, "convert_weights", one_in_bf16)
    assert [len(entry["parts"]) for _, entry, *_ in exported(recipe)] == [1, 1]


def test_a_deep_model_is_compiled_in_runs_of_layers_and_the_report_counts_every_run(built, checkpoint):
    folder = checkpoint("llama", num_hidden_layers=10)
    engine_folder = built(tiny(folder, optimization_level=0, num_threads=1))
    details = store.read_manifest(engine_folder)["details"]["graphs"]
    assert [len(calls) for entry in details.values() for calls in entry["parts"].values()] == [2, 1, 2, 1]
    check_report(inspect(engine_folder), ["prefill", "decode_b1"])
    for graph in ("prefill", "decode_b1"):
        kinds = [operation.op for operation in inspect(engine_folder).of(graph).operations]
        assert kinds.count("rsqrt") == 21  # two a layer, and one at the end
    with load(engine_folder) as ours, load(tiny(folder, backend="pytorch")) as eager:
        for prompt in ([3], [3, 14, 15, 92, 65]):
            torch.testing.assert_close(ours.logits(prompt), eager.logits(prompt), rtol=1e-4, atol=1e-4)
            expected = [answer.token_ids for answer in eager.generate([prompt], GREEDY)]
            assert [answer.token_ids for answer in ours.generate([prompt], GREEDY)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("corner", CORNERS[:2], ids=lambda corner: str(corner["max_input_len"]))
def test_the_smallest_engines_can_be_built_and_answer(built, tiny_llama, corner):
    with load(built(BuildRecipe(str(tiny_llama), device="cpu", **corner))) as engine:
        longest = engine.recipe.max_input_len
        full = SamplingParams(temperature=0, max_tokens=3 - longest, ignore_eos=True)
        for prompts in ([[5]], [list(range(3, 3 + longest))] * engine.recipe.max_batch_size):
            assert all(len(answer.token_ids) == 3 - longest for answer in engine.generate(prompts, full))


def test_prompts_read_together_answer_as_alone(built, checkpoint, monkeypatch):
    """What engines on a GPU do, by the same graph compiled for a CPU: three at once, of up to five."""
    for module in ("graphs", "engine"):
        monkeypatch.setattr(f"helpers.backends.aot.{module}.prefill_batch", lambda recipe, device: 3)
    small = limits(max_batch_size=5, max_input_len=16, max_seq_len=48, decode_batch_sizes=(1, 5), optimization_level=0)
    recipe = BuildRecipe(str(checkpoint("llama")), num_threads=1, **small)
    prompts = [[3, 14, 15], [92], [65, 35, 89, 79, 3, 23, 84, 62], [6], [4, 33]]
    tokens = torch.tensor([31, 41, 59, 26, 5])
    with load(built(recipe)) as engine:
        for batch, groups in ((prompts, [3, 2]), (prompts[:4], [3, 1]), (prompts[1:3], [2]), (prompts[:1], [1])):
            assert [len(rows) for rows in engine._read(batch)] == groups
            together = engine.prefill(batch), engine.decode(tokens[: len(batch)])
            for row, prompt in enumerate(batch):
                for ours, alone in zip(together, (engine.prefill([prompt]), engine.decode(tokens[[row]])), strict=True):
                    torch.testing.assert_close(ours[row], alone[0], rtol=1e-4, atol=1e-4)
        expected = engine.prefill(prompts)
        engine.weights["embedding"][0] = float("nan")  # of a token that no prompt has: it must not fill up one either
        assert not engine.logits([0]).isfinite().any()
        torch.testing.assert_close(engine.prefill(prompts), expected)


# ---- precision --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages(aot):
    """Held-out stories with their end token, as ids."""
    return [[*aot.tokenize(story.text), 2] for story in STORIES[:4]]


def test_lower_precision_keeps_the_held_out_loss(aot, int8, bf16, passages, stories_reference):
    model, _ = stories_reference
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in passages]
    targets = torch.cat([torch.tensor(ids[1:]) for ids in passages])
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), targets).item()
    exact = quality.score(aot, passages, quiet=True)
    assert exact.loss == pytest.approx(loss, rel=1e-4)
    for engine in (int8, bf16):
        rounded = quality.score(engine, passages, quiet=True)
        assert rounded.loss == pytest.approx(loss, rel=0.01)
        assert 0 < rounded.kl(exact) < 0.01 and rounded.greedy_kept(exact) > 0.97


def test_a_wrong_scale_raises_the_loss(int8_folder, passages):
    with load(int8_folder) as engine:
        exact = quality.score(engine, passages, quiet=True)
        scales = [tensor for name, tensor in engine.weights.items() if "scale" in name]
        scales[0].mul_(2)
        change, margin = quality.score(engine, passages, quiet=True).change(exact)
    assert change > margin


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
    from helpers.model.checkpoint import find_checkpoint

    parameters = find_checkpoint("stories").config.parameter_count()
    assert store.size(stories_fp32) <= 2.2 * 4 * parameters + 15e6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("level", [0, 3])
def test_the_size_of_the_weights_is_known_before_a_build(checkpoint, tmp_path, precision, tied, level):
    """The head of tied embeddings is the embedding: it is counted, and kept, once. A file's header is left out."""
    from helpers.backends.aot import stored
    from helpers.model.checkpoint import find_checkpoint, read_tensors

    found = find_checkpoint(str(checkpoint("llama", tie_word_embeddings=tied)))
    recipe = BuildRecipe(found.name, precision=precision, optimization_level=level, max_input_len=16, max_seq_len=48)
    size, _ = stored.stored_bytes(recipe, found.config, "cpu")
    weights = stored.convert_weights(recipe, read_tensors(found, found.config), found.config, "cpu")
    stored.save_weights(stored.packed(weights, recipe, "cpu"), recipe, found.config, "cpu", tmp_path)
    assert size <= (tmp_path / stored.WEIGHTS).stat().st_size <= size + 4096


# ---- threads ----------------------------------------------------------------------------------------------


def test_the_threads_asked_for_are_part_of_the_engine_and_otherwise_what_is_tried(tiny_llama, monkeypatch):
    """Known without a build, so that an engine that is there is found."""
    from helpers.engine import identity
    from helpers.model.checkpoint import find_checkpoint

    def threads(**changes):
        return identity(tiny(tiny_llama, **changes), find_checkpoint(str(tiny_llama)))["recipe"]["num_threads"]

    for cores, tried in ((1, 1), (2, "the fastest of 1, 2"), (6, "the fastest of 1, 2, 4, 6")):
        monkeypatch.setattr("helpers.machine.hardware.free_cores", lambda cores=cores: cores)
        assert threads() == tried
        assert threads(optimization_level=0) == 1  # each number tried would be compiled for
        assert [threads(num_threads=n) for n in (1, 2, 16)] == [1, 2, 16]


def test_the_build_keeps_the_fastest_number_of_threads(tiny_engine):
    from helpers.backends.aot.backend import fastest
    from helpers.machine import hardware

    assert fastest([1, 2, 4], [3.0, 2.0, 1.0]) == 4
    assert fastest([1, 2, 4], [3.0, 1.04, 1.0]) == 2  # a twentieth is not worth two cores
    assert fastest([1, 2, 4], [1.0, 1.0, 9.0]) == 1
    details = store.read_manifest(tiny_engine)["details"]
    if hardware.free_cores() > 1:
        counts = [int(count) for count in details["step_seconds"]]
        assert counts[0] == 1 and counts[-1] == hardware.free_cores()
        assert details["num_threads"] == fastest(counts, list(details["step_seconds"].values()))
    with load(tiny_engine) as engine:
        assert engine.num_threads == details["num_threads"]


@pytest.mark.skipif(sys.platform != "linux", reason="it counts the process's threads in /proc")
@pytest.mark.parametrize("count", [1, 2])
def test_an_engine_takes_the_threads_that_were_asked_for(built, tiny_llama, bf16_folder, count):
    """In a process where torch would take four. Each phase is run by itself: choosing a token is not the engine's."""
    script = """
        import os, sys, threading
        from helpers import load
        def native():  # without Python's own, such as one that would show progress
            return {int(task) for task in os.listdir("/proc/self/task")} - {t.native_id for t in threading.enumerate()}
        with load(sys.argv[1]) as engine:
            before = native()
            engine._prefill([list(range(3, 19))])
            engine._decode(engine.steps[1].tokens)
            print(len(native() - before))
    """
    folder = bf16_folder if count == 1 else built(tiny(tiny_llama, num_threads=count, optimization_level=0))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), folder.name],
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    started = int(done.stdout)
    assert started == 0 if count == 1 else started >= 1  # libraries start one more of their own with the second


def test_threads_that_a_gpu_would_ignore_are_refused(tiny_llama, monkeypatch):
    from helpers.engine import identity
    from helpers.machine import hardware
    from helpers.model.checkpoint import find_checkpoint

    gpu = hardware.Hardware("cuda", "a GPU", "sm_90", 132, 2**36, "580")
    monkeypatch.setattr(hardware, "describe", lambda *_: gpu)
    found = find_checkpoint(str(tiny_llama))
    recipe = tiny(tiny_llama).replace(device="auto")
    assert identity(recipe, found)["recipe"]["num_threads"] == 0
    with pytest.raises(RecipeError, match="num_threads is for CPUs, and device 'auto' is a GPU"):
        identity(recipe.replace(num_threads=2), found)


def test_both_phases_run_on_the_engines_threads_whatever_the_notebook_has(tiny_engine):
    with load(tiny_engine) as engine:
        used = []
        for graph in engine.graphs.values():
            plain = graph.run
            graph.run = lambda *inputs, plain=plain: used.append(torch.get_num_threads()) or plain(*inputs)
        engine.num_threads = 3
        engine.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))
    assert used == [3, 3, 3] and torch.get_num_threads() == 1


# ---- loading ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_loading_and_closing_keeps_nothing_and_loaded_code_needs_no_file(tiny_engine, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    load(tiny_engine).close()
    before = mappings()
    for _ in range(5):
        with load(tiny_engine) as engine:
            assert not list(tmp_path.iterdir())  # so nothing is left if this process is killed
            engine.generate([5, 6], GREEDY)
    assert mappings() <= before + 2  # 3 a graph and cycle, if they stayed
    for _ in range(5):
        load(tiny_engine)  # never closed, only forgotten
    gc.collect()
    assert mappings() <= before + 2


def test_nothing_but_the_recipe_and_the_identity_decides_what_the_compiler_makes():
    """Whatever variable torch's compiler reads its settings from is kept from the build's processes."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor
    import torch._inductor.cpu_vec_isa as vectors

    # No settings of generated code: Meta's own systems, and the compiler, which is in the identity.
    others = {"CXX", "MAST_HPC_JOB_NAME", "ROLE_RANK", "PT2_COMPILE_ID_PREFIX", "UNSAFE_SKIP_FSDP_MODULE_GUARDS"}
    others |= {"LOG_TLPARSE", "LOG_AUTOTUNE_RESULTS"}
    names = set()
    for module in (dynamo, inductor, vectors):
        text = Path(module.__file__).read_text()
        names |= set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\(|env_name_\w+=)\s*["'](\w+)["']""", text))
    assert len(names) > 100
    assert sorted(name for name in names - others if not name.startswith(SWITCHES)) == []


def test_another_compiler_makes_another_engine(tiny_llama, monkeypatch):
    from helpers.engine import identity
    from helpers.model.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(str(tiny_llama))
    here = identity(tiny(tiny_llama), checkpoint)
    assert here == identity(tiny(tiny_llama), checkpoint)
    monkeypatch.setattr("helpers.machine.hardware.compiler_version", lambda: "g++ 99.1")
    there = identity(tiny(tiny_llama), checkpoint)
    assert {key for key in here if here[key] != there[key]} == {"versions"} and "99.1" in str(there["versions"])


def test_a_temporary_folder_that_cannot_serve_does_not_make_an_engine_corrupt(tiny_engine, tmp_path, monkeypatch):
    from helpers.backends.aot.loader import Graph

    package = tmp_path / "decode_b1.pt2"
    package.write_bytes((tiny_engine / package.name).read_bytes()[:-5000])
    with pytest.raises(EngineCorrupt, match="decode_b1.pt2"):
        Graph(package, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 1000}))
        with pytest.raises(BackendUnavailable, match="has 0.0 MB free") as refused:
            Graph(package, "cpu")
        assert "TMPDIR" in refused.value.fix
    with monkeypatch.context() as patch:
        patch.setattr("helpers.backends.aot.loader.lets_programs_run", lambda folder: False)
        with pytest.raises(BackendUnavailable, match="noexec"):
            Graph(package, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(package / "within a file"))
        with pytest.raises(BackendUnavailable, match="Not a directory"):
            Graph(package, "cpu")
        patch.setattr("tempfile.tempdir", str(tmp_path / "cleared away"))
        Graph(tiny_engine / package.name, "cpu").close()
    for error, ours in (
        (OSError(errno.EMFILE, "Too many open files"), BackendUnavailable),
        (OSError(errno.EFBIG, "File too large"), BackendUnavailable),
        (RuntimeError("libx.so: cannot allocate memory in static TLS block"), BackendUnavailable),
        (RuntimeError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by x.so)"), BackendUnavailable),
        (RuntimeError("libx.so: failed to map segment: cannot allocate memory"), OutOfMemory),
        (RuntimeError("libx.so: cannot open shared object file: Too many open files"), BackendUnavailable),
        (RuntimeError("libomp.so.5: cannot open shared object file: No such file or directory"), BackendUnavailable),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("zipfile.ZipFile.__init__", lambda *_, error=error: raised(error))
            with pytest.raises(ours):
                Graph(package, "cpu")


def raised(error):
    raise error


# ---- a process that only loads and generates --------------------------------------------------------------


def test_a_cache_that_memory_has_no_room_for_is_told_as_that(tiny_engine, monkeypatch):
    monkeypatch.setattr("helpers.backends.aot.engine.empty_cache", lambda *_: torch.zeros(1 << 50))
    with pytest.raises(OutOfMemory, match="allocate") as full:
        load(tiny_engine)
    assert "max_seq_len" in full.value.cause


def test_running_an_engine_imports_no_model_code_and_no_compiler_and_stays_small(stories_fp32):
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
        env={**os.environ},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    megabytes, found = done.stdout.strip().split(" ", 1)
    assert found == "[]", f"imported for nothing: {found}"
    if "+cu" not in torch.__version__:  # a CUDA build of torch brings its own libraries into memory
        assert int(megabytes) < 300


# ---- what is inside ---------------------------------------------------------------------------------------


def check_report(report, graphs):
    assert report.graphs() == graphs
    for graph in report.graphs():
        part = report.of(graph)
        names = [operation.name for operation in part.operations]
        done = {name for kernel in part.kernels for name in kernel.fused}
        removed = {name.removeprefix(f"{graph}/") for name in part.removed}
        assert len(names) == len(set(names))
        assert set(names) <= done | removed and done <= set(names) and not done & removed
        assert not [name for name, by in part.removed.items() if not by or by == UNKNOWN]
        assert 0 < len(part.kernels) < len(names)
        assert all(kernel.fused for kernel in part.kernels)


def test_every_operation_is_in_a_kernel_or_was_taken_out_by_something(stories_fp32, tiny_engine):
    check_report(inspect(stories_fp32), ["prefill", "decode_b1", "decode_b4"])
    check_report(inspect(tiny_engine), ["prefill", "decode_b1"])


def test_a_report_that_leaves_an_operation_or_a_cause_unsaid_is_found_out(stories_fp32):
    report = inspect(stories_fp32)
    name = next(name for o in report.operations if (name := f"{o.graph}/{o.name}") in report.removed)
    for removed in ({**report.removed, name: UNKNOWN}, {n: by for n, by in report.removed.items() if n != name}):
        with pytest.raises(AssertionError):
            check_report(replace(report, removed=removed), report.graphs())


def test_the_report_counts_what_the_model_has(stories_fp32):
    """Six layers with two norms each and one at the end; a softmax a layer in decode; one sine table for all."""
    part = inspect(stories_fp32).of("decode_b1")
    counts = Counter(operation.op for operation in part.operations)
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
        num_threads=1,
        **limits(max_batch_size=1, max_input_len=16, max_seq_len=48),
    )
    plain = built(recipe)
    for graph in ("prefill", "decode_b1"):
        assert len(inspect(plain).of(graph).kernels) > 1.5 * len(inspect(tiny_engine).of(graph).kernels)
    with load(plain) as unfused, load(tiny_engine) as fused:
        assert unfused.generate([5, 6, 7], GREEDY)[0].token_ids == fused.generate([5, 6, 7], GREEDY)[0].token_ids


def test_a_report_survives_writing_and_reading(stories_fp32, tmp_path):
    from helpers.backends.report import read_report, write_report

    report = read_report(stories_fp32)
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert str(len(report.of("prefill").kernels)) in str(report)
    assert report.largest(3)[0].fused


def test_sizes_that_fill_no_tiles_and_no_blocks_are_computed_right(built, checkpoint):
    """Five sequences, and a vocabulary of 130. The build compares each graph with the decoder."""
    own = limits(max_batch_size=5, max_input_len=16, max_seq_len=48, decode_batch_sizes=(1, 5), precision="int8")
    model = checkpoint("llama", vocab_size=130, num_hidden_layers=1)
    folder = built(BuildRecipe(str(model), num_threads=1, **own))
    with load(folder) as engine:
        prompts = [[7] * length for length in (1, 2, 3, 9, 16)]
        together = engine.generate(prompts, GREEDY)
        alone = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
