"""The doctor's lines on this machine as it is, and on machines that are broken in one way each."""

import contextlib
import importlib.util
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch

from helpers.errors import StoreError
from helpers.machine import doctor, environments, hardware

FACTS = {"torch": "2.11.0+cu130", "cuda": "13.0", "threads": 1, "available": True}
GPU = {"gpu": "Test GPU", "capability": "9.0", "sms": 132, "free": 2**36, "total": 2**37, "gpus": 1}
GPU["architectures"] = ["sm_80", "sm_90a"]


@pytest.fixture
def pretend(monkeypatch):
    """pretend(driver=..., **facts): what nvidia-smi and torch would say on another machine."""

    def set_up(driver="580.159.03", **facts):
        monkeypatch.setattr(hardware, "driver", lambda: driver)
        monkeypatch.setattr(doctor, "torch_facts", lambda limit=0: {**FACTS, **facts})

    return set_up


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_this_machine_as_a_person_sees_it(tmp_path):
    """Every line has a status, and every line that is not OK a fix."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == list(doctor.CHECKS)
    assert {check["status"] for check in report["checks"]} <= {"OK", "warning", "failure"}
    assert all(check["fix"] for check in report["checks"] if check["status"] != "OK")
    assert report["ok"] == all(check["status"] != "failure" for check in report["checks"]) == (done.returncode == 0)


def test_a_failure_is_the_exit_status_and_the_fix_stands_below_it(monkeypatch, capsys):
    lines = [doctor.ok("fine", name="A"), doctor.failure("broken", "Mend.", name="B")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(lines))
    assert doctor.main() == 1
    shown = capsys.readouterr().out
    assert "failure  B" in shown and "Fix: Mend." in shown and "1 OK, 1 failure" in shown
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.warning("old", "Renew.", name="A")]))
    assert doctor.main() == 0


def refuse():
    raise StoreError("The store is a file.", fix="Name a folder.")


def break_down():
    raise OSError(28, "No space left on device")


def test_a_check_that_hangs_or_breaks_is_a_line_and_holds_up_no_other(monkeypatch):
    release = threading.Event()
    checks = {
        "hangs": lambda: release.wait() and doctor.ok("late"),
        "refuses": refuse,
        "breaks": break_down,
        "works": lambda: doctor.ok("fine"),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor, "LONGEST", 1.0)
    monkeypatch.setattr(doctor, "torch_facts", cache(lambda: {}))
    hung, refused, broken, works = doctor.examine()
    release.set()
    assert (hung.status, hung.name) == ("warning", "hangs") and "no answer within 1 s" in hung.found
    assert (refused.status, refused.found, refused.fix) == ("failure", "The store is a file.", "Name a folder.")
    assert broken.status == "failure" and "No space left" in broken.found and broken.fix
    assert (works.status, works.name) == ("OK", "works")


# ---- the compiler -----------------------------------------------------------------------------------------


def test_the_compiler_here_compiles_links_and_loads_in_a_folder_with_a_space_too(monkeypatch, tmp_path):
    (tmp_path / "my files").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "my files"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "my files"))
    assert doctor.check_compiler().status == "OK"


@pytest.mark.skipif(sys.platform != "linux", reason="the trap is one of Linux's loader")
def test_a_compiler_that_links_the_cpp_library_statically_is_a_failure_line(monkeypatch, tmp_path):
    """Seen on a GPU machine: CXX named such a compiler, and every CUDA engine crashed when it was loaded."""
    real = hardware.compiler()
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f'exec {real} -static-libstdc++ "$@"'))
    check = doctor.check_compiler()
    assert check.status == "failure" and "copy of the C++ library" in check.found
    assert "export CXX=" in check.fix


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo 'fatal error: no such header' >&2; exit 1", "no such header"),  # it does not compile
        ("echo 'ld: cannot find -ltorch: No such file' >&2; echo 'ld returned 1' >&2; exit 1", "cannot find -ltorch"),
        ('[ "$1" = --version ] || echo "libstdc++.so" > "$3"', "does not load"),  # what it writes is no library
    ],
)
def test_a_broken_compiler_is_a_failure_line(monkeypatch, tmp_path, text, words):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", text))
    check = doctor.check_compiler()
    assert check.status == "failure" and words in check.found and check.fix


def test_torchs_own_libraries_are_linked(monkeypatch, tmp_path):
    """A torch without its libraries: the compiler finds none to link with."""
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "include").symlink_to(Path(torch.__file__).with_name("include"))
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    check = doctor.check_compiler()
    assert check.status == "failure" and "cannot find -ltorch" in check.found


def test_a_compiler_that_hangs_is_a_line_and_leaves_no_process(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f"sleep 600 & echo $! > {pid}; wait"))
    monkeypatch.setattr(doctor, "TIME_LIMIT", 5.0)
    check = doctor.check_compiler()
    assert check.status == "warning" and "no answer within 1 s" in check.found and check.fix
    assert hardware.compiler_version() == str(tmp_path / "cxx")  # does not hang either
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid.read_text())).wait(10)


def test_no_compiler_is_a_failure_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = doctor.check_compiler()
    assert check.status == "failure" and "Install" in check.fix


# ---- torch and the GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "facts", "status", "words"),
    [
        ("", {"torch": "2.13.0+cpu", "cuda": None, "available": False}, "OK", "CPU build"),
        ("580.1", {}, "OK", "CUDA 13.0"),
        ("580.1", {"cuda": None, "available": False}, "warning", "NVIDIA driver"),
        ("470.1", {"available": False}, "failure", "no usable GPU"),
        ("580.1", {"torch": "2.4.1"}, "warning", "2.4.1"),
        ("580.1", {"error": "CUDA error: an illegal memory access"}, "failure", "illegal memory"),
    ],
)
def test_the_line_of_pytorch(pretend, driver, facts, status, words):
    pretend(driver, **facts)
    check = doctor.check_torch()
    assert check.status == status and words in check.found


def test_a_torch_that_crashes_or_hangs_or_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(hardware, "driver", lambda: "")
    cases = [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failure", "crashed"),
        ("import time; time.sleep(30)", "warning", "no answer within 1 s"),
        ("import no_such_torch", "failure", "no_such_torch"),
    ]
    for code, status, words in cases:
        monkeypatch.setattr(doctor, "_ASK_TORCH", code)
        doctor.torch_facts.cache_clear()
        facts = doctor.torch_facts(1.0)
        monkeypatch.setattr(doctor, "torch_facts", lambda facts=facts: facts)
        check = doctor.check_torch()
        monkeypatch.undo()
        monkeypatch.setattr(hardware, "driver", lambda: "")
        assert check.status == status and words in check.found
    doctor.torch_facts.cache_clear()


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        ({}, "OK", "compute capability 9.0"),
        ({"gpus": 4}, "OK", "4 GPUs"),
        ({"capability": "7.5", "architectures": ["sm_75"]}, "warning", "7.5"),
        ({"capability": "12.0"}, "failure", "no kernels"),
    ],
)
def test_the_line_of_the_gpu(pretend, facts, status, words):
    pretend(**{**GPU, **facts})
    check = doctor.check_gpu()
    assert check.status == status and words in check.found


def test_an_old_driver_is_a_warning_with_what_it_rules_out(pretend):
    pretend(driver="550.54.15")
    check = doctor.check_driver()
    assert check.status == "warning" and "580" in check.fix and "TensorRT-LLM" in check.fix


def test_a_full_gpu_is_a_warning(pretend):
    pretend(**{**GPU, "free": 2**30})
    check = doctor.check_memory()
    assert check.status == "warning" and "nvidia-smi" in check.fix


# ---- memory, disk, cores ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(2**34, "OK"), (2**30, "warning"), (2**28, "failure")])
def test_memory(pretend, monkeypatch, free, status):
    pretend()
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    assert doctor.check_memory().status == status


@pytest.mark.parametrize("check", [doctor.check_engines, doctor.check_temporary_folder])
@pytest.mark.parametrize(("free", "status"), [(1e11, "OK"), (1e9, "warning"), (1e8, "failure")])
def test_disk(monkeypatch, check, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert check().status == status


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("check", [doctor.check_engines, doctor.check_temporary_folder])
def test_a_folder_that_cannot_be_written_is_a_failure(monkeypatch, check):
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", no_room)
    line = check()
    assert line.status == "failure" and "No space left" in line.found and line.fix


def test_a_store_that_is_a_file_is_a_failure(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "file"))
    line = doctor._guarded(doctor.check_engines)
    assert line.status == "failure" and "COURSE_ENGINES" in line.fix


def test_a_missing_temporary_folder_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    line = doctor.check_temporary_folder()
    assert line.status == "failure" and "nowhere" in line.found and "TMPDIR" in line.fix


@pytest.mark.skipif(sys.platform != "linux", reason="mount options are read on Linux")
def test_a_temporary_folder_without_programs_is_a_failure(monkeypatch):
    monkeypatch.setattr(doctor.os, "statvfs", lambda _: type("Options", (), {"f_flag": os.ST_NOEXEC}))
    line = doctor.check_temporary_folder()
    assert line.status == "failure" and "noexec" in line.found


def test_more_threads_than_a_container_may_use_is_a_warning(pretend, monkeypatch):
    monkeypatch.setattr(hardware, "free_cores", lambda: 2)
    pretend(threads=64)
    check = doctor.check_threads()
    assert check.status == "warning" and "OMP_NUM_THREADS=2" in check.fix
    pretend(threads=2)
    assert doctor.check_threads().status == "OK"


# ---- the other environments -------------------------------------------------------------------------------


def test_an_environment_that_is_not_there_matters_only_beside_a_gpu(pretend, monkeypatch):
    monkeypatch.setattr(environments, "python_of", lambda name: None)
    pretend(driver="")
    assert doctor.check_environment("vllm").status == "OK"
    pretend()
    check = doctor.check_environment("vllm")
    assert check.status == "warning" and "env create vllm" in check.fix


def test_a_named_python_that_does_not_start_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_VLLM_PYTHON", str(tmp_path / "nowhere"))
    check = doctor.check_environment("vllm")
    assert check.status == "failure" and "COURSE_VLLM_PYTHON" in check.fix


@pytest.mark.parametrize(("version", "status"), [("1.2.1", "OK"), ("1.4.0", "warning")])
def test_an_environment_of_the_pinned_version_is_ok_another_is_a_warning(monkeypatch, tmp_path, version, status):
    monkeypatch.setenv("COURSE_TRTLLM_PYTHON", script(tmp_path / "python", f"echo {version}"))
    check = doctor.check_environment("trtllm")
    assert check.status == status and version in check.found


def test_a_python_for_tensorrt_that_is_not_there_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_TENSORRT_PYTHON", str(tmp_path / "nowhere"))
    check = doctor.check_tensorrt()
    assert check.status == "failure" and "nowhere" in check.found and "COURSE_TENSORRT_PYTHON" in check.fix
    monkeypatch.setenv("COURSE_TENSORRT_PYTHON", script(tmp_path / "python", "echo 1.7.1"))
    assert doctor.check_tensorrt().found.startswith("tensorrt_rtx 1.7.1")


def test_a_tensorrt_that_does_not_load_is_a_failure(monkeypatch, tmp_path):
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name == "tensorrt_rtx")
    check = doctor.check_tensorrt()
    assert check.status == "failure" and "libnvinfer.so.10" in check.found
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert doctor.check_tensorrt().status == "warning"
