"""The aot engine itself: how its graphs are compiled and run, what lower precision costs, what is inside."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from conftest import GREEDY, PROMPTS, STORIES, limits

from helpers import BuildRecipe, build, inspect, load, store
from helpers.errors import WorkerError


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


# ---- the graphs -------------------------------------------------------------------------------------------


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


def test_lower_precision_keeps_the_held_out_loss(aot, int8, bf16, stories_reference):
    from helpers.model.stories.evaluate import held_out_loss

    stories = STORIES[:4]
    exact, _ = held_out_loss(*stories_reference, stories)
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
    from helpers.model.checkpoint import find_checkpoint

    parameters = find_checkpoint("stories").config.parameter_count()
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
    from helpers.backends.report import read_report, write_report

    report = read_report(stories_fp32)
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert str(len(report.of("prefill").kernels)) in str(report)
    assert report.largest(3)[0].fused
