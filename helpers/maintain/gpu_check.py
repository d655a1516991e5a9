"""One command that shows what the course does on a machine with a GPU, and one report that says so.

It runs the doctor, the tests that need a GPU, every notebook, and a short benchmark with every backend that is
installed. Each is a process with a time limit. Among the tests and the notebooks, pytest ends what hangs and goes on
with the next. The report (report.json, report.md) is written after each step: what ran, on what, with which versions,
how long, and what did not run and why.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from helpers.bench import records, tables
from helpers.display import Table
from helpers.errors import BackendUnavailable, CourseError, InputError
from helpers.machine import doctor, environments, hardware
from helpers.maintain import notebooks
from helpers.paths import PROJECT
from helpers.progress import Progress

SCHEMA = 2
LIMITS = {"doctor": 120, "tests": 1800, "notebooks": 3600, "bench": 900}  # seconds of each step, in their order
ITEM_LIMIT = 900  # seconds of one test or one notebook
# In fp32, as the notebooks have it, and in bf16, the precision of models as they are published. Not `tensorrt`: its
# engines run on RTX cards only.
CONTENDERS = (
    "pytorch,torch_compile,aot,pytorch:bf16,torch_compile:bf16,aot:bf16,aot:int8,aot:int4,vllm:bf16,"
    "tensorrt_llm:bf16,tensorrt_llm_pytorch:bf16"
)
PACKAGES = (
    "torch triton transformers tokenizers safetensors numpy tensorrt tensorrt-rtx tensorrt-llm vllm onnx onnxscript "
    "ipykernel nbclient nbmake pytest pytest-xdist"
).split()
LOG_LINES = 25  # of a failed step's output that the report keeps


@dataclass
class Step:
    """One process. status: "passed", "failed", "timed out" or "not run"."""

    name: str
    command: list[str]
    limit: float
    status: str = "not run"
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # such as {"passed": 12, "skipped": 1}
    skipped: list[str] = field(default_factory=list)  # what did not run inside it, with the reason
    problems: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)  # its results: the doctor's checks, the benchmark's rows
    log: str = ""  # the end of the output, of a step that did not pass


# The steps


def plan(names: Sequence[str], out: Path, jobs: int = 1) -> list[Step]:
    """Every step in the order in which it runs. Writes nothing."""
    python = [sys.executable, "-m"]
    # pytest-xdist also for one job: a test that hangs in native code can only be ended with its process ("thread").
    pytest = [*python, "pytest", "-c", str(PROJECT / "pyproject.toml"), "-p", "no:cacheprovider", "-q", "--color=no"]
    pytest += ["-n", str(jobs), f"--timeout={ITEM_LIMIT}"]
    nbmake = ["--nbmake", "--overwrite", f"--nbmake-timeout={notebooks.CELL_TIMEOUT_S}"]
    bench = ["helpers", "bench", "--batch", "1,4", "--repeats", "3", "--start-together", "--backends", CONTENDERS]
    commands = {
        "doctor": [*python, "helpers", "doctor", "--json"],
        "tests": [
            *pytest,
            "--timeout-method=thread",
            "-m",
            "gpu",
            "--junitxml",
            str(out / "tests.xml"),
            str(PROJECT / "tests"),
        ],
        "notebooks": [*pytest, *nbmake, "--junitxml", str(out / "notebooks.xml"), str(out / "notebooks")],
        "bench": [*python, *bench, "--out", str(out / "bench.json")],
    }
    return [Step(name, commands[name], limit) for name, limit in LIMITS.items() if name in names]


def read_doctor(step: Step, out: Path, output: str) -> None:
    answer, _ = json.JSONDecoder().raw_decode(output, output.index("{"))
    checks = [doctor.Check(**check) for check in answer["checks"]]
    step.counts = dict(Counter(check.status for check in checks))
    step.problems = [str(check) for check in checks if check.status == "failure"]
    rows = [tuple(asdict(check).values()) for check in checks]
    step.tables = [Table("Doctor", tuple(asdict(checks[0])), rows)]


def test_cases(report: Path) -> Iterator[tuple[str, str, str, float]]:
    """(name, "passed", "failed" or "skipped", why, seconds) of every test in pytest's JUnit report."""
    words = {"skipped": "skipped", "failure": "failed", "error": "failed"}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        mark = next((child for child in case if child.tag in words), None)
        reason = "" if mark is None else (mark.get("message") or "no reason given")
        if mark is not None and reason == "collection skipped":  # a whole file: the reason ends a tuple, as text
            reason = (mark.text or "").rpartition("Skipped: ")[2].rstrip("')\"")
        seconds = float(case.get("time") or 0)
        yield case.get("name") or "", "passed" if mark is None else words[mark.tag], reason, seconds


