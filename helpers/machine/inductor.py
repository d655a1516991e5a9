"""Where PyTorch's compiler works. It gives paths to the C++ compiler in one line, where a space would cut them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

from helpers.errors import BackendUnavailable, CourseError
from helpers.machine import hardware
from helpers.paths import compilers_folder, engines_folder, is_one_word, read_text, temporary_folder, user_id

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
    _know_instructions()
    return folder


@cache
def _know_instructions() -> None:
    """For each kind of vector instruction, torch compiles a library and loads it in a process of its own, in every
    process that compiles: some ten seconds of a build. What was once found is remembered in the learner's own store,
    for this processor, compiler and torch. What was not found is looked for again: a full disk may have been why."""
    import torch
    from torch._inductor.cpu_vec_isa import VecISA

    def known(isa: Any, code: str) -> bool:
        asked = (code, isa.build_arch_flags(), torch.__version__, hardware.compiler_version(), hardware.instructions())
        key, memory, before = hashlib.sha256(repr(asked).encode()).hexdigest(), None, []
        with contextlib.suppress(OSError, ValueError, CourseError):  # a store that cannot be used: torch looks
            memory = engines_folder() / f".instructions-{user_id()}"
            before = read_text(memory).split()
        if key in before:
            return True
        found = check(isa, code)
        if found and memory:
            with contextlib.suppress(OSError), memory.open("a", encoding="utf-8") as file:
                file.write(f"{key}\n")
        return found

    check = VecISA.check_build
    VecISA.check_build = known  # type: ignore[assignment,method-assign]


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
