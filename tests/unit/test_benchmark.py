"""The benchmark: formulas on known numbers, records that load back or are refused, and rows that fail alone."""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from helpers import cli
from helpers.bench import claims, quality, records
from helpers.bench import run as benchmark
from helpers.bench import tables as comparison
from helpers.bench.records import SCHEMA, Host, Record, Row, Workload
from helpers.errors import InputError, RecipeError
from helpers.machine import gpu_time, hardware, load
from helpers.maintain import classroom, room
from helpers.model.checkpoint import find_checkpoint
from helpers.paths import PROJECT

SMALL = Workload(input_len=8, output_len=8, repeats=3, warmup=1)


def new_row(backend="aot", precision="fp32", batch_size=1, tpot=0.002, **changes) -> Row:
    e2e = 0.010 + 7 * tpot
    times = {"ttft_s": [0.010] * 3, "tpot_s": [tpot] * 3, "e2e_s": [e2e] * 3, "warmup_e2e_s": [2 * e2e]}
    return Row(backend, precision, batch_size, **{**times, "limit_s": 0.001, "tokens_equal": 8, **changes})


def new_record(*rows: Row, workload: Workload = SMALL, **changes) -> Record:
    fields = {"hardware": {"name": "a CPU", "device": "cpu"}, "host": Host("a processor", 2, 0.0), "versions": {}}
    fields |= {"threads": 1, "bandwidth": 1e10, "date": "2026-01-01T00:00:00+00:00"}
    return Record(workload, list(rows), **{**fields, **changes})


# Formulas


def test_itl_percentiles_are_nearest_rank():
    row = new_row(itl_s=[i / 1000 for i in range(1, 101)])
    assert [row.itl_percentile(p) for p in (50, 90, 99)] == [0.050, 0.090, 0.099]
    assert math.isnan(new_row().itl_percentile(50))


def test_bytes_per_step_are_weights_and_keys_and_values():
    from helpers.model.checkpoint import find_checkpoint

    config = find_checkpoint("stories").config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # one token, fp32
    tokens = SMALL.input_len + SMALL.output_len // 2
    assert benchmark.bytes_per_step(SMALL, "fp32", 1) == 4 * config.parameter_count() + tokens * kv
    assert benchmark.bytes_per_step(SMALL, "fp32", 3) == 4 * config.parameter_count() + 3 * tokens * kv
    assert benchmark.bytes_per_step(SMALL, "int8", 1) < benchmark.bytes_per_step(SMALL, "fp32", 1) / 3


def test_threads_are_for_the_engine_of_a_cpu(monkeypatch):
    """On a GPU, notebook 04 asked for engines for one thread, which no backend builds there."""
    for device, compiled_for in (("cpu", 3), ("cuda", 0)):
        monkeypatch.setattr(hardware, "resolve_device", lambda given, device=device: device)
        assert SMALL.recipe("aot", "fp32", 3).num_threads == compiled_for
        assert SMALL.recipe("pytorch", "fp32", 3).num_threads == 0


def test_the_shape_that_published_figures_are_about():
    """Llama-3.2-1B as its publisher counts its parameters; tied, so each is read in a step."""
    workload = dataclasses.replace(SMALL, model="dummy:llama-3.2-1b")
    weights = 1_235_814_400 * 2
    kv = 2 * 16 * 8 * 64 * 2 * (SMALL.input_len + SMALL.output_len // 2)
    assert benchmark.bytes_per_step(workload, "bf16", 1) == weights + kv


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_torchs_default_type_changes_no_measured_bandwidth(monkeypatch, dtype):
    import torch

    arrays = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *given, **named: arrays.append(ones(*given, **named)) or arrays[-1])
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        hardware.least_time(1 << 20, "cpu", 1)
        hardware.measure_bandwidth("cpu", 5000)  # and threads without a core take no memory
    finally:
        torch.set_default_dtype(torch.float32)
    assert [array.nbytes for array in arrays] == [1 << 20, hardware.free_cores() << 26]


@pytest.mark.parametrize(("mine", "theirs", "equal"), [([1, 2, 3], [1, 2, 4], 2), ([1], [1], 1), ([9], [1], 0)])
def test_tokens_are_equal_up_to_the_first_difference(mine, theirs, equal):
    assert benchmark._equal_prefix(mine, theirs) == equal


