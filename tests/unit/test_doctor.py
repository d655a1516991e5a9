"""The doctor's lines on this machine as it is, and on machines that are broken in one way each."""

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch

from helpers.bench import run as benchmark
from helpers.errors import BackendUnavailable, BuildError, StoreError, WorkerError
from helpers.machine import commands, doctor, environments, hardware, leftovers, limits
from helpers.machine.inductor import prepare_inductor
from helpers.machine.worker import Worker

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
    monkeypatch.setattr(doctor, "examine", lambda needed: iter(lines))
    assert not doctor.main()["ok"]
    shown = capsys.readouterr().out
    assert "failure  B" in shown and "Fix: Mend." in shown and "1 OK, 1 failure" in shown
    monkeypatch.setattr(doctor, "examine", lambda needed: iter([doctor.warning("old", "Renew.", name="A")]))
    assert doctor.main()["ok"]


def refuse():
    raise StoreError("The store is a file.", fix="Name a folder.")


def break_down():
    raise OSError(28, "No space left on device")


def test_what_nobody_foresaw_is_a_line_at_once(monkeypatch):
    """A driver without a number, a torch of its own numbering, and what a start-up script prints."""
    monkeypatch.setattr(hardware, "driver", cache(lambda: "[N/A]"))
    monkeypatch.setattr(doctor, "_ASK_TORCH", 'print(\'{hello\'); print(\'{"torch": "parrots", "cuda": null}\')')
    monkeypatch.setattr(doctor, "LONGEST", 10.0)
    checks = {check.name: check for check in doctor.examine(only=["PyTorch", "NVIDIA driver", "Python"])}
    doctor.torch_facts.cache_clear()
    for name in ("PyTorch", "NVIDIA driver"):
        assert "the check itself failed (ValueError" in checks[name].found and checks[name].fix


@pytest.mark.skipif(os.name != "posix", reason="these commands are POSIX's")
@pytest.mark.timeout(60)
def test_whatever_a_command_does_there_is_an_answer():
    def answer(code, limit=20.0):
        done = commands.run(["/bin/sh", "-c", code], limit)
        assert len(done.stdout) < 2 * commands.LONGEST
        return done.returncode, done.stdout[:30], done.stderr[:30]

    assert answer("echo out; echo error >&2; exit 3") == (3, "out\n", "error\n")
    assert answer("printf '\\377'") == (0, "\ufffd", "")
    for endless in ("yes", "yes >&2"):  # it would fill the memory
        assert (answer(endless)[0], answer(endless)[2]) == (commands.TOO_SLOW, "it does not stop writing")
    assert answer("echo first; sleep 600", 1.0) == (commands.TOO_SLOW, "first\n", "no answer within 1 s")
    assert answer("exec >&- 2>&-; sleep 600", 1.0)[0] == commands.TOO_SLOW  # without an output, but alive
    assert answer("sleep 600 & echo first", 1.0)[:2] == (commands.TOO_SLOW, "first\n")  # what it started holds on
    assert commands.run(["/no/such/program"], 1).returncode == commands.MISSING


@pytest.mark.skipif(os.name != "posix", reason="a folder in use cannot be deleted on Windows")
def test_a_start_in_a_folder_that_is_gone_is_a_failure(monkeypatch, tmp_path):
    assert doctor.check_python().status == "OK"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    check = doctor.check_python()
    assert check.status == "failure" and "gone" in check.found and check.fix.startswith("cd ")


