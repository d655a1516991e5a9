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
from helpers.bench import records
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


def python(code, limit=60.0, name="doctor"):
    return gpu_check.Step(name, [sys.executable, "-c", textwrap.dedent(code)], limit)


def test_without_a_gpu_it_refuses_and_says_what_it_would_run(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "torch_facts", lambda limit=0: {"torch": "2.13.0", "cuda": None, "available": False})
    with pytest.raises(BackendUnavailable) as refused:
        gpu_check.main(list(gpu_check.LIMITS), tmp_path / "out")
    for step in gpu_check.plan(gpu_check.LIMITS, tmp_path):
        assert step.name in refused.value.what
    assert "CPU build" in refused.value.cause and refused.value.fix
    assert not (tmp_path / "out").exists()


def test_notebooks_of_somebody_else_stay(on_a_gpu, tmp_path):
    """`gpu-check --out .` in the course's folder had deleted the course's notebooks."""
    write_notebook(tmp_path / "notebooks/thesis.ipynb", "1")
    for call in (lambda: gpu_check.main(["doctor"], tmp_path), lambda: gpu_check.prepare(tmp_path, tmp_path)):
        with pytest.raises(InputError, match="not of an earlier check"):
            call()
    assert (tmp_path / "notebooks/thesis.ipynb").is_file()


def test_the_benchmark_has_every_backend_that_runs_on_data_centre_gpus():
    contenders = [benchmark.make_runner(benchmark.Workload(), 1, name) for name in gpu_check.CONTENDERS.split(",")]
    assert {runner.row.backend for runner in contenders} == backends.MODULES.keys() - {"tensorrt"}


def test_the_plan_has_the_chosen_parts_in_their_order_each_with_a_limit(tmp_path):
    steps = gpu_check.plan(["bench", "doctor"], tmp_path, jobs=3)
    assert [step.name for step in steps] == ["doctor", "bench"]
    with pytest.raises(InputError, match="bnech"):
        gpu_check.main(["doctor", "bnech"], tmp_path)
    tests, notebooks = gpu_check.plan(["tests", "notebooks"], tmp_path, jobs=3)
    for step in (tests, notebooks):
        assert step.limit > gpu_check.ITEM_LIMIT > 0 and step.command[step.command.index("-n") + 1] == "3"


def test_a_notebook_that_fails_or_hangs_does_not_stop_the_next_and_all_are_reported(on_a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ITEM_LIMIT", 8)
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder / "01_bad.ipynb", "1 / 0", "print('never')")
    write_notebook(folder / "02_hangs.ipynb", "print(1)", "while True: pass")
    write_notebook(folder / "03_good.ipynb", "print(6 * 7)", SKIPPING)
    (folder / "04_cut.ipynb").write_text("{")
    assert gpu_check.main(["doctor", "notebooks"], out, folder=folder, jobs=2) == 1
    report = json.loads((out / "report.json").read_text())
    step = report["steps"][1]
    assert [step["status"] for step in report["steps"]] == ["passed", "failed"]
    bad, rest, hangs, cut = step["problems"]
    assert "01_bad: cell 1 failed: ZeroDivisionError" in bad and "cell 2" in rest and step["log"]
    assert hangs.startswith("02_hangs: ") and "Timeout (>8.0s)" in hangs
    assert cut.startswith("04_cut: ") and "json" in cut.lower()
    assert step["counts"] == {"cells run": 1, "cells skipped": 1}
    assert step["skipped"] == ["03_good: needs something (cell 2)"]
    assert not report["passed"] and report["machine"]["GPU"] == "Test GPU"
    assert report["versions"]["torch"] and "vllm (own environment)" in report["versions"]
    executed = nbformat.read(out / "notebooks" / "03_good.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "42\n"
    page = (out / "report.md").read_text()
    for words in ("NOT all steps", "Test GPU", "needs something", "ZeroDivisionError", "C++ compiler", "03_good"):
        assert words in page
    assert str(tmp_path) not in page + (out / "report.json").read_text()


@pytest.fixture
def two_steps(on_a_gpu, monkeypatch):
    check = json.dumps({"checks": [{"name": "x", "status": "OK", "found": ""}]})
    steps = [python("import time; time.sleep(60)"), python(f"print({check!r})")]
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
    gpu_check.write([python("")], gpu_check.conditions(FACTS, "helpers gpu-check"), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "NOT all steps passed" in page and "- doctor: had not ended when this was written" in page


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


def test_a_step_that_crashes_or_leaves_nothing_to_read_or_holds_no_test_has_failed(tmp_path):
    (tmp_path / "tests.xml").write_text("<testsuites><testsuite/></testsuites>")
    for step in (python("import os; os._exit(7)"), python("print('no JSON')"), python("", name="tests")):
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
    options = f"-q -p no:cacheprovider -c {os.devnull} --rootdir={tmp_path} --junitxml {tmp_path}/tests.xml {tmp_path}"
    step = gpu_check.Step("tests", [sys.executable, "-m", "pytest", *options.split()], 60.0)
    gpu_check.run_step(step, tmp_path, tmp_path, limit=60.0)
    assert step.status == "failed"
    assert step.counts == {"passed": 1, "failed": 1, "skipped": 2}
    assert step.skipped == ["test_whole_file: it is absent", "test_skipped: no such thing"]
    assert len(step.problems) == 1 and "so it is" in step.problems[0]


def test_the_benchmark_is_its_record_and_absent_backends_are_listed(tmp_path):
    record = records.read(records.REFERENCES / "h100-stories.json")
    record.rows[0].status, record.rows[0].reason = "absent", "no environment"
    record.rows[1].status, record.rows[1].reason = "failed", "out of memory"
    records.save(record, tmp_path / "bench.json")
    step = python("", name="bench")
    gpu_check.run_step(step, tmp_path, tmp_path, limit=30.0)
    absent, failed = record.rows[:2]
    assert step.skipped[0] == f"{absent.name}, batch {absent.batch_size}: no environment"
    assert step.problems == [f"{failed.name}, batch {failed.batch_size}: out of memory"] and step.status == "failed"
    assert len(step.tables[0].rows) == len(record.rows)
