"""What is true of every file: style, types, and what the committed notebooks may hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers.maintain import notebooks
from helpers.paths import PROJECT

COMMITTED = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
# A folder of somebody's machine, however it got into an output.
FOREIGN = re.compile(r"(?<![\w.~<>/-])(?:/(?:home|root|Users|tmp|var|opt|mnt|srv|private|workspace)/|[A-Z]:\\)")


TOOLS = {
    "ruff check": ["-m", "ruff", "check"],
    "ruff format": ["-m", "ruff", "format", "--check"],
    "mypy": ["-m", "mypy"],
    "lint-imports": ["-c", "from importlinter.cli import lint_imports_command as main; main()"],
}


def test_tools():
    """All at once: the types take longest, above all without what mypy keeps from its last run."""
    running = {
        name: subprocess.Popen(
            [sys.executable, *command], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, command in TOOLS.items()
    }
    outputs = {name: process.communicate()[0] for name, process in running.items()}
    problems = [f"{name}:\n{outputs[name]}" for name, process in running.items() if process.returncode]
    assert not problems, "\n".join(problems)


@pytest.fixture(params=COMMITTED, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def nb(path):
    return nbformat.read(path, as_version=4)


def test_code_cells_fit_on_a_screen(nb):
    long = [number for number, cell in notebooks.code_cells(nb) if len(cell.source.splitlines()) > 15]
    assert not long, f"code cells longer than 15 lines: {long}"


def test_one_title_and_it_comes_first(nb):
    prose = [re.sub(r"```.*?```", "", cell.source, flags=re.S) for cell in nb.cells if cell.cell_type == "markdown"]
    titles = [line for source in prose for line in source.splitlines() if line.startswith("# ")]
    assert len(titles) == 1, titles
    assert nb.cells[0].source.startswith(titles[0])


def test_committed_outputs_come_from_a_whole_run(nb, path):
    assert notebooks.judge(nb, path.stem).problems == []
    shown = [cell.execution_count for _, cell in notebooks.code_cells(nb) if cell.execution_count is not None]
    assert shown == list(range(1, len(shown) + 1)), "run again from the top: helpers run --update"


def test_failures_are_only_shown_where_they_are_the_subject(nb, path):
    failing = [cell for _, cell in notebooks.code_cells(nb) if any(out.output_type == "error" for out in cell.outputs)]
    assert not failing or path.stem.startswith(("05", "08"))


def test_outputs_hold_no_path_of_a_machine(nb):
    foreign = []
    for number, cell in notebooks.code_cells(nb):
        for out in cell.outputs:
            data = {kind: value for kind, value in out.get("data", {}).items() if not kind.startswith("image/")}
            texts = [out.get("text", ""), *out.get("traceback", []), *map(str, data.values())]
            texts = [re.sub(r"base64,[\w+/=]+", "", text) for text in texts]
            foreign += [(number, match[0]) for text in texts for match in FOREIGN.finditer(text)]
    assert not foreign


def test_metadata_says_nothing_of_a_machine(nb):
    assert nb.metadata.language_info == {"name": "python"}
    assert set(nb.metadata) <= {"kernelspec", "language_info"}
    assert not [cell for cell in nb.cells if "execution" in cell.metadata]


def test_size(path):
    assert path.stat().st_size <= 1_500_000
