"""sha256 of files. The digest of a large file is remembered, since reading 16 GB again takes many seconds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from helpers.paths import check_is_file, engines_folder, read_text, resolved, user_id
from helpers.progress import shown_if_slow

# In the learner's own store: path -> [what the file was like, its digest]. Each user's own, and readable by no other:
# in a shared store, one user could not replace another's, and should not believe it.
MEMORY = f".digests-{user_id()}.json"
LARGE = 1 << 24  # bytes; a smaller file is read faster than remembered
SETTLED_S = 2.0  # a file that was changed later than this may change again within one tick of the clock


def file_digest(path: Path, *, reread: bool = False) -> str:
    """The sha256 of a file, in hexadecimal digits.

    A large file that has the size, the inode and the times of an earlier call is not read again. `reread` reads it all
    the same: use it on request, and before a file is refused for its digest, because the memory could be wrong: a page
    of a file mapped into memory, once written to, is changed again without any time until it is on the disk.
    """
    path = resolved(path)
    check_is_file(path)
    before = _stamp(path)
    if before[0] < LARGE:
        return _sha256(path)
    if not reread and (entry := _memory().get(str(path))) and entry[0] == before:
        return entry[1]
    digest = _sha256(path)
    # An archive may bring a time that is still to come, so not by that; and a disk's own clock may be ahead.
    if _stamp(path) == before and abs(time.time() - before[3] / 1e9) > SETTLED_S:
        _remember(str(path), [before, digest])
    return digest


def _stamp(path: Path) -> list[int]:
    """What changes when the file does. The last time is set by the system alone, so no tool can put it back."""
    s = path.stat()
    return [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns]


def _sha256(path: Path) -> str:
    total, title = hashlib.sha256(), f"Reading {path.name} for its sha256, {path.stat().st_size / 1e9:.1f} GB"
    with path.open("rb") as file, shown_if_slow(title, "read"):
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _memory() -> dict[str, Any]:
    """All that is remembered; nothing where the memory is missing or damaged, for then files are read again."""
    try:
        entries = json.loads(read_text(engines_folder() / MEMORY))
    except (OSError, ValueError):
        return {}
    return {path: entry for path, entry in entries.items() if _valid(entry)} if isinstance(entries, dict) else {}


def _valid(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) and len(entry[1]) == 64


def _remember(path: str, entry: list[Any]) -> None:
    """Another process may write at the same time: then one entry is lost, and its file is read once more."""
    entries = {p: e for p, e in _memory().items() if os.access(p, os.R_OK)} | {path: entry}
    with contextlib.suppress(OSError):  # a folder that cannot be written to: the digest is right all the same
        descriptor, temporary = tempfile.mkstemp(dir=engines_folder(), prefix=MEMORY)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(entries, file)
            Path(temporary).replace(engines_folder() / MEMORY)
        finally:
            Path(temporary).unlink(missing_ok=True)  # an interrupt leaves nothing either
