"""engines/: one folder an engine, published whole or not at all, and checked before its native code is loaded.

The store is handed facts and knows no backend. The identity of an engine is a dictionary of all that it depends on;
the folder's name ends with its hash. The manifest holds the hash of every file, and one of itself. Hashes guard against
damage and mix-ups, not against a person who can write the folder: access.py says whose engines are loaded. There may be
several stores (paths.py): all are read, and only the first, the learner's own, is written to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from helpers.access import open_to_readers
from helpers.digests import MEMORY, file_digest
from helpers.errors import (
    BuildError,
    CourseError,
    EngineCorrupt,
    EngineNotFound,
    OutOfMemory,
    StoreError,
    WorkerError,
    is_full,
    shown,
    why_refused,
)
from helpers.paths import (
    engines_folder,
    engines_folders,
    is_left_behind,
    locks_folder,
    own_store_first,
    read_text,
    resolved,
)
from helpers.progress import held

MANIFEST = "manifest.json"
SCHEMA = 3
FIELDS: dict[str, type] = {  # of a manifest
    "identity": dict,
    "recipe": dict,
    "built": str,
    "hardware": dict,
    "compiler": str,
    "seconds": dict,
    "details": dict,
    "files": dict,
}
SHOWN = 8  # engines that an error names

Manifest = dict[str, Any]


def name_of(short_name: str, identity: dict[str, Any]) -> str:
    """The folder's name of an engine, such as stories-aot-int8-b4-1f0c2a9e."""
    return f"{short_name}-{_hash([SCHEMA, identity])[:8]}"


def explain_miss(identity: dict[str, Any]) -> str:
    """Why no stored engine serves: which fields differ from the nearest one, as "field: stored -> needed"."""
    backend = identity["recipe"]["backend"]
    needed = _flat(identity)
    nearest: tuple[int, str, list[str]] | None = None
    for folder, built_as in _identities():
        stored = _flat(built_as)
        if stored.get("recipe.backend") != backend or stored.get("kind") != identity.get("kind"):
            continue
        differing = [k for k in sorted(needed.keys() | stored.keys()) if needed.get(k) != stored.get(k)]
        if nearest is None or len(differing) < nearest[0]:
            words = [f"{k.removeprefix('recipe.')}: {_change(stored.get(k), needed.get(k))}" for k in differing]
            nearest = (len(differing), folder.name, words)
    if nearest is None:
        return f"No {backend} engine has been built yet."
    if not nearest[2]:
        return f"{nearest[1]} is of these very settings."
    return f"Not built yet. Nearest is {nearest[1]}, which differs in {'; '.join(nearest[2])}."


