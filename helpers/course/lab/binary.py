"""What a binary file says about the hardware that it was compiled for."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

from helpers.errors import BackendUnavailable, InputError
from helpers.machine import commands

# The names of registers, widest first, with how many bits they have.
REGISTERS = {
    r"%zmm\d": "zmm (512 bits, AVX-512)",
    r"%ymm\d": "ymm (256 bits, AVX2)",
    r"%xmm\d": "xmm (128 bits, SSE)",
    r"\bz\d+\.[bhsd]": "z (SVE)",
    r"\bv\d+\.\d+[bhsd]": "v (128 bits, NEON)",
}


def vector_registers(library: Path) -> Counter[str]:
    """How many instructions of a program or library name which vector registers: each counts for its widest.

    objdump translates the machine code; it comes with the assembler that a C++ compiler needs.
    """
    tool = shutil.which("objdump") or shutil.which("llvm-objdump")
    if not tool:
        raise BackendUnavailable(
            "Machine code cannot be read here: there is no objdump.",
            cause="It belongs to the package binutils, which g++ needs and clang++ does not.",
            fix="Install it: 'apt-get install binutils'.",
        )
    done = commands.run([tool, "-d", "--no-show-raw-insn", str(library)], 120)
    if done.returncode:
        raise InputError(f"{library.name} holds no machine code that {Path(tool).name} can read.")
    counts: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        for pattern, name in REGISTERS.items():
            if re.search(pattern, line):
                counts[name] += 1
                break
    return counts
