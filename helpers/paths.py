"""Where things lie: the course's own folder, the stores of engines, and the folder of models."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.errors import BackendUnavailable, InputError, StoreError, is_full, shown, why_refused

PYTHON = shlex.quote(sys.executable)  # for a terminal, whose own `python` and `pip` may be of another environment
PROJECT = Path(__file__).resolve().parent.parent
LARGEST_TEXT = 1 << 27  # bytes


def engines_folder() -> Path:
    """The learner's own store, where builds go: the first folder in COURSE_ENGINES, or engines/ of the course. It is
    made if it is missing."""
    return _made("engines", next(iter(_names("COURSE_ENGINES")), ""), PROJECT / "engines", "COURSE_ENGINES")


def engines_folders() -> list[Path]:
    """All stores, in the order in which an engine is looked for: the learner's own, then what else COURSE_ENGINES names
    (os.pathsep lies between two). The others are only read."""
    stores = [engines_folder()]
    for folder in _listed("COURSE_ENGINES")[1:]:
        if not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
            raise StoreError(
                f"The folder of engines {folder} is not there, or you may not read it.",
                cause="COURSE_ENGINES names it after the first; only the first is made where it is missing.",
                fix="Take it out of COURSE_ENGINES, or have it mounted or opened to you.",
            )
        stores.append(folder)
    return list(dict.fromkeys(stores))


def trusted_folders() -> list[Path]:
    """The stores in COURSE_TRUSTED_ENGINES: whatever lies in them may be loaded (see access.py)."""
    return [resolved(folder) for folder in _listed("COURSE_TRUSTED_ENGINES")]


def own_store_first() -> str:
    """The setting that goes on reading all stores, and builds into one of the learner's own, as a shell takes it."""
    stores = engines_folders()
    names = itertools.chain(["~/engines"], (f"~/engines-{number}" for number in itertools.count(2)))
    own = next(name for name in names if named(name) not in stores)
    readable = (shlex.quote(str(folder)) for folder in stores if os.access(folder, os.R_OK | os.X_OK))
    return f"COURSE_ENGINES={os.pathsep.join([own, *readable])}"


def locks_folder() -> Path:
    """Where builds take turns. All who may build in the store may take a lock that another of them has made: so it is
    as open as the store, and not sticky, because filelock trusts no other user's lock in a sticky folder."""
    store = engines_folder()
    folder = store / ".locks"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # another user made it, or the disk has no modes
        folder.chmod(stat.S_IMODE(store.stat().st_mode) & ~stat.S_ISVTX)
    return folder


def models_folder() -> Path:
    """.models/ of the course, or the folder that COURSE_MODELS names. It need not be there: to read makes none."""
    return expanded(os.environ.get("COURSE_MODELS") or PROJECT / ".models", "COURSE_MODELS")


def made_models_folder() -> Path:
    """The same, made if it is missing."""
    return _made("models", os.environ.get("COURSE_MODELS", ""), PROJECT / ".models", "COURSE_MODELS")


def read_text(path: Path) -> str:
    """The text of a file that a person or a build wrote. OSError for what is no file: a pipe or a device may never end.
    ValueError for one that is larger than any such text, and that memory might not hold."""
    size = path.stat().st_size
    check_is_file(path)
    if size > LARGEST_TEXT:
        raise ValueError(f"it has {size / 1e6:.0f} MB")
    return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Errors as `read_text`, and ValueError for what is no TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(read_text(path))


def check_is_file(path: Path) -> None:
    """OSError for what is there and no file: to read a pipe or a device may never end, and memory would not hold it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "this is no file, but a pipe or a device", str(path))


def check_working_folder() -> None:
    """StoreError where the working folder is gone: a library of PyTorch ends a process that loads it there."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise StoreError(
            "The folder that this Python works in is gone.",
            cause="It was deleted, or moved and made anew, after the notebook or the terminal was opened in it.",
            fix="Go to a folder that is there: os.chdir(os.path.expanduser('~')) in a notebook, cd in a terminal.",
        ) from error


def named(path: str | Path) -> Path:
    """The path that somebody gave, with the home that a ~ means: no shell replaces it in --out=~/x, nor in a notebook.
    InputError for what no system takes as a path."""
    text = str(path) if isinstance(path, (str, Path)) else "\0"
    if "\0" in text or re.search("[\ud800-\udc7f\udd00-\udfff]", text):
        raise InputError(f"This names no file: {shown(path)}.", fix="Give a path, such as 'record.json'.")
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path's own fails for a user who is not here)


def name_of_folder(given: str | Path) -> str:
    """The text of a model's name or folder. A Path names a folder, also one that is called as a model is: "stories"."""
    return f"./{given}" if isinstance(given, Path) and given.name == str(given) else str(given)


def write_text(path: Path, text: str) -> None:
    """Write a file that a person named, whole or not at all. InputError where that fails."""
    with _writing(path) as part:
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def check_writable(path: Path) -> None:
    """InputError if nothing can be written there: said before the minutes that its content takes."""
    with _writing(path) as part:
        part.touch()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """The name to write under until the file is whole: nobody else's. Nothing is left of it."""
    try:
        check_is_file(path)  # a device such as /dev/null would be replaced
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise refused(path, "written", error) from error