@contextlib.contextmanager
def building(name: str) -> Iterator[Path]:
    """A private folder to build into. It becomes engines/NAME when the block ends well, and vanishes otherwise;
    an engine or a torn folder of that name gives way.

    The lock lies outside the entry, so that a second process waits instead of building the same engine again;
    it finds the entry when it gets the lock, and must look before it builds.
    """
    root = engines_folder()
    entry, work = root / name, root / f".building-{name}"
    with _refusals_explained():
        if entry.is_dir() and not entry.is_symlink() and not os.access(entry, os.W_OK):  # told now, not after the build
            raise PermissionError(errno.EACCES, "you may not replace the engine of that name", str(entry))
        lock = _lock(name)
        if work.is_dir() and not Path(lock.lock_file).exists():  # whoever works there holds a lock that has no name
            raise StoreError(
                f"A build of {name!r} may be going on, whose lock was deleted.",
                cause=f"Somebody deleted {Path(lock.lock_file).parent} while it ran.",
                fix=f"Wait for that build. If there is none, delete {work}.",
            )
        with held(lock, f"builds {name}"):
            _delete(work)
            _sweep(root)
            work.mkdir(mode=0o700)
            try:
                yield work
                if (work / MANIFEST).exists():
                    _discard(entry)
                    work.replace(entry)
            finally:
                _delete(work)


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
    files = {path.relative_to(folder).as_posix(): path for path in sorted(_files(folder))}
    (folder / MANIFEST).touch()
    open_to_readers(folder)  # before the digests: a file whose mode changes is read again
    manifest = {
        "schema": SCHEMA,
        "identity": identity,
        "recipe": recipe,
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "compiler": compiler,
        "seconds": {phase: round(duration, 3) for phase, duration in seconds.items()},
        "details": details,
        "files": {name: entry_of(path) for name, path in files.items()},
    }
    save_manifest(folder, manifest)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, with the hash over all that it says."""
    fields = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    text = json.dumps({**fields, "sha256": _hash(fields)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an engine's folder. Raises EngineNotFound if there is none, and EngineCorrupt if it says
    anything else than a build of this schema wrote."""
    if not isinstance(folder, Path):
        raise StoreError(f"An engine's folder is a Path, not {shown(folder)}.", fix="Such as what build returns.")
    try:
        if not (folder / MANIFEST).is_file():
            raise _gone(folder)
        manifest = json.loads(read_text(folder / MANIFEST))
        own_hash = manifest.pop("sha256", "") if isinstance(manifest, dict) else ""
        hash_now = _hash(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise _gone(folder) from None
    except OSError as error:
        raise _unreadable(folder, error) from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(folder, f"its manifest cannot be read ({error})") from error
    if not isinstance(manifest, dict):
        raise _corrupt(folder, f"its manifest cannot be read (it holds no fields, but {shown(manifest)})")
    if manifest.get("schema") != SCHEMA:
        raise _corrupt(folder, f"its manifest has schema {shown(manifest.get('schema'))}, this course {SCHEMA}")
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]:
        raise _corrupt(folder, f"its manifest cannot be read (it has no {wrong[0]})")
    if not all(isinstance(seconds, (int, float)) for seconds in manifest["seconds"].values()):
        raise _corrupt(folder, "its manifest cannot be read (a phase's seconds are no number)")
    if not all(map(_is_entry, manifest["files"].values())):
        raise _corrupt(folder, "its manifest cannot be read (a file has no size or hash)")
    if own_hash != hash_now:
        raise _corrupt(folder, "its manifest is not the one that was written")
    in_store = folder.absolute().parent in engines_folders()
    if in_store and folder.name != name_of(folder.name.rpartition("-")[0], manifest["identity"]):
        ending = name_of("", manifest["identity"])
        raise _corrupt(
            folder,
            "its name is not that of the engine that it holds",
            cause="Its folder was renamed, or another engine's files were put into it.",
            fix=f"If it was renamed, call it {folder.name}{ending}, or any other name with that end. Else: "
            + how_to_replace(folder),
        )
    if outside := [name for name in manifest["files"] if not _is_inside(name)]:
        raise _corrupt(folder, f"its manifest names a file outside, {outside[0]!r}")
    return manifest


