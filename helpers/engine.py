"""From a recipe to an engine that answers: `build` and `load`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from . import backends, hardware, models, store
from .backends.base import Engine
from .errors import BuildError, EngineMismatch
from .progress import Progress, say
from .recipe import COMPILED, BuildRecipe


def build(recipe: BuildRecipe, *, force: bool = False, quiet: bool = False) -> Path:
    """Build what the recipe says and return the engine's folder under engines/.

    If an equal engine is there, that one is returned at once. `force` builds again all the same. A build that fails
    or is interrupted leaves nothing behind. Raises BuildError, ModelError, BackendUnavailable.
    """
    start = time.perf_counter()
    checkpoint = models.find(recipe.model)
    backend = backends.module(recipe.backend)
    if recipe.backend not in COMPILED:
        raise BuildError(
            f"Backend {recipe.backend!r} compiles nothing ahead of time, so there is nothing to build.",
            fix="Load the recipe itself: load(recipe).",
        )
    _check_fits(recipe, checkpoint)
    facts = store.identity(recipe, checkpoint)
    name = store.name_of(recipe, facts)
    if not force and (hit := _stored(name, start, quiet)):
        return hit
    seconds, size = backend.estimate(recipe, checkpoint.config, facts["recipe"]["device"])
    if not quiet:
        say(store.explain_miss(facts, recipe.backend))
    _check_disk(size)
    with store.building(name) as work:
        if not force and (hit := _stored(name, start, quiet)):  # another process built it while this one waited
            return hit
        title = f"Building {name}: about {_duration(seconds)} and {size / 1e6:.0f} MB"
        with Progress(title, quiet=quiet) as progress:
            for file in ("config.json", *models.TOKENIZER_FILES):
                if (checkpoint.folder / file).exists():
                    shutil.copy(checkpoint.folder / file, work / file)
            details = backend.build(recipe, checkpoint, work, progress)
            with progress.phase("publish"):
                store.write_manifest(work, facts, progress.seconds, details)
    return store.root() / name


def load(engine: Path | str | BuildRecipe, *, tokenizer: Path | str | None = None) -> Engine:
    """Load an engine: give its folder, its name or its recipe. Backends that compile nothing take a recipe.

    tokenizer: another tokenizer's folder. It is refused with EngineMismatch unless it is the engine's own: token
    ids mean nothing to a model that was trained with others.
    """
    if isinstance(engine, BuildRecipe) and engine.backend not in COMPILED:
        return backends.module(engine.backend).load(engine)
    folder = store.locate(engine)
    manifest = store.read_manifest(folder)
    _check_machine(folder, manifest)
    if tokenizer is not None:
        _check_tokenizer(folder, manifest, models.find(str(tokenizer)))
    store.verify(folder)
    return backends.module(manifest["identity"]["recipe"]["backend"]).load(folder, manifest)


def _stored(name: str, start: float, quiet: bool) -> Path | None:
    folder = store.root() / name
    if not (folder / store.MANIFEST).exists():
        return None
    if not quiet:
        took = sum(store.read_manifest(folder)["seconds"].values())
        say(f"Cache hit: {name} is built already ({time.perf_counter() - start:.2f} s; building it took {took:.0f} s).")
    return folder


def _check_fits(recipe: BuildRecipe, checkpoint: models.Checkpoint) -> None:
    limit = checkpoint.config.max_position_embeddings
    if recipe.max_seq_len > limit:
        raise BuildError(
            f"max_seq_len={recipe.max_seq_len} is more than the {limit} positions this model was trained for.",
            fix=f"Set max_seq_len to at most {limit}.",
        )


def _check_disk(size: int) -> None:
    free = shutil.disk_usage(store.root()).free
    if free < 1.5 * size + 50e6:
        raise BuildError(
            f"The disk has {free / 1e6:.0f} MB free; this build needs about {1.5 * size / 1e6 + 50:.0f} MB.",
            cause="An engine holds the weights, and the compiler needs room to work.",
            fix="Remove engines you no longer need: python -m helpers list, then remove NAME.",
        )


def _check_machine(folder: Path, manifest: dict) -> None:
    """An engine is native code for one architecture and one version of its libraries."""
    built = manifest["identity"]
    if built["recipe"]["backend"] == "tensorrt":
        return  # TensorRT itself judges, when it loads the engine
    if built["recipe"]["backend"] == "tensorrt_llm":
        backends.module("tensorrt_llm").check_machine(folder, manifest)
        return
    here = hardware.describe(built["recipe"]["device"])
    found = {"architecture": here.architecture, **hardware.versions()}
    wanted = {"architecture": built["architecture"], **built["versions"]}
    missing = set(built.get("instructions", "").split()) - set(here.instructions)
    if here.device == "cpu" and missing:
        raise EngineMismatch(
            f"Engine {folder.name!r} may use the instructions {', '.join(sorted(missing))}; this processor has none.",
            cause="It was compiled for all that the processor of its build could do.",
            fix="Build the recipe again here: build(recipe).",
        )
    for key in ("architecture", "torch", "cuda"):
        if found.get(key) != wanted.get(key):
            raise EngineMismatch(
                f"Engine {folder.name!r} was built for {key} {wanted.get(key)}; this machine has {found.get(key)}.",
                cause="An engine is compiled for one architecture and one version of its libraries.",
                fix="Build the recipe again here: build(recipe).",
            )


def _check_tokenizer(folder: Path, manifest: dict, given: models.Checkpoint) -> None:
    if given.tokenizer_digest() != manifest["identity"]["tokenizer"]:
        raise EngineMismatch(
            f"The tokenizer of {given.name!r} is not the one that engine {folder.name!r} was built with.",
            cause="The same text becomes other token ids, and the model would answer nonsense without any error.",
            fix="Leave `tokenizer` out: the engine's folder holds the right one.",
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
