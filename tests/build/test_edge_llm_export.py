"""TensorRT Edge-LLM's own exporter on the bundled model, where its environment is."""

import shutil

import pytest

from helpers import store
from helpers.course import edge_llm, onnx_tables
from helpers.course.recorded import recorded
from helpers.errors import BuildError
from helpers.machine import environments
from helpers.maintain.recordings import TEMPLATE
from helpers.model.checkpoint import find_checkpoint

pytestmark = pytest.mark.skipif(
    not environments.python_of("edgellm"), reason="needs TensorRT Edge-LLM: helpers env create edgellm (no GPU)"
)


def test_an_export_is_what_the_recording_shows(tmp_path):
    source = tmp_path / "stories"
    shutil.copytree(find_checkpoint("stories").folder, source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    folder = edge_llm.export(source, tmp_path / "edge", quiet=True)
    store.verify(folder, store.read_manifest(folder))
    live, kept = (
        onnx_tables.read(path / edge_llm.GRAPH) for path in (folder, recorded("edge_llm", "stories", quiet=True))
    )
    for table in (onnx_tables.operators, onnx_tables.plugin_node, onnx_tables.interface):
        assert table(live).rows == table(kept).rows
    names = store.read_manifest(folder)["files"].keys()
    assert {"llm/model.onnx", "llm/model.onnx.data", "llm/embedding.safetensors", "llm/tokenizer.json"} <= names


def test_it_still_wants_a_chat_template(tmp_path):
    with pytest.raises(BuildError, match="without a chat template"):
        edge_llm.export("stories", tmp_path / "edge", quiet=True)
    assert not list(tmp_path.iterdir())