def verify(folder: Path, manifest: Manifest, only: tuple[str, ...] = (), *, thorough: bool = False) -> None:
    """EngineCorrupt unless the files (all, or those in `only`) are what the build wrote, and no other is there.

    A large file whose size, inode and times are those of an earlier look is not read again (digests.py); what changes a
    file through the system changes its times. `thorough` reads all: it finds what a failing disk changes by itself.
    """
    with reading(folder):
        for name in only or manifest["files"]:
            path, entry = folder / name, manifest["files"].get(name)
            if entry is None:
                raise _corrupt(folder, f"its manifest does not list {name}")
            if path.is_symlink() or not path.is_file():
                raise _corrupt(folder, f"{name} is {'only a link' if path.is_symlink() else 'missing'}")
            same = path.stat().st_size == entry["bytes"] and file_digest(path, reread=thorough) == entry["sha256"]
            if not same and (thorough or file_digest(path, reread=True) != entry["sha256"]):
                raise _corrupt(folder, f"{name} is not the file that was built")
        names = () if only else (path.relative_to(folder).as_posix() for path in _files(folder))
        if unlisted := [name for name in names if name != MANIFEST and name not in manifest["files"]]:
            what = f"no build wrote {unlisted[0]!r}, which lies in its folder"
            raise _corrupt(folder, what, fix=f"Delete {unlisted[0]!r}.")


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever fails while an engine is read: if it was removed or built again meanwhile, that is the reason."""
    before: tuple[int, ...] = ()
    try:
        before = _manifest_stamp(folder)
        yield
    except Exception as error:
        try:
            now = _manifest_stamp(folder)
        except OSError as refused:
            raise _unreadable(folder, refused) from error
        if not now:
            raise _gone(folder) from error
        if now != before:
            words = f"Engine {folder.name!r} was built again while it was read."
            raise EngineNotFound(words, fix="Load it again.") from error
        if isinstance(error, OSError):
            raise _unreadable(folder, error) from error
        raise


def list_engines(*, hidden: bool = False) -> list[Path]:
    """Folders of the engines in all stores that you may read, oldest first; of one name, the first store's. hidden:
    those of the others, too, which are found only where the first is gone."""
    engines = {}
    with _refusals_explained():
        for folder in (folder for root in reversed(engines_folders()) for folder in root.iterdir()):
            with contextlib.suppress(OSError):  # no engine, removed meanwhile, or another person's
                if not folder.name.startswith("."):
                    engines[folder if hidden else folder.name] = ((folder / MANIFEST).stat().st_mtime, folder)
    return [folder for _, folder in sorted(engines.values())]


def without_manifest() -> list[Path]:
    """Folders that bear an engine's name and have no manifest: nothing is found or loaded there, and room is taken."""
    with _refusals_explained():
        folders = [folder for root in engines_folders() for folder in root.iterdir()]
        named = [folder for folder in folders if re.search(r"^[^.].*-[0-9a-f]{8}$", folder.name) and folder.is_dir()]
        return sorted(folder for folder in named if os.access(folder, os.R_OK) and not (folder / MANIFEST).exists())


def lookup(name: str) -> Path | None:
    """The folder of the engine of this name, in the first store that has one. It may be damaged, or not be yours to
    read."""
    for root in engines_folders():
        try:
            (root / name / MANIFEST).stat()
        except PermissionError:
            pass
        except OSError:
            continue
        return root / name
    return None


def serving(short_name: str, identity: dict[str, Any]) -> Path | None:
    """The folder of the engine of this identity. Where there is no compiler ("none"), nothing could be built: there an
    engine serves that differs in nothing but the compiler that it was built with."""
    folder = lookup(name_of(short_name, identity))
    versions = identity.get("versions", {})
    if folder or versions.get("compiler") != "none":
        return folder
    for folder, stored in _identities():
        compiler = stored.get("versions", {}).get("compiler")
        if stored == {**identity, "versions": {**versions, "compiler": compiler}}:
            return folder
    return None


