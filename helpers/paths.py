"""Where things lie: the course's own folder, and the folders of engines and of models."""

from __future__ import annotations

import os
from pathlib import Path

from helpers.errors import StoreError

PROJECT = Path(__file__).resolve().parent.parent


def engines_folder() -> Path:
    """engines/ of the course, or the folder that COURSE_ENGINES names. It is made if it is missing."""
    return _folder("engines", PROJECT / "engines", "COURSE_ENGINES")


def models_folder() -> Path:
    """.models/ of the course, or the folder that COURSE_MODELS names. It is made if it is missing."""
    return _folder("models", PROJECT / ".models", "COURSE_MODELS")


def _folder(content: str, default: Path, variable: str) -> Path:
    named = os.environ.get(variable)
    try:
        folder = Path(named or default).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: "~name" of nobody here
        raise StoreError(
            f"The folder of {content} cannot be made: {error}.",
            cause=f"{variable} names a file, or a place that you may not write." if named else "",
            fix=f"Set {variable} to a folder that you can write.",
        ) from error
    return folder
