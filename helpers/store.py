"""engines/: one folder an engine, published whole or not at all, and checked before its native code is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from . import hardware, models
from . import recipe as recipes
from .errors import BuildError, EngineCorrupt, EngineNotFound
from .recipe import BuildRecipe

MANIFEST = "manifest.json"
SCHEMA = 1
# A change in these files changes what is compiled, so it makes earlier engines another engine's.
SOURCES = {"aot": ("llama.py", "backends/aot.py")}


def root() -> Path:
    """Where engines live: engines/ of the course, or the folder that COURSE_ENGINES names."""
    folder = Path(os.environ.get("COURSE_ENGINES") or Path(__file__).parent.parent / "engines")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def identity(recipe: BuildRecipe, checkpoint: models.Checkpoint) -> dict[str, Any]:
    """All that an engine depends on. Two builds with equal identities are the same engine."""
    machine = hardware.describe(recipe.device)
    fields = recipe.to_dict()
    fields["device"] = machine.device
    if Path(fields["model"].removeprefix("dummy:")).is_dir():  # the content counts, not where it lies
        fields["model"] = checkpoint.folder.name
    return {
        "schema": SCHEMA,
        "recipe": fields,
        "checkpoint": checkpoint.digest(),
        "tokenizer": checkpoint.tokenizer_digest(),
        "architecture": machine.architecture,
        "device_name": machine.name if machine.device == "cuda" else "",
        "versions": hardware.versions(),
        "source": _source_digest(recipe.backend),
    }


def name_of(recipe: BuildRecipe, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{recipe.short_name}-{digest[:8]}"


def explain_miss(facts: dict[str, Any], backend: str) -> str:
    """Why no stored engine serves: which fields differ from the nearest one, as "field: stored -> wanted"."""
    wanted = _flat(facts)
    nearest: tuple[int, str, list[str]] | None = None
    for folder in list_engines():
        stored = _flat(read_manifest(folder)["identity"])
        if stored.get("recipe.backend") != backend:
            continue
        differing = [k for k in sorted(wanted.keys() | stored.keys()) if wanted.get(k) != stored.get(k)]
        if nearest is None or len(differing) < nearest[0]:
            words = [f"{k.removeprefix('recipe.')}: {_brief(stored.get(k))} -> {_brief(wanted.get(k))}" for k in differing]
            nearest = (len(differing), folder.name, words)
    if nearest is None:
        return f"No {backend} engine has been built yet."
    return f"Not built yet. Nearest is {nearest[1]}, which differs in {'; '.join(nearest[2])}."


@contextlib.contextmanager
def building(name: str) -> Iterator[Path]:
    """A private folder to build into. It becomes engines/NAME when the block ends well, and vanishes otherwise.

    The lock lies outside the entry, so that a second process waits instead of building the same engine again;
    it finds the entry when it gets the lock, and must look before it builds.
    """
    locks = root() / ".locks"
    locks.mkdir(exist_ok=True)
    with filelock.FileLock(locks / f"{name}.lock"):
        _sweep()
        work = root() / f".building-{os.getpid()}-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        try:
            yield work
            if (work / MANIFEST).exists():
                os.replace(work, root() / name)
        except OSError as error:
            if error.errno != 28:  # ENOSPC
                raise
            raise BuildError(
                "The disk is full; nothing was published.",
                cause=f"{shutil.disk_usage(root()).free / 1e6:.0f} MB were left when it failed.",
                fix="Remove engines you no longer need: python -m helpers list, then remove NAME.",
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def write_manifest(folder: Path, facts: dict[str, Any], seconds: dict[str, float], details: dict[str, Any]) -> None:
    """Seal a finished build: every file's size and hash, and where, when and from what it was made."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    manifest = {
        "identity": facts,
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": asdict(hardware.describe(facts["recipe"]["device"])),
        "seconds": {phase: round(took, 3) for phase, took in seconds.items()},
        "details": details,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["identity"]["schema"] != SCHEMA:
            raise _corrupt(folder, f"its manifest has schema {manifest['identity']['schema']}, this course {SCHEMA}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _corrupt(folder, f"its manifest cannot be read ({error})") from error


def verify(folder: Path, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """The manifest, after checking that files (all, or those in `only`) are what the build wrote.

    A hash guards against damage and mix-ups, not against a person who can write the folder: load only engines
    that were built here.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if only and name not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise _corrupt(folder, f"{name} is missing")
        if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise _corrupt(folder, f"{name} is not the file that was built")
    return manifest


def list_engines() -> list[Path]:
    """Folders of the engines here, oldest first."""
    found = [p.parent for p in root().glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")]
    return sorted(found, key=lambda p: (p / MANIFEST).stat().st_mtime)


def locate(engine: Path | str | BuildRecipe) -> Path:
    """The folder of an engine given as a folder, a name (or the start of just one), or a recipe."""
    if isinstance(engine, BuildRecipe):
        facts = identity(engine, models.find(engine.model))
        folder = root() / name_of(engine, facts)
        if not (folder / MANIFEST).exists():
            raise EngineNotFound(
                f"No engine has been built from this recipe ({engine.short_name}).",
                cause=explain_miss(facts, engine.backend),
                fix="Build it first: build(recipe).",
            )
        return folder
    if isinstance(engine, Path) and (engine / MANIFEST).exists():
        return engine
    name = str(engine)
    if (Path(name) / MANIFEST).exists():
        return Path(name)
    matches = [p for p in list_engines() if p.name.startswith(Path(name).name)]
    exact = [p for p in matches if p.name == name]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    raise EngineNotFound(
        f"{'Several engines begin' if matches else 'There is no engine'} {'with ' if matches else ''}{name!r}.",
        cause="It has not been built on this machine, or its name is misspelt.",
        fix=f"Engines here: {', '.join(p.name for p in list_engines()) or 'none; build one with build(recipe)'}.",
    )


def remove(engine: Path | str | BuildRecipe) -> Path:
    """Delete one engine; returns the folder that is gone."""
    folder = locate(engine)
    if folder.parent.resolve() != root().resolve():
        raise EngineNotFound(f"{folder.name!r} is not in this course's engines folder; it is left alone.")
    grave = root() / f".removed-{os.getpid()}-{folder.name}"
    os.replace(folder, grave)  # gone for others at once, even if deleting is interrupted
    shutil.rmtree(grave, ignore_errors=True)
    return folder


def recipe_of(folder: Path) -> BuildRecipe:
    return recipes.from_dict(read_manifest(folder)["identity"]["recipe"])


def size(folder: Path) -> int:
    """Bytes of all files of an engine."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def _sweep() -> None:
    """Delete what builds and removals that were killed have left; those of living processes stay."""
    for folder in [*root().glob(".building-*"), *root().glob(".removed-*")]:
        pid = folder.name.split("-")[1]
        if not pid.isdigit() or not _alive(int(pid)) or int(pid) == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


def _source_digest(backend: str) -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / s).read_bytes() for s in SOURCES.get(backend, ()))).hexdigest()


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


def _brief(value: Any) -> str:
    text = str(value)
    return text[:10] if len(text) == 64 else text  # a hash


def _corrupt(folder: Path, what: str) -> EngineCorrupt:
    return EngineCorrupt(
        f"Engine {folder.name!r} is not loaded: {what}.",
        cause="Its files were changed, cut or mixed up after the build, or a newer course reads an older engine.",
        fix=f"Remove it (python -m helpers remove {folder.name}) and build it again.",
    )