def test_logits_may_be_off_by_a_constant_and_nothing_else():
    """A softmax does not see the constant, and vLLM hands out log-probabilities."""
    assert benchmark._logit_error([1.0, 2.0, 4.0], [-1.0, 0.0, 2.0]) == pytest.approx(0)
    assert benchmark._logit_error([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / 3)
    assert math.isnan(benchmark._logit_error([1.0, math.nan], [1.0, 2.0]))
    assert benchmark._logit_error([0.0, 0.0], [0.0, 0.0]) == benchmark._logit_error([3.0, 3.0], [2.0, 2.0]) == 0
    assert benchmark._logit_error([0.0, 1.0], [0.0, 0.0]) == 0.5


def test_prompts_are_different_equally_long_and_the_same_every_time():
    prompts = benchmark.make_prompts(SMALL, 4)
    assert {len(ids) for ids in prompts} == {SMALL.input_len}
    assert len({tuple(ids) for ids in prompts}) == 4
    assert prompts == benchmark.make_prompts(SMALL, 4)
    assert prompts[:2] == benchmark.make_prompts(SMALL, 2)


IMPOSSIBLE = [{"output_len": 1}, {"repeats": 0}, {"input_len": 65}, {"output_len": 250}, {"decode_batch_sizes": (5,)}]
IMPOSSIBLE += [{"repeats": "5"}, {"repeats": 1.5}, {"model": None}, {"threads": -1}, {"decode_batch_sizes": ("a",)}]
IMPOSSIBLE += [{"threads": 20_000}]


@pytest.mark.parametrize("fields", IMPOSSIBLE)
def test_impossible_workloads_are_refused(fields):
    with pytest.raises(InputError):
        Workload(**fields)


def test_a_contender_is_asked_for_what_it_can_obey():
    """The engine is compiled for the threads that the record names; others would refuse what they have no use for."""
    workload = Workload(threads=2, decode_batch_sizes=[1, 2, 4])
    assert workload.decode_batch_sizes == (2,)  # the other two are there anyway
    recipe = workload.recipe("aot", "fp32", 2)
    assert (recipe.num_threads, recipe.all_decode_batch_sizes) == (2, (1, 2, 4))
    runner = benchmark.make_runner(dataclasses.replace(workload, device="cpu"), 2, "aot:int8")
    assert (runner.recipe.precision, runner.recipe.num_threads) == ("int8", 2)
    for backend, precision in (("pytorch", "fp32"), ("torch_compile", "bf16"), ("tensorrt", "fp32")):
        assert workload.recipe(backend, precision, 2).num_threads == 0
    gpu = dataclasses.replace(workload, device="cuda")
    for backend in ("vllm", "tensorrt_llm", "tensorrt_llm_pytorch"):
        assert gpu.recipe(backend, "bf16", 2).decode_batch_sizes == ()


def test_a_peer_is_built_in_the_folder_of_its_own_runner(tmp_path, monkeypatch):
    peers = runpy.run_path(str(PROJECT / "tests/peers/__main__.py"))
    asked = {}

    class Builder(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__(self)

        def call(self, _, **arguments):
            asked.update(arguments)
            Path(arguments["folder"]).mkdir()

    monkeypatch.setitem(peers["PeerRunner"]._build.__globals__, "Worker", Builder)
    runner = peers["PeerRunner"](Workload(device="cpu"), 1, "llama.cpp", "fp32", Path("python"), tmp_path)
    runner._build()
    assert Path(asked["scratch"]).is_dir()
    runner.close()


# Records


def test_a_file_that_holds_no_record_is_refused(tmp_path):
    path = records.save(new_record(new_row()), tmp_path / "a.json")
    for content in (path.read_bytes()[:200], b"[" * 100_000, b"\xff\xfe\x00", b"", b"9" * 5000, b'{"schema": 1e999}'):
        path.write_bytes(content)
        with pytest.raises(InputError, match="a.json is not read"):
            records.read(path)
    for name in (tmp_path, tmp_path / "b.json"):
        with pytest.raises(InputError, match="cannot be read"):
            records.read(name)


def test_records_load_back(tmp_path):
    record = new_record(new_row(), new_row(batch_size=2), Row("vllm", "fp32", 1, "absent", "not installed here"))
    assert records.read(records.save(record, tmp_path / "a.json")) == record


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: {**raw, "schema": SCHEMA + 1},
        lambda raw: {k: v for k, v in raw.items() if k != "hardware"},
        lambda raw: {**raw, "extra": 1},
        lambda raw: {**raw, "rows": [{**raw["rows"][0], "tpot_s": []}]},
        lambda raw: {**raw, "rows": [{**raw["rows"][0], "tpot_s": [0.001, "fast"]}]},
        lambda raw: {**raw, "rows": [{k: v for k, v in raw["rows"][0].items() if k != "e2e_s"}]},
        lambda raw: {**raw, "rows": [{**raw["rows"][0], "status": "fine"}]},
        lambda raw: {**raw, "workload": {**raw["workload"], "repeats": 0}},
        lambda raw: [raw],
    ],
)
def test_broken_records_are_refused_with_what_is_wrong(tmp_path, damage):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(damage(dataclasses.asdict(new_record(new_row())))))
    with pytest.raises(InputError, match="a.json is not read: ."):
        records.read(path)


