"""The check for machines with a GPU: how it runs steps and what it reports. Here the steps are tiny, on the CPU."""

import json
import os
import sys
import textwrap
import time

import psutil
import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")
pytest.importorskip("nbmake", reason="the notebook tools are not in this environment")

from helpers import backends
from helpers.bench import run as benchmark
from helpers.errors import BackendUnavailable, InputError
from helpers.machine import doctor
from helpers.maintain import gpu_check

FACTS = {"gpu": "Test GPU", "capability": "9.0", "total": 2**33, "free": 2**32, "cuda": "13.0", "torch": "2.11.0"}
SKIPPING = "from helpers.course.skip import skip\nskip('needs something')"


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "torch_facts", lambda limit=0: dict(FACTS))


def write_notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    for cell in nb.cells:  # what an earlier run left
        cell.execution_count = 1
        cell.outputs = [nbformat.v4.new_output("stream", text="an old output")]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)


def python(code, limit=60.0, kind="doctor"):
    return gpu_check.Step(kind, "a step", [sys.executable, "-c", textwrap.dedent(code)], limit)


def test_without_a_gpu_it_refuses_and_says_what_it_would_run(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "torch_facts", lambda limit=0: {"torch": "2.13.0", "cuda": None, "available": False})
    with pytest.raises(BackendUnavailable) as refused:
        gpu_check.main(out=tmp_path / "out")
    for step in gpu_check.plan(gpu_check.KINDS, tmp_path):
        assert step.name in refused.value.what
    assert "CPU build" in refused.value.cause and refused.value.fix
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(InputError, match="bnech"):
        gpu_check.main(["doctor", "bnech"], tmp_path)


def test_the_benchmark_has_every_backend_that_runs_on_data_centre_gpus():
    contenders = [benchmark.make_runner(benchmark.Workload(), 1, name) for name in gpu_check.CONTENDERS.split(",")]
    assert {runner.row.backend for runner in contenders} == backends.MODULES.keys() - {"tensorrt"}


def test_the_plan_has_every_notebook_and_each_part_once(tmp_path):
    steps = gpu_check.plan(gpu_check.KINDS, tmp_path)
    committed = sorted(path.stem for path in gpu_check.notebooks.NOTEBOOKS.glob("*.ipynb"))
    assert [s.name.split()[1] for s in steps if s.kind == "notebooks"] == committed
    assert sorted({s.kind for s in steps}) == sorted(gpu_check.KINDS)
    assert all(s.limit > 0 and "--only" not in s.command for s in steps)


