"""A compiled graph from its .pt2 file into this process, without importing the compiler (that alone would take seconds
and 100 MB).

A .pt2 file is a ZIP archive, and the system loads a library only from a file of its own. So the library is unpacked
into a temporary folder, which goes as soon as it is in memory; what a killed process left goes with the next load.

What has been loaded stays mapped for good, because a C++ library with unique symbols cannot be unloaded. So a graph
that an engine has given back, or that was forgotten with its engine, is kept, and the next engine from the same file
takes it instead of loading another copy.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import weakref
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from helpers.errors import BackendUnavailable, CourseError, EngineCorrupt, out_of_memory, why_refused
from helpers.paths import lets_programs_run, owned_folder

_idle: defaultdict[tuple[Any, ...], list[Any]] = defaultdict(list)  # loaded graphs without an engine, by their file


class Graph:
    """One compiled graph. Its library belongs to this object alone, until `close` or the object's end."""

    def __init__(self, path: Path, device: str):
        status = path.stat()
        idle = _idle[str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns]
        try:
            library = idle.pop()
        except IndexError:
            library = _load(path, device)
        self.run = library.run  # (tensors in the order of the graph's inputs) -> its outputs
        self._give_back = weakref.finalize(self, idle.append, library)

    def close(self) -> None:
        self.run = None
        self._give_back()  # only the first call does something


def _load(path: Path, device: str) -> Any:
    if device == "cuda":
        # torch's own loader unpacks too, and cleans up when it ends: the GPU's kernels are read when they first run.
        # It is told to run single-threaded, which a CUDA graph asks for, and the class used below cannot be.
        try:
            return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        except RuntimeError as error:
            raise _explain(path, Path(tempfile.gettempdir()), error) from error
    try:
        with owned_folder("aot-engine-") as folder:
            try:
                with zipfile.ZipFile(path) as archive:
                    for entry in archive.infolist():
                        if not entry.filename.endswith(".cpp"):
                            (folder / Path(entry.filename).name).write_bytes(archive.read(entry))
                (library,) = folder.glob("*.so")
                return torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
            except (RuntimeError, OSError, ValueError, zipfile.BadZipFile) as error:
                refused = isinstance(error, OSError) and error.errno != errno.ENOSPC
                raise _explain(path, None if refused else folder, error) from error
    except OSError as error:  # of the folder itself
        raise _explain(path, None, error) from error


def _explain(path: Path, folder: Path | None, error: Exception) -> CourseError:
    """Why a graph cannot be loaded: told by what the temporary folder can do, before the words of the error."""
    if explained := out_of_memory(error):
        return explained
    many = os.strerror(errno.EMFILE).lower() in str(error).lower()  # the linker has it in words alone
    fix = "Set TMPDIR to a folder that can be written, has room and allows programs to run; then start Python again."
    if folder is None or many:
        return BackendUnavailable(
            f"The compiled graph {path.name} cannot be unpacked: {error}.",
            cause=why_refused(error),
            fix="Close engines, or allow more: ulimit -n 4096, in the terminal that starts Python." if many else fix,
        )
    what = f"The compiled graph {path.name} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if "cannot open shared object file: No such file" in str(error):
        return BackendUnavailable(
            what,
            cause="The engine is sound; a library that its compiler links with is not on this machine.",
            fix="Install the package of that library (libomp5 for libomp.so.5), or name its folder in LD_LIBRARY_PATH.",
        )
    if re.search(r"version `(GLIBC|GLIBCXX|CXXABI)_[\d.]+' not found", str(error)):
        return BackendUnavailable(
            what,
            cause="The engine is sound; this process has loaded an older C++ library than the compiler's.",
            fix="Unset LD_LIBRARY_PATH, or take from it the folder that is named above; then start Python again.",
        )
    if "static tls" in str(error).lower():
        return BackendUnavailable(
            what,
            cause="Libraries that were loaded before take all room that the loader has for their threads' own data.",
            fix="Start Python again, and load the engine before other libraries.",
        )
    room, runs = shutil.disk_usage(folder).free, lets_programs_run(folder)
    if not runs or room < 2 * path.stat().st_size:
        lacks = f"has {room / 1e6:.1f} MB free" if runs else "lets no program run (noexec)"
        return BackendUnavailable(
            f"The compiled graph {path.name} cannot be loaded: the temporary folder {folder.parent} {lacks}.",
            cause="The engine is sound; its compiled code is unpacked there to be loaded.",
            fix=fix,
        )
    return EngineCorrupt(
        what,
        cause="It was built with another version of torch, or on another machine.",
        fix="Remove the engine and build it again.",
    )