def refused(path: Path, verb: str, error: OSError) -> InputError:
    """The error for a file that a person named, and that the operating system refuses to be "read" or "written": by
    itself it may be right."""
    return InputError(
        f"{path.name!r:.80} cannot be {verb}: {error.strerror or error}.",
        cause=why_refused(error),
        fix="Mend that, or give another file.",
    )


def temporary_folder() -> Path:
    """Where Python makes temporary files: tried, and made anew where a system has cleared it away while a kernel lives.
    BackendUnavailable where nothing can be made in it."""
    try:
        place = Path(tempfile.gettempdir())
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise _no_temporary_file(error) from error
    if not is_utf8(place):
        raise BackendUnavailable(
            f"The temporary folder {shown(str(place))} cannot be used.",
            cause="Its name is not UTF-8, and the libraries that write there take no other.",
            fix="Set TMPDIR to another folder, then start Python again.",
        )
    return place


@contextlib.contextmanager
def full_is_told() -> Iterator[None]:
    """BackendUnavailable where what the block writes into the temporary folder finds no room."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise _no_temporary_file(error) from error
        raise


def _no_temporary_file(error: OSError) -> BackendUnavailable:
    return BackendUnavailable(
        f"No temporary file can be written: {' '.join(str(error).split()):.300}.",
        cause=why_refused(error),
        fix="Mend that, or set TMPDIR to a folder that can be written and that has room; then start Python again.",
    )


@contextlib.contextmanager
def owned_folder(prefix: str, place: Path | None = None) -> Iterator[Path]:
    """A folder of this process in that place or the temporary folder, gone after the block. What killed processes have
    left under that prefix goes first: one that is at work holds the lock in its folder, or is about to take it."""
    import filelock

    told = contextlib.nullcontext() if place else full_is_told()  # of a place that is given, its owner tells
    place = place or temporary_folder()
    for left in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError, filelock.Timeout):  # another user's, gone meanwhile, or in use
            if is_left_behind(left):
                with filelock.FileLock(left / ".lock", timeout=0):
                    shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as folder,
        filelock.FileLock(f"{folder}/.lock"),
        told,
    ):
        yield Path(folder)


def resolved(path: Path) -> Path:
    """Path.resolve, which before Python 3.13 has an error of its own for a link that leads to itself."""
    return Path(os.path.realpath(path))


def is_utf8(path: Path) -> bool:
    """Whether the path has a text that all libraries take; on Linux a name may be any bytes."""
    return not re.search("[\ud800-\udfff]", str(path))


def is_one_word(path: str) -> bool:
    """Whether a command line can hold the path without quotes."""
    return not re.search(r"""[\s'"\\]""", path)


def lets_programs_run(folder: Path) -> bool:
    """False for a folder that is mounted with noexec: no library can be loaded from there."""
    return not (hasattr(os, "statvfs") and os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))


def compilers_folder(first: Path) -> Path | None:
    """The first of some folders that a C++ compiler can work in: torch gives it paths in one line, where a space cuts
    them, and what is compiled there is run there."""

    def suits(place: Path) -> bool:
        return is_one_word(str(place)) and os.access(place, os.W_OK) and lets_programs_run(place)

    if suits(first):  # where it does, the others need not be there
        return first
    return next(filter(suits, (temporary_folder(), Path("/tmp"), Path("/var/tmp"))), None)


def is_left_behind(path: Path) -> bool:
    """Whether something temporary is older than the moment in which its maker takes its lock, or is done."""
    return time.time() - path.stat().st_mtime > 60


def user_id() -> str:
    """The user's number, for what each user keeps apart; "" on Windows, where a folder is rarely shared."""
    return str(os.getuid()) if hasattr(os, "getuid") else ""


def _names(variable: str) -> list[str]:
    return [name for name in os.environ.get(variable, "").split(os.pathsep) if name]


def _listed(variable: str) -> list[Path]:
    return [expanded(name, variable) for name in _names(variable)]


def expanded(name: str | Path, variable: str) -> Path:
    """The whole path of a folder that a variable names; StoreError for one under nobody's home, and for a relative one:
    a notebook works in another folder than the terminal that it was started from."""
    try:
        path = Path(name).expanduser()
        if not path.is_absolute():
            raise StoreError(
                f"{variable} names {name}, which is another folder for a terminal than for a notebook.",
                cause="A relative path begins in the folder that a process works in.",
                fix=f"Give the whole path: export {variable}={shlex.quote(str(path.absolute()))}",
            )
        return path
    except (OSError, RuntimeError) as error:  # OSError: the working folder is gone
        raise StoreError(
            f"The path {name} cannot be: {error}",
            cause=f"{variable} names it, with a user that is not here, or from a working folder that is gone.",
            fix=f"Set {variable} to a whole path that is there.",
        ) from error


def _made(content: str, name: str, default: Path, variable: str) -> Path:
    folder = expanded(name or default, variable)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The folder of {content} cannot be made: {error}.",
            cause=f"{variable} names it. {why_refused(error)}" if name else why_refused(error),
            fix=f"Set {variable} to a folder that you can write.",
        ) from error
    return folder