def test_one_notebook_that_fails_does_not_stop_the_next_and_both_are_reported(on_a_gpu, tmp_path, capsys):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder / "01_bad.ipynb", "1 / 0", "print('never')")
    write_notebook(folder / "02_good.ipynb", "print(6 * 7)", SKIPPING)
    assert gpu_check.main(["doctor", "notebooks"], out, folder=folder) == 1
    report = json.loads((out / "report.json").read_text())
    bad, good = report["steps"][1:]
    assert [step["status"] for step in report["steps"]] == ["passed", "failed", "passed"]
    assert "ZeroDivisionError" in bad["problems"][0] and bad["log"]
    assert good["counts"] == {"cells run": 1, "cells skipped": 1}
    assert good["skipped"] == ["needs something (cell 2)"]
    assert not report["passed"] and report["machine"]["gpu"] == "Test GPU"
    assert report["versions"]["torch"] and "vllm" in report["versions"]
    executed = nbformat.read(out / "notebooks" / "02_good.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "42\n"
    page = (out / "report.md").read_text()
    for said in ("NOT all steps passed", "Test GPU", "needs something", "ZeroDivisionError", "C++ compiler"):
        assert said in page
    assert str(tmp_path) not in page + (out / "report.json").read_text()
    assert "[3/3] notebook 02_good" in capsys.readouterr().out


@pytest.fixture
def two_steps(on_a_gpu, monkeypatch):
    steps = [python("import time; time.sleep(60)"), python("print('{\"checks\": []}')")]
    monkeypatch.setattr(gpu_check, "plan", lambda *_: steps)
    return steps


def test_a_step_that_hangs_is_ended_at_its_limit_and_the_next_one_runs(two_steps, tmp_path):
    two_steps[0].limit = 1.0
    assert gpu_check.main(["doctor"], tmp_path) == 1
    assert [step.status for step in two_steps] == ["timed out", "passed"]
    assert "after 1 s" in two_steps[0].problems[0]


def test_when_the_whole_time_is_used_up_the_rest_is_listed_as_not_run(two_steps, tmp_path):
    assert gpu_check.main(["doctor"], tmp_path, time_limit=2.0) == 1
    assert [step.status for step in two_steps] == ["timed out", "not run"]
    assert "time limit" in (tmp_path / "report.md").read_text()


def test_a_report_of_a_check_that_was_cut_off_lists_what_had_not_ended(tmp_path):
    gpu_check.write([python("")], dict(FACTS), tmp_path, 1.0)
    page = (tmp_path / "report.md").read_text()
    assert "NOT all steps passed" in page and "- a step: had not ended when this was written" in page


def test_what_a_step_started_ends_with_it(tmp_path):
    step = python(
        f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
        time.sleep(60)
        """
    )
    gpu_check.run_step(step, tmp_path, tmp_path, limit=5.0)
    assert step.status == "timed out"
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child)


def test_a_step_that_crashes_or_leaves_nothing_to_read_has_failed(tmp_path):
    for code in ("import os; os._exit(7)", "print('no JSON')"):
        step = python(code)
        gpu_check.run_step(step, tmp_path, tmp_path, limit=30.0)
        assert step.status == "failed" and step.problems


def test_test_results_are_counted_as_pytest_writes_them(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0, 'so it is'\n"
        "@pytest.mark.skip(reason='no such thing')\n"
        "def test_skipped(): pass\n"
    )
    (tmp_path / "test_whole_file.py").write_text("import pytest\npytest.importorskip('nosuch', reason='it is absent')")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        "-c",
        os.devnull,
    ]
    step = gpu_check.Step("tests", "tests", [*command, "--junitxml", str(tmp_path / "tests.xml"), str(tmp_path)], 60.0)
    gpu_check.run_step(step, tmp_path, tmp_path, limit=60.0)
    assert step.status == "failed"
    assert step.counts == {"passed": 1, "failed": 1, "skipped": 2}
    assert step.skipped == ["test_whole_file: it is absent", "test_skipped: no such thing"]
    assert len(step.problems) == 1 and "so it is" in step.problems[0]


def test_no_test_at_all_is_no_success(tmp_path):
    (tmp_path / "tests.xml").write_text("<testsuites><testsuite/></testsuites>")
    step = python("", kind="tests")
    gpu_check.run_step(step, tmp_path, tmp_path, limit=30.0)
    assert step.status == "failed"


def test_benchmark_rows_become_medians_and_absent_backends_are_listed(tmp_path):
    row = {"backend": "aot", "precision": "fp32", "batch_size": 2, "status": "ok", "reason": "", "versions": {}}
    row |= {"ttft_s": [0.003, 0.001, 0.002], "tpot_s": [0.0005] * 3, "e2e_s": [0.1, 0.2, 0.3]}
    absent = {**row, "backend": "vllm", "status": "absent", "reason": "no environment"}
    failed = {**row, "backend": "pytorch", "status": "failed", "reason": "out of memory"}
    work = {"model": "stories", "input_len": 16, "output_len": 64, "repeats": 3}
    record = {"workload": work, "threads": 1, "hardware": {"name": "X"}, "date": "", "rows": [row, absent, failed]}
    (tmp_path / "bench.json").write_text(json.dumps(record))
    step = python("", kind="bench")
    gpu_check.run_step(step, tmp_path, tmp_path, limit=30.0)
    first = step.details["rows"][0]
    assert (first["ttft_ms"], first["tpot_ms"], first["tokens_per_s"]) == (2.0, 0.5, 2 * 64 / 0.2)
    assert step.skipped == ["vllm fp32, batch 2: no environment"]
    assert step.problems == ["pytorch fp32, batch 2: out of memory"] and step.status == "failed"
    assert "| aot fp32 | 2 | 2.0 | 0.5 | 640.0 | ok |" in gpu_check._bench_table(step.details)
