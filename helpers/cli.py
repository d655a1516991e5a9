"""The course from a terminal: helpers build, list, inspect, verify, generate, chat, remove, model, bench, run, doctor,
explain, env, course, gpu-check."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from helpers.display import Table
from helpers.errors import CourseError, EngineCorrupt, InputError, printable, status_of


def main(arguments: list[str] | None = None) -> int:
    """With --json, standard output has one JSON object: what the command returns, or the error. What is for people goes
    to standard error."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in takewhile(lambda word: word != "--", words)

    def command() -> int:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            try:
                settings = _parser().parse_args(words)
            except SystemExit as end:
                if not (as_json and end.code):
                    raise
                raise InputError("The command line is not understood.", fix="See the usage, above.") from end
            answer = {"ok": True, **(settings.run(settings) or {})}
        if as_json:
            print(json.dumps(answer, indent=1))
        return 0 if answer["ok"] else 1

    return status_of(command, as_json=as_json)


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], dict[str, Any] | None], words: str) -> Any:
    """A command. run: does it, and returns what --json prints; "ok": False is the exit status 1."""
    command = commands.add_parser(name, help=words, allow_abbrev=False)
    command.add_argument("--json", action="store_true", help="the answer, or the error, as JSON on standard output")
    command.set_defaults(run=run)
    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="helpers", description="The TensorRT-LLM course from a terminal.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _add(commands, "build", _build, "build an engine from a recipe file or from options")
    command.add_argument("recipe", nargs="?", help="a TOML file, such as engines/recipes/stories-fp32.toml")
    command.add_argument("--force", action="store_true", help="build even if an equal engine is there")
    for name, kind in _RECIPE_OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)

    command = _add(commands, "list", _list, "the engines in all stores, and where each lies")

    command = _add(commands, "inspect", _inspect, "what is inside an engine")
    command.add_argument("engine", help="its name, or the start of it")
    command.add_argument("--kernels", type=int, default=5, help="how many of the largest kernels to show per graph")

    command = _add(commands, "verify", _verify, "read engines whole, and compare each byte with what was built")
    command.add_argument("engine", nargs="*", help="only these; default: all")

    command = _add(commands, "generate", _generate, "answer prompts with an engine")
    command.add_argument("engine")
    command.add_argument("prompts", nargs="+")
    command.add_argument("--stream", action="store_true", help="print each token as it comes")
    _add_sampling(command)

    command = _add(commands, "chat", _chat, "talk with an engine of a model that has a chat template")
    command.add_argument("engine")
    _add_sampling(command)

    command = _add(commands, "remove", _remove, "delete an engine")
    command.add_argument("engine", nargs="+")

    command = commands.add_parser("model", help="the models on this machine")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    action = _add(actions, "get", _model_get, "download a model; nothing else in the course does")
    action.add_argument("name", help="smollm2, or the id of a model on the Hugging Face Hub: owner/name")
    action = _add(actions, "list", _model_list, "which are there, how large, from where")

    command = _add(commands, "bench", _bench, "time the same work on several backends")
    command.add_argument("--backends", default="pytorch,aot", help="such as pytorch,torch_compile,aot,aot:int8")
    command.add_argument("--batch", default="1", help="batch sizes, such as 1,4")
    command.add_argument("--model", default="stories")
    command.add_argument("--input", type=int, default=16, help="tokens in")
    command.add_argument("--output", type=int, default=64, help="tokens out")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--max-batch", type=int, help="with the next two: the limits that engines get,")
    command.add_argument("--max-input", type=int, help="4, 64 and 256 or what the work needs")
    command.add_argument("--max-seq", type=int)
    command.add_argument("--decode-batch-sizes", default="1", help="those that get a decode graph, and the largest")
    command.add_argument(
        "--start-together",
        action="store_true",
        help="build and start all at once; quicker with many cores, but build and start times disturb each other",
    )
    command.add_argument("--threads", type=int, default=0, help="threads on a CPU, for all alike; 0 chooses")
    command.add_argument("--out", type=Path, help="write the record here, as JSON")
    command.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="two records, side by side"
    )

    command = _add(commands, "run", _run, "execute every notebook and write them as a web site to build/site")
    command.add_argument("notebooks", nargs="*", help="only these; default: all")
    command.add_argument("--out", type=Path, default=Path("build"))
    command.add_argument("--update", action="store_true", help="write the outputs back into notebooks/")

    command = _add(commands, "doctor", _doctor, "is this machine ready? each check with the step that mends it")
    command.add_argument("recipe", nargs="?", help="a TOML file: is there room for what it builds?")
    command.add_argument(
        "--room", type=int, nargs="?", const=1, metavar="LEARNERS", help="one line: ready for so many?"
    )

    command = _add(commands, "explain", _explain, "what an error means and what ends it; knows some hundred by heart")
    command.add_argument("message", nargs="*", help="the message, or the file of a log; default: standard input")

    command = commands.add_parser("env", help="the environments of TensorRT-LLM, vLLM and TensorRT Edge-LLM")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    action = _add(actions, "create", _env_create, "check this machine, then install from the lock in constraints/")
    action.add_argument("name", choices=["trtllm", "vllm", "edgellm"])
    action.add_argument("--python", default="", help="the Python to make it with")
    action = _add(actions, "list", _env_list, "which are there, and where")

    command = commands.add_parser("course", help="the learner's copies of the notebooks, exercises and points")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    _add(actions, "copy", _course_copy, "make or renew work/: copies without outputs, to work in (make lab does it)")
    action = _add(actions, "reset", _course_reset, "take a fresh copy of a notebook; yours is kept under a dated name")
    action.add_argument("notebook", help="its number, such as 03")
    _add(actions, "progress", _course_progress, "which exercises are answered, and which guesses were near")
    action = _add(actions, "solution", _course_solution, "a right answer to an exercise, with the reason")
    action.add_argument("exercise", help="its number, such as 03.1")
    action = _add(actions, "grade", _course_grade, "run a learner's notebook, code and all, and count its points")
    action.add_argument("notebook", help="a file, or the number of a copy in work/")
    action.add_argument("--gradescope", type=Path, metavar="FILE", help="write results.json as Otter-Grader does")
    action = _add(actions, "timings", _course_timings, "run notebooks here, and tell how long each section takes")
    action.add_argument("notebooks", nargs="*", help="only these; default: all")
    action = _add(actions, "summary", _course_summary, "a line for each machine, from what doctor --room --json wrote")
    action.add_argument("files", nargs="+", type=Path)
    action = _add(actions, "prepare", _course_prepare, "all that a room without a network needs, in one folder")
    action.add_argument("folder", type=Path)
    action.add_argument("--python", default="", help="of the learners' version; default: this one")
    action.add_argument("--platform", default="", help="pip's tag of their machines, such as manylinux_2_28_x86_64")
    action.add_argument("--without-engines", action="store_true", help="do not run the notebooks to build theirs")
    action = _add(actions, "slides", _course_slides, "slides of the notebooks, by their headings")
    action.add_argument("folder", type=Path, help="where they go, and where reveal.js lies as reveal.js/")
    action.add_argument("notebooks", nargs="*", help="only these; default: all")

    command = _add(commands, "gpu-check", _gpu_check, "on a machine with a GPU: run all of the course and report on it")
    command.add_argument("--only", default="doctor,tests,notebooks,bench", help="some of these parts")
    command.add_argument("--out", type=Path, default=Path("build/gpu-check"))
    command.add_argument("--time-limit", type=float, default=0.0, metavar="S", help="seconds for all of it")
    command.add_argument("--jobs", type=int, default=1, help="tests and notebooks at a time; the benchmark runs alone")
    return parser


