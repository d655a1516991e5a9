"""Engines that were built elsewhere, to be looked at where TensorRT cannot build: on macOS, for example.

    folder = recorded("block", "fp16")       # says in one line when, where and by what it was built
    inspect(folder)                          # its report, as that of any engine

A record is an engine's folder without its plan file: the report, and the manifest with the word "recorded" in it.
`python -m helpers.recorded`, on a machine where TensorRT builds, writes all of them anew.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import inspection, store
from .errors import EngineNotFound

FOLDER = Path(__file__).parent / "recordings"
# The block of the notebooks: which builds are recorded, and with which options of build_module.
BLOCK: dict[str, dict[str, Any]] = {
    **{precision: {"precision": precision} for precision in ("fp32", "fp16", "bf16", "int8", "int4", "fp8")},
    "fp16-all-marked": {"precision": "fp16", "mark_outputs": "all"},
}


def recorded(label: str, kind: str, *, quiet: bool = False) -> Path:
    """The folder of a recorded engine: "block" and one of BLOCK. Raises EngineNotFound."""
    folder = FOLDER / f"{label}-{kind}"
    if not (folder / store.MANIFEST).exists():
        names = ", ".join(sorted(path.name for path in FOLDER.iterdir()))
        raise EngineNotFound(f"There is no record of {folder.name!r}.", fix=f"Recorded are: {names}.")
    if not quiet:
        print(f"Recorded engine {folder.name}: {words(folder)}. It was not built on this machine.")
    return folder


def words(folder: Path) -> str:
    """When, where and by what a recorded engine was built."""
    manifest = store.read_manifest(folder)
    details, machine = manifest["details"], manifest["hardware"]
    by = f"{details['provider']} {details['version']}"
    gpu = "without a GPU" if machine["device"] == "cpu" else f"with {machine['name']}"
    return f"built by {by} on {manifest['identity']['architecture']} {gpu}, {manifest['built'][:10]}"


def record(engine: Path, name: str) -> Path:
    """Keep an engine's report and manifest under recordings/NAME; its plan stays behind."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manifest = store.read_manifest(engine)
    report = replace(inspection.read_report(engine), backend="tensorrt, recorded")
    inspection.write_report(report, folder)
    manifest["files"][inspection.REPORT_FILE] = store.entry_of(folder / inspection.REPORT_FILE)
    (folder / store.MANIFEST).write_text(json.dumps({"recorded": True, **manifest}, indent=1) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    import torch
    from torch import nn

    from .tensorrt_builder import build_module

    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU())
    example = (torch.randn(8, 256),)
    for kind, options in BLOCK.items():
        engine = build_module(block, example, name="block", force=True, quiet=True, **options)
        print(words(record(engine, f"block-{kind}")), file=sys.stderr)


if __name__ == "__main__":
    main()