def test_a_kernel_of_another_environment_is_a_warning(monkeypatch, tmp_path):
    assert doctor.check_notebook_tools().status == "OK"
    spec = {"argv": ["/opt/other/bin/python", "-m", "ipykernel_launcher"], "display_name": "x", "language": "python"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    check = doctor.check_notebook_tools()
    assert check.status == "warning" and "/opt/other/bin/python" in check.found and str(tmp_path) in check.fix


def test_notebook_tools_that_are_there_and_cannot_be_imported_are_a_failure(monkeypatch, tmp_path):
    """Such as a package that was built for an older NumPy, in a folder of PYTHONPATH."""
    (tmp_path / "ipywidgets.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_notebook_tools()
    assert check.status == "failure" and "multiarray" in check.found and "make clean setup" in check.fix
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ipywidgets", raising=False)
    assert "ipywidgets comes from" in leftovers.check_packages().found


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
    monkeypatch.setenv("CXX", "ccache g++")
    check = doctor.check_compiler()
    assert check.status == "warning" and "'ccache g++', which is no program" in check.found and check.fix == "unset CXX"
    (tmp_path / "my files/g++").symlink_to(shutil.which("g++"))  # as conda's CXX, in an environment with a space
    monkeypatch.setenv("CXX", str(tmp_path / "my files/g++"))
    assert "g++', which has a space in its path" in doctor.check_compiler().found
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in doctor.check_compiler().found


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
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX")
    check = doctor.check_compiler()
    assert check.status == "failure" and "no C++ compiler" in check.found and "Install" in check.fix


def test_a_compiler_that_is_too_old_for_torchs_standard_is_a_failure_line(monkeypatch, tmp_path):
    """As g++ 9, which knows c++20 by no such name: each build would fail."""
    from torch._inductor.cpp_builder import _get_cpp_std_cflag

    (flag,) = _get_cpp_std_cflag()
    refused = f"echo \"g++: error: unrecognized command line option '-{flag}'\" >&2; exit 1"
    code = f'for word in "$@"; do [ "$word" != -{flag} ] || {{ {refused}; }}; done; exec {hardware.compiler()} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", code))
    check = doctor.check_compiler()
    assert check.status == "failure" and f"-{flag}" in check.found
    assert "Install g++ 10 or newer" in check.fix and "CXX" in check.fix
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", "echo 'fatal error: no such header' >&2; exit 1"))
    assert "newer" not in doctor.check_compiler().fix


@pytest.mark.parametrize(
    ("text", "standard"),
    [
        ('def _get_cpp_std_cflag(std_num: str = "c++20") -> list[str]:', "c++20"),
        ('def _get_cpp_std_cflag(std_num: str = "c++17") -> list[str]:\n        std_num = "c++20"', "c++17"),
        ("says nothing", "c++17"),
        (None, "c++17"),
    ],
)
def test_the_compiler_is_tried_with_the_standard_that_torch_names(tmp_path, text, standard):
    if text is not None:
        (tmp_path / "_inductor").mkdir()
        (tmp_path / "_inductor" / "cpp_builder.py").write_text(text)
    assert doctor._standard_of(tmp_path) == standard


def test_of_two_compilers_the_one_that_works_not_is_not_advised(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    script(tmp_path / "g++", "exit 1")
    assert "Install g++ anew" in doctor.check_compiler().fix
    (tmp_path / "clang++").symlink_to(tmp_path / "g++")
    assert "Install g++ anew" in doctor.check_compiler().fix
    (tmp_path / "clang++").unlink()
    other = script(tmp_path / "clang++", "exit 1")
    assert doctor.check_compiler().fix == f"export CXX={other}"


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
    monkeypatch.setattr(hardware, "ANSWER_LIMIT", 0.5)
    check = doctor.check_compiler()
    assert check.status == "warning" and "no answer within 1 s" in check.found and check.fix
    assert hardware.compiler_version() == str(tmp_path / "cxx")  # does not hang either
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid.read_text())).wait(10)


def test_a_build_that_fails_names_what_the_doctor_finds_and_takes_only_a_failure_for_the_cause(monkeypatch):
    lines = {name: lambda: doctor.ok("fine") for name in doctor.OF_A_BUILD}
    assert set(lines) <= set(doctor.CHECKS)
    monkeypatch.setattr(doctor, "CHECKS", lines | {"vLLM": lambda: doctor.failure("not asked", "x")})
    monkeypatch.setattr(doctor, "torch_facts", cache(lambda: {}))
    failed = WorkerError("It was killed.", cause="Perhaps.", fix="Again.")
    named = doctor.named_cause(failed)
    assert (named.what, named.fix) == (failed.what, failed.fix) and "Perhaps. (The doctor finds nothing" in named.cause
    lines["engines"] = lambda: doctor.warning("little room", "Delete some.")
    monkeypatch.setattr(doctor, "CHECKS", lines)
    named = doctor.named_cause(failed)
    assert (named.cause, named.fix) == ("Perhaps. (The doctor warns of engines: little room.)", "Again.")
    lines["memory"] = lambda: doctor.failure("none left", "Close some.")
    monkeypatch.setattr(doctor, "CHECKS", lines)
    named = doctor.named_cause(failed)
    assert type(named) is WorkerError and named.fix == "Close some."
    assert "'memory' finds a failure: none left" in named.cause


# ---- torch and the GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "driver", "facts", "status", "words"),
    [
        (doctor.check_torch, "", {"torch": "2.13.0+cpu", "cuda": None, "available": False}, "OK", "CPU build"),
        (doctor.check_torch, "580.1", {}, "OK", "CUDA 13.0"),
        (doctor.check_torch, "580.1", {"cuda": None, "available": False}, "warning", "NVIDIA driver"),
        (doctor.check_torch, "580.1", {"cuda": None, "available": False}, "warning", "--isolated"),
        (doctor.check_torch, "470.1", {"available": False}, "failure", "no usable GPU"),
        (doctor.check_torch, "580.1", {"torch": "2.4.1"}, "warning", "2.4.1"),
        (doctor.check_torch, "580.1", {"error": "CUDA error: an illegal memory access"}, "failure", "illegal memory"),
        (doctor.check_gpu, "580.1", {}, "warning", "reports no GPU"),
        (doctor.check_gpu, "", {}, "OK", "none that PyTorch can use"),
        (doctor.check_gpu, "580.1", GPU, "OK", "compute capability 9.0"),
        (doctor.check_gpu, "580.1", {**GPU, "gpus": 4}, "OK", "4 GPUs"),
        (doctor.check_gpu, "580.1", {**GPU, "capability": "7.5", "architectures": ["sm_75"]}, "warning", "7.5"),
        (doctor.check_gpu, "580.1", {**GPU, "capability": "12.0"}, "failure", "no kernels"),
        # the driver is held against the CUDA that PyTorch was built for
        (doctor.check_driver, "580.1", {"cuda": "13.0"}, "OK", ""),
        (doctor.check_driver, "550.54.15", {"cuda": "12.8"}, "warning", "driver 580"),
        (doctor.check_driver, "550.54.15", {"cuda": "13.0"}, "failure", "driver 580"),
        (doctor.check_driver, "470.1", {"cuda": "12.1"}, "failure", "driver 525"),
        (doctor.check_driver, "470.1", {"cuda": "11.8"}, "warning", "580"),
        (doctor.check_driver, "470.1", {"cuda": None}, "warning", "580"),
        (doctor.check_driver, "580.1", {"cuda": "99.0"}, "OK", ""),
        (doctor.check_memory, "580.1", {**GPU, "free": 2**30}, "warning", "nvidia-smi"),
        (doctor.check_threads, "580.1", {"threads": 4096}, "warning", "OMP_NUM_THREADS="),
        (doctor.check_threads, "580.1", {"threads": 1}, "OK", ""),
    ],
)
def test_what_torch_and_the_driver_say(pretend, check, driver, facts, status, words):
    pretend(driver, **facts)
    line = check()
    assert line.status == status and words in line.found + line.fix and bool(line.fix) == (status != "OK")