def _identities() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each engine with its identity, but those that are damaged or were removed meanwhile: they must not keep others
    from being built."""
    for folder in list_engines():
        with contextlib.suppress(CourseError):
            yield folder, read_manifest(folder)["identity"]


def find(engine: Path | str) -> Path:
    """The folder of an engine given as a folder, a name, or the start of just one name. Raises EngineNotFound."""
    if not isinstance(engine, (str, Path)):
        raise EngineNotFound(
            f"No engine is found by {shown(engine)}.",
            cause="One that is built is named by its folder or its name.",
            fix="Give what build returned. A loaded engine has its recipe with it, unchecked: engine.recipe.",
        )
    place = None  # the store that is named with it
    try:
        given = Path(engine).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if given.name and (given / MANIFEST).stat():
                return given
        stores = [root.resolve() for root in engines_folders()]
        if given.name != str(engine):
            place = given.parent.resolve()
        in_store = given.name and (place is None or place in stores)
    except PermissionError:
        return given  # as below
    except (ValueError, OSError, RuntimeError):  # nothing that a file system knows
        given, in_store = Path(), False
    every = list_engines(hidden=place is not None)
    there = [folder for folder in every if place is None or folder.parent.resolve() == place]
    matches = [folder for folder in there if _begins(folder.name, given.name)] if in_store else []
    unreadable = lookup(given.name) if in_store and not matches else None
    if unreadable and place in (None, unreadable.parent.resolve()):
        return unreadable  # whoever reads it is told so
    exact = [folder for folder in matches if folder.name == given.name]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        several = ", ".join(folder.name for folder in matches)
        raise EngineNotFound(f"Several engines begin with {str(engine)!r}.", fix=f"Name one: {several}.")
    names = [folder.name for folder in reversed(list_engines())]
    more = f" and {len(names) - SHOWN} more (helpers list)" if len(names) > SHOWN else ""
    raise EngineNotFound(
        f"There is no engine {shown(str(engine) if isinstance(engine, Path) else engine)}.",
        cause="It has not been built on this machine, or its name is misspelt.",
        fix=f"Engines here: {', '.join(names[:SHOWN]) or 'none; build one with build(recipe)'}{more}.",
    )


def _begins(name: str, start: str) -> bool:
    """Whether an engine's name begins so. "…-b1" is no start of "…-b16", nor "step-500" of "step-5000": these are other
    engines, and `remove` deletes what is found. Only in the hash at the end may a number be cut."""
    cut = start[-1:].isdigit() and name[len(start) :][:1].isdigit() and len(start) < name.rfind("-")
    return name.startswith(start) and not cut


def remove(engine: Path | str) -> Path:
    """Delete one engine of the learner's own store; returns the folder that is gone. Of a link, only the link goes."""
    folder = find(engine)
    if (parent := folder.absolute().parent).resolve() != engines_folder().resolve():
        raise EngineNotFound(
            f"{folder.name!r} lies in {parent}, and your own store is {engines_folder()}; it is left alone.",
            fix="If it is yours, delete it by hand; else whoever owns that folder can.",
        )
    with _refusals_explained():
        _discard(folder)
    return folder


def size(folder: Path) -> int:
    """Bytes of all files of an engine."""
    total = 0
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            total += path.lstat().st_size
    return total


def _manifest_stamp(folder: Path) -> tuple[int, ...]:
    """What tells one manifest from a later one; nothing, and so false, where there is none. OSError where nobody may
    know that, as in another person's folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = (folder / MANIFEST).stat()
        return (status.st_ino, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else ()
    return ()


def _lock(name: str) -> filelock.BaseFileLock:
    """Whoever may write to the store may take the lock, also after another user. Of a store that is closed to its owner
    too, the system says so; filelock would call the mode wrong."""
    mode = engines_folder().stat().st_mode & 0o666 | 0o600
    return filelock.FileLock(locks_folder() / f"{name}.lock", mode=mode)


@contextlib.contextmanager
def _refusals_explained() -> Iterator[None]:
    """What the operating system refuses while engines are written, in our words. Other errors pass."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory("The host's memory ran out; nothing was published.", fix="Close what else runs.") from error
    except Exception as error:
        if isinstance(error, CourseError) and not (isinstance(error, WorkerError) and is_full(error)):
            raise
        root = place = engines_folder()
        if is_full(error):
            fix = "Remove engines you no longer need: helpers list, then remove NAME."
            named = Path(getattr(error, "filename", None) or root)
            if named.is_dir() and not named.is_relative_to(root):
                place, fix = named, "Make room there, or set TMPDIR to a folder that has more."
            raise BuildError(
                "The disk is full, or a limit on space is reached; nothing was published.",
                cause=f"{shutil.disk_usage(place).free / 1e6:.0f} MB are left in {place}: {error}.",
                fix=fix,
            ) from error
        if not isinstance(error, OSError) and "can't start new thread" not in str(error):
            raise
        if isinstance(error, OSError) and Path(str(error.filename or "")).is_relative_to(root):
            raise StoreError(
                f"The folder of engines cannot be read or written: {error.strerror}.",
                cause=f"{error.filename}: {why_refused(error)}",
                fix=f"Mend that, or build into another folder of your own: export {own_store_first()}",
            ) from error
        what = f"The operating system refused: {error}; nothing was published."
        raise BuildError(what, cause=why_refused(error)) from error