def read_tests(step: Step, out: Path, output: str) -> None:
    cases = list(test_cases(out / "tests.xml"))
    step.counts = dict(Counter(status for _, status, _, _ in cases))
    reasons = [(status, f"{name}: {reason.partition(chr(10))[0]}") for name, status, reason, _ in cases]
    step.skipped = [reason for status, reason in reasons if status == "skipped"]
    step.problems = [reason for status, reason in reasons if status == "failed"]
    if "passed" not in step.counts:
        step.problems.append("no test passed")


def read_notebooks(step: Step, out: Path, output: str) -> None:
    results = []
    cases = {case[0]: case[1:] for case in test_cases(out / "notebooks.xml")}
    for copy in sorted((out / "notebooks").glob("*.ipynb")):
        status, reason, seconds = cases.get(copy.name, ("failed", "it did not begin", 0.0))
        try:
            nb = notebooks.read(copy)
            result = notebooks.judge(nb, copy.stem)
            if all(cell.execution_count is None for _, cell in notebooks.code_cells(nb)):
                result.problems = []  # a list of all its cells would hide the reason
        except InputError:
            result = notebooks.NotebookResult(copy.stem)
        if status == "failed" and not result.problems:
            result.problems.append(" ".join(reason.split()).partition(" File ")[0][:200])
        result.seconds = seconds
        results.append(result)
    step.counts = {
        "cells run": sum(result.cells_run for result in results),
        "cells skipped": sum(len(result.skipped) for result in results),
    }
    step.skipped = [f"{r.name}: {reason}" for r in results for reason in notebooks.grouped(r.skipped)]
    step.problems = [f"{r.name}: {problem}" for r in results for problem in r.problems]
    step.tables = [notebooks.table(results)]


def read_bench(step: Step, out: Path, output: str) -> None:
    record = records.read(out / "bench.json")
    step.counts = dict(Counter(row.status for row in record.rows))
    reasons = [(row.status, f"{row.name}, batch {row.batch_size}: {row.reason}") for row in record.rows]
    step.skipped = [reason for status, reason in reasons if status == "absent"]
    step.problems = [reason for status, reason in reasons if status == "failed"]
    step.tables = [tables.overview(record)]


READERS: dict[str, Callable[[Step, Path, str], None]] = {
    "doctor": read_doctor,
    "tests": read_tests,
    "notebooks": read_notebooks,
    "bench": read_bench,
}


# Running


def run_step(step: Step, out: Path, engines: Path, limit: float) -> None:
    """Run one step's process and read what it left. Never raises for what the step does."""
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COURSE_ENGINES": str(engines)}
    if step.name != "bench":  # threads that spin for a core which another job holds make both many times slower
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start, late = time.monotonic(), False
    with (out / f"{step.name}.log").open("w+", errors="replace") as log:
        process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=PROJECT)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process)
        log.seek(0)
        output = log.read()
    step.seconds = round(time.monotonic() - start, 1)
    try:
        READERS[step.name](step, out, output)
    except (CourseError, OSError, ValueError, LookupError, TypeError, ElementTree.ParseError) as error:
        step.problems.append(f"it left no result that can be read ({type(error).__name__}: {error})")
    if late:
        step.problems.insert(0, f"ended after {limit:.0f} s, its time limit")
    elif process.returncode and not step.problems:
        step.problems.append(f"exit status {process.returncode}")
    step.status = "timed out" if late else "failed" if step.problems else "passed"
    if step.problems:
        step.log = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines()[-LOG_LINES:])


def end(process: subprocess.Popen) -> None:
    """End a process with everything it started: a kernel or a worker must not hold the GPU against the next step."""
    import psutil

    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)  # pytest then writes the results that it has
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()


def main(
    names: Sequence[str], out: Path, time_limit: float = 0.0, *, jobs: int = 1, folder: Path = notebooks.NOTEBOOKS
) -> int:
    """`helpers gpu-check`: exit status 0 if every chosen step passed. time_limit: seconds for all of it; 0 for none.

    jobs: how many tests, and then notebooks, run at a time. What they time is then worth less; the benchmark is always
    alone. Raises BackendUnavailable, with what would have run, on a machine without a usable GPU.
    """
    if unknown := [name for name in names if name not in LIMITS]:
        raise InputError(f"There is no part {unknown[0]!r}.", fix=f"Name some of: {', '.join(LIMITS)}.")
    if jobs < 1 or not time_limit >= 0:  # the second is so of NaN too
        raise InputError(f"jobs is {jobs}, time_limit {time_limit}.", fix="Give 1 job or more, and 0 seconds or more.")
    out = out.absolute()
    steps = plan(names, out, jobs)
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
    prepare(out, folder)
    about = conditions(facts, f"helpers gpu-check --only {','.join(step.name for step in steps)} --jobs {jobs}")
    write(steps, about, out)  # an interrupted check has a report too, by which its folder is known
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, Progress("GPU check") as progress:
        engines = Path(os.environ.get("COURSE_ENGINES") or temporary)
        for step in steps:
            left = time_limit - (time.monotonic() - start) if time_limit else step.limit
            if left < 1:
                step.problems.append("the time limit of the whole check was used up")
            else:
                with progress.phase(step.name):
                    run_step(step, out, engines, min(step.limit, left))
            write(steps, about, out)
    print(*(f"{step.name}: {problem}" for step in steps for problem in step.problems), sep="\n")
    print(f"\n{os.path.relpath(out / 'report.md')}\n\n{summary(steps)}")
    return 0 if all(step.status == "passed" for step in steps) else 1


