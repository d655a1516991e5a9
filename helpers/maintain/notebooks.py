"""Run the notebooks from top to bottom, as a learner would, and say honestly what ran.

Every code cell either runs or is listed as skipped, with its reason; anything else is an error. A cell is
skipped in one of two ways:
- it calls `skip("needs an NVIDIA GPU")` when it finds that it cannot do its work on this machine;
- it has the tag `skip-execution` (it is never run) and a `skip_reason` in its metadata.
A cell with the tag `raises-exception` must raise: a failure that is shown on purpose has to keep failing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.course import learner
from helpers.display import Table
from helpers.errors import InputError
from helpers.maintain import site
from helpers.messages import ESCAPES
from helpers.paths import PROJECT, read_text, refused

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = PROJECT / "notebooks"
CELL_TIMEOUT_S = 600
MOST_PRINTED = 10_000_000  # characters of a cell; a loop that prints without end would fill the memory


@dataclass
class NotebookResult:
    """What happened in one notebook. Cells are numbered as code cells, from 1."""

    name: str
    seconds: float = 0.0
    cells_run: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)  # (cell, reason)
    problems: list[str] = field(default_factory=list)
    cell_seconds: dict[int, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


def read(path: Path) -> NotebookNode:
    """A notebook from its file. Raises InputError for whatever is no notebook."""
    import nbformat

    try:
        text = read_text(path)
        content = json.loads(text)
        if content["nbformat"] != 4 or not isinstance(content["nbformat_minor"], int):
            raise ValueError(f"its format is {content['nbformat']}.{content['nbformat_minor']}, not 4")
        nbformat.validate(content)  # nbformat.reads only logs what is wrong, and fails later in all kinds of ways
        nb = nbformat.reads(text, as_version=4)
        nbformat.writes(nb).encode()  # half of a surrogate pair can be read, but not written
    except OSError as error:
        raise refused(path, "read", error) from error
    except (ValueError, TypeError, LookupError, RecursionError, nbformat.ValidationError) as error:
        raise InputError(
            f"{path.name} is not a notebook ({type(error).__name__}: {str(error).partition(chr(10))[0]:.200}).",
            cause="It was cut, or edited as text.",
            fix=_whole_again(path),
        ) from error
    return nb


def _whole_again(path: Path) -> str:
    """How to come by the whole file again: the course's own from git, a learner's copy from the course."""
    folder = path.absolute().parent
    if folder == NOTEBOOKS:
        return (
            f"Take it from git again: git -C {shlex.quote(str(PROJECT))} checkout -- notebooks/{shlex.quote(path.name)}"
        )
    if folder == learner.work_folder() and (NOTEBOOKS / path.name).exists():
        return f"Take a fresh copy; yours stays beside it: helpers course reset {path.stem}"
    return "Ask for the whole file again."


def write(nb: NotebookNode, path: Path) -> None:
    """The whole file or none of it."""
    import nbformat

    partial = path.with_name(f".{path.name}.partial")
    try:
        nbformat.write(nb, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# Judging: pure functions of a notebook, so that the tests also apply them to the committed files.


def code_cells(nb: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """The code cells that hold something, numbered from 1 as a reader counts them."""
    cells = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    return list(enumerate(cells, start=1))


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def judge(nb: NotebookNode, name: str) -> NotebookResult:
    """Count what ran and what was skipped, and name every cell that did neither or did it wrongly."""
    result = NotebookResult(name)
    untouched = []
    for number, cell in code_cells(nb):
        errors = [out for out in cell.outputs if out.output_type == "error"]
        reasons = [str(out.metadata["skipped"]) for out in cell.outputs if "skipped" in out.get("metadata", {})]
        expected = "raises-exception" in tags(cell)
        if "skip-execution" in tags(cell):
            reason = str(cell.metadata.get("skip_reason", "")).strip()
            if reason:
                result.skipped.append((number, reason))
            else:
                result.problems.append(f"cell {number} has the tag skip-execution but no skip_reason in its metadata")
        elif cell.execution_count is None:
            untouched.append(number)
        elif errors and not expected:
            result.problems.append(f"cell {number} failed: {errors[0].ename}: {errors[0].evalue:.1000}")
        elif expected and not errors and not reasons:
            result.problems.append(f"cell {number} has the tag raises-exception but raised nothing")
        elif reasons:
            result.skipped.append((number, "; ".join(reasons)))
        else:
            result.cells_run += 1
    if untouched:
        numbers = ", ".join(map(str, untouched))
        result.problems.append(f"neither run nor listed as skipped: cell {numbers}")
    return result


# Tidying: what is written must say nothing about the machine beyond what a cell prints on purpose.


def tidy(nb: NotebookNode) -> None:
    """Take this machine's paths and versions out of the metadata and outputs, and make widgets static."""
    nb.metadata.pop("widgets", None)
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.metadata["language_info"] = {"name": "python"}
    for _, cell in code_cells(nb):
        cell.metadata.pop("execution", None)
        cell.outputs = [scrub(out) for out in map(static, merged(cell.outputs)) if out is not None]


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """A cell's outputs with each stream's text in one piece, as a terminal would show it.

    nbclient's own coalesce_streams takes hours for a line of a megabyte: its pattern is quadratic.
    """
    parts: dict[str, list[str]] = {}
    for output in outputs:
        if output.output_type == "stream":
            parts.setdefault(output.name, []).append(output.text)
    result: list[NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            result.append(output)
        elif texts := parts.pop(output.name, None):
            lines = "".join(texts).split("\n")
            output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)  # "\r" begins a line anew
            late = output.name == "stdout" and result and result[-1].get("name") == "stderr"  # they come in any order
            result.insert(len(result) - 1 if late else len(result), output)
    return result


