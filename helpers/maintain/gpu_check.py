"""One command that shows what the course does on a machine with a GPU, and one report that says so.

It runs the doctor, the tests that need a GPU, every notebook through nbmake, and a short benchmark with every backend
that is installed. Each step is a process of its own with a time limit; one that fails does not stop the others. The
report (report.json, report.md) says what ran, on what, with which versions, how long, and what did not run and why.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from helpers.bench import records
from helpers.errors import BackendUnavailable, InputError
from helpers.machine import doctor, environments, hardware
from helpers.maintain import notebooks
from helpers.paths import PROJECT

SCHEMA = 1
KINDS = ("doctor", "tests", "notebooks", "bench")
LIMITS = {"doctor": 60, "tests": 1200, "notebooks": 900, "bench": 900}  # seconds for one step of each kind
OUT = notebooks.BUILD / "gpu-check"
# In fp32, as the notebooks have it, and in bf16, the precision of models as they are published. Not `tensorrt`: its
# engines run on RTX cards only.
CONTENDERS = (
    "pytorch,torch_compile,aot,pytorch:bf16,torch_compile:bf16,aot:bf16,aot:int8,vllm:bf16,"
    "tensorrt_llm:bf16,tensorrt_llm_pytorch:bf16"
)
PACKAGES = (
    "torch triton transformers tokenizers safetensors numpy tensorrt tensorrt-rtx tensorrt-llm vllm onnx onnxscript "
    "ipykernel nbclient nbmake pytest"
).split()
LOG_LINES = 25  # of a failed step's output that the report keeps


@dataclass
class Step:
    """One process. status: "passed", "failed", "timed out" or "not run"."""

    kind: str
    name: str
    command: list[str]
    limit: float
    status: str = "not run"
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # such as {"passed": 12, "skipped": 1}
    skipped: list[str] = field(default_factory=list)  # what did not run inside it, with the reason
    problems: list[str] = field(default_factory=list)
    details: Any = None  # the doctor's checks, or the benchmark's rows
    log: str = ""  # the end of the output, of a step that did not pass


# The steps


def plan(kinds: Iterable[str], out: Path, folder: Path = notebooks.NOTEBOOKS) -> list[Step]:
    """Every step in the order in which it runs. Writes nothing."""
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-c", str(PROJECT / "pyproject.toml"), "-p", "no:cacheprovider", "-q"]
    steps = []
    for kind in KINDS:
        if kind not in kinds:
            continue
        if kind == "doctor":
            steps.append(Step(kind, "doctor", [*python, "helpers", "doctor", "--json"], LIMITS[kind]))
        elif kind == "tests":
            command = [*pytest, "-m", "gpu", "--junitxml", str(out / "tests.xml"), str(PROJECT / "tests")]
            steps.append(Step(kind, "gpu tests", command, LIMITS[kind]))
        elif kind == "notebooks":
            for source in notebooks.select(folder, None):
                copy = out / "notebooks" / source.name
                command = [*pytest, "--nbmake", "--overwrite", f"--nbmake-timeout={LIMITS[kind]}", str(copy)]
                steps.append(Step(kind, f"notebook {source.stem}", command, LIMITS[kind]))
        elif kind == "bench":
            command = [*python, "helpers", "bench", "--batch", "1,4", "--repeats", "3", "--start-together"]
            command += ["--backends", CONTENDERS]
            steps.append(Step(kind, "benchmark", [*command, "--out", str(out / "bench.json")], LIMITS[kind]))
    return steps


def read_doctor(step: Step, out: Path, output: str) -> None:
    step.details = json.loads(output[output.index("{") :])["checks"]
    step.counts = _count(check["status"] for check in step.details)
    step.problems = [
        f"{check['name']}: {check['found']} Fix: {check['fix']}"
        for check in step.details
        if check["status"] == "failure"
    ]


def read_tests(step: Step, out: Path, output: str) -> None:
    words = {"skipped": "skipped", "failure": "failed", "error": "failed"}
    statuses = []
    for case in ElementTree.parse(out / "tests.xml").getroot().iter("testcase"):
        mark = next((child for child in case if child.tag in words), None)
        statuses.append(words[mark.tag] if mark is not None else "passed")
        if mark is not None:
            reason = (mark.get("message") or "no reason given").splitlines()[0]
            if reason == "collection skipped":  # a whole file: the reason is at the end of a tuple, as text
                reason = (mark.text or "").rpartition("Skipped: ")[2].rstrip("')\"")
            said = f"{case.get('name')}: {reason}"
            (step.skipped if mark.tag == "skipped" else step.problems).append(said)
    step.counts = _count(statuses)
    if not step.counts.get("passed"):
        step.problems.append("no test ran")


def read_notebook(step: Step, out: Path, output: str) -> None:
    import nbformat

    executed = Path(step.command[-1])
    nb = nbformat.read(executed, as_version=4)
    result = notebooks.judge(nb, executed.stem)
    step.counts = {"cells run": result.cells_run, "cells skipped": len(result.skipped)}
    step.skipped = list(notebooks.grouped(result.skipped))
    step.problems = result.problems
    if all(cell.execution_count is None for _, cell in notebooks.code_cells(nb)):  # their list would hide the reason
        lines = [line for line in output.splitlines() if line.strip()]
        step.problems = [f"no cell ran: {lines[-1].strip() if lines else 'no output'}"]


def read_bench(step: Step, out: Path, output: str) -> None:
    record = json.loads((out / "bench.json").read_text())
    step.details = {name: record[name] for name in ("workload", "threads", "hardware", "date")}
    step.details["rows"] = [_bench_row(row, record["workload"]["output_len"]) for row in record["rows"]]
    step.counts = _count(row["status"] for row in record["rows"])
    for row in record["rows"]:
        said = f"{row['backend']} {row['precision']}, batch {row['batch_size']}: {row['reason'] or row['status']}"
        if row["status"] not in ("ok", "absent"):
            step.problems.append(said)
        elif row["status"] == "absent":
            step.skipped.append(said)


def _bench_row(row: dict[str, Any], output_len: int) -> dict[str, Any]:
    """Medians: TTFT and TPOT in ms, output tokens per second (batch x output tokens / E2E)."""
    short: dict[str, Any] = {name: row[name] for name in ("backend", "precision", "batch_size", "status", "versions")}
    if row["status"] == "ok":
        short["ttft_ms"] = round(statistics.median(row["ttft_s"]) * 1e3, 3)
        short["tpot_ms"] = round(statistics.median(row["tpot_s"]) * 1e3, 4)
        short["tokens_per_s"] = round(row["batch_size"] * output_len / statistics.median(row["e2e_s"]), 1)
    return short


READERS: dict[str, Callable[[Step, Path, str], None]] = {
    "doctor": read_doctor,
    "tests": read_tests,
    "notebooks": read_notebook,
    "bench": read_bench,
}


def _count(words: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts


# Running


def run_step(step: Step, out: Path, engines: Path, limit: float) -> None:
    """Run one step's process and read what it left. Never raises for what the step does."""
    log = out / "logs" / f"{step.name.replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        "COURSE_ENGINES": str(engines),
        "PYTHONUNBUFFERED": "1",
    }
    start = time.monotonic()
    with log.open("w+", errors="replace") as file:
        errors = subprocess.DEVNULL if step.kind == "doctor" else subprocess.STDOUT
        process = subprocess.Popen(step.command, stdout=file, stderr=errors, env=environment, cwd=PROJECT)
        try:
            late = _wait(process, step, limit)
        finally:
            _end(process)
        file.seek(0)
        output = re.sub(r"\x1b\[[0-9;]*m", "", file.read())  # the colours of a terminal
    step.seconds = round(time.monotonic() - start, 1)
    try:
        READERS[step.kind](step, out, output)
    except (OSError, ValueError, KeyError, ImportError, ElementTree.ParseError) as error:
        if not late:
            step.problems.append(f"it left no result that can be read ({type(error).__name__}: {error})")
    if late:
        step.status = "timed out"
        step.problems.insert(0, f"ended after {limit:.0f} s, its time limit")
    else:
        step.status = "failed" if process.returncode or step.problems else "passed"
        if process.returncode and not step.problems:
            step.problems.append(f"exit status {process.returncode}")
    if step.status != "passed":
        step.log = "\n".join(output.splitlines()[-LOG_LINES:])


