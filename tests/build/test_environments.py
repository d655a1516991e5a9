"""The environments of TensorRT-LLM, vLLM and TensorRT Edge-LLM: which Python is taken, what is checked before one is
made, and how one is made. It is made for real, from a small package that stands in for vLLM; the true wheels are not
installed here."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import filelock
import psutil
import pytest

from helpers import backends, cli
from helpers.backends.tensorrt import builder
from helpers.backends.tensorrt_llm.errors import explain_import
from helpers.errors import BackendUnavailable, CourseError, InputError
from helpers.machine import environments, hardware

ROOT = Path(__file__).resolve().parents[2]
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def project(monkeypatch, tmp_path):
    """A course folder of its own, without environments, whose machine has nothing against making one."""
    for name in environments.ENVIRONMENTS:
        monkeypatch.delenv(environments.variable(name), raising=False)
    monkeypatch.setattr(environments, "PROJECT", tmp_path / "course")
    monkeypatch.setattr(environments, "problems", lambda name, python="": iter(()))
    (tmp_path / "course" / "constraints").mkdir(parents=True)
    return tmp_path / "course"


@pytest.fixture
def wheels(project, monkeypatch):
    """wheels(code): pip's only source is one wheel of vllm 0.25.1 whose module is this code."""
    vllm = replace(environments.ENVIRONMENTS["vllm"], pythons=(VERSION,))
    monkeypatch.setitem(environments.ENVIRONMENTS, "vllm", vllm)
    folder = project.parent / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    (project / "constraints" / "vllm.txt").write_text("vllm==0.25.1\n")

    def write(code, version="0.25.1"):
        info = f"vllm-{version}.dist-info"
        with zipfile.ZipFile(folder / f"vllm-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("vllm.py", code)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return write


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---- which Python -----------------------------------------------------------------------------------------


def test_a_home_that_is_nobodys_is_a_python_that_is_not_there(project, monkeypatch):
    monkeypatch.setenv("COURSE_VLLM_PYTHON", "~nobody-of-that-name/bin/python")
    assert ("vllm", "broken") in [row[:2] for row in environments.describe()]
    with pytest.raises(BackendUnavailable, match="does not exist"):
        environments.need_python("vllm")


def test_the_variable_comes_before_the_folder(project, monkeypatch):
    assert environments.python_of("vllm") is None
    own = script(project / ".venv-vllm" / "bin" / "python", "")
    assert environments.python_of("vllm") == own
    monkeypatch.setenv("COURSE_VLLM_PYTHON", "/elsewhere/python")
    assert environments.python_of("vllm") == Path("/elsewhere/python")


@pytest.mark.parametrize("name", environments.ENVIRONMENTS)
def test_a_named_python_that_cannot_be_started_is_refused_by_its_name(project, monkeypatch, tmp_path, name):
    """By the same error, whichever backend asks."""
    (tmp_path / "no-program").touch()
    for path, words in [("nowhere", "does not exist"), ("no-program", "no program"), (".", "no program")]:
        monkeypatch.setenv(environments.variable(name), str(tmp_path / path))
        with pytest.raises(BackendUnavailable, match="not here") as refused:
            environments.need_python(name)
        assert str(tmp_path / path) in refused.value.cause and words in refused.value.cause
        assert f"Let {environments.variable(name)} name another, or unset it; then: helpers env" in refused.value.fix
        with pytest.raises(InputError) as refused:  # which is what `create` would say
            environments.create(name)
        assert environments.another(name) in refused.value.fix
        assert environments.describe()[list(environments.ENVIRONMENTS).index(name)][1] == "broken"
    named = script(tmp_path / "python", "")
    monkeypatch.setenv(environments.variable(name), str(named))
    assert environments.need_python(name) == str(named)


def test_a_python_for_tensorrt_that_cannot_be_started_is_refused_by_its_name_whatever_was_asked_before(monkeypatch):
    assert builder.provider_version("tensorrt_rtx")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("COURSE_TENSORRT_PYTHON", "~/python")
    for ask in (builder.start_worker, lambda: builder.provider_version("tensorrt_rtx")):
        with pytest.raises(BackendUnavailable, match="/nowhere/python cannot be started"):
            ask()


def test_an_environment_that_is_still_being_made_is_not_taken(project):
    own = script(project / ".venv-trtllm" / "bin" / "python", "")
    (project / ".venv-trtllm" / environments.UNFINISHED).touch()
    assert environments.python_of("trtllm") != own


def test_the_list_says_which_version_and_from_where(project, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_VLLM_PYTHON", str(script(tmp_path / "python", "echo 0.25.1")))
    script(project / ".venv-trtllm" / "bin" / "python", "exit 1")
    rows = {name: (version, where) for name, version, where in environments.describe()}
    assert rows["vllm"][0] == "0.25.1" and "COURSE_VLLM_PYTHON" in rows["vllm"][1]
    assert rows["trtllm"] == ("broken", ".venv-trtllm/bin/python")


# ---- what is checked first --------------------------------------------------------------------------------


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """A machine on which nothing stands in the way of TensorRT-LLM; each test breaks one thing."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(environments.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(environments, "_loads", lambda library, python="": True)
    monkeypatch.setattr(hardware, "driver", lambda: "580.159.03")
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e12}))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    script(tmp_path / "python3.12", "echo 3.12")


def found(name="trtllm", python=""):
    return [" ".join(problem) for problem in environments.problems(name, python)]


def test_nothing_stands_in_the_way_of_a_fit_machine(fit):
    assert found() == []


def test_another_system(fit, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert len(found()) == 1 and "Linux" in found()[0]


def test_no_driver_and_an_old_one(fit, monkeypatch):
    monkeypatch.setattr(hardware, "driver", lambda: "550.54")
    assert len(found()) == 1 and "550.54" in found()[0] and "580" in found()[0]
    monkeypatch.setattr(hardware, "driver", lambda: "")
    assert len(found()) == 1 and "--gpus all" in found()[0]


def test_too_little_disk(fit, monkeypatch):
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 9e9}))
    assert len(found()) == 1 and "9 GB" in found()[0] and "40 GB" in found()[0]


def test_only_a_python_without_wheels(fit, tmp_path):
    (tmp_path / "python3.12").unlink()
    script(tmp_path / "python3", "echo 3.11")
    assert len(found()) == 1 and "3.12 or 3.10" in found()[0]
    assert environments.find_python("vllm") == str(tmp_path / "python3")


def test_a_named_python_of_another_version_is_refused_not_replaced(fit, tmp_path):
    other = script(tmp_path / "python3.13", "echo 3.13")
    assert len(found(python=str(other))) == 1 and "python3.13" in found(python=str(other))[0]


def test_the_exporter_of_edge_llm_needs_no_gpu_and_an_x86_processor(fit, monkeypatch):
    monkeypatch.setattr(hardware, "driver", lambda: "")
    assert found("edgellm") == []
    monkeypatch.setattr(environments.platform, "machine", lambda: "aarch64")
    (problem,) = found("edgellm")
    assert "x86_64" in problem and "GPU" not in problem


@pytest.mark.parametrize(
    ("library", "fix"),
    [("libmpi.so.40", "libopenmpi-dev"), ("libpython", "LD_LIBRARY_PATH"), ("libcuda.so.1", "driver")],
)
def test_a_library_that_does_not_load(fit, monkeypatch, library, fix):
    monkeypatch.setattr(environments, "_loads", lambda name, python="": library not in name)
    monkeypatch.setattr(environments, "_libpython_missing", lambda python: library if library == "libpython" else "")
    assert len(found()) == 1 and library in found()[0] and fix in found()[0]


def test_the_loader_is_really_asked():
    libc = {"linux": "libc.so.6", "darwin": "libSystem.dylib"}.get(sys.platform, "msvcrt.dll")
    assert environments._loads(libc)
    assert not environments._loads("libno_such_thing.so.1")


# ---- making one -------------------------------------------------------------------------------------------


def test_on_a_machine_that_cannot_it_fails_at_once_with_every_reason_and_the_container(project, monkeypatch):
    monkeypatch.setattr(
        environments, "problems", lambda name, python="": iter([("There is no driver.", "Install it.")])
    )
    with pytest.raises(BackendUnavailable) as refused:
        environments.create("trtllm")
    assert "There is no driver." in refused.value.what and "Install it." in refused.value.what
    assert "compose.yaml" in refused.value.fix
    assert not (project / ".venv-trtllm").exists()


def test_who_needs_no_gpu_is_not_told_of_one(project):
    with pytest.raises(BackendUnavailable, match="Edge-LLM") as refused:
        environments.need_python("edgellm")
    assert "env create edgellm" in refused.value.fix and "GPU" not in refused.value.fix


def test_the_command_line_makes_every_environment_that_there_is(monkeypatch):
    asked = []
    monkeypatch.setattr(environments, "create", lambda name, **_: asked.append(name))
    for name in environments.ENVIRONMENTS:
        assert cli.main(["env", "create", name]) == 0
    assert asked == list(environments.ENVIRONMENTS)


def test_an_unknown_name_is_refused(project):
    with pytest.raises(InputError, match="tensorflow"):
        environments.create("tensorflow")


def test_it_is_made_tried_and_then_taken(wheels, project, capsys):
    wheels("__version__ = '0.25.1'")
    python = environments.create("vllm")
    assert python == project / ".venv-vllm" / "bin" / "python" == environments.python_of("vllm")
    assert environments.installed_version(python, "vllm") == "0.25.1"
    shown = capsys.readouterr().out
    assert re.findall(r"\[(\d)/4\]", shown) == ["1", "2", "3", "4"] and "Ready" in shown
    environments.create("vllm")  # a second time there is nothing to do
    assert "there already" in capsys.readouterr().out


def test_where_no_wheel_can_be_had_nothing_stays(wheels, project):
    wheels("", version="0.1.0")
    with pytest.raises(BackendUnavailable, match="no wheel of vllm==0.25.1") as refused:
        environments.create("vllm")
    assert "COURSE_VLLM_PYTHON" in refused.value.fix
    assert not (project / ".venv-vllm").exists()


def test_where_the_installation_breaks_off_nothing_stays(wheels, project):
    wheels("__version__ = '0.25.1'")
    (project / "constraints" / "vllm.txt").write_text("vllm==0.25.1\nno-such-package-at-all==1\n")
    with pytest.raises(CourseError, match="could not be installed") as broken:
        environments.create("vllm")
    assert "no-such-package-at-all" in broken.value.cause
    assert not (project / ".venv-vllm").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_an_interrupt_that_reaches_only_this_process_ends_the_step_that_it_waits_for(tmp_path):
    """As VS Code sends it to a kernel: pip would go on in a folder that is being removed."""
    file = tmp_path / "pid"
    code = f"import os, time; open({str(file)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"

    def interrupt_once_it_runs():
        while not (file.exists() and file.read_text().endswith(" ")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_it_runs, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        environments._step([sys.executable, "-c", code], environments.ENVIRONMENTS["vllm"])
    assert not psutil.pid_exists(int(file.read_text()))


def test_where_the_import_fails_the_reason_is_told_and_nothing_stays(wheels, project):
    wheels("raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(BackendUnavailable, match=r"libcudart\.so\.13") as broken:
        environments.create("vllm")
    assert "CUDA Toolkit" in broken.value.cause and "LD_LIBRARY_PATH" in broken.value.fix
    assert not (project / ".venv-vllm").exists()


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        (
            "ImportError: libmpi.so.40: cannot open shared object file",
            "libopenmpi-dev",
        ),  # NVIDIA/TensorRT-LLM issue 167
        ("ImportError: libpython3.12.so.1.0: cannot open shared object file", "LD_LIBRARY_PATH"),  # issue 6102
        ("ImportError: libcublasLt.so.13: cannot open shared object file", "CUDA Toolkit 13"),
        ("ImportError: bindings.so: undefined symbol: _ZN3c10", "container"),  # issues 1008, 2380
        ("ImportError: libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4", "Unset LD_LIBRARY_PATH"),
    ],
)
def test_what_tensorrt_llm_says_when_it_does_not_load_has_a_way_out(said, fix):
    error = environments._not_importable("trtllm", said, explain_import)
    assert isinstance(error, BackendUnavailable) and fix in error.fix and said.split()[1][:9] in error.what


def test_what_a_killed_attempt_left_is_made_anew(wheels, project):
    script(project / ".venv-vllm" / "bin" / "python", "exit 1")
    (project / ".venv-vllm" / environments.UNFINISHED).touch()
    wheels("__version__ = '0.25.1'")
    assert environments.installed_version(environments.create("vllm"), "vllm") == "0.25.1"


def test_a_removal_that_is_interrupted_leaves_nothing_that_passes_for_finished(project, monkeypatch):
    script(project / ".venv-vllm" / "bin" / "python", "echo 0.25.1")
    (project / ".venv-vllm" / environments.UNFINISHED).touch()

    def interrupted(folder, **_):
        if folder.is_dir():
            (folder / environments.UNFINISHED).unlink(missing_ok=True)
            raise KeyboardInterrupt

    monkeypatch.setattr(environments.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environments.create("vllm")
    assert environments.python_of("vllm") is None


def test_two_that_make_the_same_environment_take_turns(project):
    """The second would delete what the first has fetched."""
    target, lock = project / ".venv-vllm", filelock.FileLock(project / ".venv-vllm.lock")
    target.mkdir()
    (target / environments.UNFINISHED).touch()
    with ThreadPoolExecutor(1) as other, lock:
        waiting = other.submit(environments.create, "vllm")
        time.sleep(1.5)
        assert (target / environments.UNFINISHED).exists() and not waiting.done()
        python = script(target / "bin" / "python", "echo 0.25.1")
        (target / environments.UNFINISHED).unlink()
        lock.release()
        assert waiting.result(30) == python


def test_a_folder_of_somebody_else_is_not_deleted(wheels, project):
    own = script(project / ".venv-vllm" / "bin" / "python", "exit 1")
    with pytest.raises(InputError, match="does not start"):
        environments.create("vllm")
    assert own.exists()


def test_a_named_python_works_without_making_anything(project, monkeypatch, tmp_path, capsys):
    named = script(tmp_path / "python", "echo 0.25.1")
    monkeypatch.setenv("COURSE_VLLM_PYTHON", str(named))
    assert environments.create("vllm") == named
    assert not (project / ".venv-vllm").exists()


# ---- the locks --------------------------------------------------------------------------------------------


def pins(name):
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    return dict(line.split(" ;")[0].split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("name", environments.ENVIRONMENTS)
def test_a_lock_pins_the_version_that_the_course_is_made_for(name):
    wanted = environments.ENVIRONMENTS[name]
    assert pins(name)[wanted.package] == wanted.version


@pytest.mark.parametrize("name", sorted(set(backends.ENVIRONMENTS.values())))
def test_a_lock_has_what_a_worker_imports(name):
    assert {"filelock", "psutil", "tqdm", "safetensors", "tokenizers"} <= pins(name).keys()


def test_the_lock_of_edge_llm_keeps_what_its_release_requires_and_leaves_torch_its_build():
    """Requires-Dist of tensorrt-edgellm 0.11.0 with the extra `export` (its wheel's METADATA)."""
    locked = pins("edgellm")
    for requirement in (
        "torch==2.13.0",
        "transformers==5.14.1",
        "onnx==1.19.0",
        "onnxscript==0.7.1",
        "safetensors==0.8.0",
        "numpy==2.2.6",
        "onnx-graphsurgeon==0.6.1",
    ):
        package, version = requirement.split("==")
        assert locked[package] == version
    assert locked["cuda-python"].startswith("13.")
    assert not [name for name in locked if name.startswith("nvidia-") or name in ("triton", "cuda-toolkit")]


def test_the_lock_of_tensorrt_llm_keeps_what_its_release_requires():
    """Requires-Dist of tensorrt_llm 1.2.1 (its source distribution's PKG-INFO on the Python Package Index)."""
    found = pins("trtllm")
    assert found["torch"] == "2.9.1"  # >=2.9.1,<=2.10.0a0
    assert found["transformers"] == "4.57.3"
    assert found["tensorrt"].startswith("10.14.1.")  # ~=10.14.1
    assert found["triton"] == "3.5.1"
    assert found["nvidia-modelopt"] == "0.37.0"
    assert found["numpy"].startswith("1.")  # <2
    assert int(found["setuptools"].split(".")[0]) < 80
    assert not [name for name in found if name.endswith("-cu12")]  # the wheel is built for CUDA 13


def test_compose_uses_the_container_of_the_same_release():
    text = (ROOT / "compose.yaml").read_text()
    assert f"nvcr.io/nvidia/tensorrt-llm/release:{environments.ENVIRONMENTS['trtllm'].version}" in text
    for option in ("ipc: host", "memlock: -1", "stack: 67108864"):
        assert option in text


@pytest.mark.skipif(not shutil.which("docker"), reason="needs docker compose")
def test_compose_can_be_read():
    done = subprocess.run(
        ["docker", "compose", "-f", str(ROOT / "compose.yaml"), "config", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not a docker command" in done.stderr or "unknown" in done.stderr:
        pytest.skip("docker has no compose here")
    assert done.returncode == 0, done.stderr


def test_a_folder_of_that_name_is_no_tensorrt_llm(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_llm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("COURSE_TRTLLM_PYTHON", raising=False)
    monkeypatch.setattr(environments, "PROJECT", tmp_path)
    assert environments.python_of("trtllm") is None
