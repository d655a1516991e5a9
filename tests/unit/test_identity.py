"""What decides what an engine is, is in its identity: the code that builds it too."""

import ast
import importlib
from pathlib import Path

import pytest

from helpers.backends import job
from helpers.errors import BackendUnavailable
from helpers.paths import PROJECT

# What of these rooms works when an engine runs, checks what was asked for, or tells of the build.
ELSEWHERE = {
    *("answers", "base", "remote", "job", "report", "prompts", "sampling", "tokenizer", "chat", "recipe", "options"),
    "__init__",
}


def imported(path: Path) -> set[Path]:
    """The course's own files that a file imports from the rooms of models, recipes and backends."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    rooms = ("helpers.model.", "helpers.recipe.", "helpers.backends.")
    files = {PROJECT / f"{name.replace('.', '/')}.py" for name in names if name and name.startswith(rooms)}
    return {file for file in files if file.exists() and file.stem not in ELSEWHERE}


@pytest.mark.parametrize("backend", ["aot", "tensorrt", "tensorrt_llm"])
def test_a_change_in_whatever_code_a_build_runs_makes_another_engine(backend, monkeypatch):
    sources = importlib.import_module(f"helpers.backends.{backend}.backend").SOURCES
    paths = [PROJECT / "helpers" / name for name in sources]
    covered = {file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])}
    for file in covered:
        others = {path for path in imported(file) if backend != "tensorrt_llm" or "tensorrt" != path.parent.name}
        assert others <= covered, f"{file.name} imports {sorted(path.name for path in others - covered)}"
    before = job.source_digest(*sources)
    assert before == job.source_digest(*sources)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")  # it reads the configuration
    assert job.source_digest(*sources) != before


def test_an_editors_hidden_files_are_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PROJECT", tmp_path)
    (folder := tmp_path / "helpers/part").mkdir(parents=True)
    (folder / "code.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(job, "_RUNNING", {folder / "code.py": hash(b"x = 1\n")})
    before = job.source_digest("part")
    (folder / "._code.py").write_bytes(b"\0")  # macOS, on a disk of another system
    (folder / ".#code.py").symlink_to("me@here.7")  # Emacs: a link to nothing
    assert job.source_digest("part") == before


def test_code_that_was_changed_after_it_was_imported_builds_nothing(tmp_path, monkeypatch):
    """As by git pull under a living kernel: its engine would bear the name of the new code, and be found by that."""
    monkeypatch.setattr(job, "PROJECT", tmp_path)
    (folder := tmp_path / "helpers/part").mkdir(parents=True)
    (folder / "code.py").write_bytes(b"x = 1\n")
    monkeypatch.setattr(job, "_RUNNING", {folder / "code.py": hash(b"x = 1\n")})
    assert job.source_digest("part")
    (folder / "more.py").write_bytes(b"")
    with pytest.raises(BackendUnavailable, match="changed.*\n.*\nFix: Restart"):
        job.source_digest("part")
    (folder / "more.py").unlink()
    (folder / "code.py").write_bytes(b"x = 2\n")
    with pytest.raises(BackendUnavailable, match="changed"):
        job.source_digest("part")