@pytest.mark.skipif(os.name == "nt", reason="scripts of a Unix shell")
@pytest.mark.parametrize("says", ["echo 'it failed'; exit 9", "printf 'failed\\033[2J\\n'", "sleep 60"])
def test_an_nvidia_smi_that_names_no_driver_is_a_warning(monkeypatch, tmp_path, says):
    """As after an update of the system's kernel: no driver is loaded, and the machine has a GPU all the same."""
    for module in (doctor, commands):
        monkeypatch.setattr(module, "run", lambda command, _, run=commands.run: run(command, 0.5))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script(tmp_path / "nvidia-smi", says)
    monkeypatch.setattr(hardware, "driver", hardware.driver.__wrapped__)
    check = doctor.check_driver()
    assert check.status == "warning" and re.search("failed|no answer", check.found) and "Restart" in check.fix
    assert "\x1b" not in str(check)


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


# ---- memory, disk, cores ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(2**34, "OK"), (2**30, "warning"), (2**28, "failure")])
def test_memory(pretend, monkeypatch, free, status):
    pretend()
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    assert doctor.check_memory().status == status
    check = doctor.check_memory(2**35)  # what a recipe needs
    assert check.status == ("warning" if status == "OK" else status)
    assert status == "failure" or "needs 32.0" in check.found


