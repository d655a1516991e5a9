"""From a recipe to an engine that answers: `build`, `load`, `inspect`, `locate`.

This is the one place that knows both the store and the backends. A backend says what an engine depends on and compiles
it; the store publishes it and finds it again.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from helpers import backends, store
from helpers.access import check_trust, origin
from helpers.backends.base import Engine, check_not_forked
from helpers.backends.job import COMPILER_BYTES, WORK, BuildJob
from helpers.backends.report import REPORT_FILE, EngineReport, read_report
from helpers.errors import (
    BuildError,
    EngineCorrupt,
    EngineMismatch,
    EngineNotFound,
    ModelError,
    RecipeError,
    StoreError,
    out_of_memory,
    shown,
)
from helpers.machine import hardware
from helpers.machine.inductor import one_thread
from helpers.machine.plain_torch import plain_torch
from helpers.model.checkpoint import NAMED, TOKENIZER_FILES, Checkpoint, find_checkpoint, is_folder
from helpers.model.config import save_config
from helpers.model.tokenizer import load_tokenizer
from helpers.paths import engines_folder, name_of_folder
from helpers.progress import Progress, hushed, say, shown_if_slow
from helpers.recipe import COMPILED, BuildRecipe, from_dict

if TYPE_CHECKING:
    from torch import nn


def build(recipe: BuildRecipe, *, force: bool = False, quiet: bool = False) -> Path:
    """Build what the recipe says and return the engine's folder, in the first of the stores (COURSE_ENGINES).

    If an equal engine is in any of them, that one is returned at once. `force` builds again all the same. A build that
    fails or is interrupted leaves nothing behind. Raises BuildError, ModelError, BackendUnavailable.
    """
    if not isinstance(recipe, BuildRecipe):
        raise RecipeError(f"An engine is built from a recipe, not from {shown(recipe)}.", fix="Give a BuildRecipe.")
    need_compiled(recipe)
    with hushed(quiet):
        return _run(_job(recipe), force)


def _job(recipe: BuildRecipe) -> BuildJob:
    """What `build` builds."""
    checkpoint = find_checkpoint(recipe.model)
    recipe = recipe.replace(model=checkpoint.name)  # it may have been a link, or "."
    backend = backends.module(recipe.backend)

    def compile_into(folder: Path, progress: Progress) -> dict[str, Any]:
        save_config(checkpoint.config, folder)
        for name in TOKENIZER_FILES:
            if (checkpoint.folder / name).exists():
                shutil.copy(checkpoint.folder / name, folder / name)
        details = backend.build(recipe, checkpoint, folder, progress)
        if not _is_of(find_checkpoint(recipe.model), depends_on):  # the engine would bear the name of other weights
            raise BuildError(
                f"The checkpoint {recipe.model!r} was changed while an engine was built from it.",
                cause="Something wrote into its folder meanwhile, such as a training run that saves.",
                fix="Build again once nothing writes there, or build from a copy.",
            )
        return details

    depends_on = identity(recipe, checkpoint)

    def estimate() -> tuple[float, int, float]:
        checkpoint.check(recipe.max_seq_len)
        load_tokenizer(checkpoint.folder)  # refused here if it cannot be read
        return backend.estimate(recipe, checkpoint.config, depends_on["recipe"]["device"])

    return BuildJob(recipe.short_name, depends_on, recipe.to_dict(), compile_into, estimate)


def build_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    precision: str = "fp32",
    *,
    name: str = "",
    force: bool = False,
    quiet: bool = False,
    time_limit: float = 1800.0,
    **options: Any,
) -> Path:
    """A TensorRT engine from a torch module, in a folder under engines/; an equal one is returned at once.

    example_inputs: what forward takes; sizes that no profile opens are fixed. options: see helpers/recipe/tensorrt.py.
    time_limit: seconds for TensorRT's part. Raises BuildError, RecipeError, BackendUnavailable, WorkerError.
    """
    check_not_forked()
    with hushed(quiet), one_thread:
        job = _of_modules().from_module(
            module, example_inputs, precision, name=name, time_limit=time_limit, options=options
        )
        return _run(job, force)


def build_onnx(
    file: Path | str,
    precision: str = "",
    *,
    name: str = "",
    force: bool = False,
    quiet: bool = False,
    time_limit: float = 1800.0,
    **options: Any,
) -> Path:
    """A TensorRT engine from an ONNX file. precision: "" takes the graph's own types, else they are rewritten."""
    check_not_forked()
    with hushed(quiet):
        job = _of_modules().from_onnx(file, precision, name=name, time_limit=time_limit, options=options)
        return _run(job, force)


