"""Who may read what the course publishes, and whose engines are loaded. POSIX only: Windows keeps its own rules.

An engine is native code: it runs with all that you may do. So it is loaded only where nobody can have written it, or
can put another in its place, but these: you, root, and the owner of the store it lies in, since whoever set
COURSE_ENGINES chose that store. A store in COURSE_TRUSTED_ENGINES is trusted with whatever anybody left there.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path

from helpers.errors import StoreError
from helpers.paths import engines_folder, engines_folders, trusted_folders

PACKAGE = Path(__file__).parent


def open_to_readers(folder: Path) -> None:
    """Let all that lies in a new folder be read by whom the umask lets read: safetensors and tempfile make what only
    its owner reads. Nobody but the owner may write, whatever the umask says, or others would not load it."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o644
    probe.unlink()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            with contextlib.suppress(PermissionError):  # a disk that has no modes
                path.chmod(mode | 0o100 | (mode & 0o044) >> 2 if path.is_dir() else mode)


def check_trust(folder: Path) -> None:
    """StoreError if somebody whom you have not said to trust can have written an engine, or can change it now."""
    entry, engine = folder.absolute(), folder.resolve()
    store, refused = entry.parent, f"Engine {folder.name!r} is not loaded"
    if not (owners := _owners(store)):
        return
    for path in (entry, engine, *engine.rglob("*")):
        info = path.lstat()
        if info.st_uid not in owners:
            raise StoreError(
                f"{refused}: it belongs to another user, {user_name(info.st_uid)}.",
                cause="An engine is native code, which could do all that you may do.",
                fix=f"If you trust everybody who can write to {store}: {_trust(store)}",
            )
        if not path.is_symlink() and _others_write(info, owners):
            raise _open_to_others(refused, store, path, info, f"chmod -R go-w {shlex.quote(str(engine))}")
    _check_above(refused, store, (*entry.parents, *engine.parents), owners)


def check_store(store: Path) -> None:
    """StoreError if `check_trust` refuses whatever lies in a store, because others may write to it or above it."""
    if owners := _owners(store):
        entry, folder = store.absolute(), store.resolve()
        _check_above(f"No engine in {store} is loaded", store, (entry, *entry.parents, folder, *folder.parents), owners)


def origin(folder: Path) -> str:
    """Whose engine it is and where it lies, such as ", by anna, in /srv/engines"; "" for your own in your own store."""
    by = "" if os.name != "posix" or folder.stat().st_uid == os.geteuid() else f", by {user_name(folder.stat().st_uid)}"
    return by if folder.parent == engines_folder() else f"{by}, in {folder.parent}"


def user_name(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # as in a container
        return f"number {number}"


def _owners(store: Path) -> set[int]:
    """Who may write to an engine of that store; nobody where that is not asked."""
    if os.name != "posix" or PACKAGE.stat().st_mode & stat.S_IWOTH:
        return set()  # where anybody can change this very code, as on a disk without modes, it would guard nothing
    if store.resolve() in trusted_folders():
        return set()
    named = store.resolve() in [one.resolve() for one in engines_folders()]
    return {0, os.geteuid(), *([store.stat().st_uid] if named else [])}


def _check_above(refused: str, store: Path, folders: Iterable[Path], owners: set[int]) -> None:
    for path in dict.fromkeys(folders):
        info = path.stat()  # in a sticky folder, nobody moves what belongs to others
        if not info.st_mode & stat.S_ISVTX and _others_write(info, owners):
            raise _open_to_others(refused, store, path, info, f"chmod +t {shlex.quote(str(path))}")


def _others_write(info: os.stat_result, owners: set[int]) -> bool:
    """Whether the mode lets anybody write but these users. Many systems give each user a group of that user's name
    alone, and let it write. A group of which no member is known counts as others."""
    if info.st_mode & stat.S_IWOTH or not info.st_mode & stat.S_IWGRP:
        return bool(info.st_mode & stat.S_IWOTH)
    import grp
    import pwd

    try:
        group = grp.getgrgid(info.st_gid)
        members = {user.pw_uid for user in pwd.getpwall() if user.pw_gid == info.st_gid}
        members |= {pwd.getpwnam(name).pw_uid for name in group.gr_mem}
    except KeyError:
        return True
    return not members <= owners or not (members or group.gr_name == user_name(info.st_uid))


def _trust(store: Path) -> str:
    folders = os.pathsep.join(map(str, [*trusted_folders(), store.resolve()]))
    return f"export COURSE_TRUSTED_ENGINES={shlex.quote(folders)}"


def _open_to_others(refused: str, store: Path, path: Path, info: os.stat_result, mend: str) -> StoreError:
    mine = os.geteuid() in (0, info.st_uid)
    return StoreError(
        f"{refused}: others may write to {path}.",
        cause="An engine is native code, and they could put theirs in its place. Of a disk without modes (NTFS) this "
        f"is always said; if nobody else writes there: {_trust(store)}",
        fix=mend if mine else f"Ask {user_name(info.st_uid)}, who owns it, for this: {mend}",
    )
