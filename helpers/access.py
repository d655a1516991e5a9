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
    if os.name != "posix" or PACKAGE.stat().st_mode & stat.S_IWOTH:
        return  # where anybody can change this very code, as on a disk without modes, the check would guard nothing
    entry, engine = folder.absolute(), folder.resolve()
    store = entry.parent
    if store.resolve() in trusted_folders():
        return
    owners = {0, os.geteuid()}
    if store.resolve() in [named.resolve() for named in engines_folders()]:
        owners.add(store.stat().st_uid)
    for path in (entry, engine, *engine.rglob("*")):
        info = path.lstat()
        if info.st_uid not in owners:
            raise StoreError(
                f"Engine {folder.name!r} is not loaded: it belongs to another user, {user_name(info.st_uid)}.",
                cause="An engine is native code, which could do all that you may do.",
                fix=f"If you trust everybody who can write to {store}: {_trust(store)}",
            )
        if not path.is_symlink() and _others_write(info, owners):
            raise _open_to_others(folder, path, info, f"chmod -R go-w {shlex.quote(str(engine))}")
    for path in dict.fromkeys((*entry.parents, *engine.parents)):
        info = path.stat()  # in a sticky folder, nobody moves what belongs to others
        if not info.st_mode & stat.S_ISVTX and _others_write(info, owners):
            raise _open_to_others(folder, path, info, f"chmod +t {shlex.quote(str(path))}")


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


def _open_to_others(folder: Path, path: Path, info: os.stat_result, mend: str) -> StoreError:
    mine = os.geteuid() in (0, info.st_uid)
    return StoreError(
        f"Engine {folder.name!r} is not loaded: others may write to {path}.",
        cause="An engine is native code, and they could put theirs in its place. Of a disk without modes (NTFS) this "
        f"is always said; if nobody else writes there: {_trust(folder.absolute().parent)}",
        fix=mend if mine else f"Ask {user_name(info.st_uid)}, who owns it, for this: {mend}",
    )
