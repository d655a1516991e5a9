"""The benchmark: formulas on known numbers, records that load back or are refused, and rows that fail alone."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pytest

from helpers import BuildRecipe, cli
from helpers.bench import claims, records
from helpers.bench import run as benchmark
from helpers.bench import tables as comparison
from helpers.bench.records import SCHEMA, Record, Row, Workload
from helpers.errors import InputError, RecipeError
from helpers.machine import hardware
from helpers.machine.worker import Worker

SMALL = Workload(input_len=8, output_len=8, repeats=2, warmup=1)


def made_row(backend="aot", precision="fp32", batch_size=1, tpot=0.002, **changes) -> Row:
    e2e = 0.010 + 7 * tpot
    times = {"ttft_s": [0.010] * 2, "tpot_s": [tpot] * 2, "e2e_s": [e2e] * 2, "warmup_e2e_s": [2 * e2e]}
    return Row(backend, precision, batch_size, **{**times, "limit_s": 0.001, "tokens_equal": 8, **changes})


def made_record(*rows: Row, workload: Workload = SMALL, **changes) -> Record:
    machine = {"name": "made", "device": "cpu"}
    return Record(workload, list(rows), **{"hardware": machine, "versions": {}, "threads": 1, "bandwidth": 1e10,
                                           "date": "2026-01-01T00:00:00+00:00", **changes})  # fmt: skip


# Formulas


def test_throughput_counts_every_token_of_the_batch():
    record = made_record(row := made_row(batch_size=4, e2e_s=[0.1, 0.1]))
    assert record.throughput(row) == pytest.approx(4 * 8 / 0.1)


def test_itl_percentiles_are_nearest_rank():
    row = made_row(itl_s=[i / 1000 for i in range(1, 101)])
    assert [row.itl_percentile(p) for p in (50, 90, 99)] == [0.050, 0.090, 0.099]
    assert math.isnan(made_row().itl_percentile(50))


def test_bytes_per_step_are_weights_and_keys_and_values():
    from helpers.model.checkpoint import find_checkpoint

    config = find_checkpoint("stories").config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4  # one token, fp32
    tokens = SMALL.input_len + SMALL.output_len // 2
    assert benchmark.bytes_per_step(SMALL, "fp32", 1) == 4 * config.parameter_count() + tokens * kv
    assert benchmark.bytes_per_step(SMALL, "fp32", 3) == 4 * config.parameter_count() + 3 * tokens * kv
    assert benchmark.bytes_per_step(SMALL, "int8", 1) < benchmark.bytes_per_step(SMALL, "fp32", 1) / 3


def test_least_time_grows_with_the_bytes():
    assert 0 < benchmark.least_time(10**6, "cpu", 1) < benchmark.least_time(10**8, "cpu", 1)


@pytest.mark.parametrize(("mine", "theirs", "equal"), [([1, 2, 3], [1, 2, 4], 2), ([1], [1], 1), ([9], [1], 0)])
def test_tokens_are_equal_up_to_the_first_difference(mine, theirs, equal):
    assert benchmark._equal_prefix(mine, theirs) == equal


def test_logits_may_be_off_by_a_constant_and_nothing_else():
    """A softmax does not see the constant, and vLLM hands out log-probabilities."""
    assert benchmark._logit_error([1.0, 2.0, 4.0], [-1.0, 0.0, 2.0]) == pytest.approx(0)
    assert benchmark._logit_error([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / 3)
    assert benchmark._logit_error(None, [1.0]) is None


def test_a_contender_that_computes_something_else_is_flagged():
    good, bad = made_row(logit_error=1e-6), made_row(precision="int8", logit_error=0.5)
    assert good.agrees and not bad.agrees
    assert "NO" in str(comparison.table(made_record(good, bad)))


def test_prompts_are_different_equally_long_and_the_same_every_time():
    prompts = benchmark.make_prompts(SMALL, 4)
    assert {len(ids) for ids in prompts} == {SMALL.input_len}
    assert len({tuple(ids) for ids in prompts}) == 4
    assert prompts == benchmark.make_prompts(SMALL, 4)
    assert prompts[:2] == benchmark.make_prompts(SMALL, 2)


@pytest.mark.parametrize("fields", [{"output_len": 1}, {"repeats": 0}, {"input_len": 65}, {"output_len": 250}])
def test_impossible_workloads_are_refused(fields):
    with pytest.raises(InputError):
        Workload(**fields)


def test_impossible_runs_are_refused_before_anything_is_loaded():
    with pytest.raises(RecipeError):
        benchmark.run(SMALL, ["nothing"])
    with pytest.raises(RecipeError):
        benchmark.run(SMALL, ["pytorch:int8"])
    with pytest.raises(InputError):
        benchmark.run(SMALL, ["pytorch"], [5])
    with pytest.raises(InputError):
        benchmark.batch_sizes("1,x")


# Records


def test_records_load_back(tmp_path):
    record = made_record(made_row(), made_row(batch_size=2), Row("vllm", "fp32", 1, "absent", "not installed here"))
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
    path.write_text(json.dumps(damage(dataclasses.asdict(made_record(made_row())))))
    with pytest.raises(InputError, match="a.json is not read: ."):
        records.read(path)


def test_truncated_and_missing_records_are_refused(tmp_path):
    path = records.save(made_record(made_row()), tmp_path / "a.json")
    path.write_text(path.read_text()[:200])
    for name in ("a.json", "b.json"):
        with pytest.raises(InputError):
            records.read(tmp_path / name)


def test_records_merge_only_if_they_did_the_same_work():
    first = made_record(made_row())
    second = made_record(made_row("pytorch"), date="2026-01-02T00:00:00+00:00")
    assert [row.name for row in records.merge(first, second).rows] == ["aot fp32", "pytorch fp32"]
    other_work = made_record(made_row(), workload=dataclasses.replace(SMALL, output_len=9))
    for other in (other_work, made_record(made_row(), threads=2), made_record(made_row(), hardware={"name": "b"})):
        with pytest.raises(InputError, match="do not belong in one table"):
            records.merge(first, other)


def test_a_row_is_asked_for_by_name():
    record = made_record(made_row(), Row("vllm", "fp32", 1, "absent"))
    assert record.row("aot fp32").backend == "aot"
    for name in ("vllm fp32", "aot int8"):
        with pytest.raises(InputError, match="No measurement"):
            record.row(name)


# Tables and pictures


def test_the_table_names_what_failed_and_what_is_not_installed():
    rows = (
        made_row(),
        Row("aot", "int8", 1, "failed", "it broke"),
        Row("vllm", "fp32", 1, "absent", "not installed here"),
    )
    text = str(comparison.table(made_record(*rows)))
    assert "it broke" in text and "Not on this machine: vllm fp32" in text and "2.00" in text
    assert "TPOT" in str(comparison.formulas())


def test_pictures_say_their_numbers():
    record = made_record(made_row(), made_row("pytorch", tpot=0.004), made_row(batch_size=4))
    assert "aot fp32 2.00, limit 1.00" in comparison.tpot(record).alt
    assert "at batch 4" in comparison.batching(record).alt


@pytest.fixture
def two_machines():
    """A record of a CPU, and one of a GPU that has vLLM too."""
    mine = made_record(
        made_row(peak_host_bytes=10**8, build_s=60.0, start_s=1.0),
        made_row("pytorch", tpot=0.006, peak_host_bytes=2 * 10**8, start_s=3.0),
        made_row(batch_size=4),
    )
    rows = [
        made_row(name, "bf16", size, tpot=tpot * (1 + size / 8), device_bytes=size_bytes, start_s=start)
        for name, tpot, size_bytes, start in (
            ("aot", 0.001, 10**9, 5.0), ("pytorch", 0.012, 3 * 10**9, 9.0), ("vllm", 0.0015, 2 * 10**9, 80.0)
        )
        for size in (1, 8)
    ]  # fmt: skip
    theirs = made_record(*rows, hardware={"name": "made GPU", "device": "cuda"})
    return mine, theirs


def test_claims_are_judged_on_each_machine_by_its_own_figures(two_machines):
    mine, theirs = two_machines
    here, there = claims.judge(mine), claims.judge(theirs)
    assert here["2 to 5 times faster than eager PyTorch"] == (
        "TPOT 3.0 times shorter (aot fp32 against pytorch fp32)", "yes")  # fmt: skip
    assert there["2 to 5 times faster than eager PyTorch"][1] == "more"
    assert there["2 to 5 times faster than vLLM"][1] == "no"
    assert here["2 to 5 times faster than vLLM"] == ("not measured", "open")
    assert here["lower memory usage than eager PyTorch"] == ("host: 100 MB, pytorch 200 MB", "yes")
    assert there["vLLM uses more memory"] == ("GPU: 1,000 MB, vllm 2,000 MB", "yes")
    assert here["a build takes 10 to 30 minutes"] == ("1.0 minutes", "less")
    table = claims.claims(mine, theirs)
    assert {len(row) for row in table.rows} == {5} and "made GPU" in table.caption
    assert "no record" in str(claims.claims(mine, None))


def test_what_is_missing_on_this_machine_comes_from_the_other_marked_as_such(two_machines):
    mine, theirs = two_machines
    rows = {row[0]: row for row in comparison.beside(mine, theirs).rows}
    assert rows["vllm bf16"][1:4] == ["not measured", "-", "-"]
    assert float(rows["vllm bf16"][4]) == pytest.approx(1.69, abs=0.01)
    assert rows["aot fp32"][4:] == ["not measured", "-", "-"]
    assert comparison.MISSING in comparison.beside(mine, None).caption
    often = dataclasses.replace(theirs, workload=dataclasses.replace(SMALL, repeats=9, start_together=True))
    assert comparison.beside(mine, often).rows == comparison.beside(mine, theirs).rows
    longer = dataclasses.replace(theirs, workload=dataclasses.replace(SMALL, output_len=9))
    with pytest.raises(InputError, match="output_len: 8 and 9"):
        comparison.beside(mine, longer)


def test_the_guide_and_the_aspects_name_who_leads(two_machines):
    mine, theirs = two_machines
    guide = {row[0]: row[1:] for row in claims.guide(mine, theirs).rows}
    assert guide["one answer, each next word soon (TPOT)"] == ("aot fp32: 2.00 ms", "aot bf16: 1.13 ms")
    assert guide["a model that is new or changes (first token ever)"] == ("pytorch fp32: 3.0 s", "aot bf16: 5.0 s")
    wrong = made_record(made_row(logit_error=0.5), made_row("pytorch", tpot=0.006, logit_error=0.0))
    assert "pytorch" in claims.guide(wrong, None).rows[0][1]  # fast and wrong is not best
    rows = {row[0]: row for row in claims.aspects(mine, {"aot": 5, "tensorrt_llm": 12}).rows}
    assert rows["aot fp32"][1:4] == (5, "61.0", "1.0") and "not measured by us" in rows["tensorrt_llm"]


def test_an_overview_has_a_line_for_each_row(two_machines):
    failed = Row("vllm", "bf16", 1, "failed", "it broke")
    assert len(comparison.overview(two_machines[1]).rows) == 6
    assert "failed: it broke" in str(comparison.overview(made_record(made_row(), failed)))
    assert "GPU: aot bf16 1,000" in comparison.memory(two_machines[1]).alt
    assert "aot fp32 61.0, of which build 60.0" in comparison.first_token(two_machines[0]).alt


def test_programs_count_lines_of_code_only():
    programs = comparison.Programs({"a": "\n# a comment\n\nx = 1\nprint(x < 2)\n"})
    assert programs.lines == {"a": 2}
    assert "x &lt; 2" in programs._repr_html_() and "2 lines" in str(programs)


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
        assert card in record.hardware["name"] and record.versions["torch"] and record.commit and record.command
        assert "/" not in record.workload.model and '"/' not in path.read_text()


def test_comparing_says_what_differs():
    slow = made_record(made_row(tpot=0.004), threads=2)
    text = str(comparison.compare(made_record(made_row()), slow, ("mine", "yours")))
    assert "threads: 1 and 2" in text and "0.50" in text


# Real runs, in processes of their own


@pytest.fixture(scope="module")
def record():
    return benchmark.run(SMALL, ["pytorch", "vllm"], [1, 2], quiet=True)


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
    assert row.tokens_equal == SMALL.output_len and row.logit_error == 0 and row.agrees
    for ttft, tpot, e2e in zip(row.ttft_s, row.tpot_s, row.e2e_s, strict=True):
        assert e2e == pytest.approx(ttft + (SMALL.output_len - 1) * tpot)
    assert row.start_s > row.load_s > 0 and row.peak_host_bytes > 100e6 and row.limit_s < row.median("tpot_s")


def test_a_runs_record_loads_back(record, tmp_path):
    assert records.read(records.save(record, tmp_path / "a.json")) == record


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
    assert "ended unexpectedly" in record.rows[0].reason


def test_a_processs_peak_memory_is_its_own():
    ballast = bytearray(800_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    recipe = BuildRecipe(backend="pytorch").to_dict()
    with Worker("helpers.bench.process") as worker, tempfile.TemporaryDirectory() as cache:
        worker.call("load", recipe=recipe, threads=1, cache=cache)
        peak = worker.call("check", prompts=[[1, 2, 3]], output_len=2, logits=False)["host_bytes"]
    assert 20e6 < peak < 800e6 < hardware.peak_host_bytes()


def test_the_command_line(tmp_path, capsys, monkeypatch):
    record = made_record(made_row(), Row("vllm", "fp32", 1, "absent", "not installed here"))
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
    assert "Same work, same machine, same versions." in capsys.readouterr().out
    assert cli.main(["bench", "--compare", paths[0], "nothing.json"]) == 1