def test_where_nothing_can_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    places = [tmp_path / "no folder" / "a.json", tmp_path, tmp_path / "file" / "a.json", tmp_path / ("a" * 300)]
    if hasattr(os, "mkfifo"):  # as /dev/null, which a file of that name would take away from all
        os.mkfifo(tmp_path / "pipe")
        places.append(tmp_path / "pipe")
    for path in places:
        for call in (records.keeper, partial(records.save, new_record())):
            with pytest.raises(InputError):
                call(path)
    assert {path.name for path in tmp_path.iterdir() if not path.is_fifo()} == {"file"}
    assert all(path.is_fifo() for path in places[4:])
    for module, name in ((benchmark, "run"), (room, "timings"), (classroom, "grade")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it measured"))
    for words in (["bench", "--out"], ["course", "timings", "--out"], ["course", "grade", "x.ipynb", "--gradescope"]):
        assert cli.main([*words, str(tmp_path / "no folder" / "a.json")]) == 1
        assert "cannot be written" in capsys.readouterr().err


def test_a_file_is_written_under_a_name_that_nobody_else_has(tmp_path, monkeypatch):
    """Two may write the same one at a time; and NAME.part may be the user's own."""
    (tmp_path / "a.json.part").write_text("mine")
    names = []
    plain = Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, path: (names.append(part.name), plain(part, path))[1])
    for _ in range(2):
        records.save(new_record(new_row()), tmp_path / "a.json")
    records.keeper(tmp_path / "a.json")
    assert len(set(names)) == 2 and (tmp_path / "a.json.part").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.json.part"}