def static(output: NotebookNode) -> NotebookNode | None:
    """A widget as a page without a kernel can show it: its picture or table if it has one, else a note. None for what
    shows nothing, such as a progress that has vanished."""
    data = output.get("data", {})
    if output.output_type == "display_data" and not any(data.values()):
        return None
    if data.pop("application/vnd.jupyter.widget-view+json", None) is None:
        return output
    if set(data) <= {"text/plain"}:
        text = data.get("text/plain", "")
        if re.search(r"\d%\||\dit \[", text):  # tqdm's bar, stopped at its first state
            return None
        data["text/plain"] = "(A widget: run this cell in JupyterLab to use it.)"
    return output


def scrub(value: Any) -> Any:
    """Replace this machine's folders in all texts of an output, and take a terminal's colours out, which nbconvert
    takes hours for where there are many; pictures are left as they are."""
    if isinstance(value, str):
        value = ESCAPES.sub("", value).replace("\x1b", "")
        folders = _folders()
        # The innermost first, and all in one pass: "~/tmp" is no temporary folder. /home/ann, but not /home/anna
        # or http://home/ann.
        names = "|".join(re.escape(name) for name in sorted(folders, key=len, reverse=True))
        cell = re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py"
        pattern = rf"(?<!:/)(?<![\w.~-])(?:(?P<cell>{cell})|(?P<folder>{names})(?P<inside>/|(?![\w.-])))"

        def stand_in(match: re.Match[str]) -> str:
            return "<cell>" if match["cell"] else folders[match["folder"]] or ("" if match["inside"] else ".")

        return re.sub(pattern, stand_in, value)
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if isinstance(value, dict):
        changed = {k: v if k.startswith("image/") else scrub(v) for k, v in value.items()}
        if "text/html" in changed:
            changed["text/html"] = re.sub(r"<(python|tmp|cell)>", r"&lt;\1&gt;", changed["text/html"])
        return type(value)(changed)  # a NotebookNode stays one
    return value


def _folders() -> dict[str, str]:
    """The folders of this machine that outputs may name, and what stands for each; paths inside the course become
    relative to it."""
    python, base = Path(sys.prefix), Path(sys.base_prefix)
    stand_ins = {
        Path(os.path.expanduser("~")): "~/",  # noqa: PTH111  (Path.home() fails where there is none)
        Path(tempfile.gettempdir()): "<tmp>/",
        Path(sysconfig.get_paths()["stdlib"]): "<python>/lib/",
        PROJECT: "",
    }
    if python != base or (python / "conda-meta").is_dir():  # not /usr, where other programs are too
        stand_ins[python] = "<python>/"
    # HOME and TMPDIR may be anything. "/", "/x" or a relative path stand in texts that are no paths.
    usable = {folder: text for folder, text in stand_ins.items() if folder.is_absolute() and len(folder.name) > 1}
    return {str(name): text for folder, text in usable.items() for name in (folder.resolve(), folder)}


# Running


def clear(nb: NotebookNode) -> None:
    """Take out what an earlier run left: it must not pass for this one's."""
    for _, cell in code_cells(nb):
        cell.execution_count = None
        if "skip-execution" not in tags(cell):
            cell.outputs = []