@pytest.mark.parametrize("check", [doctor.check_engines, doctor.check_temporary_folder])
@pytest.mark.parametrize(("free", "status"), [(1e11, "OK"), (1e9, "warning"), (1e8, "failure")])
def test_disk(monkeypatch, check, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert check().status == status


def test_the_disk_is_held_against_what_a_recipe_needs(monkeypatch):
    assert doctor.check_engines(needed=1e9).status == "OK"
    check = doctor.check_engines(needed=1e15)
    assert check.status == "failure" and "needs 1000000.0 GB" in check.found and "helpers remove" in check.fix
    monkeypatch.setattr(doctor, "CHECKS", {"engines": doctor.check_engines})
    monkeypatch.setattr(doctor, "torch_facts", cache(lambda: {}))
    assert [check.status for check in doctor.examine({"engines": 1e15})] == ["failure"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o777, 0o2775])
@pytest.mark.parametrize("place", ["store", "above"])
def test_a_store_whose_engines_load_refuses_is_a_failure_until_its_fix(monkeypatch, tmp_path, place, mode):
    """A lab's folder, in which its group writes. The law is what `load` asks of an engine there."""
    from helpers import access

    (tmp_path / "code").mkdir(mode=0o755)  # a checkout that anybody can write to would turn the check off
    monkeypatch.setattr(access, "PACKAGE", tmp_path / "code")
    monkeypatch.setattr("grp.getgrgid", lambda number: (_ for _ in ()).throw(KeyError(number)))  # one nobody knows
    store, own = tmp_path / "lab" / "engines", tmp_path / "own"
    (store / "engine").mkdir(parents=True), own.mkdir()
    monkeypatch.setenv("COURSE_ENGINES", str(store))
    access.check_trust(store / "engine")
    assert doctor.check_engines().status == "OK"
    path = store if place == "store" else store.parent
    path.chmod(mode)
    with pytest.raises(StoreError) as refused:
        access.check_trust(store / "engine")
    check = doctor.check_engines()
    assert check.status == "failure" and f"others may write to {path}" in check.found
    assert check.fix == refused.value.fix == f"chmod +t {path}"
    monkeypatch.setenv("COURSE_TRUSTED_ENGINES", str(store))
    access.check_trust(store / "engine")
    assert doctor.check_engines().status == "OK"
    monkeypatch.delenv("COURSE_TRUSTED_ENGINES")
    monkeypatch.setenv("COURSE_ENGINES", f"{own}{os.pathsep}{store}")  # what it lacks is built in the own one
    check = doctor.check_engines()
    assert check.status == "warning" and "others may write" in check.found and "free" in check.found
    monkeypatch.setenv("COURSE_ENGINES", str(store))
    monkeypatch.setattr(doctor, "CHECKS", {"engines": doctor.check_engines})
    monkeypatch.setattr(doctor, "torch_facts", cache(lambda: {}))
    failed = WorkerError("It was killed.", cause="Perhaps.", fix="Again.")
    assert doctor.named_cause(failed).fix == "Again."  # no compiler fails of that
    subprocess.run(check.fix, shell=True, check=True)
    access.check_trust(store / "engine")
    assert doctor.check_engines().status == "OK"


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("check", [doctor.check_engines, doctor.check_temporary_folder])
def test_a_folder_that_cannot_be_used_is_a_failure(monkeypatch, tmp_path, check):
    variable = "COURSE_ENGINES" if check is doctor.check_engines else "TMPDIR"
    with monkeypatch.context() as patch:
        patch.setattr(doctor.tempfile, "TemporaryFile", no_room)
        line = check()
        assert line.status == "failure" and "No space left" in line.found and line.fix
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    line = doctor._guarded(check)
    assert line.status == "failure" and "file" in line.found and variable in line.fix
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)  # Python takes another one, and says nothing
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "TMPDIR" in doctor.check_temporary_folder().found


def test_where_no_temporary_file_can_be_made_the_way_out_is_told(monkeypatch, tmp_path):
    def fail():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", fail)
    for check in (doctor.check_compiler, doctor.check_temporary_folder):
        line = doctor._guarded(check)
        assert line.status == "failure" and "No usable" in line.found and "TMPDIR" in line.fix
    assert doctor.check_compiler_folder().status == "OK"  # the folder of engines is one
    runner = benchmark.make_runner, benchmark.Workload(), 1, "pytorch"
    for start, *arguments in ((benchmark._turn,), runner, (Worker, "json")):
        with pytest.raises(BackendUnavailable, match="No usable") as refused:
            start(*arguments)
        assert "disk is full" in refused.value.cause and "TMPDIR" in refused.value.fix


