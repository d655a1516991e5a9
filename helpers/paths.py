"""Where things lie: the course's own folder, and the folder of engines."""

from __future__ import annotations

import os
from pathlib import Path

from helpers.errors import StoreError

PROJECT = Path(__file__).resolve().parent.parent


def engines_folder() -> Path:
    """engines/ of the course, or the folder that COURSE_ENGINES names. It is made if it is missing."""
    named = os.environ.get("COURSE_ENGINES")
    try:
        folder = Path(named or PROJECT / "engines").expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: "~name" of nobody here
        raise StoreError(
            f"The folder of engines cannot be made: {error}.",
            cause="COURSE_ENGINES names a file, or a place that you may not write." if named else "",
            fix="Set COURSE_ENGINES to a folder that you can write.",
        ) from error
    return folder
