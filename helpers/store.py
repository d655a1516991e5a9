"""engines/: one folder an engine, published whole or not at all, and checked before its native code is loaded."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
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
MANIFEST_FIELDS = {"identity", "built", "hardware", "seconds", "details", "files"}
SCHEMA = 1
SHOWN = 8  # engines that an error names
# A change in these files changes what is compiled, so it makes earlier engines another engine's.
SOURCES = {
    "aot": ("llama.py", "llama_gpu.py", "gpu_kernels.py", "backends/aot.py", "backends/aot_compile.py"),
    "tensorrt_llm": ("backends/tensorrt_llm.py", "backends/tensorrt_llm_worker.py", "backends/tensorrt_llm_options.py"),
    "tensorrt": (
        *("llama.py", "llama_onnx.py", "onnx_export.py", "layers.py"),
        *("tensorrt_api.py", "tensorrt_builder.py", "tensorrt_options.py", "backends/tensorrt.py"),
    ),
}


def root() -> Path:
    """Where engines live: engines/ of the course, or the folder that COURSE_ENGINES names."""
    folder = Path(os.environ.get("COURSE_ENGINES") or Path(__file__).parent.parent / "engines")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def identity(recipe: BuildRecipe, checkpoint: models.Checkpoint) -> dict[str, Any]:
    """All that an engine depends on. Two builds with equal identities are the same engine."""
    remote = recipe.backend == "tensorrt_llm"  # it has another PyTorch: that one knows the GPU, ours may not
    machine = hardware.describe("auto" if remote else recipe.device)
    fields = recipe.to_dict()
    fields["device"] = machine.device
    fields["batch_sizes"] = list(recipe.decode_batch_sizes)
    if checkpoint.is_local:  # the content counts, not where it lies
        fields["model"] = ("dummy:" if checkpoint.dummy else "") + checkpoint.folder.name
    facts = {
        "schema": SCHEMA,
        "recipe": fields,
        "checkpoint": checkpoint.digest(),
        "tokenizer": checkpoint.tokenizer_digest(),
        "architecture": machine.architecture,
        "device_name": machine.name if machine.device == "cuda" else "",
        "instructions": " ".join(machine.instructions),
        "versions": hardware.versions(),
        "source": source_digest(recipe.backend),
    }
    if remote:
        from .backends import tensorrt_llm

        fields["device"], fields["batch_sizes"] = "cuda", []
        facts |= tensorrt_llm.identity()
    elif recipe.backend == "tensorrt":  # its engines depend on TensorRT's version, not on this processor
        from . import tensorrt_builder

        facts |= tensorrt_builder.machine_facts(recipe.options.get("provider", "tensorrt_rtx"))
    return facts


def name_of(recipe: BuildRecipe, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{recipe.short_name}-{digest[:8]}"


def explain_miss(facts: dict[str, Any], backend: str) -> str:
    """Why no stored engine serves: which fields differ from the nearest one, as "field: stored -> wanted"."""
    wanted = _flat(facts)
    nearest: tuple[int, str, list[str]] | None = None
    for folder in list_engines():
        try:
            stored = _flat(read_manifest(folder)["identity"])
        except EngineCorrupt:
            continue  # a damaged engine must not keep others from being built
        if stored.get("recipe.backend") != backend or not stored.get("source"):  # a single module has none
            continue
        differing = [k for k in sorted(wanted.keys() | stored.keys()) if wanted.get(k) != stored.get(k)]
        if nearest is None or len(differing) < nearest[0]:
            words = [f"{k.removeprefix('recipe.')}: {_change(stored.get(k), wanted.get(k))}" for k in differing]
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
    locks = root() / ".locks"
    locks.mkdir(exist_ok=True)
    _sweep(locks)
    with filelock.FileLock(locks / f"{name}.lock"):
        work = root() / f".building-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        try:
            yield work
            if (work / MANIFEST).exists():
                _discard(root() / name)
                work.replace(root() / name)
        except Exception as error:
            if not _disk_full(error):
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
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {p.relative_to(folder).as_posix(): entry_of(p) for p in paths}
    found = details.pop("hardware", None) or asdict(hardware.describe(facts["recipe"]["device"]))
    manifest = {
        "identity": facts,
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": found,
        "compiler": hardware.compiler_version(),
        "seconds": {phase: round(took, 3) for phase, took in seconds.items()},
        "details": details,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = manifest["identity"]["schema"]
        if schema == SCHEMA:
            missing = MANIFEST_FIELDS - manifest.keys()
            if missing:
                raise KeyError(*sorted(missing))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(folder, f"its manifest cannot be read ({error})") from error
    if schema != SCHEMA:
        raise _corrupt(folder, f"its manifest has schema {schema}, this course {SCHEMA}")
    return manifest


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
    given = Path(engine)
    if given.name and (given / MANIFEST).exists():
        return given
    here = given.name and (given.name == str(engine) or given.parent.resolve() == root().resolve())
    matches = [p for p in list_engines() if p.name.startswith(given.name)] if here else []
    exact = [p for p in matches if p.name == given.name]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        raise EngineNotFound(
            f"Several engines begin with {str(engine)!r}.", fix=f"Name one: {', '.join(p.name for p in matches)}."
        )
    names = [p.name for p in reversed(list_engines())]
    more = f" and {len(names) - SHOWN} more (helpers list)" if len(names) > SHOWN else ""
    raise EngineNotFound(
        f"There is no engine {str(engine)!r}.",
        cause="It has not been built on this machine, or its name is misspelt.",
        fix=f"Engines here: {', '.join(names[:SHOWN]) or 'none; build one with build(recipe)'}{more}.",
    )


def remove(engine: Path | str | BuildRecipe) -> Path:
    """Delete one engine; returns the folder that is gone."""
    folder = locate(engine)
    if folder.parent.resolve() != root().resolve():
        raise EngineNotFound(f"{folder.name!r} is not in this course's engines folder; it is left alone.")
    _discard(folder)
    return folder


def recipe_of(folder: Path) -> BuildRecipe:
    return recipes.from_dict(read_manifest(folder)["identity"]["recipe"])


def size(folder: Path) -> int:
    """Bytes of all files of an engine."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _discard(folder: Path) -> None:
    """Delete a folder of engines/ if it is there: out of sight at once, even if deleting it is interrupted."""
    grave = root() / f".removed-{os.getpid()}-{time.monotonic_ns()}"
    with contextlib.suppress(FileNotFoundError):
        folder.replace(grave)
        shutil.rmtree(grave, ignore_errors=True)


