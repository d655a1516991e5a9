"""What a learner has done: one file, progress.json in work/ (or in COURSE_WORK), with answers and predictions.

Only what somebody did is written: a notebook that runs from top to bottom, with nothing answered, leaves no file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from helpers.errors import StoreError, is_full, why_refused
from helpers.paths import PROJECT, expanded
from helpers.progress import say

FILE = "progress.json"
GRADED = "COURSE_GRADED_WORK"  # the environment variable by which a grading tells its kernel where to write


def work_folder() -> Path:
    """Where a learner's copies of the notebooks and the file of what they did lie. While a notebook is graded, that is
    a folder of the grading, whatever COURSE_WORK the notebook sets."""
    return expanded(os.environ.get(GRADED) or os.environ.get("COURSE_WORK") or PROJECT / "work", "COURSE_WORK")


def read() -> dict[str, Any]:
    """{"exercises": {number: {...}}, "predictions": {notebook: {name: whether near}}}. A damaged file is put aside."""
    path = work_folder() / FILE
    empty: dict[str, Any] = {"exercises": {}, "predictions": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        inner = [entry for key in empty for entry in content[key].values()]
        if not all(isinstance(entry, dict) for entry in inner):
            raise ValueError("not a file of progress")
        return content
    except FileNotFoundError:
        return empty
    except OSError as error:
        raise _unusable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        aside = path.with_name(f"progress.damaged-{datetime.now():%Y-%m-%d-%H%M%S}.json")
        path.replace(aside)
        say(f"{path.name} could not be read. It is kept as {aside.name}, and a new one is begun.")
        return empty


@contextlib.contextmanager
def changed() -> Iterator[dict[str, Any]]:
    """The content, to be changed, and written whole. Two notebooks may write at once. StoreError if that fails."""
    from filelock import FileLock, Timeout

    path = work_folder() / FILE
    part = path.with_name(f".{FILE}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{FILE}.lock"), timeout=5):
            content = read()
            yield content
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
    except (OSError, Timeout) as error:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"What you did cannot be written to {path}, or read from it: {error}.",
        cause=why_refused(error),
        fix=how_to_write(error),
    )


def how_to_write(error: Exception) -> str:
    """What lets the learner's folder be written again. Another folder has none of their work."""
    return "Free some space." if is_full(error) else "Set COURSE_WORK to a folder that you can write."


def record_answer(number: str, state: str, fingerprint: str) -> tuple[int, str]:
    """Note an answer. Returns how many different wrong ones there were, and a remark if it could not be noted."""
    try:
        with changed() as content:
            entry = _entry(content, number)
            if state == "right":
                entry["state"] = state
            elif fingerprint not in entry["wrong"]:
                entry["wrong"].append(fingerprint)
            entry["when"] = now()
            return max(len(entry["wrong"]), entry["hints"], 1), ""
    except StoreError as error:
        return 1, f"\n({error})"


def record_hint(number: str, most: int) -> int:
    """Note that a hint was asked for; which one it is."""
    with changed() as content:
        entry = _entry(content, number)
        entry["hints"] = min(max(entry["hints"], len(entry["wrong"])) + 1, most)
        return entry["hints"]


def record_solution(number: str) -> None:
    with changed() as content:
        _entry(content, number)["solution"] = True


def _entry(content: dict[str, Any], number: str) -> dict[str, Any]:
    new = {"state": "open", "wrong": [], "hints": 0, "solution": False, "when": now()}
    content["exercises"][number] = {**new, **content["exercises"].get(number, {})}
    return content["exercises"][number]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
