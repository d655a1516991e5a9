"""Generated code that can be read: a kernel's loop with the model's own lines beside it."""

from __future__ import annotations

import re
import textwrap
import zipfile
from pathlib import Path

from helpers.backends.report import EngineReport, Kernel, need_report
from helpers.display import Table
from helpers.errors import EngineCorrupt, InputError, need
from helpers.store import how_to_replace

# How the generated C++ and Triton write an operation; all others are written as calls of their name.
SIGNS = {
    "add": r" \+ ",
    "sub": " - ",
    "mul": r" \* ",
    "pow": r" \* |\bpow\(",
    "square": r" \* ",
    "div": " / ",
    "mean": r"tmp_acc\w* = .*\+| / |\bsum\(",
    "sum": r"tmp_acc\w* = |\bsum\(",
    "var_mean": "welford",
    "amax": r"maximum|max_propagate|tmp_acc\w* = .*max",
    "where": "blendv|\\bwhere\\(|\\? ",
    "gt": " > ",
    "neg": r"\.neg\(\)| = -",
    "rsqrt": r"rsqrt\(|1 / std::sqrt",
    "relu": "maximum|clamp_min",
}


def without_noise(source: str) -> str:
    """A generated loop without casts of indices and namespaces: they are much of the text and say nothing."""
    source = re.sub(r"static_cast<int64_t>\((-?\w+)\)", r"\1", source)
    source = source.replace("static_cast<int64_t>", "").replace("at::vec::", "")
    return re.sub(r"\b(\d+)L\b", r"\1", source)


def beside(kernel: Kernel, report: EngineReport, code: str = "") -> Table:
    """A kernel's code, line by line, with the operation that a line computes and the model's line that asked for it.

    Both lists are in the order of the graph, so a line goes with the next operation that is written like it; what an
    earlier kernel has computed is passed over. Lines that only load, store or convert have none.
    """
    need(kernel, Kernel, "Give one of them: report.kernels[0].")
    need_report(report)
    need(code, str, "Give one of them: loops[0].")
    if not (code := code or kernel.details.get("code", "")):
        raise InputError(
            f"The report holds no code of kernel {kernel.name!r}.",
            cause="A library does its work; or the report is an engine's, whose loops lie in its folder.",
            fix="Give a kernel of kind 'generated', and of an engine one of generated_loops(folder, graph) as code.",
        )
    known = {operation.name: operation for operation in report.operations}
    waiting = [known[name] for name in kernel.fused if name in known]
    rows, last = [], 0
    for line in _loop(code):
        computed = line if re.search(r"\btmp\w* = (?!\w+_ptr\d+\[)(?!.*(loadu|tl\.load)\()", line) else ""
        after = [at for at, o in enumerate(waiting) if computed and re.search(_sign(o.op), computed)]
        last = next((at for at in after if at >= last), after[0] if after else last)
        match = waiting.pop(last) if after else None
        rows.append((line, match.op if match else "", f"{match.source}  {match.line}" if match else ""))
    return Table(f"{kernel.name}: {len(kernel.fused)} operations", ("generated", "operation", "the model's line"), rows)


def generated_loops(folder: Path, graph: str) -> list[str]:
    """The C++ loops that the compiler wrote for one graph, one kernel each, in order; for a GPU, Triton. Empty where
    there are none. Of a deep model, those of the layers that were compiled once for all.
    """
    need(folder, Path, "Give the engine's folder: build(recipe).")
    if not (file := folder / f"{graph}.pt2").is_file():
        have = ", ".join(sorted(path.stem for path in folder.glob("*.pt2"))) or "none that PyTorch compiled"
        raise InputError(f"Engine {folder.name!r} has no graph {graph!r}.", fix=f"There are: {have}.")
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".cpp")]
            programs = {name.split(".")[-2]: archive.read(name).decode() for name in names}
    except zipfile.BadZipFile as error:
        raise EngineCorrupt(
            f"{file.name} of engine {folder.name!r} cannot be read: {error}.",
            cause="The file was changed or cut after the build.",
            fix=how_to_replace(folder),
        ) from error
    # Kernels that several threads share stand one level deeper, in a parallel region.
    region = re.compile(r"\n    #pragma omp parallel.*?\n    \{\n        int tid.*?(\n.*?)\n    \}(?=\n)", re.DOTALL)
    source = region.sub(lambda match: match[1].replace("\n    ", "\n"), programs.get("kernel", ""))
    loops = [textwrap.dedent(block.split("\n    }", 1)[0]) for block in source.split("\n    {\n")[1:]]
    return loops or triton_sources(programs.get("wrapper", ""))


def triton_sources(program: str) -> list[str]:
    """The Triton source of each kernel that the C++ program of a GPU engine launches, in order. The program quotes a
    source in a comment, in the function that launches the kernel."""
    quoted = dict(re.findall(r"void (call_\w+)\([^{]*\{\s*/\*.*?'''(.*?)'''", program, re.DOTALL))
    calls = re.findall(r"^\s+(call_\w+)\(", program, re.MULTILINE)
    return [textwrap.dedent(quoted[name]) for name in calls if name in quoted]


def _sign(op: str) -> str:
    return SIGNS.get(op, rf"\b{re.escape(op.strip('_'))}\(")


def _loop(code: str) -> list[str]:
    """The lines of a kernel's loops: without what stands around every kernel, and without braces of their own."""
    lines = textwrap.dedent(without_noise(code)).splitlines()
    start = next((at for at, line in enumerate(lines) if re.search(r"\bfor ?\(|def triton_", line)), 0)
    body = [
        line for line in lines[start:] if not re.fullmatch(r"[\s{}]*|.*(C10_LIKELY|integer_div_error|#pragma).*", line)
    ]
    indent = min((len(line) - len(line.lstrip()) for line in body), default=0)
    return [line[indent:].replace("    ", " ") for line in body]