def _wait(process: subprocess.Popen, step: Step, limit: float) -> bool:
    """Wait with a sign of life every 15 s. True if the time limit came first."""
    start = said = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if now - start > limit:
            return True
        if now - said > 15:
            said = now
            print(f"    {step.name}: {now - start:.0f} s of at most {limit:.0f}", flush=True)
        time.sleep(0.1)
    return False


def _end(process: subprocess.Popen) -> None:
    """End a process with everything it started: a kernel or a worker must not hold the GPU against the next step."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.kill()
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=10)


def main(
    kinds: Iterable[str] = KINDS,
    out: Path = OUT,
    time_limit: float = 0.0,
    *,
    jobs: int = 1,
    folder: Path = notebooks.NOTEBOOKS,
) -> int:
    """`helpers gpu-check`: exit status 0 if every chosen step passed. time_limit: seconds for all of it; 0 for none.

    jobs: how many of the tests and notebooks run at a time. What they time is then worth less; the benchmark is
    always alone.

    Raises BackendUnavailable, with what would have run, on a machine without a usable GPU.
    """
    kinds = list(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"There is no part {unknown[0]!r}.", fix=f"Name some of: {', '.join(KINDS)}.")
    if jobs < 1:
        raise InputError(f"jobs is {jobs}.", fix="Give 1 or more.")
    out = out.absolute()
    steps = plan(kinds, out, folder)
    print("Looking for a GPU", flush=True)
    facts = doctor.torch_facts(180.0)  # generous: the first import of torch on a fresh machine is slow
    if "gpu" not in facts:
        raise BackendUnavailable(
            "gpu-check is for a machine with an NVIDIA GPU, and PyTorch finds none here; nothing was run.\n"
            f"It would run: {', '.join(step.name for step in steps)}.",
            cause=facts.get("error", "")
            or ("this PyTorch is a CPU build" if not facts.get("cuda") else "no usable GPU"),
            fix="Run it where nvidia-smi lists a GPU. Without one: make test, and helpers doctor says what is missing.",
        )
    for old in ("logs", "notebooks"):  # an old result must not pass for this run's
        shutil.rmtree(out / old, ignore_errors=True)
    for old in ("tests.xml", "bench.json", "report.json", "report.md"):
        (out / old).unlink(missing_ok=True)
    (out / "notebooks").mkdir(parents=True)
    for step in steps:
        if step.kind == "notebooks":
            _copy_clean(folder, Path(step.command[-1]))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        engines = Path(os.environ.get("COURSE_ENGINES") or temporary)
        ended = 0
        together = [step for step in steps if step.kind in ("tests", "notebooks")]
        for group in (
            [step for step in steps if step.kind == "doctor"],
            together,
            [step for step in steps if step.kind == "bench"],
        ):
            with ThreadPoolExecutor(jobs if group is together else 1) as pool:
                running = [pool.submit(_limited, step, out, engines, start, time_limit) for step in group]
                for future in as_completed(running):
                    step, ended = future.result(), ended + 1
                    print(f"[{ended}/{len(steps)}] {step.name} {step.status}", end=" ")
                    print(f"in {step.seconds:.0f} s {_in_words(step.counts)}", flush=True)
                    for problem in step.problems:
                        print(f"    {problem[:300]}", flush=True)
                    # After each step: an interrupted check has a report too.
                    write(steps, facts, out, time.monotonic() - start, jobs)
    print(f"\n{os.path.relpath(out / 'report.md')}\n\n{summary(steps)}")
    return 0 if all(step.status == "passed" for step in steps) else 1


def _limited(step: Step, out: Path, engines: Path, start: float, time_limit: float) -> Step:
    """Run a step in what is left of the whole check's time."""
    left = time_limit - (time.monotonic() - start) if time_limit else step.limit
    if left < 1:
        step.problems.append("the time limit of the whole check was used up")
    else:
        print(f"{step.name} begins", flush=True)
        run_step(step, out, engines, min(step.limit, left))
    return step


