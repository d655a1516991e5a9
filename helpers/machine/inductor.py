"""Where PyTorch's compiler works. It gives paths to the C++ compiler in one line, where a space would cut them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

from helpers.errors import BackendUnavailable
from helpers.machine import hardware
from helpers.paths import compilers_folder, is_one_word, temporary_folder

# Held while a module is exported or compiled in this process: torch.export keeps what it traces, and the course what it
# changes in torch meanwhile, for all threads at once.
one_thread = threading.RLock()


def prepare_inductor() -> Path:
    """Let torch's compiler work in this process, whatever has a space in its path. Returns the folder for what it
    writes: TORCHINDUCTOR_CACHE_DIR or torch's own choice, if that has no space and lets programs run."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    if (place := compilers_folder(folder)) not in (folder, None):
        folder = place / folder.name
        folder.mkdir(exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    with contextlib.suppress(BackendUnavailable):  # a GPU's kernels may need none
        config.cpp.cxx = (None, hardware.compiler())  # torch's own choice is CXX, whatever it names
    if not is_one_word(str(temporary_folder())):
        config.cpp_cache_precompile_headers = False  # they would be compiled there
    _link_libraries()
    return folder


@cache
def _link_libraries() -> None:
    """torch's libraries lie in the environment. Where its path has a space, they get a link
    (https://github.com/pytorch/pytorch/issues/191010)."""
    from torch._inductor.cpp_builder import BuildOptionsBase

    def without_spaces(options: Any) -> list[str]:
        return [path if is_one_word(path) else _link_to(path) for path in plain(options)]

    plain = BuildOptionsBase.get_libraries_dirs
    BuildOptionsBase.get_libraries_dirs = without_spaces  # type: ignore[assignment,method-assign]


def _link_to(path: str) -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    link = Path(cache_dir()) / f"lib-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)
    return str(link)