def test_a_folder_that_was_retrained_between_two_records_is_other_work(tmp_path):
    folder = shutil.copytree(find_checkpoint("stories").folder, tmp_path / "model")
    before = benchmark.empty_record(Workload(model=str(folder)))
    assert not records.differences(before, benchmark.empty_record(before.workload), ("workload", "versions"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(InputError, match="versions.checkpoint"):
        records.merge(before, benchmark.empty_record(before.workload))


def test_records_merge_only_if_they_did_the_same_work():
    first = new_record(new_row())
    second = new_record(new_row(tpot=0.003), new_row("pytorch"), new_row("pytorch", batch_size=4))
    for both in (records.merge(first, second), records.merge(second, first)):
        assert both.rows == second.rows
    assert records.merge(first, first).rows == first.rows
    with pytest.raises(InputError, match="at batch 1 no one of them has all"):  # they took no turns
        records.merge(first, new_record(new_row("pytorch")))
    other_work = new_record(new_row(), workload=dataclasses.replace(SMALL, output_len=9))
    newer, elsewhere = new_record(new_row(), versions={"torch": "2.13"}), new_record(new_row(), hardware={"name": "b"})
    for other in (other_work, new_record(new_row(), threads=2), elsewhere, newer):
        with pytest.raises(InputError, match="do not belong in one table"):
            records.merge(first, other)


# Tables and pictures


def test_tables_and_pictures_say_what_was_measured_what_failed_and_what_is_not_here(two_machines):
    other = Row("aot", "int8", 1, "failed", "it broke"), Row("vllm", "fp32", 1, "absent", "not installed here")
    wrong = new_row("pytorch", logit_error=0.5, e2e_s=[0.1, 0.1])
    record = new_record(new_row(logit_error=1e-6), wrong, new_row(batch_size=4), *other)
    text = str(comparison.table(record))
    assert "it broke" in text and "Not on this machine: vllm fp32" in text and "2.00" in text
    assert "NO" in text and record.row("aot fp32").agrees and not wrong.agrees
    assert record.throughput(wrong) == pytest.approx(8 / 0.1)
    for name in ("vllm fp32", "aot int8"):
        with pytest.raises(InputError, match="No measurement"):
            record.row(name)
    assert "aot fp32 2.00 (least 2.00), limit 1.00" in comparison.tpot(record).alt
    assert "at batch 4" in comparison.batching(record).alt
    assert len(comparison.overview(record).rows) == 5 and "failed: it broke" in str(comparison.overview(record))
    assert "GPU: aot bf16 1,000" in comparison.memory(two_machines[1]).alt
    assert "aot fp32 61.0, of which build 60.0" in comparison.first_token(two_machines[0]).alt
    slow = new_record(new_row(tpot=0.004), threads=2)
    text = str(comparison.compare(record, slow, ("mine", "yours")))
    assert "threads: 1 and 2" in text and "0.50" in text
    assert (
        sum("not measured" in str(row) for row in comparison.compare(record, slow).rows)
        == len([row for row in record.rows if row.status == "ok"]) - 1
    )
    programs = comparison.Programs({"a": "\n# a comment\n\nx = 1\nprint(x < 2)\n"})
    assert programs.lines == {"a": 2} and "x &lt; 2" in programs._repr_html_() and "2 lines" in str(programs)


def test_a_record_without_batch_1_shows_its_smallest():
    rows = [new_row(batch_size=4), new_row("pytorch", batch_size=4, tpot=0.004), new_row(batch_size=8)]
    record = new_record(*(dataclasses.replace(row, peak_host_bytes=10**8) for row in rows))
    for show in (comparison.table, comparison.tpot, comparison.first_token, comparison.memory):
        assert str(show(record))
    assert "batch 4" in comparison.table(record).caption and "batch 4" in comparison.tpot(record).alt
    assert claims.judge(record)["2 to 5 times faster than eager PyTorch"][1] == "yes"
    assert (
        "aot fp32: 2.00 (2.00) ms" in str(claims.guide(record, None))
        and claims.aspects(record, {}).rows[0][0] == "aot fp32"
    )


def test_what_was_not_measured_is_said_and_not_a_traceback():
    failed = new_record(Row("aot", "fp32", 1, "failed", "it broke"))
    aspects, guide = partial(claims.aspects, lines={}), partial(claims.guide, theirs=None)
    for show in (comparison.tpot, comparison.batching, aspects, guide):
        for record, words in ((failed, "it broke"), (new_record(), "nothing at batch")):
            with pytest.raises(InputError, match=words):
                show(record)
    with pytest.raises(InputError, match="Its batch sizes: 1"):
        comparison.table(failed, 2)


# Disturbances and intervals


def test_a_disturbed_record_says_so():
    uneven = new_row("pytorch", tpot_s=[0.002, 0.0026])
    calm, busy = Host("a processor", 2, 0.1), Host("a processor", 2, 1.5)
    for record, remarks in (
        (new_record(new_row(device="cpu", threads=1), host=calm), ""),
        (
            new_record(new_row(), host=busy),
            ". Disturbed: other work kept 1.5 cores busy beside the 2 that were used here",
        ),
        (new_record(new_row(threads=2, device="cpu")), ". Disturbed: aot fp32 used 2 threads"),
        (new_record(new_row(device="cuda")), ". Disturbed: aot fp32 ran on cuda"),
    ):
        assert record.remarks() == remarks
    steadier = new_row("pytorch", batch_size=4, tpot_s=[0.002, 0.0028])
    words = ". Disturbed: slowest run up to 1.4 times the fastest: pytorch fp32"
    assert new_record(uneven, steadier, new_row()).remarks() == words  # once, however many batch sizes
    for table in (comparison.table(new_record(uneven)), comparison.overview(new_record(uneven))):
        assert "Disturbed: slowest run up to 1.3 times the fastest: pytorch fp32" in table.caption
    assert records.merge(new_record(host=calm), new_record(host=busy)).host == busy


GPU = {"name": "a GPU", "device": "cuda"}


def on_a_gpu(busy: float | None, handover: float | None = 0.0, **changes) -> Record:
    """An engine that keeps the GPU busy beside vLLM, whose GPU works for `busy` of 2.4 ms."""
    vllm = new_row("vllm", tpot=0.0024, gpu_busy_s=busy, gpu_handover_s=None if busy is None else handover)
    return new_record(new_row(tpot=0.001, gpu_busy_s=0.00095, gpu_handover_s=0.00005), vllm, hardware=GPU, **changes)


def test_a_contender_that_waits_for_its_host_is_named_in_every_table_and_picture():
    record = on_a_gpu(0.0009, handover=0.00006, host=Host("a processor", 4, 1.5))
    waits = "Waiting for its host: vllm fp32"
    busy = "Disturbed: other work kept 1.5 cores busy"
    assert record.row("vllm fp32").gpu_idle == pytest.approx(0.6) and record.row("aot fp32").gpu_idle == 0
    shown = [comparison.table, comparison.overview, partial(comparison.compare, theirs=record), comparison.tpot]
    shown += [partial(comparison.beside, theirs=record), partial(claims.claims, theirs=record), comparison.batching]
    shown += [partial(claims.guide, theirs=None), partial(claims.aspects, lines={}), comparison.first_token]
    for show in shown:
        assert waits in str(show(record)) and busy in str(show(record)), show
    assert comparison.tpot(record).figure._suptitle.get_text()  # and those who look see it too
    assert ["GPU idle", "0%", "60%"] in [list(row) for row in comparison.table(record).rows]
    assert "host: a processor" in comparison.table(record).caption
    assert "not recorded of vllm fp32" in comparison.table(on_a_gpu(None)).caption
    assert "GPU idle" not in str(comparison.table(new_record(new_row())))  # a CPU waits for nobody


@pytest.mark.parametrize(
    ("busy", "verdict"),
    [
        (0.0023, "yes"),  # it would be as slow on any host
        (0.0009, claims.CANNOT_TELL),  # on the fastest host it would be faster than the engine
        (None, claims.CANNOT_TELL),  # nobody looked
    ],
)
def test_who_waits_for_its_host_is_not_judged_by_one_host(busy, verdict):
    words, judged_as = claims.judge(on_a_gpu(busy))["2 to 5 times faster than vLLM"]
    assert judged_as == verdict and "aot fp32 1.00 (1.00) and vllm fp32 2.40 (2.40) ms" in words
    assert ("with any host" in words) == (verdict == claims.CANNOT_TELL)


def test_where_nobody_waits_for_a_host_the_rounds_alone_decide():
    """A round that was slow for both widens nothing, on a CPU and on a GPU that is kept busy."""
    mine, theirs = [0.001, 0.0019, 0.001], [0.003, 0.0057, 0.003]
    for hardware_ in (GPU, {"name": "a CPU", "device": "cpu"}):
        seen = {"gpu_busy_s": 0.003, "gpu_handover_s": 0.0} if hardware_ is GPU else {}
        rows = new_row(tpot_s=mine, **seen), new_row("pytorch", tpot_s=theirs, **seen)
        words, verdict = claims.judge(new_record(*rows, hardware=hardware_))["2 to 5 times faster than eager PyTorch"]
        assert words.startswith("TPOT 3.0 times shorter") and "any host" not in words and verdict == "yes"


def test_a_ratio_is_taken_round_by_round():
    """A round that was slow for both changes nothing; one that was slow for one of them does."""
    assert claims.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == (2, 2)
    assert claims.ratio([2.0, 2.0, 2.0], [1.0, 4.0, 1.0]) == (0.5, 2)
    assert claims.ratio([2.0, 2.0, 4.0], [1.0, 1.0]) == (2 / 1.1, 4 / 0.9)  # of other rounds


# The GPU's work, from a trace


def trace(path: Path, *work: tuple[float, float], kind: str = "kernel") -> Path:
    """A trace with pieces of work that begin at a time and last so long, in microseconds."""
    events = [{"ph": "X", "cat": kind, "ts": start, "dur": took} for start, took in work]
    others = [{"ph": "X", "cat": "cuda_runtime", "ts": 0, "dur": 10**6}, {"ph": "M", "name": "process_name"}]
    path.write_text(json.dumps({"traceEvents": [*events, *others]}))
    return path


def test_the_gpus_time_is_the_union_of_its_work(tmp_path):
    """Against counting microseconds one by one."""
    rng = random.Random(0)
    for _ in range(50):
        work = [(rng.randrange(300), rng.randrange(1, 12)) for _ in range(20)]
        line = "".join("x" if any(a <= t < a + d for a, d in work) else "." for t in range(400)).strip(".")
        gaps = [len(gap) for gap in line.split("x") if gap]
        busy, handover = gpu_time.read(trace(tmp_path / "a.json", *work))
        assert busy == pytest.approx(1e-6 * line.count("x"))
        assert handover == pytest.approx(1e-6 * sum(gap for gap in gaps if gap <= 5))


def test_a_trace_without_a_gpu_says_nothing_of_one(tmp_path):
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(10) + 1
    profiler.export_chrome_trace(str(tmp_path / "cpu.json"))
    for path in (tmp_path / "cpu.json", trace(tmp_path / "b.json", (0, 5), kind="cpu_op")):
        with pytest.raises(InputError, match="no work on the GPU"):
            gpu_time.read(path)
    assert gpu_time.read(trace(tmp_path / "c.json", (0, 5), kind="gpu_memcpy")).busy_s == pytest.approx(5e-6)


def test_a_trace_that_is_never_written_is_no_idle_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_time, "PATIENCE_S", 0.3)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "a.json").write_text('{"traceEvents": [')
    with pytest.raises(InputError, match="no trace"):
        gpu_time.read_from(tmp_path / "traces")
    assert not (tmp_path / "traces").exists()


