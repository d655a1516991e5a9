"""Write the recorded engines anew, on a machine where TensorRT builds: python -m helpers.maintain.recordings"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers import store
from helpers.backends.report import REPORT_FILE, write_report
from helpers.course.recorded import FOLDER, words
from helpers.engine import build_module, inspect

# The block of the notebooks: which builds are recorded, and with which options of build_module.
BLOCK: dict[str, dict[str, Any]] = {
    **{precision: {"precision": precision} for precision in ("fp32", "fp16", "bf16", "int8", "int4", "fp8")},
    "fp16-all-marked": {"precision": "fp16", "mark_outputs": "all"},
}


def keep(engine: Path, name: str) -> Path:
    """Keep an engine's report and manifest under recordings/NAME; its plan stays behind."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manifest = store.read_manifest(engine)
    write_report(replace(inspect(engine), backend="tensorrt, recorded", sizes={}), folder)
    manifest["files"][REPORT_FILE] = store.entry_of(folder / REPORT_FILE)
    store.save_manifest(folder, {"recorded": True, **manifest})
    return folder


def main() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU())
    example = (torch.randn(8, 256),)
    for kind, options in BLOCK.items():
        engine = build_module(block, example, name="block", force=True, quiet=True, **options)
        print(words(keep(engine, f"block-{kind}")), file=sys.stderr)


if __name__ == "__main__":
    main()