def run_notebook(
    source: Path, *, timeout: int = CELL_TIMEOUT_S, go_on: bool = False
) -> tuple[NotebookNode, NotebookResult]:
    """Execute one notebook in a fresh kernel, in its own folder, and judge it. go_on: also after a cell that fails."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    nb = read(source)
    clear(nb)
    started = time.perf_counter()
    broken = ""
    progress = _Progress(nb)

    class Client(NotebookClient):
        def output(self, outs: list[NotebookNode], msg: dict[str, Any], *more: Any) -> NotebookNode | None:
            content = msg["content"]
            left = max(0, MOST_PRINTED - progress.printed[progress.cell])
            progress.printed[progress.cell] += len(content.get("text") or str(content.get("data", "")))
            if not left:
                return None
            if text := content.get("text"):  # of a stream
                content["text"] = text[:left]
            return super().output(outs, msg, *more)

    client = Client(
        nb,
        timeout=timeout,
        allow_errors=go_on,
        startup_timeout=120,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # a fresh kernel's warnings are about the kernel, not the course
        resources={"metadata": {"path": str(source.parent)}},
        record_timing=False,
        on_notebook_start=_interruptible,
        on_cell_execute=progress.start,
        on_cell_executed=progress.end,
    )
    try:
        client.execute()
    except CellExecutionError:
        pass  # the cell holds the error; judge() reports it
    except Exception as error:  # a dead kernel, a timeout: the notebook does not show it
        # a timeout's message goes on to print the cell
        broken = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(flush=True)
    seconds = time.perf_counter() - started

    result = judge(nb, source.stem)
    result.seconds, result.cell_seconds = seconds, progress.seconds
    for number, printed in progress.printed.items():
        if printed > MOST_PRINTED:
            result.problems.append(f"cell {number} printed more than {MOST_PRINTED:,} characters; the rest is left out")
    if broken:
        where = f"in cell {progress.cell}" if progress.cell else "before the first cell"
        result.problems.insert(0, f"broke off {where}: {broken}")
    tidy(nb)
    return nb, result


def _interruptible(**_: Any) -> None:
    """Let Ctrl-C and SIGTERM (a time limit, docker stop) end the run: nbclient's own handler for both stops the kernel
    alone, and the next notebook would follow."""
    import asyncio
    import signal

    if sys.platform != "win32":
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)


class _Progress:
    """One line per cell: begun when the cell begins, ended with its seconds."""

    def __init__(self, nb: NotebookNode):
        self.numbers = {id(cell): number for number, cell in code_cells(nb)}
        self.cell = 0  # the one that runs now, or ran last
        self.began = 0.0
        self.printed: Counter[int] = Counter()  # characters, by cell
        self.seconds: dict[int, float] = {}  # by cell

    def start(self, cell: NotebookNode, **_: Any) -> None:
        self.cell, self.began = self.numbers[id(cell)], time.perf_counter()
        print(f"  cell {self.cell:3d} of {len(self.numbers)} ", end="", flush=True)

    def end(self, **_: Any) -> None:
        self.seconds[self.cell] = time.perf_counter() - self.began
        print(f"{self.seconds[self.cell]:7.1f} s", flush=True)


def select(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The notebooks in reading order; `only` names some of them, whole or by their beginning ("03")."""
    every = sorted(folder.glob("*.ipynb"))
    if not only:
        return every
    named: set[Path] = set()
    for name in only:
        # A whole name names one, though a copy of it lies beside.
        found = {path for path in every if path.stem == name} or {p for p in every if p.stem.startswith(name)}
        named |= found
        if not found:
            known = ", ".join(path.stem for path in every) or f"none: {folder.name}/ is empty"
            raise InputError(f"There is no notebook named {name!r}.", fix=f"Name one of these: {known}.")
    return sorted(named)


def run_all(
    out: Path, only: Sequence[str] = (), *, folder: Path = NOTEBOOKS, update: bool = False
) -> list[NotebookResult]:
    """Run the notebooks; write each, executed, to `out`, and back to `folder` if asked to. All become a web site in
    `out`/site, those that did not run now as they were committed."""
    if out.resolve() in (folder.resolve(), learner.work_folder().resolve()):
        raise InputError(
            f"{out} holds notebooks to work in.",
            cause="What ran would be written over them, also where a cell failed.",
            fix="Give --out another folder; --update writes what ran well back.",
        )
    site.check_replaceable(out / "site")
    out.mkdir(parents=True, exist_ok=True)
    results, pages = [], {}
    for source in select(folder, only):
        print(source.stem, flush=True)
        try:
            nb, result = run_notebook(source)
            write(nb, out / source.name)
            pages[source.stem] = site.convert(source.stem, nb)
            if update and result.ok:
                write(nb, source)
        except Exception as error:  # whatever is wrong with this notebook, the next one runs
            words = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            result = NotebookResult(source.stem, problems=[words])
        results.append(result)
    ran = {result.name for result in results}
    for source in select(folder):
        if source.stem not in ran:
            pages[source.stem] = site.convert(source.stem, read(source))
    site.write_site([pages[name] for name in sorted(pages)], out / "site")
    return results


# Reporting


def table(results: list[NotebookResult]) -> Table:
    """A row for each notebook, and one for all."""

    def row(name: str, some: list[NotebookResult], why: str) -> tuple[Any, ...]:
        minutes = f"{sum(r.seconds for r in some) / 60:.1f}"
        run, skipped = sum(r.cells_run for r in some), sum(len(r.skipped) for r in some)
        return name, minutes, run, skipped, "ok" if all_ok(some) else "FAILED", why

    rows = [row(r.name, [r], "; ".join(grouped(r.skipped))) for r in results]
    columns = ("notebook", "minutes", "run", "skipped", "status", "why skipped")
    return Table("Code cells of the notebooks", columns, [*rows, row("all", results, "")])


def all_ok(results: list[NotebookResult]) -> bool:
    """Whether every cell ran or was listed as skipped, and there was one."""
    return bool(results) and all(result.ok for result in results)


def grouped(skipped: list[tuple[int, str]]) -> Iterator[str]:
    """ "needs an NVIDIA GPU (cells 4, 7)", each reason once."""
    for reason in dict.fromkeys(reason for _, reason in skipped):
        cells = [str(cell) for cell, other in skipped if other == reason]
        yield f"{reason} (cell{'s' if len(cells) > 1 else ''} {', '.join(cells)})"