# Other work on the machine


def test_what_this_process_starts_is_no_other_work():
    program = "sum(range(10**7)); import time; print(flush=True); time.sleep(60)"
    watch = load.OtherWork()
    start_all, start_own = load._seconds()
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        everything, own = (now - then for now, then in zip(load._seconds(), (start_all, start_own), strict=True))
        assert own > 0.02 and everything > 0.02  # the child's seconds are in both
    finally:
        child.kill()
        child.communicate()
    assert load._seconds()[1] - start_own >= own - 0.02  # and stay when it has ended
    assert watch.cores() >= 0


def test_other_work_is_all_that_is_not_our_own(monkeypatch):
    moments = iter([(100.0, 10.0), (104.0, 11.0), (103.0, 14.0)])
    monkeypatch.setattr(load, "_seconds", lambda: next(moments))
    monkeypatch.setattr(load.time, "perf_counter", iter([0.0, 2.0, 3.0]).__next__)
    watch = load.OtherWork()
    assert watch.cores() == pytest.approx(1.5)
    assert watch.cores() == 0  # clocks of different ticks: never less than nothing


def judged(engine: dict, other: dict, claim: str) -> str:
    rows = new_row(**engine), new_row("pytorch", **other)
    return claims.judge(new_record(*rows))[claim][1]


@pytest.mark.parametrize(
    ("engine", "other", "verdict"),
    [
        ([0.0010, 0.0011], [0.0030, 0.0031], "yes"),
        ([0.0010, 0.0010], [0.0019, 0.0030], claims.CANNOT_TELL),
        ([0.0010, 0.0010], [0.0011, 0.0012], "no"),
        ([0.0010] * 3, [0.0008, 0.0009, 0.0009], "no, slower"),
        ([0.0010, 0.0011, 0.0011], [0.0060] * 3, "more"),
        ([0.0010], [0.0021], claims.CANNOT_TELL),  # one run says little
        ([0.0010, 0.0010], [0.0021, 0.0021], claims.CANNOT_TELL),  # and two: half of all pairs miss the median
        ([0.0010] * 3, [0.0021] * 3, "yes"),
    ],
)
def test_faster_is_judged_by_the_whole_interval(engine, other, verdict):
    assert judged({"tpot_s": engine}, {"tpot_s": other}, "2 to 5 times faster than eager PyTorch") == verdict


@pytest.mark.parametrize(
    ("first", "verdict"), [(0.030, "yes"), (0.014, claims.CANNOT_TELL), (0.011, claims.CANNOT_TELL), (0.007, "no")]
)
def test_a_first_request_is_slower_only_beyond_what_later_ones_differ(first, verdict):
    row = {"warmup_e2e_s": [first], "e2e_s": [0.010, 0.013]}
    assert judged(row, {}, "the first inference is slower") == verdict