@pytest.mark.skipif(sys.platform != "linux", reason="mount options are read on Linux")
def test_a_temporary_folder_without_programs_is_a_failure(monkeypatch):
    monkeypatch.setattr(doctor.os, "statvfs", lambda _: type("Options", (), {"f_flag": os.ST_NOEXEC}))
    line = doctor.check_temporary_folder()
    assert line.status == "failure" and "noexec" in line.found


def test_torchs_compiler_works_where_programs_may_run(monkeypatch, tmp_path):
    noexec = tmp_path / "noexec"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(noexec / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("helpers.paths.lets_programs_run", lambda folder: not folder.is_relative_to(noexec))
    monkeypatch.setenv("CXX", "ccache g++")  # torch would take it, and then find no compiler
    assert prepare_inductor() == tmp_path / "cache" == Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert torch._inductor.config.cpp.cxx == (None, hardware.compiler())


def test_the_compilers_folder_is_the_one_that_a_build_takes(monkeypatch, tmp_path):
    """A space in its path, or noexec: the next place is tried. With none left a build is refused."""
    from helpers.backends.aot.backend import _scratch_folder

    spaced, plain = tmp_path / "my files", tmp_path / "files"
    spaced.mkdir(), plain.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and str(path) not in ("/tmp", "/var/tmp"))
    for store, temporary, good in ((plain, spaced, plain), (spaced, plain, plain), (spaced, spaced, None)):
        monkeypatch.setenv("COURSE_ENGINES", str(store))
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        check = doctor.check_compiler_folder()
        if good:
            assert check.status == "OK" and check.found.startswith(str(good))
            with _scratch_folder(store) as scratch:
                assert Path(scratch).parent == good
            with monkeypatch.context() as patch:
                patch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 1e6}))
                with pytest.raises(BuildError, match="1 MB free") as full, _scratch_folder(store):
                    pass
            assert str(good) in full.value.what and "TMPDIR" in full.value.fix
        else:
            assert check.status == "failure" and "TMPDIR" in check.fix
            with pytest.raises(BuildError, match="no folder to work in"), _scratch_folder(store):
                pass
    monkeypatch.setenv("COURSE_ENGINES", str(plain))
    monkeypatch.setattr(doctor.os, "statvfs", lambda _: type("Options", (), {"f_flag": os.ST_NOEXEC}))
    assert doctor.check_compiler_folder().status == "failure"


def test_few_processes_or_files_are_a_line(monkeypatch):
    for room, files, status, words, *size in (
        (None, None, "OK", "no limit on processes"),
        (5000, 20000, "OK", "room for 5000"),
        (100, 20000, "warning", "ulimit -u"),
        (10, 20000, "failure", "pids-limit"),
        (5000, 256, "warning", "ulimit -n"),
        (5000, 64, "failure", "ulimit -n"),
        (5000, 20000, "warning", "ulimit -f", 10**9),
        (5000, 20000, "failure", "ulimit -f", 8 * 2**20),
    ):
        monkeypatch.setattr(limits, "processes", lambda room=room: room)
        monkeypatch.setattr(limits, "open_files", lambda files=files: files)
        monkeypatch.setattr(limits, "file_size", lambda size=size: next(iter(size), None))
        check = doctor.check_processes()
        assert check.status == status and words in check.found + check.fix


# ---- control groups and limits ----------------------------------------------------------------------------


@pytest.fixture
def control_groups(monkeypatch, tmp_path):
    """control_groups(of_process, **files): what /proc/self/cgroup says, and the files under /sys/fs/cgroup."""

    def set_up(of_process, files):
        (tmp_path / "proc" / "self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(of_process)
        monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        monkeypatch.setattr(limits, "CONTROL_GROUPS", root)
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content + "\n")

    return set_up


