"""engines/: one folder an engine, published whole or not at all, and checked before its native code is loaded.

The store is handed facts and knows no backend. The identity of an engine is a dictionary of all that it depends on;
the folder's name ends with its hash.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from helpers.errors import BuildError, EngineCorrupt, EngineNotFound
from helpers.paths import engines_folder

MANIFEST = "manifest.json"
MANIFEST_FIELDS = {"identity", "recipe", "built", "hardware", "compiler", "seconds", "details", "files"}
SCHEMA = 2
SHOWN = 8  # engines that an error names

Manifest = dict[str, Any]


def name_of(short_name: str, identity: dict[str, Any]) -> str:
    """The folder's name of an engine, such as stories-aot-int8-b4-1f0c2a9e."""
    digest = hashlib.sha256(json.dumps([SCHEMA, identity], sort_keys=True).encode()).hexdigest()
    return f"{short_name}-{digest[:8]}"


def explain_miss(identity: dict[str, Any]) -> str:
    """Why no stored engine serves: which fields differ from the nearest one, as "field: stored -> needed"."""
    backend = identity["recipe"]["backend"]
    needed = _flat(identity)
    nearest: tuple[int, str, list[str]] | None = None
    for folder in list_engines():
        try:
            stored = _flat(read_manifest(folder)["identity"])
        except EngineCorrupt:
            continue  # a damaged engine must not keep others from being built
        if stored.get("recipe.backend") != backend or stored.get("kind") != identity.get("kind"):
            continue
        differing = [k for k in sorted(needed.keys() | stored.keys()) if needed.get(k) != stored.get(k)]
        if nearest is None or len(differing) < nearest[0]:
            words = [f"{k.removeprefix('recipe.')}: {_change(stored.get(k), needed.get(k))}" for k in differing]
            nearest = (len(differing), folder.name, words)
    if nearest is None:
        return f"No {backend} engine has been built yet."
    return f"Not built yet. Nearest is {nearest[1]}, which differs in {'; '.join(nearest[2])}."


