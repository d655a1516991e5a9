"""The doctor's lines on this machine as it is, and on machines that are broken in one way each."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest

from helpers.machine import doctor, environments, hardware

FACTS = {"torch": "2.11.0+cu130", "cuda": "13.0", "threads": 1, "available": True}
GPU = {"gpu": "Test GPU", "capability": "9.0", "sms": 132, "free": 2**36, "total": 2**37, "gpus": 1}
GPU["architectures"] = ["sm_80", "sm_90a"]


@pytest.fixture
def said(monkeypatch):
    """said(driver=..., **facts): what nvidia-smi and torch would say on another machine."""

    def set_up(driver="580.159.03", **facts):
        monkeypatch.setattr(hardware, "driver", lambda: driver)
        monkeypatch.setattr(doctor, "torch_facts", lambda limit=0: {**FACTS, **facts})

    return set_up


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_this_machine_as_a_person_sees_it(tmp_path):
    """Every line has a status, every line that is not OK a fix, and all of it takes less than 20 s."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert time.monotonic() - start < 20  # the promise is a bound, held by time limits, not a measurement
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == list(doctor.CHECKS)
    assert {check["status"] for check in report["checks"]} <= {"OK", "warning", "failure"}
    assert all(check["fix"] for check in report["checks"] if check["status"] != "OK")
    assert report["ok"] == all(check["status"] != "failure" for check in report["checks"]) == (done.returncode == 0)


def test_a_failure_is_the_exit_status_and_the_fix_stands_below_it(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "examine", lambda: iter([doctor.ok("A", "fine"), doctor.failure("B", "broken", "Mend.")])
    )
    assert doctor.main() == 1
    shown = capsys.readouterr().out
    assert "failure  B" in shown and "Fix: Mend." in shown and "1 OK, 1 failure" in shown
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.warning("A", "old", "Renew.")]))
    assert doctor.main() == 0


# ---- the compiler -----------------------------------------------------------------------------------------


def test_the_compiler_here_compiles_and_loads():
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
    ("text", "found"),
    [
        ("echo 'fatal error: no such header' >&2; exit 1", "no such header"),  # it does not compile
        ('touch "$5"; echo "libstdc++.so" > "$5"', "does not load"),  # what it writes is no library
    ],
)
def test_a_broken_compiler_is_a_failure_line(monkeypatch, tmp_path, text, found):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", text))
    check = doctor.check_compiler()
    assert check.status == "failure" and found in check.found and check.fix


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
def test_the_line_of_pytorch(said, driver, facts, status, words):
    said(driver, **facts)
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
def test_the_line_of_the_gpu(said, facts, status, words):
    said(**{**GPU, **facts})
    check = doctor.check_gpu()
    assert check.status == status and words in check.found


def test_an_old_driver_is_a_warning_with_what_it_rules_out(said):
    said(driver="550.54.15")
    check = doctor.check_driver()
    assert check.status == "warning" and "580" in check.fix and "TensorRT-LLM" in check.fix


def test_a_full_gpu_is_a_warning(said):
    said(**{**GPU, "free": 2**30})
    check = doctor.check_memory()
    assert check.status == "warning" and "nvidia-smi" in check.fix


# ---- memory, disk, cores ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(2**34, "OK"), (2**30, "warning"), (2**28, "failure")])
def test_memory(said, monkeypatch, free, status):
    said()
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    assert doctor.check_memory().status == status


@pytest.mark.parametrize(("free", "status"), [(1e11, "OK"), (1e9, "warning"), (1e8, "failure")])
def test_disk(monkeypatch, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert doctor.check_disk().status == status


def test_more_threads_than_a_container_may_use_is_a_warning(said, monkeypatch):
    monkeypatch.setattr(hardware, "free_cores", lambda: 2)
    said(threads=64)
    check = doctor.check_threads()
    assert check.status == "warning" and "OMP_NUM_THREADS=2" in check.fix
    said(threads=2)
    assert doctor.check_threads().status == "OK"


# ---- the other environments -------------------------------------------------------------------------------


def test_an_environment_that_is_not_there_matters_only_beside_a_gpu(said, monkeypatch):
    monkeypatch.setattr(environments, "python_of", lambda name: None)
    said(driver="")
    assert doctor.check_environment("vllm").status == "OK"
    said()
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


def test_a_tensorrt_that_does_not_load_is_a_failure(monkeypatch, tmp_path):
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name == "tensorrt_rtx")
    check = doctor.check_tensorrt()
    assert check.status == "failure" and "libnvinfer.so.10" in check.found
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert doctor.check_tensorrt().status == "warning"