def _copy_clean(folder: Path, copy: Path) -> None:
    """A notebook without its committed outputs, so that none of them can pass for this run's."""
    import nbformat

    nb = nbformat.read(folder / copy.name, as_version=4)
    for _, cell in notebooks.code_cells(nb):
        cell.execution_count = None
        if "skip-execution" not in notebooks.tags(cell):
            cell.outputs = []
    nbformat.write(nb, copy)


# Reporting


def machine(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "gpu": facts["gpu"],
        "compute_capability": facts["capability"],
        "gpu_memory_gib": round(facts["total"] / 2**30, 1),
        "driver": hardware.driver(),
        "cuda": facts["cuda"],
        "cores": hardware.free_cores(),
        "host_memory_free_gib": round(hardware.free_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the packages beside this Python, then of TensorRT-LLM and vLLM in environments of their own."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    for name, wanted in environments.ENVIRONMENTS.items():
        python = environments.python_of(name)
        version = environments.installed_version(python, wanted.package) if python else ""
        found[f"{wanted.package} (own environment)"] = version or "not installed"
    return found


def write(steps: list[Step], facts: dict[str, Any], out: Path, seconds: float, jobs: int = 1) -> None:
    """report.json and report.md, without this machine's folders in them."""
    kinds = sorted({step.kind for step in steps}, key=KINDS.index)
    report = {
        "schema": SCHEMA,
        "command": f"helpers gpu-check --only {','.join(kinds)} --jobs {jobs}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": records.commit(),
        "passed": all(step.status == "passed" for step in steps),
        "seconds": round(seconds, 1),
        "machine": machine(facts),
        "versions": versions(),
        "steps": [{key: value for key, value in asdict(step).items() if key != "command"} for step in steps],
    }
    report = notebooks.scrub(report)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: the machine, the versions, a table of the steps, then what did not run and what failed."""
    lines = [
        f"# GPU check: {'all steps passed' if report['passed'] else 'NOT all steps passed'}",
        "",
        f"{report['date']}, commit {report['commit'] or 'unknown'}, {report['seconds']:.0f} s, `{report['command']}`",
        "",
        "| machine | |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in report["machine"].items()),
        "",
        "| package | version |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in report["versions"].items()),
        "",
        "| step | status | seconds | counts |",
        "|---|---|---:|---|",
        *(f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {_in_words(s['counts'])} |" for s in report["steps"]),
    ]
    for step in report["steps"]:
        if step["kind"] == "doctor" and step["details"]:
            lines += ["", "## Doctor", "", "| check | status | found |", "|---|---|---|"]
            lines += [f"| {c['name']} | {c['status']} | {c['found']} |" for c in step["details"]]
        if step["kind"] == "bench" and step["details"]:
            lines += ["", *_bench_table(step["details"])]
    skipped = [(s["name"], reason) for s in report["steps"] for reason in s["skipped"]]
    skipped += [
        (s["name"], "had not ended when this was written")
        for s in report["steps"]
        if s["status"] == "not run" and not s["problems"]
    ]
    if skipped:
        lines += ["", "## What did not run, and why", "", *(f"- {name}: {reason}" for name, reason in skipped)]
    if problems := [(s["name"], problem) for s in report["steps"] for problem in s["problems"]]:
        lines += ["", "## What failed", "", *(f"- {name}: {problem}" for name, problem in problems)]
    for step in report["steps"]:
        if step["log"]:
            lines += ["", f"The end of the output of {step['name']}:", "", "````", step["log"], "````"]
    return "\n".join(lines) + "\n"


def _bench_table(details: dict[str, Any]) -> list[str]:
    work = details["workload"]
    return [
        "## Benchmark",
        "",
        f"{work['model']}, {work['input_len']} tokens in, {work['output_len']} out, greedy; medians of "
        f"{work['repeats']} runs, on {details['hardware'].get('name', 'this machine')}.",
        "",
        "| backend | batch | TTFT ms | TPOT ms | output tokens/s | status |",
        "|---|---:|---:|---:|---:|---|",
        *(
            f"| {row['backend']} {row['precision']} | {row['batch_size']} | {row.get('ttft_ms', '')} "
            f"| {row.get('tpot_ms', '')} | {row.get('tokens_per_s', '')} | {row['status']} |"
            for row in details["rows"]
        ),
    ]


def summary(steps: list[Step]) -> str:
    """One line a step, as the terminal shows at the end."""
    return "\n".join(f"{s.status:<10} {s.name:<32} {s.seconds:6.0f} s  {_in_words(s.counts)}".rstrip() for s in steps)


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {word}" for word, number in counts.items())