def test_what_was_started_beside_others_is_judged_by_no_time_of_its_start():
    rows = new_row(start_s=2.0, build_s=12 * 60.0, warmup_e2e_s=[0.04]), new_row("pytorch", start_s=3.0)
    for together, verdicts in ((False, ("yes", "yes")), (True, (claims.CANNOT_TELL,) * 2)):
        record = new_record(*rows, workload=dataclasses.replace(SMALL, start_together=together))
        judged = claims.judge(record)
        assert (judged["the first inference is slower"][1], judged["a build takes 10 to 30 minutes"][1]) == verdicts
        often = claims.guide(record, None).rows[4][1]
        assert often.startswith("aot fp32 or pytorch fp32: " if together else "aot fp32: ")


def test_memory_within_the_error_of_one_measurement_is_not_less():
    claim = "lower memory usage than eager PyTorch"
    for theirs, verdict in ((200, "yes"), (105, claims.CANNOT_TELL), (50, "no")):
        assert judged({"peak_host_bytes": 100}, {"peak_host_bytes": theirs}, claim) == verdict


def test_int8_is_without_loss_only_where_nothing_is_lost():
    for error, verdict in ((1e-6, "yes"), (0.01, "no, but the loss is small"), (0.5, "no")):
        row = new_row(precision="int8", logit_error=error)
        assert claims.judge(new_record(row))["int8 without loss of accuracy"][1] == verdict


def test_an_engine_that_computes_something_else_is_not_faster():
    wrong = new_row(logit_error=0.5), new_row("pytorch", tpot=0.02, logit_error=0.0)
    measured, verdicts = zip(*claims.judge(new_record(*wrong)).values(), strict=True)
    assert set(verdicts) == {"open"} and measured[0] == "not measured: of aot fp32 the answers are wrong"
    precisions = new_record(new_row(), new_row("vllm", "bf16", tpot=0.02))  # these are not compared either
    assert claims.judge(precisions)["2 to 5 times faster than vLLM"] == claims.NOT_MEASURED


def test_not_measured_by_us_stands_beside_no_measured_row():
    measured = claims.aspects(new_record(new_row("tensorrt_llm", "bf16"), hardware={"name": "b", "device": "cuda"}), {})
    assert [row[0] for row in measured.rows] == ["tensorrt_llm bf16"] and "not measured" not in str(measured)
    absent = Row("tensorrt_llm", "bf16", 1, "absent", "it is not here")
    last = claims.aspects(new_record(new_row(), absent), {}).rows[-1]
    assert last[0] == "tensorrt_llm" and last[-1] == "it is not here"


def test_memory_of_the_host_stands_beside_none_of_a_gpu():
    """The driver does not always give a GPU's memory back while somebody looks."""
    rows = new_row(device="cuda", peak_host_bytes=10**6), new_row("pytorch", device="cuda", device_bytes=10**9)
    record = new_record(*rows, hardware={"name": "b", "device": "cuda"})
    assert ("little memory", "pytorch fp32: 1,000 MB", "no record") in claims.guide(record, None).rows


def test_who_cannot_be_told_apart_leads_together():
    rows = new_row(tpot_s=[0.001, 0.002]), new_row("pytorch", tpot_s=[0.0015, 0.003]), new_row("vllm", tpot=0.01)
    guide = {row[0]: row[1] for row in claims.guide(new_record(*rows), None).rows}
    assert guide["one answer, each next word soon (TPOT)"] == "aot fp32 or pytorch fp32: 1.50 (1.00) ms"


@pytest.mark.parametrize(("other_work", "leads"), [(0.0, "aot fp32: "), (1.5, "aot fp32 or pytorch fp32: ")])
def test_what_was_measured_once_beside_other_work_is_told_apart_by_less(other_work, leads):
    rows = new_row(start_s=2.0, build_s=30 * 60.0), new_row("pytorch", start_s=3.0)
    record = new_record(*rows, host=Host("a processor", 2, other_work))
    guide = {row[0]: row[1] for row in claims.guide(record, None).rows}
    assert guide["a process that starts often (first token, built before)"].startswith(leads)
    judged = claims.judge(new_record(new_row(build_s=12 * 60.0), host=Host("a processor", 2, other_work)))
    assert judged["a build takes 10 to 30 minutes"][1] == (claims.CANNOT_TELL if other_work else "yes")


@pytest.fixture
def two_machines():
    """A record of a CPU, and one of a GPU that has vLLM too."""
    mine = new_record(
        new_row(peak_host_bytes=10**8, build_s=60.0, start_s=1.0),
        new_row("pytorch", tpot=0.006, peak_host_bytes=2 * 10**8, start_s=3.0),
        new_row(batch_size=4),
    )
    rows = [
        new_row(name, "bf16", size, tpot=tpot * (1 + size / 8), device_bytes=size_bytes, start_s=start,
                gpu_busy_s=tpot * (1 + size / 8), gpu_handover_s=0.0)
        for name, tpot, size_bytes, start in (
            ("aot", 0.001, 10**9, 5.0), ("pytorch", 0.012, 3 * 10**9, 9.0), ("vllm", 0.0015, 2 * 10**9, 80.0)
        )
        for size in (1, 8)
    ]  # fmt: skip
    theirs = new_record(*rows, hardware={"name": "a GPU", "device": "cuda"})
    return mine, theirs


