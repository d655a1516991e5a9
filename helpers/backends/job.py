"""Something to build, as a backend hands it to engine.py; and the hash of the code that builds it."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.errors import BackendUnavailable
from helpers.paths import PROJECT
from helpers.progress import Progress

WORK = 50e6  # bytes of disk that any build needs, and the folder that its compiler works in
COMPILER_BYTES = 1.5e9  # bytes of memory that it takes beside the weights, about


_RUNNING = {file: hash(file.read_bytes()) for file in (PROJECT / "helpers").rglob("[!.]*.py")}  # as it is imported


@dataclass(frozen=True)
class BuildJob:
    """Something to build and publish.

    short_name    readable part of the folder's name
    identity      all that the engine depends on; its hash is the other part
    recipe        what was asked for, as plain values
    compile_into  (folder, progress): writes the engine's files; returns what the manifest keeps for loading
    estimate      about how many seconds it takes, how many bytes the engine becomes, and how many more it takes
                  meanwhile; asked only before a build, so it is where what cannot be built is refused
    """

    short_name: str
    identity: dict[str, Any]
    recipe: dict[str, Any]
    compile_into: Callable[[Path, Progress], dict[str, Any]]
    estimate: Callable[[], tuple[float, int, float]]


def source_digest(*names: str) -> str:
    """A hash of the code that decides what a backend compiles: the Python files of these folders of helpers/ (not an
    editor's hidden ones), these files, and the version of transformers, which reads a checkpoint's configuration."""
    paths = [PROJECT / "helpers" / name for name in names]
    files = [file for path in paths for file in (sorted(path.glob("[!.]*.py")) if path.is_dir() else [path])]
    code = {file: file.read_bytes() for file in files}
    if any(_RUNNING.get(file) != hash(content) for file, content in code.items()):
        raise BackendUnavailable(
            "The course's code was changed after this Python had read it.",
            cause="An update, such as git pull. What this Python built would bear the name of the new code.",
            fix="Restart the kernel, or start Python again.",
        )
    reader = importlib.metadata.version("transformers").encode()
    return hashlib.sha256(b"".join([*code.values(), reader])).hexdigest()
