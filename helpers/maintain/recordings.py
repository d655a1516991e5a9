"""Write recordings anew: python -m helpers.maintain.recordings [MODEL ...]

Without arguments the block's engines, on a machine where TensorRT builds. With models, their exports by TensorRT
Edge-LLM, where its environment is (helpers env create edgellm).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from helpers import store
from helpers.backends.report import REPORT_FILE, write_report
from helpers.backends.tensorrt.onnx_export import is_plugin
from helpers.course import edge_llm, onnx_tables
from helpers.course.recorded import FOLDER, words
from helpers.engine import build_module, inspect
from helpers.errors import status_of
from helpers.model.checkpoint import find_checkpoint

# The block of the notebooks: which builds are recorded, and with which options of build_module.
BLOCK: dict[str, dict[str, Any]] = {
    **{precision: {"precision": precision} for precision in ("fp32", "fp16", "bf16", "int8", "int4", "fp8")},
    "fp16-all-marked": {"precision": "fp16", "mark_outputs": "all"},
}


# What the bundled model is exported with: it has no chat template, and the exporter wants one.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def keep(engine: Path, name: str) -> Path:
    """Keep an engine's report and manifest under recordings/NAME; its plan stays behind."""
    folder, manifest = _empty(name), store.read_manifest(engine)
    write_report(replace(inspect(engine), backend="tensorrt, recorded", sizes={}), folder)
    manifest["files"][REPORT_FILE] = store.entry_of(folder / REPORT_FILE)
    store.save_manifest(folder, {"recorded": True, **manifest})
    return folder


def keep_export(exported: Path, name: str) -> Path:
    """Keep an export's graph and manifest; its weights stay behind, and so does what torch.onnx notes of every node,
    which is most of the file and holds paths of this machine."""
    folder, manifest = _empty(name), store.read_manifest(exported)
    graph = onnx_tables.read(exported / edge_llm.GRAPH)
    plugins = [node for node in graph.graph.node if is_plugin(node)]
    shown = {name for node in plugins for name in (*node.input, *node.output)}
    kept = [value for value in graph.graph.value_info if value.name in shown]
    del graph.graph.value_info[:], graph.metadata_props[:], graph.graph.metadata_props[:]
    graph.graph.value_info.extend(kept)
    values = (*graph.graph.input, *graph.graph.output, *kept)
    for noted in (*graph.graph.node, *graph.graph.initializer, *values):
        del noted.metadata_props[:]
    path = folder / edge_llm.GRAPH
    path.parent.mkdir()
    onnx.save(graph, path)
    store.save_manifest(folder, {"recorded": True, **manifest})
    return folder


def export(model: str) -> Path:
    """A recording of a model's export; where the model has no chat template, with one that was added to a copy."""
    checkpoint = find_checkpoint(model)
    with tempfile.TemporaryDirectory() as temporary:
        source, exported = Path(temporary) / checkpoint.short_name, Path(temporary) / "exported"
        shutil.copytree(checkpoint.folder, source)
        if not (source / "chat_template.jinja").exists():
            (source / "chat_template.jinja").write_text(TEMPLATE)
        return keep_export(edge_llm.export(source, exported), f"edge_llm-{checkpoint.short_name}")


def _empty(name: str) -> Path:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    for model in sys.argv[1:]:
        print(words(export(model)), file=sys.stderr)
    if sys.argv[1:]:
        return
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU())
    example = (torch.randn(8, 256),)
    for kind, options in BLOCK.items():
        engine = build_module(block, example, name="block", force=True, quiet=True, **options)
        print(words(keep(engine, f"block-{kind}")), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(status_of(main))