def _discard(folder: Path) -> None:
    """Delete an entry of engines/ if it is there: out of sight at once, even if deleting it is interrupted."""
    grave = locks_folder() / f"removed-{os.getpid()}-{time.monotonic_ns()}"
    with contextlib.suppress(FileNotFoundError):
        folder.replace(grave)
        _delete(grave)


def _delete(path: Path) -> None:
    """A folder with all that is in it, a file, or a link: never what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(root: Path) -> None:
    """Delete what killed builds and removals have left. A build that goes on holds its lock, so its folder stays; what
    has no lock is not ours."""
    locks = locks_folder()
    for left in (*locks.glob("removed-*"), *root.glob(f"{MEMORY}?*")):
        _delete(left)  # who is at work on one does without it
    for left in locks.glob("doctor-*"):
        with contextlib.suppress(FileNotFoundError):
            if is_left_behind(left):  # a doctor is done in 20 s
                _delete(left)
    for path in root.glob(".building-*"):
        lock = _lock(path.name.removeprefix(".building-"))
        if Path(lock.lock_file).exists():
            with contextlib.suppress(filelock.Timeout, PermissionError), lock.acquire(timeout=0):
                _delete(path)


def _files(folder: Path) -> Iterator[Path]:
    """The files and links in a folder and its folders."""
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in files)
        yield from (link for name in folders if (link := Path(parent, name)).is_symlink())


def _is_entry(entry: Any) -> bool:
    """Whether a manifest says of a file what entry_of does."""
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def _is_inside(name: str) -> bool:
    """Whether a file's name in a manifest stays within the engine's folder, on any system."""
    return not re.search(r"[\\:\0]", name) and all(part.strip(".") for part in name.split("/"))


def _hash(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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


def _gone(folder: Path) -> EngineNotFound:
    return EngineNotFound(
        f"Engine {folder.name!r} is not there any more.",
        cause="It was removed, or it never was one.",
        fix="Build it.",
    )


def _unreadable(folder: Path, error: OSError) -> StoreError:
    """The engine may be sound: what the operating system refuses does not say that it is damaged."""
    if isinstance(error, PermissionError):
        return StoreError(f"You may not read engine {folder.name!r}.", fix="Ask its owner, or build your own.")
    fix = "`helpers doctor` looks at disk and limits."
    return StoreError(f"Engine {folder.name!r} cannot be read: {error}.", cause=why_refused(error), fix=fix)


def how_to_replace(folder: Path) -> str:
    """What to do about a damaged engine. A copy beside the stores bears the name of a sound one, which stays."""
    place = resolved(folder.absolute().parent)
    own, *others = map(resolved, engines_folders())
    if place == own:
        return f"Remove it (helpers remove {folder.name}) and build it again."
    if place in others:
        return f"Build it again, in your own store; and tell whoever owns {folder.parent}."
    return f"Delete {folder}; copy it anew, or build it again."


def _corrupt(folder: Path, what: str, *, cause: str = "", fix: str = "") -> EngineCorrupt:
    usual = "Its files were changed, cut or mixed up after the build, or a newer course reads an older engine."
    return EngineCorrupt(
        f"Engine {folder.name!r} is not loaded: {what}.",
        cause=cause or usual,
        fix=fix or how_to_replace(folder),
    )
