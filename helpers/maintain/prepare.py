"""What a room without a network needs, in one folder: packages, engines, the real model. `make run OFFLINE=FOLDER`, and
lab, test and setup, take everything from there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import store
from helpers.errors import CourseError
from helpers.maintain import notebooks
from helpers.paths import PROJECT, read_toml

EXTRAS = ("test", "browser")  # those that the Makefile installs


def prepare(out: Path, *, python: str = "", engines: bool = True) -> None:
    """Fill the folder `out`; what is there already is kept, so that a second call goes on where the first one ended.

    python: of the version that learners have, this one if "".
    engines: also those that the notebooks build, by running them once. They are found on machines like this one.
    """
    from helpers.engine import identity
    from helpers.model.checkpoint import find_checkpoint
    from helpers.recipe import BuildRecipe

    out = out.absolute()
    model = find_checkpoint("smollm2").folder  # first, because its error says how to get it
    out.mkdir(parents=True, exist_ok=True)
    wheels(out / "wheels", PROJECT, python=python)
    shutil.copytree(model, out / "models/smollm2", dirs_exist_ok=True)
    if not engines:
        return
    recipe = BuildRecipe()
    # Its engine's name says all that an engine is found by: processor, cores, compiler, versions.
    done = out / "build" / store.name_of(recipe.short_name, identity(recipe, find_checkpoint(recipe.model)))
    done.mkdir(parents=True, exist_ok=True)
    for source in notebooks.select(notebooks.NOTEBOOKS):
        executed = done / source.name
        newer = executed.exists() and executed.stat().st_mtime > source.stat().st_mtime
        newer = newer and any((out / "engines").glob(f"*/{store.MANIFEST}"))
        if not (newer and notebooks.judge(notebooks.read(executed), source.stem).ok):
            command = [sys.executable, "-m", "helpers", "run", source.stem, "--out", str(executed.parent)]
            _run(command, f"{source.stem} did not run.", COURSE_ENGINES=str(out / "engines"))


def wheels(folder: Path, project: Path, *, python: str = "") -> None:
    """Download what `make setup` installs: the requirements, the tests' too, in the versions of constraints/."""
    described = read_toml(project / "pyproject.toml")
    required = [
        *described["build-system"]["requires"],
        *described["project"].get("dependencies", []),
        *(name for extra in EXTRAS for name in described["project"]["optional-dependencies"].get(extra, [])),
    ]
    # `wheel` and not `download`: what comes as sources becomes a wheel here, because its build would want a network.
    command = [python or sys.executable, "-m", "pip", "wheel", "--wheel-dir", str(folder), *required]
    _run([*command, "--constraint", str(project / "constraints/course.txt")], "The packages could not be downloaded.")


def _run(command: list[str], what: str, **variables: str) -> None:
    try:
        done = subprocess.run(command, env={**os.environ, **variables}, check=False)
    except OSError as error:
        raise CourseError(what, cause=str(error), fix="Name a Python that is there: --python python3.12") from error
    if done.returncode:
        raise CourseError(what, cause=f"{' '.join(command[:4])} ended with {done.returncode}.", fix="See above.")