@contextlib.contextmanager
def building(name: str) -> Iterator[Path]:
    """A private folder to build into. It becomes engines/NAME when the block ends well, and vanishes otherwise;
    an engine or a torn folder of that name gives way.

    The lock lies outside the entry, so that a second process waits instead of building the same engine again;
    it finds the entry when it gets the lock, and must look before it builds.
    """
    root = engines_folder()
    locks = root / ".locks"
    locks.mkdir(exist_ok=True)
    _sweep(locks)
    with filelock.FileLock(locks / f"{name}.lock"):
        work = root / f".building-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        try:
            yield work
            if (work / MANIFEST).exists():
                _discard(root / name)
                work.replace(root / name)
        except Exception as error:
            if not _disk_full(error):
                raise
            raise BuildError(
                "The disk is full; nothing was published.",
                cause=f"{shutil.disk_usage(root).free / 1e6:.0f} MB were left when it failed.",
                fix="Remove engines you no longer need: python -m helpers list, then remove NAME.",
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def write_manifest(
    folder: Path,
    identity: dict[str, Any],
    recipe: dict[str, Any],
    *,
    hardware: dict[str, Any],
    compiler: str,
    seconds: dict[str, float],
    details: dict[str, Any],
) -> None:
    """Seal a finished build: every file's size and hash, and where, when and from what it was made.

    recipe: as it was given; in the identity, the content of a local checkpoint stands for its path.
    details: what the backend needs to load the engine.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "schema": SCHEMA,
        "identity": identity,
        "recipe": recipe,
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "compiler": compiler,
        "seconds": {phase: round(duration, 3) for phase, duration in seconds.items()},
        "details": details,
        "files": {path.relative_to(folder).as_posix(): entry_of(path) for path in paths},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an engine's folder; EngineCorrupt if it cannot be read or is of another schema."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = manifest.get("schema", 1)
        if schema == SCHEMA and (missing := MANIFEST_FIELDS - manifest.keys()):
            raise KeyError(*sorted(missing))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(folder, f"its manifest cannot be read ({error})") from error
    if schema != SCHEMA:
        raise _corrupt(folder, f"its manifest has schema {schema}, this course {SCHEMA}")
    return manifest


def verify(folder: Path, manifest: Manifest, only: tuple[str, ...] = ()) -> None:
    """EngineCorrupt unless the files (all, or those in `only`) are what the build wrote.

    A hash guards against damage and mix-ups, not against a person who can write the folder: load only engines
    that were built here.
    """
    for name, entry in manifest["files"].items():
        if only and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise _corrupt(folder, f"{name} is missing")
        if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise _corrupt(folder, f"{name} is not the file that was built")


def list_engines() -> list[Path]:
    """Folders of the engines here, oldest first."""
    folders = [p.parent for p in engines_folder().glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")]
    return sorted(folders, key=lambda folder: (folder / MANIFEST).stat().st_mtime)


def is_built(name: str) -> bool:
    return (engines_folder() / name / MANIFEST).exists()


def find(engine: Path | str) -> Path:
    """The folder of an engine given as a folder, a name, or the start of just one name. Raises EngineNotFound."""
    given = Path(engine)
    if given.name and (given / MANIFEST).exists():
        return given
    in_store = given.name and (given.name == str(engine) or given.parent.resolve() == engines_folder().resolve())
    matches = [folder for folder in list_engines() if folder.name.startswith(given.name)] if in_store else []
    exact = [folder for folder in matches if folder.name == given.name]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        several = ", ".join(folder.name for folder in matches)
        raise EngineNotFound(f"Several engines begin with {str(engine)!r}.", fix=f"Name one: {several}.")
    names = [folder.name for folder in reversed(list_engines())]
    more = f" and {len(names) - SHOWN} more (helpers list)" if len(names) > SHOWN else ""
    raise EngineNotFound(
        f"There is no engine {str(engine)!r}.",
        cause="It has not been built on this machine, or its name is misspelt.",
        fix=f"Engines here: {', '.join(names[:SHOWN]) or 'none; build one with build(recipe)'}{more}.",
    )


def remove(engine: Path | str) -> Path:
    """Delete one engine; returns the folder that is gone."""
    folder = find(engine)
    if folder.parent.resolve() != engines_folder().resolve():
        raise EngineNotFound(f"{folder.name!r} is not in this course's engines folder; it is left alone.")
    _discard(folder)
    return folder


def size(folder: Path) -> int:
    """Bytes of all files of an engine."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _discard(folder: Path) -> None:
    """Delete a folder of engines/ if it is there: out of sight at once, even if deleting it is interrupted."""
    grave = engines_folder() / f".removed-{os.getpid()}-{time.monotonic_ns()}"
    with contextlib.suppress(FileNotFoundError):
        folder.replace(grave)
        shutil.rmtree(grave, ignore_errors=True)


def _sweep(locks: Path) -> None:
    """Delete what killed builds and removals have left. A build that goes on holds its lock, so its folder stays."""
    for grave in engines_folder().glob(".removed-*"):
        shutil.rmtree(grave, ignore_errors=True)
    for folder in engines_folder().glob(".building-*"):
        lock = filelock.FileLock(locks / f"{folder.name.removeprefix('.building-')}.lock")
        with contextlib.suppress(filelock.Timeout), lock.acquire(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)


def _disk_full(error: BaseException) -> bool:
    """OSError says it by number; safetensors and torch, which write too, only in words."""
    return getattr(error, "errno", None) == errno.ENOSPC or "no space left on device" in str(error).lower()


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _change(stored: Any, needed: Any) -> str:
    """ "old -> new"; of hashes the first digits, of long lists in words only those that differ."""
    if isinstance(stored, str) and isinstance(needed, str) and " " in stored + needed:
        old, new = stored.split(), needed.split()
        stored = " ".join(word for word in old if word not in new)
        needed = " ".join(word for word in new if word not in old)
    return " -> ".join(str(v)[:10] if len(str(v)) == 64 else str(v) or "none" for v in (stored, needed))


def _corrupt(folder: Path, what: str) -> EngineCorrupt:
    return EngineCorrupt(
        f"Engine {folder.name!r} is not loaded: {what}.",
        cause="Its files were changed, cut or mixed up after the build, or a newer course reads an older engine.",
        fix=f"Remove it (python -m helpers remove {folder.name}) and build it again.",
    )