def test_the_tightest_control_group_counts_in_either_version(control_groups):
    control_groups("0::/user.slice/jupyter\n", {
        "user.slice/memory.max": str(8 * 2**30), "user.slice/memory.current": str(3 * 2**30),
        "user.slice/memory.stat": f"anon 1\ninactive_file {2**30}",
        "user.slice/jupyter/memory.max": "max", "user.slice/jupyter/memory.current": "5",
        "user.slice/jupyter/cpu.max": "150000 100000", "user.slice/cpu.max": "max 100000",
        "user.slice/jupyter/pids.max": "100", "user.slice/jupyter/pids.current": "90",
    })  # fmt: skip
    assert limits.memory() == 6 * 2**30  # a file's pages in the cache would be given back
    assert limits.cores() == 1.5 and limits.processes() == 10
    assert hardware.free_cores() == 1 and hardware.free_memory() <= 6 * 2**30
    control_groups("5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:pids:/\n0::/\n", {
        "memory/memory.limit_in_bytes": str(2**30), "memory/memory.usage_in_bytes": str(2**29),  # its own root, inside
        "cpu/docker/abc/cpu.cfs_quota_us": "50000", "cpu/docker/abc/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "pids/pids.max": "max",
    })  # fmt: skip
    assert limits.memory() == 2**29 and limits.cores() == 0.5
    assert hardware.free_cores() == 1  # never none


def test_without_control_groups_there_is_no_limit(control_groups):
    for line, files in (
        ("", {}),
        ("nonsense\n", {}),
        ("0::/\n", {"memory.max": "much", "cpu.max": "x", "pids.max": ""}),
    ):
        control_groups(line, files)
        assert limits.memory() is None and limits.cores() is None
    control_groups("5:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)})
    assert limits.memory() is None


def test_a_memory_limit_is_named(control_groups, pretend):
    pretend()
    control_groups("0::/\n", {"memory.max": str(2**30), "memory.current": str(2**29)})
    check = doctor.check_memory()
    assert check.status == "warning" and "0.5 GiB free under a limit" in check.found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_users_own_limit_counts_its_threads(control_groups, monkeypatch):
    control_groups("", {})
    user = os.getuid()
    monkeypatch.setattr(limits, "_soft_limit", lambda name: 100_000)
    monkeypatch.setattr(limits.os, "getuid", lambda: 0)
    assert limits.processes() is None  # root has none
    monkeypatch.setattr(limits.os, "getuid", lambda: user or 4711)
    if user:
        assert 0 < limits.processes() < 100_000
    else:
        assert limits.processes() == 100_000  # nobody here has that number
    monkeypatch.undo()
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert limits.open_files() == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    taken = psutil.Process().memory_info().vms
    monkeypatch.setattr(limits, "_soft_limit", lambda name: taken + 2**30 if name == "RLIMIT_AS" else None)
    assert 2**29 < limits.memory() <= hardware.free_memory() + 2**29 < 2**31


# ---- what others have left --------------------------------------------------------------------------------


def test_locks_that_work_are_ok_and_those_of_a_bad_disk_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    assert leftovers.check_locks().status == "OK"
    assert not list((tmp_path / ".locks").iterdir())  # it leaves nothing

    class NoLock:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("filelock.FileLock", NoLock)
    check = leftovers.check_locks()
    assert check.status == "failure" and "local disk" in check.fix


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who holds a lock")
def test_a_lock_that_is_kept_names_its_process(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    (tmp_path / ".locks").mkdir()
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".locks" / "stories.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            assert leftovers.check_locks().status == "OK"  # a build that goes on
            holder.send_signal(signal.SIGSTOP)
            while psutil.Process(holder.pid).status() != "stopped":
                time.sleep(0.01)
            check = leftovers.check_locks()
            assert check.status == "warning" and "stopped" in check.found and check.fix == f"kill -9 {holder.pid}"
            holder.send_signal(signal.SIGCONT)
            while psutil.Process(holder.pid).status() == "stopped":
                time.sleep(0.01)
            monkeypatch.setattr(leftovers, "OLD", 0.0)
            check = leftovers.check_locks()
            assert check.status == "warning" and "hours" in check.found and str(holder.pid) in check.fix
            monkeypatch.setattr(psutil.Process, "open_files", lambda _: [])  # it is a file of another disk, same number
            assert leftovers.check_locks().status == "OK"
        finally:
            holder.kill()


def test_a_lock_of_another_user_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / "stories.lock").touch()
    monkeypatch.setattr(leftovers.os, "access", lambda path, mode: False)  # root may write all
    check = leftovers.check_locks()
    assert check.status == "failure" and "sudo rm" in check.fix


def installed(folder, name, version, *requirements):
    """What pip leaves of a package in an environment, without the package."""
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata.write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requirements)]) + "\n")


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([("torch", "2.13.0"), ("numpy", "2.1")], "OK", "2, each once"),
        ([("torch", "2.13.0"), ("torch", "2.9.1")], "failure", "torch"),
        ([("Typing_Extensions", "4.1"), ("typing-extensions", "4.2")], "failure", "typing-extensions"),
        ([("tensorrt_cu12", "10.1"), ("tensorrt_cu13", "10.2")], "warning", "tensorrt-cu12 and tensorrt-cu13"),
        ([("nvidia_cublas_cu12", "12"), ("nvidia_cudnn_cu13", "9")], "OK", "each once"),
        ([("nvidia-nccl-cu12", "2"), ("nvidia-nccl-cu13", "2")], "warning", "nvidia-nccl-cu12 and nvidia-nccl-cu13"),
    ],
)
def test_packages_of_two_environments_in_one_are_a_line(monkeypatch, tmp_path, packages, status, words):
    for name, version in packages:
        installed(tmp_path, name, version)
    monkeypatch.setattr(leftovers, "_own_folders", lambda: {tmp_path})
    monkeypatch.setattr(leftovers, "PACKAGES", ())
    check = leftovers.check_packages()
    assert check.status == status and words in check.found and bool(check.fix) == (status != "OK")