def _sweep(locks: Path) -> None:
    """Delete what killed builds and removals have left. A build that goes on holds its lock, so its folder stays."""
    for grave in root().glob(".removed-*"):
        shutil.rmtree(grave, ignore_errors=True)
    for folder in root().glob(".building-*"):
        lock = filelock.FileLock(locks / f"{folder.name.removeprefix('.building-')}.lock")
        with contextlib.suppress(filelock.Timeout), lock.acquire(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)


def _disk_full(error: BaseException) -> bool:
    """OSError says it by number; safetensors and torch, which write too, only in words."""
    return getattr(error, "errno", None) == errno.ENOSPC or "no space left on device" in str(error).lower()


def source_digest(backend: str) -> str:
    """A hash of the course's code that decides what this backend compiles."""
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


def _change(stored: Any, wanted: Any) -> str:
    """ "old -> new"; of hashes the first digits, of long lists in words only those that differ."""
    if isinstance(stored, str) and isinstance(wanted, str) and " " in stored + wanted:
        old, new = stored.split(), wanted.split()
        stored = " ".join(w for w in old if w not in new)
        wanted = " ".join(w for w in new if w not in old)
    return " -> ".join(str(v)[:10] if len(str(v)) == 64 else str(v) or "none" for v in (stored, wanted))


def _corrupt(folder: Path, what: str) -> EngineCorrupt:
    return EngineCorrupt(
        f"Engine {folder.name!r} is not loaded: {what}.",
        cause="Its files were changed, cut or mixed up after the build, or a newer course reads an older engine.",
        fix=f"Remove it (python -m helpers remove {folder.name}) and build it again.",
    )
