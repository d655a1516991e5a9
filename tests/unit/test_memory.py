"""The memory calculator against what an engine would store, the benchmark's own count, and published sizes."""

import json
from pathlib import Path

import pytest
import torch

from helpers import BuildRecipe, backends
from helpers.backends.aot.stored import convert_weights, packed, stored_bytes
from helpers.bench.records import Workload
from helpers.bench.run import bytes_per_step
from helpers.course import memory as calculator
from helpers.course.memory import memory, memory_table, plan
from helpers.errors import RecipeError
from helpers.machine import hardware
from helpers.model.checkpoint import find_checkpoint
from helpers.model.config import expected_shapes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"max_batch_size": 8, "max_seq_len": 300}, {"optimization_level": 0}], ids=str)
def test_two_layers_tell_what_all_take(device, precision, changes):
    for model in ("stories", "dummy:tinyllama-1.1b"):
        recipe = BuildRecipe(model=model, precision=precision, **changes)
        takes = memory(recipe, device)
        assert (takes.weights, takes.unread) == stored_bytes(recipe, find_checkpoint(model).config, device)


def test_packed_weights_take_the_place_of_the_plain_ones():
    """Memory would have to hold both."""
    recipe, config = BuildRecipe(optimization_level=3), find_checkpoint("stories").config
    empty = ((name, torch.empty(shape, device="meta")) for name, shape in expected_shapes(config).items())
    weights = convert_weights(recipe, empty, config, "cpu")
    packed(weights, recipe, "cpu")
    both = {name for name in weights if f"{name}.packed" in weights}
    assert not both and any(name.endswith(".packed") for name in weights)


def test_a_checkpoint_that_changes_in_its_folder_is_counted_anew(checkpoint):
    folder = checkpoint("llama")
    before = memory(BuildRecipe(str(folder)), "cpu").weights
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": fields["num_hidden_layers"] + 1}))
    assert memory(BuildRecipe(str(folder)), "cpu").weights > before


@pytest.mark.parametrize(("device", "level", "times"), [("cpu", 3, 2), ("cpu", 0, 1), ("cuda", 3, 1)])
def test_a_build_needs_room_for_the_plain_weights_too_where_they_are_packed(device, level, times, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (80e9, 80e9))
    recipe = BuildRecipe(optimization_level=level)
    _, size, more = backends.module("aot").estimate(recipe, find_checkpoint("stories").config, device)
    assert times * size < size + more < (times + 1) * size


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("model", ["stories", "dummy:tinyllama-1.1b"])
def test_a_steps_bytes_are_those_of_the_benchmark(model, precision):
    """The benchmark counts caches at the mean length; here that is all of max_seq_len. Scales are left out there."""
    workload = Workload(model, input_len=255, output_len=2, max_input_len=255, max_seq_len=257, max_batch_size=4)
    for batch in (1, 4):
        takes = memory(BuildRecipe(model=model, precision=precision, max_batch_size=4, max_seq_len=255), "cpu")
        ours, theirs = takes.least_seconds(1.0, batch), bytes_per_step(workload, precision, batch)
        assert ours == pytest.approx(theirs, rel=0.13 if precision == "int4" else 0.03)  # int4: a scale for 32 weights


def test_the_shapes_of_public_models_have_their_published_sizes():
    for name, parameters in {"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}.items():
        config = find_checkpoint(f"dummy:{name}").config
        assert config.parameter_count() == parameters and config.head_dim == 128
    # 2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token
    assert find_checkpoint("dummy:llama-3.1-8b").config.kv_cache_bytes(1, 1, 2) == 2**17


def test_what_fits_is_what_there_is_room_for():
    takes = memory(
        BuildRecipe(model="dummy:llama-3.1-8b", precision="bf16", max_batch_size=4, max_seq_len=4096), "cuda"
    )
    most = takes.most_sequences(24e9 * 0.9)
    fixed, each = takes.weights, takes.kv_cache / 4
    assert fixed + most * each <= 24e9 * 0.9 < fixed + (most + 1) * each and most > 0
    assert takes.most_sequences(takes.weights - 1) == 0


def test_the_table_says_where_it_fits():
    table = memory_table(BuildRecipe(model="dummy:llama-3.1-70b", precision="bf16", max_seq_len=1024), speed=20e9)
    fits = {row[0]: row[5] for row in table.rows}
    assert fits["L4"] == fits["A100 80GB SXM"] == "no" and "this machine" in fits  # 141 GB of weights
    small = {row[0]: row[5] for row in memory_table(BuildRecipe(), speed=20e9).rows}
    assert set(small.values()) == {"yes"}


def test_an_engine_for_the_cpu_is_counted_on_the_cpu_also_where_there_is_a_gpu(monkeypatch):
    gpu = hardware.Hardware("cuda", "Card", "sm_90", 132, 80 * 10**9, "580")
    cpu = hardware.Hardware("cpu", "Processor", "x86_64", 8, 25 * 10**9, "")
    monkeypatch.setattr(hardware, "describe", lambda device="auto": cpu if device == "cpu" else gpu)
    monkeypatch.setattr(hardware, "resolve_device", lambda device="auto": "cpu" if device == "cpu" else "cuda")
    monkeypatch.setattr(calculator, "expected_seconds", lambda recipe: 60.0)
    monkeypatch.setattr(calculator, "locate", lambda recipe: Path("built"))
    monkeypatch.setattr(calculator, "bandwidth", {"cpu": 20e9, "cuda": 3000e9}.__getitem__)
    for device, name, reads, size in (("cpu", "Processor", 20, "25.00 GB"), ("auto", "Card", 3000, "80.00 GB")):
        recipe = BuildRecipe(device=device)
        assert f"{name}, which reads {reads} GB/s" in plan(recipe).caption
        here = next(row for row in memory_table(recipe).rows if row[0] == "this machine")
        assert here[1] == size


def test_a_table_of_many_machines_reads_the_checkpoint_once_for_each_kind(monkeypatch):
    asked = []
    monkeypatch.setattr(calculator, "find_checkpoint", lambda name: asked.append(name) or find_checkpoint(name))
    table = memory_table(BuildRecipe(), speed=20e9)
    assert len(asked) <= 2 < len(table.rows)


def test_a_gpu_of_the_table_names_its_source():
    gpus = json.loads(Path(calculator.__file__).with_name("gpus.json").read_text(encoding="utf-8"))
    assert len(gpus) > 4
    for gpu in gpus:
        assert gpu["source"].startswith("https://") and 10 < gpu["memory_gb"] < 300 and 100 < gpu["gb_per_s"] < 10_000


def test_the_plan_of_a_recipe_adds_up_and_follows_it():
    def said(**fields):
        return dict(plan(BuildRecipe(optimization_level=3, **fields), speed=20e9).rows)

    one, four = said(), said(max_batch_size=4)
    assert one["engine"] == "not built yet" and "least time of a step, batch 4" in four
    assert one["weights"] == four["weights"] and one["KV cache"] < four["KV cache"]


def test_another_backends_or_devices_memory_is_not_guessed():
    with pytest.raises(RecipeError, match="aot"):
        memory(BuildRecipe(backend="pytorch"), "cpu")
    with pytest.raises(RecipeError, match="'gpu'"):
        memory(BuildRecipe(precision="int8"), "gpu")