def test_claims_are_judged_on_each_machine_by_its_own_figures(two_machines):
    mine, theirs = two_machines
    here, there = claims.judge(mine), claims.judge(theirs)
    assert here["2 to 5 times faster than eager PyTorch"] == (
        "TPOT 3.0 times shorter: median (least) of aot fp32 2.00 (2.00) and pytorch fp32 6.00 (6.00) ms",
        "yes",
    )
    assert there["2 to 5 times faster than eager PyTorch"][1] == "more"
    assert there["2 to 5 times faster than vLLM"][1] == "no"
    assert here["2 to 5 times faster than vLLM"] == ("not measured", "open")
    assert here["lower memory usage than eager PyTorch"] == ("host: 100 MB, pytorch 200 MB", "yes")
    assert there["vLLM uses more memory"] == ("GPU: 1,000 MB, vllm 2,000 MB", "yes")
    assert here["a build takes 10 to 30 minutes"] == ("1.0 minutes", "less")
    table = claims.claims(mine, theirs)
    assert {len(row) for row in table.rows} == {5} and "a GPU" in table.caption
    assert "no record" in str(claims.claims(mine, None))


def test_what_is_missing_on_this_machine_comes_from_the_other_marked_as_such(two_machines):
    mine, theirs = two_machines
    rows = {row[0]: row for row in comparison.beside(mine, theirs).rows}
    assert rows["vllm bf16"][1:5] == ("not measured", "-", "-", "-")
    assert float(rows["vllm bf16"][5]) == pytest.approx(1.69, abs=0.01)
    assert rows["aot fp32"][5:] == ("not measured", "-", "-", "-")
    assert comparison.MISSING in comparison.beside(mine, None).caption
    often = dataclasses.replace(theirs, workload=dataclasses.replace(SMALL, repeats=9, start_together=True))
    assert comparison.beside(mine, often).rows == comparison.beside(mine, theirs).rows
    longer = dataclasses.replace(theirs, workload=dataclasses.replace(SMALL, output_len=9))
    with pytest.raises(InputError, match="output_len: 8 and 9"):
        comparison.beside(mine, longer)
    moved = dataclasses.replace(theirs, workload=dataclasses.replace(SMALL, model="./elsewhere"))
    with pytest.raises(InputError, match="workload.model"):
        comparison.beside(mine, moved)
    one, other = (dataclasses.replace(r, versions={**r.versions, "checkpoint": "1f0c"}) for r in (mine, moved))
    assert len(comparison.beside(one, other).rows) == len(comparison.beside(mine, theirs).rows)
    versions = [{**record.versions, "checkpoint": name} for record, name in ((mine, "a" * 12), (theirs, "b" * 12))]
    mine, theirs = (dataclasses.replace(r, versions=v) for r, v in zip(two_machines, versions, strict=True))
    with pytest.raises(InputError, match="the checkpoint's files"):  # "./model" is another one in each folder
        comparison.beside(mine, theirs)


def test_the_guide_and_the_aspects_name_who_leads(two_machines):
    mine, theirs = two_machines
    guide = {row[0]: row[1:] for row in claims.guide(mine, theirs).rows}
    assert guide["one answer, each next word soon (TPOT)"] == ("aot fp32: 2.00 (2.00) ms", "aot bf16: 1.13 (1.13) ms")
    assert guide["a model that is new or changes (first token ever)"] == ("pytorch fp32: 3.1 s", "aot bf16: 5.0 s")
    wrong = new_record(new_row(logit_error=0.5), new_row("pytorch", tpot=0.006, logit_error=0.0))
    assert "pytorch" in claims.guide(wrong, None).rows[0][1]  # fast and wrong is not best
    rows = {row[0]: row for row in claims.aspects(mine, {"aot": 5, "tensorrt_llm": 12}).rows}
    assert rows["aot fp32"][1:4] == (5, "61.0", "1.0") and "not measured by us" in rows["tensorrt_llm"]


def test_published_figures_say_who_when_what_on_which_machine_and_where():
    table = comparison.published()
    assert all(all(row) and row[-1].startswith("https://") for row in table.rows)


def test_the_peers_records_are_whole():
    for path in (Path(__file__).parents[1] / "peers" / "records").glob("*.json"):
        record = records.read(path)
        assert record.row("onnxruntime-genai fp32").versions["onnxruntime-genai"] and record.row("aot fp32").agrees


def test_records_that_come_with_the_course_are_whole_and_of_nobodys_machine():
    for path in records.REFERENCES.glob("*.json"):
        record = records.read(path)
        card = path.name.partition("-")[0].upper()  # a result of one machine must not be filed as another's
        assert card in f"{record.hardware['name']} {record.hardware['device'].upper()}"
        assert record.versions["torch"] and record.commit and record.command
        assert "/" not in record.workload.model and '"/' not in path.read_text()


# Real runs, in processes of their own