def test_a_package_from_elsewhere_is_a_warning(tmp_path):
    """A PYTHONPATH that an activation script of another environment has left."""
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors" / "__init__.py").touch()
    code = "from helpers.machine import leftovers; check = leftovers.check_packages(); print(check.status, check.found)"
    for path, words in (("", "OK"), (str(tmp_path), f"warning safetensors comes from {tmp_path}")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.stdout.startswith(words), done


@pytest.mark.parametrize(
    ("library", "text", "words"),
    [("onnx", "raise ImportError('libonnx.so: file too short')", "file too short"), ("sympy", "1/0", "division")],
)
def test_a_library_of_the_course_that_cannot_be_imported_is_a_failure(monkeypatch, tmp_path, library, text, words):
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = leftovers.check_packages()
    assert check.status == "failure" and words in check.found and "make clean setup" in check.fix


def test_pins_that_are_not_kept_are_named(monkeypatch, tmp_path):
    installed(
        tmp_path, "tensorrt_llm", "1.2.1", "torch==2.9.1", f"psutil=={psutil.__version__}", "nowhere>=2",
        'other==1; sys_platform == "plan9"', 'more==1; extra == "all"',
    )  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    conflicts = f"torch {torch.__version__} instead of ==2.9.1, nowhere none instead of >=2"
    assert leftovers.pins(sys.executable, "tensorrt-llm", 30) == ("1.2.1", conflicts)
    assert leftovers.pins(sys.executable, "no-such-library", 30)[0] == ""
    monkeypatch.setenv("COURSE_TRTLLM_PYTHON", sys.executable)
    check = doctor.check_environment("trtllm")
    assert check.status == "warning" and "torch" in check.found and "env create trtllm" in check.fix
    assert "remove" not in check.fix  # /usr, for a Python of the system
    monkeypatch.setattr(leftovers, "_own_folders", lambda: {tmp_path})
    monkeypatch.setattr(leftovers, "PACKAGES", ())
    check = leftovers.check_packages()
    assert check.status == "warning" and "tensorrt-llm is in this environment" in check.found


def test_a_package_of_another_version_than_the_course_asks_for_is_a_warning(monkeypatch, tmp_path):
    """What is missing is told elsewhere, and without the course's own distribution nothing is known."""
    installed(tmp_path, "transformers", "4.49.0")
    installed(tmp_path, "filelock", "3.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # the course's own folder holds what says its versions
    monkeypatch.setattr(leftovers, "_own_folders", lambda: {tmp_path})
    monkeypatch.setattr(leftovers, "PACKAGES", ())
    monkeypatch.setattr(leftovers, "LIBRARIES", "")
    assert leftovers.check_packages().status == "OK"
    for needed, words in (
        (("transformers>=4.49,<6", "filelock", "nowhere", "torch<1"), ""),
        (("transformers>=4.57,<6", "filelock>=4", "nowhere>=2"), "transformers 4.49.0 instead of <6,>=4.57, filelock"),
    ):
        shutil.rmtree(tmp_path / "tensorrt_llm_course-0.1.0.dist-info", ignore_errors=True)
        installed(tmp_path, "tensorrt_llm_course", "0.1.0", *needed)
        check = leftovers.check_packages()
        assert check.status == ("warning" if words else "OK") and words in check.found and "nowhere" not in check.found
    constraints = re.search(r"pip install --constraint (\S+) transformers filelock$", check.fix)[1]
    assert "\ntransformers==" in Path(constraints).read_text()
    monkeypatch.setattr(leftovers, "LIBRARIES", "import no_such_library")
    assert leftovers.check_packages().status == "failure"  # a warning does not hide it


def test_the_memory_of_a_kernel_that_is_gone_is_a_warning(monkeypatch, tmp_path):
    assert leftovers.check_gpu_memory().status == "OK"  # whatever is here
    sleep = "import time; time.sleep(60)"
    started = "subprocess.Popen([sys.executable, '-c', sys.argv[1], 'ipykernel_launcher'], stdout=subprocess.DEVNULL)"
    command = [sys.executable, "-c", f"import subprocess, sys; print({started}.pid)", sleep]
    orphan = psutil.Process(int(subprocess.run(command, stdout=subprocess.PIPE).stdout))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with subprocess.Popen([sys.executable, "-c", sleep, "ipykernel_launcher"]) as child:
        try:
            script(tmp_path / "nvidia-smi", f"echo '{child.pid}, 512'; echo '99999999, 5'; echo 'nonsense, [N/A]'")
            assert leftovers.check_gpu_memory().status == "OK"  # a child of this process, and one that is not here
            script(tmp_path / "nvidia-smi", f"echo '{child.pid}, 512'; echo '{orphan.pid}, 1024'")
            check = leftovers.check_gpu_memory()
            if orphan.parent() is not None and orphan.parent().pid != 1 and orphan.parent().name() != "systemd":
                pytest.skip("orphans get a parent of their own here")
            assert check.status == "warning" and "1024 MB" in check.found and check.fix == f"kill {orphan.pid}"
        finally:
            child.kill()
            orphan.kill()


# ---- the other environments -------------------------------------------------------------------------------


def test_an_environment_that_is_not_there_matters_only_beside_a_gpu(pretend, monkeypatch):
    monkeypatch.setattr(environments, "python_of", lambda name: None)
    pretend(driver="")
    assert doctor.check_environment("vllm").status == "OK"
    pretend()
    check = doctor.check_environment("vllm")
    assert check.status == "warning" and "env create vllm" in check.fix


@pytest.mark.parametrize(("version", "status"), [("1.2.1", "OK"), ("1.4.0", "warning")])
def test_an_environment_of_the_pinned_version_is_ok_another_is_a_warning(monkeypatch, tmp_path, version, status):
    python = (
        f'case "$2" in *libmpi*) [ -e {tmp_path}/gone ] || echo yes;; *ctypes*) echo yes;; *) echo {version};; esac'
    )
    monkeypatch.setenv("COURSE_TRTLLM_PYTHON", script(tmp_path / "python", python))
    check = doctor.check_environment("trtllm")
    assert check.status == status and version in check.found
    (tmp_path / "gone").touch()  # a library of the system, as in a terminal without the LD_LIBRARY_PATH of another
    ((what, fix),) = environments.missing_libraries("trtllm", str(tmp_path / "python"))
    check = doctor.check_environment("trtllm")
    assert check.status == "warning" and (status == "warning" or what in check.found and check.fix == fix)
    monkeypatch.setenv("COURSE_VLLM_PYTHON", str(tmp_path / "nowhere"))  # it does not start
    check = doctor.check_environment("vllm")
    assert check.status == "failure" and "COURSE_VLLM_PYTHON" in check.fix


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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("x.so: failed to map segment from shared object"),
    ],
)
def test_a_check_that_has_no_memory_says_so(error):
    def check():
        raise error

    line = doctor._guarded(check)
    assert (line.status, line.fix) == ("failure", "Close other programs, or give the container more memory.")