def _add_sampling(command: argparse.ArgumentParser) -> None:
    for name, kind in _SAMPLING_OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    command.add_argument(
        "--stop", action="append", metavar="TEXT", help="end an answer before it; more than one may be"
    )


_RECIPE_OPTIONS = {
    "model": str,
    "backend": str,
    "precision": str,
    "max_batch_size": int,
    "max_input_len": int,
    "max_seq_len": int,
    "optimization_level": int,
    "device": str,
    "num_threads": int,
}
_SAMPLING_OPTIONS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
}


def _given(settings: argparse.Namespace, names: dict) -> dict:
    return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}


def _rows(table: Table, name: str) -> dict[str, Any]:
    """Print a table; what --json prints of it."""
    print(table)
    return {name: [dict(zip(table.columns, row, strict=True)) for row in table.rows]}


def _build(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers import recipe as recipes
    from helpers.engine import build

    recipe = recipes.read(settings.recipe) if settings.recipe else recipes.BuildRecipe()
    folder = build(recipe.replace(**_given(settings, _RECIPE_OPTIONS)), force=settings.force)
    print(folder.name)
    return {"engine": folder.name, "folder": str(folder)}


def _list(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers import store
    from helpers.paths import engines_folder, engines_folders

    folders = store.list_engines()
    if not folders:
        print("No engines yet. Build one: helpers build")
        return {"engines": []}
    rows = []
    for folder in folders:
        try:
            manifest = store.read_manifest(folder)
            built = [f"{sum(manifest['seconds'].values()):.0f} s", manifest["built"][:16]]
        except EngineCorrupt:
            mend = f"; helpers remove {folder.name}" if folder.parent == engines_folder() else ""
            built = ["", f"damaged, or of another version{mend}"]
        except CourseError:
            continue  # removed meanwhile, or another person's
        rows.append([folder.name, f"{store.size(folder) / 1e6:.1f}", *built, str(folder.parent)])
    columns = ("engine", "MB", "built in", "built", "store")
    several = len(engines_folders()) > 1
    table = Table("", columns if several else columns[:-1], [row if several else row[:-1] for row in rows])
    return _rows(table, "engines")


def _inspect(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.engine import inspect

    report = inspect(settings.engine)
    print(report)
    for graph in report.graphs():
        kernels = report.of(graph).largest(settings.kernels)
        rows = [(len(kernel.fused), kernel.kind, kernel.dtype, kernel.name) for kernel in kernels]
        print(f"\n{Table(f'{graph}: the largest kernels', ('operations', 'kind', 'dtype', 'name'), rows)}")
    sizes = [(f"{size / 1e6:.2f}", name) for name, size in report.sizes.items()]
    print(f"\n{Table('Files', ('MB', 'name'), sizes)}")
    return {"report": report.to_dict()}


def _verify(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers import store

    whole: list[str] = []
    damaged: dict[str, str] = {}
    for folder in [store.find(name) for name in settings.engine] or store.list_engines():
        try:
            store.verify(folder, store.read_manifest(folder), thorough=True)
            whole.append(folder.name)
            print(f"whole    {folder.name}")
        except EngineCorrupt as error:
            damaged[folder.name] = error.what
            print(f"damaged  {error}")
    return {"ok": not damaged, "whole": whole, "damaged": damaged}


def _generate(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.engine import load
    from helpers.model.sampling import SamplingParams

    sampling = SamplingParams(**_given(settings, _SAMPLING_OPTIONS), stop=settings.stop or ())
    with load(settings.engine) as engine:
        if settings.stream:
            texts = []
            for prompt in settings.prompts:
                print(printable(prompt), end="", flush=True)
                texts.append("")
                for token in engine.stream(prompt, sampling):
                    print(printable(token.text), end="", flush=True)
                    texts[-1] += token.text
                print()
            return {"answers": [{"text": text} for text in texts]}
        answers = engine.generate(settings.prompts, sampling)
    for answer, prompt in zip(answers, settings.prompts, strict=True):
        print(printable(prompt + answer.text))
        m = answer.metrics
        print(
            f"  [{len(answer.token_ids)} tokens, {answer.finish_reason}; TTFT {m.ttft_s * 1e3:.1f} ms, "
            f"TPOT {m.tpot_s * 1e3:.2f} ms]"
        )
    return {"answers": list(map(asdict, answers))}


def _chat(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.engine import load
    from helpers.model.sampling import SamplingParams

    sampling = SamplingParams(**_given(settings, _SAMPLING_OPTIONS), stop=settings.stop or ())
    with load(settings.engine) as engine:
        messages: list[dict[str, str]] = []
        while True:
            try:
                messages.append({"role": "user", "content": input("> ")})
            except EOFError:
                print()
                return {"messages": messages}
            except RuntimeError as error:  # Python has no standard input or output
                raise InputError(f"There is nobody to talk with: {error}.", fix="Run it in a terminal.") from error
            answer = ""
            for token in engine.stream_chat(messages, sampling):
                print(printable(token.text), end="", flush=True)
                answer += token.text
            print()
            messages.append({"role": "assistant", "content": answer})


def _remove(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers import store

    removed = []
    for engine in settings.engine:
        removed.append(store.remove(engine).name)
        print(f"removed {removed[-1]}")
    return {"removed": removed}


def _model_get(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.model import fetch

    return {"folder": str(fetch.get(settings.name))}


def _model_list(_: argparse.Namespace) -> dict[str, Any]:
    from helpers.model import fetch

    columns = ("model", "MB", "million parameters", "from", "folder")
    return _rows(Table("", columns, fetch.describe()), "models")


def _bench(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.bench import records
    from helpers.bench import run as benchmark
    from helpers.bench import tables as comparison

    if settings.compare:
        plain = vars(_parser().parse_args(["bench"]))
        if others := [
            name for name, value in vars(settings).items() if name not in ("compare", "json") and value != plain[name]
        ]:
            raise InputError(f"--compare measures nothing; --{others[0]} was given too.", fix="Leave it out.")
        first, second = settings.compare
        table = comparison.compare(records.read(first), records.read(second), (first.stem, second.stem))
        return _rows(table, "rows")
    batches = benchmark.batch_sizes(settings.batch)
    workload = records.Workload(
        settings.model,
        settings.input,
        settings.output,
        settings.repeats,
        threads=settings.threads,
        max_batch_size=_or_least(settings.max_batch, 4, *batches),
        max_input_len=_or_least(settings.max_input, 64, settings.input),
        max_seq_len=_or_least(settings.max_seq, 256, settings.input + settings.output),
        decode_batch_sizes=tuple(benchmark.batch_sizes(settings.decode_batch_sizes)),
        start_together=settings.start_together,
    )
    keep = records.keeper(settings.out) if settings.out else None
    record = benchmark.run(workload, settings.backends.split(","), batches, keep=keep)
    for size in record.batch_sizes:
        print(f"\n{comparison.table(record, size)}")
    print(f"\n{comparison.formulas()}")
    return {"ok": all(row.status != "failed" for row in record.rows), "record": asdict(record)}


def _or_least(given: int | None, *least: int) -> int:
    return max(least) if given is None else given


def _run(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import notebooks

    return {"ok": not notebooks.main(settings.notebooks, settings.out, update=settings.update)}


def _doctor(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.machine import doctor

    needed = 0.0
    if settings.recipe:
        from helpers import recipe as recipes
        from helpers.engine import disk_needed

        needed = disk_needed(recipes.read(settings.recipe))
    if settings.room is None:
        return doctor.main(as_json=settings.json, needed=needed)
    from helpers.maintain import room

    machine = room.describe(doctor.main(as_json=True, needed=needed), settings.room)
    print(room.summary([machine]))
    return machine


def _explain(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.course import cards

    message = " ".join(settings.message)
    if not message:
        if sys.stdin is None:
            raise InputError("There is no message and no standard input.", fix="helpers explain 'the message'")
        if sys.stdin.isatty():
            print("Paste the message, then press Enter and Ctrl-D.", file=sys.stderr)
        explanation = cards.explain(cards.decode(sys.stdin.buffer.read(cards.LONGEST)))
    else:
        explanation = cards.explain(Path(message) if os.path.isfile(message) else message)  # noqa: PTH113 (any text)
    print(explanation)
    return {"ok": bool(explanation), "troubles": [asdict(m.card) | {"line": m.line} for m in explanation.troubles]}


def _env_create(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.backends.tensorrt_llm.errors import explain_import
    from helpers.machine import environments

    explain = {"trtllm": explain_import}.get(settings.name)
    return {"python": str(environments.create(settings.name, python=settings.python, explain=explain))}


def _env_list(_: argparse.Namespace) -> dict[str, Any]:
    from helpers.machine import environments

    return _rows(Table("", ("environment", "version", "where"), environments.describe()), "environments")


def _course_copy(_: argparse.Namespace) -> dict[str, Any]:
    from helpers.course.learner import work_folder
    from helpers.maintain import classroom

    remarks = classroom.update()
    print("\n".join([*remarks, f"Your copies of the notebooks are in {work_folder()}"]))
    return {"folder": str(work_folder()), "kept": remarks}


def _course_reset(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import classroom

    kept = classroom.reset(settings.notebook)
    print(f"A fresh copy is there. Yours is now {kept}" if kept else "A fresh copy is there.")
    return {"kept": str(kept) if kept else None}


def _course_progress(_: argparse.Namespace) -> dict[str, Any]:
    from helpers.course import learner
    from helpers.maintain import classroom

    print("\n\n".join(map(str, classroom.progress())))
    return learner.read()


def _course_solution(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.course.exercises import solution

    text = str(solution(settings.exercise))
    print(printable(text))
    return {"solution": text}


def _course_grade(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import classroom

    grade = classroom.grade(settings.notebook)
    print("\n".join([*(f"{grade.notebook}: {problem}" for problem in grade.problems), str(grade.table())]))
    if settings.gradescope:
        classroom.write_gradescope(grade, settings.gradescope)
    return grade.as_json()


def _course_timings(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import room

    answer = room.timings(settings.notebooks)
    print("\n".join([*answer["problems"], str(room.timings_table(answer))]))
    return answer


def _course_summary(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import room

    machines = room.read_reports(settings.files)
    print(room.summary(machines))
    return {"ok": all(machine["ok"] for machine in machines), "machines": machines}


def _course_prepare(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain.prepare import prepare

    folder, engines = settings.folder, not settings.without_engines
    prepare(folder, python=settings.python, platform=settings.platform, engines=engines)
    print(f"All is in {folder}. On each machine: make lab OFFLINE={folder}")
    return {"folder": str(folder)}


def _course_slides(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import notebooks, site

    sources = notebooks.select(notebooks.NOTEBOOKS, settings.notebooks)
    pages = [site.write_slides(path.stem, notebooks.read(path), settings.folder) for path in sources]
    print("\n".join(map(str, pages)))
    return {"slides": list(map(str, pages))}


def _gpu_check(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import gpu_check

    parts = settings.only.split(",")
    return {"ok": not gpu_check.main(parts, settings.out, settings.time_limit, jobs=settings.jobs)}
