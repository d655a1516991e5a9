"""What the machine is said to be, beside what the operating system says."""

import importlib
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from helpers import BuildRecipe, engine
from helpers.backends.aot.backend import thread_counts
from helpers.errors import BackendUnavailable, InputError
from helpers.machine import hardware, inductor
from helpers.model.checkpoint import find_checkpoint


def test_the_processor_is_described_as_the_system_describes_it():
    cpu = hardware.describe("cpu")
    assert cpu.device == "cpu" and cpu.name and cpu.driver == ""
    assert cpu.architecture.split()[0] == platform.machine()
    assert cpu.memory_bytes == psutil.virtual_memory().total
    assert 1 <= cpu.cores <= os.cpu_count()
    assert cpu.name in str(cpu)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_vector_instructions_are_those_that_torch_found_too():
    names = hardware.describe("cpu").instructions
    known = {"AVX512": "avx512f", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability())
    assert known is None or known in names
    assert list(names) == sorted(set(names))


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_no_engine_is_named_for_a_library_that_was_replaced_in_a_running_kernel(tmp_path, monkeypatch, name):
    """As by `pip install -U torch`: a build's workers import the new one."""
    library = importlib.import_module(name)  # now: a test before this one may have imported it anew
    engine.identity(BuildRecipe(), find_checkpoint("stories"))
    for file in ("version.py", "__init__.py"):
        (tmp_path / file).write_text(f"__version__ = '{library.__version__}.1'")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BackendUnavailable, match=name) as refused:
        engine.identity(BuildRecipe(), find_checkpoint("stories"))
    assert "Restart" in refused.value.fix


@pytest.mark.parametrize("call", [hardware.describe, hardware.measure_bandwidth])
@pytest.mark.parametrize("device", ["gpu", "cuda:0", None])
def test_a_device_of_another_name_is_refused_and_no_cpu(call, device):
    with pytest.raises(InputError, match="There is no device"):
        call(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_auto_is_the_cpu_and_asking_for_cuda_is_refused():
    assert hardware.resolve_device("auto") == hardware.resolve_device("cpu") == "cpu"
    with pytest.raises(BackendUnavailable) as refused:
        hardware.describe("cuda")
    assert refused.value.cause and refused.value.fix


@pytest.mark.gpu
def test_a_gpu_is_described_as_torch_describes_it():
    gpu, properties = hardware.describe("auto"), torch.cuda.get_device_properties(0)
    assert (gpu.device, gpu.name) == ("cuda", properties.name)
    assert gpu.architecture == f"sm_{properties.major}{properties.minor}"
    assert gpu.driver[0].isdigit()


def test_free_cores_obey_the_affinity_mask():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert hardware.free_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("variable, threads", [("", 4), ("3", 3), ("64", 4), ("2,1", 2), ("0", 4), ("nonsense", 4)])
def test_threads_are_cores_or_the_share_of_them_that_a_server_grants(monkeypatch, variable, threads):
    """As OpenMP reads its variable: what is no number, or 0, counts for nothing."""
    monkeypatch.setattr(hardware, "free_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert hardware.free_threads() == threads
    assert hardware.default_threads(20_000_000) == 1  # of a small model
    assert hardware.default_threads(2_000_000_000) == threads
    assert max(thread_counts(BuildRecipe(), "cpu")) == threads  # those that a build tries


def test_measuring_bandwidth_leaves_the_thread_count_alone():
    before = torch.get_num_threads()
    gigabytes = hardware.measure_bandwidth("cpu", threads=1) / 1e9
    assert 0.1 < gigabytes < 10_000  # bytes per second, not per millisecond
    assert torch.get_num_threads() == before


def test_the_compilers_vector_instructions_are_looked_for_once_and_anew_for_another_compiler(tmp_path, monkeypatch):
    from torch._inductor.cpu_vec_isa import VecISA

    asked, there = [], True

    def look(isa, code):
        asked.append(code)
        return there

    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr(VecISA, "check_build", look)
    isa = SimpleNamespace(build_arch_flags=lambda: "-mavx2")
    for place in (tmp_path, tmp_path, Path(__file__)):  # the last is no store: torch looks, and nothing fails
        monkeypatch.setenv("COURSE_ENGINES", str(place))
        monkeypatch.setattr(VecISA, "check_build", look)
        inductor._know_instructions.__wrapped__()  # as in a new process
        assert VecISA.check_build(isa, "avx") is VecISA.check_build(isa, "avx") is True
    assert asked == ["avx"] * 3
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    monkeypatch.setattr(hardware, "compiler_version", lambda: "g++ 99")
    assert VecISA.check_build(isa, "avx") and len(asked) == 4
    there = False  # it may be there the next time
    assert not VecISA.check_build(isa, "amx") and not VecISA.check_build(isa, "amx") and len(asked) == 6


@pytest.mark.gpu
def test_the_least_time_on_a_gpu_is_the_gpus_and_not_its_hosts():
    """Memory is read as fast for 256 MB as for 2 GB: to start a sum and to fetch its result is no part of reading."""
    speeds = [size / hardware.least_time(size, "cuda", 1) for size in (2**28, 2**31)]
    assert speeds[0] > 0.8 * speeds[1]


def test_the_compiler_is_the_one_that_cxx_names_else_one_on_the_path(tmp_path, monkeypatch):
    for name in ("mine", "g++", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\necho made up 1.0\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "mine")
    assert hardware.compiler() == "mine"
    for wrong in ("ccache g++", "/my environment/bin/g++"):  # no program's name; torch's command line would cut it
        monkeypatch.setenv("CXX", wrong)
        assert hardware.compiler() == "g++"
    assert hardware.compiler_version() == "made up 1.0"
    (tmp_path / "g++").write_text("#!/bin/sh\necho made up 1.1\n")
    assert hardware.compiler_version() == "made up 1.1"  # it was upgraded while this process lives
    (tmp_path / "g++").unlink()
    assert hardware.compiler() == "clang++"
    (tmp_path / "clang++").unlink()
    with pytest.raises(BackendUnavailable, match="compiler"):
        hardware.compiler()
    assert hardware.compiler_version() == "none"
