"""What a binary file says about the hardware that it was compiled for."""

from __future__ import annotations

import mmap
import re
import shutil
import struct
import zipfile
from collections import Counter
from pathlib import Path

from helpers.errors import BackendUnavailable, InputError
from helpers.machine import commands
from helpers.paths import named, owned_folder, refused

# The names of registers, widest first, with how many bits they have.
REGISTERS = {
    r"%zmm\d": "zmm (512 bits, AVX-512)",
    r"%ymm\d": "ymm (256 bits, AVX2)",
    r"%xmm\d": "xmm (128 bits, SSE)",
    r"\bz\d+\.[bhsd]": "z (SVE)",
    r"\bv\d+\.\d+[bhsd]": "v (128 bits, NEON)",
}
# A GPU's machine code is an ELF file of machine 190, wherever it lies in a package. Its flags, 48 bytes in, name the
# compute capability: in the lowest byte, and since ABI version 8 in the second (LLVM's BinaryFormat/ELF.h).
CUBIN = re.compile(rb"\x7fELF\x02\x01.{2}(.).{9}\xbe\x00.{28}(.{4})", re.DOTALL)
# TensorRT for RTX finishes its kernels on the GPU, and writes into a plan for which GPUs: "sm86", or the least one.
PLAN = re.compile(rb"accelerators=\{([\w ]*)\}")


def compiled_for(file: Path) -> Counter[str]:
    """Of a file with GPU code, the compute capabilities that it is for, such as "8.6", with the number of kernels (a
    plan of TensorRT for RTX has none yet, and counts 1); of another, what `vector_registers` says of its libraries.

    file: a library, a .pt2 package (a ZIP archive that is not compressed), a cubin, or a plan.
    """
    file = named(file)
    try:
        if not file.is_file() or not file.stat().st_size:
            fix = "Give one file, such as folder / 'decode_b1.pt2'."
            raise InputError(f"{file.name!r} is empty, or no file.", fix=fix)
        file.open("rb").close()
    except OSError as error:
        raise refused(file, "read", error) from error
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        numbers = [_capability(match[1], match[2]) for match in CUBIN.finditer(content)]
        for match in PLAN.finditer(content):
            numbers += [int(name.removeprefix("sm")) for name in match[1].decode().split()]
    if numbers:
        return Counter(f"{number // 10}.{number % 10}" for number in numbers)
    if not zipfile.is_zipfile(file):
        return vector_registers(file)
    with zipfile.ZipFile(file) as archive, owned_folder("course-binary-") as folder:
        libraries = [archive.extract(name, folder) for name in archive.namelist() if name.endswith(".so")]
        return sum((vector_registers(Path(library)) for library in libraries), Counter())


def _capability(abi: bytes, flags: bytes) -> int:
    """Ten times the major number, and the minor one."""
    return struct.unpack("<I", flags)[0] >> (8 if abi[0] >= 8 else 0) & 0xFF


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
    if done.returncode == commands.TOO_SLOW:
        raise InputError(
            f"{library.name} has too much machine code: {Path(tool).name} was stopped.",
            cause=f"{done.stderr[:1].upper()}{done.stderr[1:]}.",
            fix="Ask about a smaller one, such as an engine's.",
        )
    if done.returncode:
        raise InputError(f"{library.name} holds no machine code that {Path(tool).name} can read.")
    counts: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        for pattern, name in REGISTERS.items():
            if re.search(pattern, line):
                counts[name] += 1
                break
    return counts
