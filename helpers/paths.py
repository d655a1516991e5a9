"""Where things lie: the course's own folder, and the folder of engines."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def engines_folder() -> Path:
    """engines/ of the course, or the folder that COURSE_ENGINES names. It is made if it is missing."""
    folder = Path(os.environ.get("COURSE_ENGINES") or PROJECT / "engines").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