def _of_modules() -> ModuleType:
    """What builds modules and ONNX files. Raises BackendUnavailable where a library of it cannot be imported."""
    backends.module("tensorrt")  # for what it says while PyTorch is imported
    try:
        return importlib.import_module("helpers.backends.tensorrt.modules")
    except ImportError as error:
        raise backends.wrong_library(error) from error


def load(engine: Path | str | BuildRecipe, *, tokenizer: Path | str | None = None) -> Engine:
    """Load an engine: give its folder, its name or its recipe. Backends that compile nothing take a recipe.

    tokenizer: another tokenizer's folder. It is refused with EngineMismatch unless it is the engine's own: token
    ids mean nothing to a model that was trained with others.
    """
    if isinstance(engine, BuildRecipe) and engine.backend not in COMPILED:
        checkpoint = find_checkpoint(engine.model)
        if tokenizer is not None:
            _check_tokenizer(checkpoint.folder, tokenizer)
        backend = backends.module(engine.backend)
        with _loading():
            return backend.load(engine.replace(model=checkpoint.name))  # checked again, as in `identity`
    folder = locate(engine)
    with store.reading(folder), _understood(folder):
        check_trust(folder)
        manifest = _read_language_model(folder)
        _check_recipe(folder, manifest)
        backend = backends.module(manifest["recipe"]["backend"])
        with _loading():
            backend.check_machine(folder.name, manifest["identity"])
            store.verify(folder, manifest)
            if tokenizer is not None:
                _check_tokenizer(folder, tokenizer)
            return backend.load(from_dict(manifest["recipe"]), folder, manifest)


def load_plan(engine: Path | str) -> dict[str, Any]:
    """Load a TensorRT engine in a worker and give it back: can it run here?

    Returns its numbers of layers and profiles. Raises EngineMismatch (another GPU, or no TensorRT engine),
    BackendUnavailable (no driver) or EngineCorrupt, each with TensorRT's own words.
    """
    from helpers.backends.tensorrt import builder

    folder = store.find(engine)
    with store.reading(folder):
        check_trust(folder)
        manifest = store.read_manifest(folder)
        builder.check_plans(folder.name, manifest)
        store.verify(folder, manifest)
        return builder.load_plans(folder, manifest)


def inspect(engine: Path | str | BuildRecipe) -> EngineReport:
    """What is inside a built engine: give its folder, its name or its recipe.

    Reads the report that the build wrote; the engine's native code is not loaded.
    """
    folder = locate(engine)
    with store.reading(folder):
        manifest = store.read_manifest(folder)
        store.verify(folder, manifest, only=(REPORT_FILE,))
        return read_report(folder, {name: entry["bytes"] for name, entry in manifest["files"].items()})


def locate(engine: Path | str | BuildRecipe) -> Path:
    """The folder of an engine given as a folder, a name (or the start of just one), or a recipe."""
    if not isinstance(engine, BuildRecipe):
        return store.find(engine)
    need_compiled(engine)
    checkpoint = find_checkpoint(engine.model)
    engine, depends_on = engine.replace(model=checkpoint.name), identity(engine, checkpoint)
    folder = store.serving(engine.short_name, depends_on)
    if folder is None:
        raise EngineNotFound(
            f"No engine has been built from this recipe ({engine.short_name}).",
            cause=store.explain_miss(depends_on),
            fix="Build it first: build(recipe).",
        )
    return folder


