"""The memory calculator against engines that were built: their files, and the tensors that they hold."""

import pytest

from conftest import limits

from helpers import BuildRecipe, load, store
from helpers.backends.aot.stored import WEIGHTS
from helpers.course.memory import memory, plan

HEADER = 64 * 1024  # of a file of tensors: names and shapes, and what rounds them up


def tensor_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("which", ["stories_fp32", "tiny_engine"])
def test_an_engine_takes_what_was_counted(which, request):
    folder = request.getfixturevalue(which)
    with load(folder) as engine:
        takes = memory(engine.recipe, "cpu")
        files = {name: entry["bytes"] for name, entry in store.read_manifest(folder)["files"].items()}
        assert 0 <= files[WEIGHTS] - takes.weights < HEADER
        assert tensor_bytes(engine.cache) == takes.kv_cache
        held = {tensor.data_ptr(): tensor for tensor in engine.weights.values()}  # a tied head is held once
        assert tensor_bytes(held.values()) == takes.weights
        assert dict(plan(engine.recipe, speed=1e9).rows)["engine"] == f"built already: {folder.name}"


def test_narrow_weights_take_what_was_counted(built):
    recipe = BuildRecipe(precision="int8", **limits(max_batch_size=1))  # which other tests and a notebook build, too
    folder = built(recipe)
    size = store.read_manifest(folder)["files"][WEIGHTS]["bytes"]
    takes = memory(recipe, "cpu")
    assert 0 <= size - takes.weights < HEADER
    with load(folder) as engine:
        assert tensor_bytes(engine.cache) == takes.kv_cache
