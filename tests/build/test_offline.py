"""A room without a network: `helpers course prepare`, then `make` with OFFLINE, where no network can be reached."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers.errors import CourseError
from helpers.maintain import notebooks, prepare
from helpers.model import checkpoint
from helpers.paths import PROJECT

ALONE = ["unshare", "--map-root-user", "--net"]  # a network namespace: not even the loopback interface is up


@pytest.fixture
def project(tmp_path):
    """A project with the course's Makefile and constraints, and one small requirement for its two GB."""
    folder = tmp_path / "project"
    shutil.copytree(PROJECT / "constraints", folder / "constraints")
    shutil.copy(PROJECT / "Makefile", folder)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools==84.2.1"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "tiny"\nversion = "1"\ndependencies = ["tomli-w"]\n'
        'optional-dependencies.test = ["iniconfig"]\n'
        "[tool.setuptools]\npackages = []\n"
    )
    return folder


def make(project: Path, *words: str, alone=()) -> subprocess.CompletedProcess:
    command = [*alone, "make", f"PYTHON={sys.executable}", *words]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not those of `make test`
    return subprocess.run(command, cwd=project, env=own, capture_output=True, text=True, check=False, timeout=300)


def test_set_up_from_a_prepared_folder_without_a_network(project, tmp_path):
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace may be made here (unshare --map-root-user --net)")
    out = tmp_path / "ann's 50% stick"
    try:
        prepare.wheels(out / "wheels", project)
    except CourseError:
        pytest.skip("pip reaches no package index here")
    names = {wheel.name.partition("-")[0] for wheel in (out / "wheels").iterdir()}
    assert names >= {"setuptools", "tomli_w", "iniconfig"}
    done = make(project, "setup", f"OFFLINE={out}", alone=ALONE)
    assert done.returncode == 0, done.stderr
    python = project / ".venv/bin/python"
    assert subprocess.run([python, "-c", "import tomli_w, iniconfig"], check=False).returncode == 0
    next((out / "wheels").glob("tomli_w*")).unlink()  # and it did come from there: without the wheel it cannot
    shutil.rmtree(project / ".venv")
    assert make(project, "setup", f"OFFLINE={out}", alone=ALONE).returncode != 0


@pytest.mark.parametrize(("name", "typed"), [("out", "../out"), ("USB STICK", "../USB STICK"), ("out", "~/out")])
def test_make_uses_the_models_and_engines_of_the_prepared_folder(project, tmp_path, monkeypatch, name, typed):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("COURSE_MODELS", "COURSE_ENGINES"):
        monkeypatch.delenv(variable, raising=False)
    out = tmp_path / name
    for part in ("wheels", "engines"):
        (out / part).mkdir(parents=True)
    with (project / "Makefile").open("a") as file:
        file.write('\nshow:\n\t@echo "$$COURSE_MODELS|$$COURSE_ENGINES|$$PIP_NO_INDEX|$$HF_HUB_OFFLINE"\n')
    shown = make(project, "show", f"OFFLINE={typed}").stdout.strip()  # as a person types it, in a shell that leaves ~
    assert shown == f"{out}/models|{project}/engines:{out}/engines|1|1"
    monkeypatch.setenv("COURSE_MODELS", "/mine/models")  # what somebody has set stays
    monkeypatch.setenv("COURSE_ENGINES", "~/engines:/shared")
    shown = make(project, "show", f"OFFLINE={typed}").stdout.strip()
    assert shown == f"/mine/models|~/engines:/shared:{out}/engines|1|1"


def test_the_wheels_are_those_that_set_up_installs():
    assert f"-e '.[{','.join(prepare.EXTRAS)}]'" in (PROJECT / "Makefile").read_text(encoding="utf-8")


def test_a_folder_that_was_not_prepared_is_named_with_the_command_that_does(project):
    done = make(project, "setup", "OFFLINE=nowhere")
    assert done.returncode and 'helpers course prepare "nowhere"' in done.stderr
    assert not (project / ".venv").exists()


def test_a_python_that_is_named_is_the_environments_or_refused(project):
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/python").symlink_to(sys.executable)
    (project / ".venv/.set-up").touch()
    other = project / "other"
    other.write_text("#!/bin/sh\necho 3 99\n")
    other.chmod(0o755)
    assert make(project, "setup").returncode == 0
    refused = make(project, "setup", f"PYTHON={other}")  # make takes the last one
    assert refused.returncode and "make clean" in refused.stdout


def test_a_set_up_that_was_interrupted_before_pip_was_there_goes_on(project):
    python, log = project / ".venv/bin/python", project / "log"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in\n'
        f'*"import pip"*) exit 1;;\n*version_info*) exec {sys.executable} "$@";;\nesac\n'
    )
    python.chmod(0o755)
    assert make(project, "setup").returncode == 0
    words = log.read_text()
    assert words.index("-m ensurepip") < words.index("-m pip install") and (project / ".venv/.set-up").exists()


def test_make_passes_on_how_many_steps_of_the_gpu_check_run_at_a_time(project):
    assert "--jobs '12'" in make(project, "--dry-run", "gpu-check", "JOBS=12").stdout


def test_what_cannot_be_downloaded_is_an_error_of_ours(project, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CourseError, match="could not be downloaded"):
        prepare.wheels(tmp_path / "wheels", project)
    with pytest.raises(CourseError, match="could not be downloaded.*\n.*pythonx"):
        prepare.wheels(tmp_path / "wheels", project, python="pythonx")


def test_nothing_is_begun_without_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "wheels", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setenv("COURSE_MODELS", str(tmp_path / "none"))
    with pytest.raises(CourseError, match="helpers model get smollm2"):
        prepare.prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_call_goes_on_with_the_notebook_that_did_not_run(tmp_path, monkeypatch):
    names, ran = [path.stem for path in notebooks.select(notebooks.NOTEBOOKS)], []

    def run(command, what, **_):
        name, out = command[4], Path(command[-1])
        ran.append(name)
        (tmp_path / "out/engines/one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out/engines/one/manifest.json").touch()
        failed = ran == names[:3]  # helpers run writes it all the same, and may be killed instead of telling
        cell = nbformat.v4.new_code_cell("1", execution_count=None if failed else 1)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), out / f"{name}.ipynb")
        if failed:
            raise KeyboardInterrupt

    (tmp_path / "model").mkdir()
    find, model = checkpoint.find_checkpoint, SimpleNamespace(folder=tmp_path / "model")
    monkeypatch.setattr(checkpoint, "find_checkpoint", lambda name: model if name == "smollm2" else find(name))
    monkeypatch.setattr(prepare, "wheels", lambda *_, **__: None)
    monkeypatch.setattr(prepare, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tmp_path / "out")
    prepare.prepare(tmp_path / "out")
    assert ran == [*names[:3], *names[2:]]
    prepare.prepare(tmp_path / "out")
    assert len(ran) == len(names) + 1
    with monkeypatch.context() as patch:  # on a machine for which other engines are built
        patch.setattr("helpers.machine.hardware.free_cores", lambda: 97)
        prepare.prepare(tmp_path / "out")
    assert len(ran) == 2 * len(names) + 1
    shutil.rmtree(tmp_path / "out/engines")
    prepare.prepare(tmp_path / "out")
    assert ran[2 * len(names) + 1] == names[0]  # nothing that it built is there