def needed(recipe: BuildRecipe) -> dict[str, float]:
    """Bytes that building the recipe takes: of disk for "engines", and of "memory" at least, which holds all weights
    and a compiler beside them. Nothing for a backend that compiles nothing."""
    if recipe.backend not in COMPILED:
        return {}
    checkpoint = find_checkpoint(recipe.model)
    device = identity(recipe, checkpoint)["recipe"]["device"]
    _, size, more = backends.module(recipe.backend).estimate(recipe, checkpoint.config, device)
    return {"engines": size + more + WORK, "memory": size + COMPILER_BYTES}


def recipe_of(engine: Path | str) -> BuildRecipe:
    """The recipe that an engine was built from. Raises ModelError if its checkpoint is gone, or another by now."""
    folder = store.find(engine)
    manifest = _read_language_model(folder)
    recipe = from_dict(manifest["recipe"])
    if not _is_of(find_checkpoint(recipe.model), manifest["identity"]):
        raise ModelError(
            f"The checkpoint {recipe.model!r} is not the one that engine {folder.name!r} was built from.",
            cause="Its weights, its configuration or its tokenizer were changed after the build.",
            fix="Build a new engine from it, or bring the old files back.",
        )
    return recipe


def identity(recipe: BuildRecipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """All that an engine depends on. Two builds with equal identities are the same engine."""
    recipe.replace()  # checks again: options are a dict, into which something may have been written since
    depends_on = backends.module(recipe.backend).identity(recipe, checkpoint)
    fields = {**recipe.to_dict(), "model": checkpoint.short_name, **depends_on.pop("recipe")}
    return {
        "kind": "language model",
        "recipe": fields,
        "checkpoint": checkpoint.digest(),
        "tokenizer": checkpoint.tokenizer_digest(),
        **depends_on,
    }


def _is_of(checkpoint: Checkpoint, identity: dict[str, Any]) -> bool:
    """Whether a checkpoint's files are those that an engine of this identity depends on."""
    digests = checkpoint.digest(), checkpoint.tokenizer_digest()
    return digests == (identity["checkpoint"], identity["tokenizer"])


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """torch as it starts; where memory runs out, our error."""
    try:
        with plain_torch():
            yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the former
        if explained := out_of_memory(error):
            raise explained from error
        raise


@contextlib.contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """EngineCorrupt where a backend does not find in a manifest what its own builds write there; BackendUnavailable
    where it does not find in a library what belongs there."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ImportError) as error:
        if isinstance(error, ImportError) or isinstance(getattr(error, "obj", None), ModuleType):
            raise backends.wrong_library(error) from error
        raise EngineCorrupt(
            f"Engine {folder.name!r} is not loaded: its manifest is of another kind ({type(error).__name__}: {error}).",
            cause="Another version of the course built it.",
            fix=store.how_to_replace(folder),
        ) from error


def need_compiled(recipe: BuildRecipe) -> None:
    """BuildError for a recipe of a backend that builds nothing."""
    if recipe.backend not in COMPILED:
        raise BuildError(
            f"Backend {recipe.backend!r} compiles nothing ahead of time, so there is nothing to build.",
            fix="Load the recipe itself: load(recipe).",
        )


def _read_language_model(folder: Path) -> store.Manifest:
    manifest = store.read_manifest(folder)
    if manifest["identity"].get("kind") != "language model":
        raise EngineMismatch(
            f"Engine {folder.name!r} holds a module, not a language model: it has no recipe and answers no prompts.",
            fix="Look inside with inspect(folder), or try it with load_plan(folder).",
        )
    return manifest


def _check_recipe(folder: Path, manifest: store.Manifest) -> None:
    """EngineCorrupt unless the recipe, which sizes the KV cache, is that of the identity, which names the folder."""
    recipe, built = manifest["recipe"], manifest["identity"]["recipe"]
    resolved = {"model", "device", "decode_batch_sizes", "num_threads"}  # an identity has these as the machine has them
    if others := [name for name in built if name not in resolved and recipe.get(name) != built[name]]:
        raise EngineCorrupt(
            f"Engine {folder.name!r} is not loaded: its recipe is not the one it was built from ({others[0]} differs).",
            cause="Its manifest was changed after the build.",
            fix=store.how_to_replace(folder),
        )


def _run(job: BuildJob, force: bool) -> Path:
    """Publish what the job compiles, unless it is there already. A damaged engine is built again."""
    start = time.perf_counter()
    name = store.name_of(job.short_name, job.identity)

    def stored() -> Path | None:
        folder = None if force else store.serving(job.short_name, job.identity)
        if folder is None:
            return None
        try:
            with store.reading(folder):
                check_trust(folder)
                manifest = store.read_manifest(folder)
                store.verify(folder, manifest)
        except (EngineCorrupt, EngineNotFound) as error:
            say(f"{error.what} So it is built again.")
            return None
        except StoreError as error:  # not yours to read, or not to be trusted
            if folder.parent == engines_folder():
                raise
            say(f"{error}\nSo it is built again, in your own store.")
            return None
        here, then = time.perf_counter() - start, sum(manifest["seconds"].values())
        say(f"Cache hit: {name} is built already{origin(folder)} ({here:.2f} s; building it took {then:.0f} s).")
        return folder

    if folder := stored():
        return folder
    say(store.explain_miss(job.identity))
    with shown_if_slow(f"Reading what {name} is built from", "read"):  # transformers is imported for it
        seconds, size, more = job.estimate()
    _check_disk(size + more + WORK)
    with store.building(name) as work:
        if folder := stored():  # another process built it while this one waited
            return folder
        title = f"Building {name}: about {_duration(seconds)} and {size / 1e6:.0f} MB"
        with Progress(title) as progress:
            details = job.compile_into(work, progress)
            machine = details.pop("hardware", None) or asdict(hardware.describe(job.identity["recipe"]["device"]))
            with progress.phase("publish"):
                store.write_manifest(
                    work,
                    job.identity,
                    job.recipe,
                    hardware=machine,
                    compiler=hardware.compiler_version(),
                    seconds=progress.seconds,
                    details=details,
                )
    return engines_folder() / name


def _check_disk(needed: float) -> None:
    free = shutil.disk_usage(engines_folder()).free
    if free < needed:
        raise BuildError(
            f"The disk has {free / 1e6:.0f} MB free; this build needs about {needed / 1e6:.0f} MB.",
            cause="An engine holds the weights, and the compiler needs room to work.",
            fix="Remove engines you no longer need: helpers list, then remove NAME.",
        )


def _check_tokenizer(folder: Path, tokenizer: Path | str) -> None:
    if not isinstance(tokenizer, (str, Path)):
        raise EngineMismatch(f"A tokenizer is given as its folder, not as {shown(tokenizer)}.", fix="Give the folder.")
    name = name_of_folder(tokenizer)
    # A tokenizer that was saved alone has no config.json.
    alone = is_folder(name) and name not in ("stories", *NAMED)
    given = Path(name).expanduser().resolve() if alone else find_checkpoint(name).folder
    theirs, own = load_tokenizer(given), load_tokenizer(folder)
    if theirs is None and own is not None:
        raise EngineMismatch(
            f"{given.name!r} has no tokenizer.json.",
            cause="It is another folder, or the tokenizer was saved in an older form.",
            fix="Give the folder that tokenizer.json lies in, or leave `tokenizer` out.",
        )
    if theirs != own:
        raise EngineMismatch(
            f"The tokenizer of {given.name!r} is not the one that engine {folder.name!r} was built with.",
            cause="The same text becomes other token ids, and the model would answer nonsense without any error.",
            fix="Leave `tokenizer` out: the engine's folder holds the right one.",
        )
    if theirs and own and theirs.chat_template not in (None, own.chat_template):
        raise EngineMismatch(
            f"The chat template or the end token of {given.name!r} is not that of engine {folder.name!r}.",
            cause="An engine keeps those of the checkpoint that it was built from.",
            fix="Put these files into a copy of the checkpoint, and build from that; or leave `tokenizer` out.",
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