def test_the_commit_of_a_repository_around_a_copy_is_not_the_courses(tmp_path, monkeypatch):
    around = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@here"]
    subprocess.run([*around, "init", "-q"], check=True)
    subprocess.run([*around, "commit", "-q", "--allow-empty", "-m", "my own work"], check=True)
    monkeypatch.delenv("COURSE_COMMIT", raising=False)
    here = records.commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert records.commit() == here
    monkeypatch.setattr(records, "PROJECT", tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", records.commit())
    monkeypatch.setattr(records, "PROJECT", tmp_path / "course")
    assert records.commit() == ""


@pytest.mark.parametrize("words", ["bench --batch 4 --out R", "bench --out R --batch 4", "bench --out=R --batch 4"])
def test_a_record_names_the_command_without_its_own_place(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["helpers", *words.replace("R", "/home/ann/r.json").split()])
    assert benchmark._command() == "helpers bench --batch 4"


@pytest.mark.parametrize(
    "arguments",
    [
        ({}, ["aot"]), (Workload(), "aot"), (Workload(), []), (Workload(), [None]), (Workload(), ["aot"], 4),
        (Workload(), ["aot"], "14"), (Workload(), ["aot"], []), (Workload(), ["aot"], [True]),
        (SMALL, ["nothing"]), (SMALL, ["pytorch:int8"]), (SMALL, ["pytorch"], [5]),
    ],
    ids=str,
)  # fmt: skip
def test_what_only_looks_like_a_benchmark_is_refused_before_it_begins(monkeypatch, arguments):
    monkeypatch.setattr(benchmark, "empty_record", lambda *_: pytest.fail("begun"))
    with pytest.raises((InputError, RecipeError)) as refused:
        benchmark.run(*arguments, quiet=True)
    assert refused.value.fix


def test_what_a_benchmark_looks_at_before_it_begins_is_shown_where_it_takes_long(monkeypatch, capsys):
    """PyTorch and transformers are imported for it."""

    def slow(_):
        time.sleep(0.3)
        raise InputError("That is all.")

    monkeypatch.setattr(benchmark, "empty_record", slow)
    monkeypatch.setattr("helpers.progress.SILENT_S", 0.1)
    for quiet in (True, False):
        with pytest.raises(InputError):
            benchmark.run(SMALL, ["pytorch"], quiet=quiet)
        assert ("Looking at this machine" in capsys.readouterr().err) != quiet


@pytest.mark.parametrize("path", [b"x", None, 5, [], "\0"], ids=repr)
def test_what_names_no_file_is_refused(path):
    for call in (records.read, records.keeper, lambda path: records.save(new_record(new_row()), path)):
        with pytest.raises(InputError, match="names no file"):
            call(path)
    with pytest.raises(InputError, match="no records"):
        records.merge()


def test_a_records_file_in_its_place_is_refused(tmp_path):
    record, file = new_record(new_row()), str(tmp_path / "record.json")
    records.save(record, file)
    shown = (comparison.table, comparison.overview, comparison.tpot, comparison.batching, comparison.first_token)
    shown += (comparison.memory, records.merge, lambda given: records.save(given, file))
    shown += (lambda given: claims.aspects(given, {}), lambda given: quality.compare(given, {}))
    for two in (claims.claims, claims.guide, comparison.compare, comparison.beside):
        shown += (partial(two, theirs=record), partial(two, record))
    for show in shown:
        with pytest.raises(InputError, match="Record is asked for") as refused:
            show(file)
        assert "records.read" in refused.value.fix
    assert records.read(file) == record


def test_the_command_line(tmp_path, capsys, monkeypatch):
    record = new_record(new_row(), Row("vllm", "fp32", 1, "absent", "not installed here"))
    asked = []

    def run(workload, contenders, batch_sizes, keep):
        asked.append((workload.input_len, workload.output_len, contenders, batch_sizes))
        keep(record)
        return record

    monkeypatch.setattr(benchmark, "run", run)
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    words = "bench --backends pytorch,aot:int8 --batch 1,4 --input 8 --output 8 --out"
    for path in paths:
        assert cli.main([*words.split(), path]) == 0
    assert asked[0] == (8, 8, ["pytorch", "aot:int8"], [1, 4])
    assert "TPOT, ms" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", *paths]) == 0
    assert "Same work, same machine, same versions" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    paths[1] = str(Path(paths[1]).rename(tmp_path / "b/a.json"))  # of one name in two folders
    assert cli.main(["bench", "--compare", *paths, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert all(f"{path}: TPOT (least), ms" in row for path in paths)
    assert cli.main(["bench", "--compare", paths[0], "nothing.json"]) == 1


def test_a_contender_that_is_named_in_two_ways_is_measured_once(monkeypatch):
    names = []
    monkeypatch.setattr(benchmark, "make_runner", lambda workload, threads, name: names.append(name))
    monkeypatch.setattr(benchmark, "run_all", lambda *_, **__: None)
    workload = benchmark.Workload(model="stories", device="cpu")
    benchmark.run(workload, ["pytorch", "aot:int8", "pytorch:fp32", "aot"], [1], quiet=True)
    assert names == ["pytorch", "aot:int8", "aot"]