def prepare(out: Path, folder: Path) -> None:
    """A folder for the results, and copies of the notebooks in it without outputs: nothing old may pass for new.
    InputError where another's notebooks/ lies in it."""
    if (out / "notebooks").exists() and not (out / "report.json").exists():
        raise InputError(
            f"{out} holds a folder notebooks/ that is not of an earlier check.",
            cause="The check would delete it, for its own copies of the notebooks.",
            fix="Give --out a folder of its own.",
        )
    shutil.rmtree(out / "notebooks", ignore_errors=True)
    (out / "notebooks").mkdir(parents=True)
    for name in ("tests.xml", "notebooks.xml", "bench.json", "report.json", "report.md"):
        (out / name).unlink(missing_ok=True)
    for source in notebooks.select(folder):
        copy = Path(shutil.copy(source, out / "notebooks"))
        with contextlib.suppress(InputError):  # what is no notebook fails when its turn comes
            nb = notebooks.read(copy)
            notebooks.clear(nb)
            notebooks.write(nb, copy)


# Reporting


def conditions(facts: dict[str, Any], command: str) -> dict[str, Any]:
    """On what, and with which versions, the check runs. facts: as the doctor asks torch for them."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": records.commit(),
        "machine": {
            "GPU": facts["gpu"],
            "compute capability": facts["capability"],
            "GPU memory": f"{facts['total'] / 2**30:.1f} GiB",
            "driver": hardware.driver(),
            "CUDA": facts["cuda"],
            "cores": hardware.free_cores(),
            "free host memory": f"{hardware.free_memory() / 2**30:.1f} GiB",
            "system": f"{platform.system()} {platform.machine()}",
            "Python": platform.python_version(),
        },
        "versions": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    """Of the packages beside this Python, then of TensorRT-LLM and vLLM in environments of their own."""
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    for name, version, _ in environments.describe():
        yield f"{name} (own environment)", "not installed" if version == "-" else version


def summary(steps: list[Step]) -> Table:
    """A row for each step."""
    counts = [", ".join(f"{number} {word}" for word, number in step.counts.items()) for step in steps]
    rows = [(s.name, s.status, f"{s.seconds:.0f}", words) for s, words in zip(steps, counts, strict=True)]
    return Table("Steps", ("step", "status", "seconds", "counts"), rows)


def write(steps: list[Step], about: dict[str, Any], out: Path) -> None:
    """report.json and report.md, without this machine's folders in them."""
    content = {
        "schema": SCHEMA,
        "passed": all(step.status == "passed" for step in steps),
        **about,
        "steps": [{key: value for key, value in asdict(step).items() if key != "command"} for step in steps],
    }
    text = json.dumps(notebooks.scrub(content), indent=1, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.md").write_text(notebooks.scrub(markdown(steps, about)), encoding="utf-8")


def markdown(steps: list[Step], about: dict[str, Any]) -> str:
    """The machine, the versions, the steps with their results, then what did not run and what failed."""
    parts = [
        f"# GPU check: {'' if all(step.status == 'passed' for step in steps) else 'NOT '}all steps passed",
        f"{about['date']}, commit {about['commit'] or 'unknown'}, `{about['command']}`",
        Table("Machine", ("of this machine", ""), list(about["machine"].items())).markdown(),
        Table("Versions", ("package", "version"), list(about["versions"].items())).markdown(),
        *(table.markdown() for table in [summary(steps), *(table for step in steps for table in step.tables)]),
    ]
    skipped = [f"- {step.name}: {reason}" for step in steps for reason in step.skipped]
    waiting = [step.name for step in steps if step.status == "not run" and not step.problems]
    skipped += [f"- {name}: had not ended when this was written" for name in waiting]
    problems = [f"- {step.name}: {problem}" for step in steps for problem in step.problems]
    parts += ["## What did not run, and why", "\n".join(skipped)] if skipped else []
    parts += ["## What failed", "\n".join(problems)] if problems else []
    parts += [f"The end of the output of {step.name}:\n\n````\n{step.log}\n````" for step in steps if step.log]
    return "\n\n".join(parts) + "\n"
