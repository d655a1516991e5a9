"""Engines and exports that were made elsewhere, to be looked at where they cannot be made: on macOS, for example.

    folder = recorded("block", "fp16")       # says in one line when, where and by what it was built
    inspect(folder)                          # its report, as that of any engine

A recording is an engine's folder without its plan file: the report, and the manifest with the word "recorded" in it.
That of an export by TensorRT Edge-LLM ("edge_llm", MODEL) is its folder without weights: the ONNX file and a manifest.
helpers/maintain/recordings.py writes them.
"""

from __future__ import annotations

from pathlib import Path

from helpers import store
from helpers.errors import EngineNotFound

FOLDER = Path(__file__).parent / "recordings"


def recorded(label: str, kind: str, *, quiet: bool = False) -> Path:
    """The folder of a recording: "block" and how it was built, for example. Raises EngineNotFound."""
    names = sorted(path.name for path in FOLDER.iterdir())
    if f"{label}-{kind}" not in names:
        raise EngineNotFound(f"There is no recording of '{label}-{kind}'.", fix=f"There are: {', '.join(names)}.")
    folder = FOLDER / f"{label}-{kind}"
    if not quiet:
        print(f"Recorded {folder.name}: {words(folder)}. It was not built on this machine.")
    return folder


def words(folder: Path) -> str:
    """When, where and by what a recording was made."""
    manifest = store.read_manifest(folder)
    details, machine = manifest["details"], manifest["hardware"]
    by = f"{details['provider']} {details['version']}"
    gpu = "without a GPU" if machine["device"] == "cpu" else f"with {machine['name']}"
    return f"built by {by} on {manifest['identity']['architecture']} {gpu}, {manifest['built'][:10]}"
