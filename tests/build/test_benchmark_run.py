"""The benchmark on real engines: what a run measures, and contenders that fail alone."""

import contextlib
import dataclasses
import tempfile

import pytest

from helpers import BuildRecipe, load
from helpers.bench import process, records
from helpers.bench import run as benchmark
from helpers.bench.records import Workload
from helpers.machine import hardware
from helpers.machine.worker import Worker

SMALL = Workload(input_len=8, output_len=8, repeats=2, warmup=1)


@pytest.fixture(scope="module")
def record():
    return benchmark.run(dataclasses.replace(SMALL, threads=2), ["pytorch", "vllm"], [1, 2], quiet=True)


def test_a_run_measures_what_it_promises(record):
    assert [(row.name, row.batch_size, row.status) for row in record.rows] == [
        ("pytorch fp32", 1, "ok"),
        ("vllm fp32", 1, "absent"),
        ("pytorch fp32", 2, "ok"),
        ("vllm fp32", 2, "absent"),
    ]
    row = record.row("pytorch fp32")
    assert len(row.ttft_s) == SMALL.repeats and len(row.itl_s) == SMALL.repeats * (SMALL.output_len - 1)
    assert len(row.warmup_e2e_s) == SMALL.warmup
    assert row.tokens_equal == SMALL.output_len and row.logit_error < 1e-5 and row.agrees
    for ttft, tpot, e2e in zip(row.ttft_s, row.tpot_s, row.e2e_s, strict=True):
        assert e2e == pytest.approx(ttft + (SMALL.output_len - 1) * tpot)
    assert row.start_s > row.load_s > 0 and row.peak_host_bytes > 100e6 and row.limit_s < row.median("tpot_s")
    assert (row.device, row.threads, record.threads, row.decode_graph) == ("cpu", 2, 2, None)
    assert record.host.processor and record.host.cores >= 1


def test_a_runs_record_loads_back(record, tmp_path):
    assert records.read(records.save(record, tmp_path / "a.json")) == record


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("phase", ["_prefill", "_decode"])
def test_a_contender_that_is_wrong_in_one_phase_only_does_not_agree(monkeypatch, phase, batch):
    prompts = benchmark.make_prompts(SMALL, batch)
    row = records.Row("pytorch", "fp32", batch)
    with load(SMALL.recipe("pytorch", "fp32")) as engine:
        monkeypatch.setattr(process, "_engine", engine, raising=False)
        expected = process.check(prompts[:1], SMALL.output_len, logits=True)
        for wrong in (False, True):
            right = getattr(engine, phase)
            if wrong:
                monkeypatch.setattr(engine, phase, lambda given, right=right: right(given).roll(1, -1))
            answer = process.check(prompts, SMALL.output_len, logits=True)
            row.logit_error = max(benchmark._logit_error(row, expected["logits"][0]) for row in answer["logits"])
            assert row.agrees is not wrong


def test_no_contender_inherits_what_changes_the_compilation(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # with it, torch_compile is refused
    runner = benchmark.make_runner(dataclasses.replace(SMALL, device="cpu"), 1, "torch_compile")
    with contextlib.closing(runner):
        assert runner._start()


def test_one_failing_batch_size_leaves_the_others(monkeypatch):
    ask = benchmark.Runner.ask

    def failing(self, row, call, **arguments):
        if call == "measure" and row.batch_size == 2:
            arguments["prompts"] = []
        return ask(self, row, call, **arguments)

    monkeypatch.setattr(benchmark.Runner, "ask", failing)
    kept = []
    record = benchmark.run(SMALL, ["pytorch"], [1, 2, 4], quiet=True, keep=lambda r: kept.append(len(r.rows)))
    assert [row.status for row in record.rows] == ["ok", "failed", "ok"]
    assert record.rows[1].reason
    assert kept == [1, 2, 3]


def test_a_dying_process_is_a_reason_and_not_the_end(monkeypatch):
    ask = benchmark.Runner.ask

    def killing(self, row, call, **arguments):
        if call == "measure" and row.batch_size == 1 and self.worker:
            self.worker.kill()
        return ask(self, row, call, **arguments)

    monkeypatch.setattr(benchmark.Runner, "ask", killing)
    record = benchmark.run(SMALL, ["pytorch"], [1, 2], quiet=True)
    assert [row.status for row in record.rows] == ["failed", "ok"]
    assert "worker" in record.rows[0].reason


def test_a_processs_peak_memory_is_its_own():
    ballast = bytearray(800_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    recipe = BuildRecipe(backend="pytorch").to_dict()
    with Worker("helpers.bench.process") as worker, tempfile.TemporaryDirectory() as cache:
        worker.call("load", recipe=recipe, threads=1, cache=cache)
        peak = worker.call("check", prompts=[[1, 2, 3]], output_len=2, logits=False)["host_bytes"]
    assert 20e6 < peak < 800e6 < hardware.peak_host_bytes()
