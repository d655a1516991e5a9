"""The course from a terminal: helpers --help lists the commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from helpers.display import Table
from helpers.errors import CourseError, EngineCorrupt, InputError, printable, status_of
from helpers.paths import check_writable, named, write_text


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


def _add_options(command: argparse.ArgumentParser, kind: type, *names: str) -> None:
    """Options that are named as the fields are which they set; those not given are None."""
    for name in names:
        command.add_argument(f"--{name.replace('_', '-')}", type=kind)


def _group(commands: Any, name: str, words: str) -> Any:
    """A command that has commands of its own."""
    return commands.add_parser(name, help=words).add_subparsers(required=True, metavar="ACTION")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="helpers", description="The TensorRT-LLM course from a terminal.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _add(commands, "build", _build, "build an engine from a recipe file or from options")
    command.add_argument("recipe", nargs="?", help="a TOML file, such as engines/recipes/stories-fp32.toml")
    command.add_argument("--force", action="store_true", help="build even if an equal engine is there")
    _add_options(command, str, "model", "backend", "precision", "device")
    _add_options(command, int, "max_batch_size", "max_input_len", "max_seq_len", "optimization_level", "num_threads")

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

    actions = _group(commands, "model", "the models on this machine")
    action = _add(actions, "get", _model_get, "download a model; nothing else in the course does")
    action.add_argument("name", help="smollm2, or the id of a model on the Hugging Face Hub: owner/name")
    action = _add(actions, "list", _model_list, "which are there, how large, from where")

    command = _add(commands, "bench", _bench, "time the same work on several backends")
    command.add_argument("--backends", default="pytorch,aot", help="such as pytorch,torch_compile,aot,aot:int8")
    command.add_argument("--batch", default="1", help="batch sizes, such as 1,4")
    command.add_argument("--model", default="stories")
    command.add_argument("--input", dest="input_len", type=int, default=16, help="tokens in")
    command.add_argument("--output", dest="output_len", type=int, default=64, help="tokens out")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument(
        "--max-batch", dest="max_batch_size", type=int, help="with the next two: the limits that engines get,"
    )
    command.add_argument("--max-input", dest="max_input_len", type=int, help="4, 64 and 256 or what the work needs")
    command.add_argument("--max-seq", dest="max_seq_len", type=int)
    command.add_argument("--decode-batch-sizes", default="1", help="those that get a decode graph, and the largest")
    command.add_argument(
        "--start-together",
        action="store_true",
        help="build and start all at once; quicker with many cores, but build and start times disturb each other",
    )
    command.add_argument("--threads", type=int, default=0, help="threads on a CPU, for all alike; 0 chooses")
    command.add_argument("--out", type=named, help="write the record here, as JSON")
    command.add_argument(
        "--compare", type=named, nargs=2, metavar=("A.json", "B.json"), help="two records, side by side"
    )

    command = _add(commands, "run", _run, "execute every notebook and write them as a web site to build/site")
    command.add_argument("notebooks", nargs="*", help="only these; default: all")
    command.add_argument("--out", type=named, default=Path("build"))
    command.add_argument("--update", action="store_true", help="write the outputs back into notebooks/")

    command = _add(commands, "doctor", _doctor, "is this machine ready? each check with the step that mends it")
    command.add_argument("recipe", nargs="?", help="a TOML file: is there room for what it builds?")
    command.add_argument(
        "--room", type=int, nargs="?", const=1, metavar="LEARNERS", help="one line: ready for so many?"
    )

    command = _add(commands, "explain", _explain, "what an error means and what ends it; knows some hundred by heart")
    command.add_argument("message", nargs="*", help="the message, or the file of a log; default: standard input")

    actions = _group(commands, "env", "the environments of TensorRT-LLM, vLLM and TensorRT Edge-LLM")
    action = _add(actions, "create", _env_create, "check this machine, then install from the lock in constraints/")
    action.add_argument("name", choices=["trtllm", "vllm", "edgellm"])
    action.add_argument("--python", type=os.path.expanduser, default="", help="the Python to make it with")
    action = _add(actions, "list", _env_list, "which are there, and where")

    actions = _group(commands, "course", "the learner's copies of the notebooks, exercises and points")
    _add(actions, "copy", _course_copy, "make or renew work/: copies without outputs, to work in (make lab does it)")
    action = _add(actions, "reset", _course_reset, "take a fresh copy of a notebook; yours is kept under a dated name")
    action.add_argument("notebook", help="its number, such as 03")
    _add(actions, "progress", _course_progress, "which exercises are answered, and which guesses were near")
    action = _add(actions, "solution", _course_solution, "a right answer to an exercise, with the reason")
    action.add_argument("exercise", help="its number, such as 03.1")
    action = _add(actions, "grade", _course_grade, "run a learner's notebook, code and all, and count its points")
    action.add_argument("notebook", help="a file, or the number of a copy in work/")
    action.add_argument("--gradescope", type=named, metavar="FILE", help="write results.json as Otter-Grader does")
    action = _add(actions, "timings", _course_timings, "run notebooks here, and tell how long each section takes")
    action.add_argument("notebooks", nargs="*", help="only these; default: all")
    action.add_argument("--out", type=named, metavar="FILE", help="write the table here too, as Markdown")
    action = _add(actions, "summary", _course_summary, "a line for each machine, from what doctor --room --json wrote")
    action.add_argument("files", nargs="+", type=named)
    action = _add(actions, "prepare", _course_prepare, "all that a room without a network needs, in one folder")
    action.add_argument("folder", type=named)
    action.add_argument("--python", type=os.path.expanduser, default="", help="of the learners; default: this one")
    action.add_argument("--without-engines", action="store_true", help="do not run the notebooks to build theirs")
    action = _add(actions, "slides", _course_slides, "slides of the notebooks, by their headings")
    action.add_argument("folder", type=named, help="where they go, and where reveal.js lies as reveal.js/")
    action.add_argument("notebooks", nargs="*", help="only these; default: all")

    command = _add(commands, "gpu-check", _gpu_check, "on a machine with a GPU: run all of the course and report on it")
    command.add_argument("--only", default="doctor,tests,notebooks,bench", help="some of these parts")
    command.add_argument("--out", type=named, default=Path("build/gpu-check"))
    command.add_argument("--time-limit", type=float, default=0.0, metavar="S", help="seconds for all of it")
    command.add_argument("--jobs", type=int, default=1, help="tests and notebooks at a time; the benchmark runs alone")
    return parser


def _add_sampling(command: argparse.ArgumentParser) -> None:
    _add_options(command, float, "temperature", "top_p", "repetition_penalty")
    _add_options(command, int, "top_k", "seed", "max_tokens")
    command.add_argument(
        "--stop", action="append", metavar="TEXT", help="end an answer before it; more than one may be"
    )


def _given(settings: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """What the command line gives for the fields of this dataclass."""
    values = {field.name: getattr(settings, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _rows(table: Table, name: str) -> dict[str, Any]:
    """Print a table; what --json prints of it."""
    print(table)
    return {name: [dict(zip(table.columns, row, strict=True)) for row in table.rows]}


def _build(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers import recipe as recipes
    from helpers.engine import build

    recipe = recipes.read(settings.recipe) if settings.recipe else recipes.BuildRecipe()
    folder = build(recipe.replace(**_given(settings, recipes.BuildRecipe)), force=settings.force)
    print(folder.name)
    return {"engine": folder.name, "folder": str(folder)}


def _list(_: argparse.Namespace) -> dict[str, Any]:
    from helpers import store

    rows = []
    for folder in store.list_engines():
        try:
            manifest = store.read_manifest(folder)
            built = [f"{sum(manifest['seconds'].values()):.0f} s", manifest["built"][:16]]
        except EngineCorrupt:
            built = ["", f"damaged, renamed, or of another version; helpers verify {folder.name}"]
        except CourseError:
            continue  # removed meanwhile, or another person's
        rows.append([folder.name, f"{store.size(folder) / 1e6:.1f}", *built, str(folder.parent)])
    if not rows:
        print("No engines yet. Build one: helpers build")
        return {"engines": []}
    return _rows(Table("", ("engine", "MB", "built in", "built", "store"), rows), "engines")


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
    from helpers.access import origin

    whole: list[str] = []
    damaged: dict[str, str] = {}  # or not to be read, which keeps no other from being looked at
    for folder in [store.find(name) for name in settings.engine] or store.list_engines(hidden=True):
        name = f"{folder.name}{origin(folder)}"
        try:
            store.verify(folder, store.read_manifest(folder), thorough=True)
            whole.append(name)
            print(f"whole    {name}")
        except CourseError as error:
            damaged[name] = error.what
            print(f"{'damaged' if isinstance(error, EngineCorrupt) else 'not read':<8} {error}")
    for folder in [] if settings.engine else store.without_manifest():
        damaged[folder.name] = f"{folder.name} has no {store.MANIFEST}."
        print(f"damaged  {damaged[folder.name]}\nLikely cause: A copy of it was cut short.\nFix: Delete {folder}")
    if not whole and not damaged:
        print("No engines yet.")
    return {"ok": not damaged, "whole": whole, "damaged": damaged}


def _generate(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.engine import load
    from helpers.model.sampling import SamplingParams

    sampling = SamplingParams(**_given(settings, SamplingParams))
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

    sampling = SamplingParams(**_given(settings, SamplingParams))
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
        plain = vars(_parser().parse_args(["bench", "--compare", *map(str, settings.compare)]))
        if others := [name for name, value in vars(settings).items() if name != "json" and value != plain[name]]:
            raise InputError(
                f"--compare measures nothing; {others[0]} was given too.", fix="Leave out all other options."
            )
        first, second = settings.compare
        names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
        table = comparison.compare(records.read(first), records.read(second), names)
        return _rows(table, "rows")
    batches = benchmark.batch_sizes(settings.batch)
    work = {
        "max_batch_size": max(4, *batches),
        "max_input_len": max(64, settings.input_len),
        "max_seq_len": max(256, settings.input_len + settings.output_len),
        **_given(settings, records.Workload),
        "decode_batch_sizes": tuple(benchmark.batch_sizes(settings.decode_batch_sizes)),
    }
    keep = records.keeper(settings.out) if settings.out else None
    record = benchmark.run(records.Workload(**work), settings.backends.split(","), batches, keep=keep)
    for size in record.batch_sizes:
        print(f"\n{comparison.table(record, size)}")
    print(f"\n{comparison.formulas()}")
    return {"ok": all(row.status != "failed" for row in record.rows), "record": asdict(record)}


def _run(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import notebooks

    results = notebooks.run_all(settings.out, settings.notebooks, update=settings.update)
    print(f"\nThe executed notebooks are in {settings.out}; to read them: {settings.out / 'site/index.html'}\n")
    print("".join(f"{result.name}: {problem}\n\n" for result in results for problem in result.problems), end="")
    print(notebooks.table(results))
    return {"ok": notebooks.all_ok(results), "notebooks": list(map(asdict, results))}


def _doctor(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.machine import doctor

    needed = {}
    if settings.recipe:
        from helpers import engine
        from helpers import recipe as recipes

        needed = engine.needed(recipes.read(settings.recipe))
    if settings.room is None:
        return doctor.main(as_json=settings.json, needed=needed)
    from helpers.maintain import room

    machine = room.describe(doctor.main(as_json=True, needed=needed), settings.room)
    print(room.summary([machine]))
    return machine


def _explain(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.course import cards

    message = " ".join(settings.message)
    logs = [message] if os.path.isfile(message) else settings.message  # noqa: PTH113 (any text)
    given: list[Path | str]
    if not message:
        given = [_pasted()]
    elif all(map(os.path.isfile, logs)):
        given = [Path(log) for log in logs]
    elif all(os.path.isfile(log) or (log.endswith((".log", ".txt")) and " " not in log) for log in logs):  # noqa: PTH113
        missing = next(log for log in logs if not os.path.isfile(log))  # noqa: PTH113
        raise InputError(f"There is no file {missing!r}.", fix="Give the paths of logs, or a message.")
    else:
        given = [message]
    explanations = [cards.explain(each) for each in given]
    print(*explanations, sep="\n\n")
    found = [match for explanation in explanations for match in explanation.troubles]
    return {"ok": bool(found), "troubles": [asdict(match.card) | {"line": match.line} for match in found]}


def _pasted() -> str:
    """The end of what standard input has."""
    from helpers.course import cards

    if sys.stdin is None:
        raise InputError("There is no message and no standard input.", fix="helpers explain 'the message'")
    if sys.stdin.isatty():
        print("Paste the message, then press Enter and Ctrl-D.", file=sys.stderr)
    content = b""
    while more := sys.stdin.buffer.read(cards.LONGEST):
        content = (content + more)[-cards.LONGEST :]
    return cards.decode(content)


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

    if settings.gradescope:
        check_writable(settings.gradescope)
    grade = classroom.grade(settings.notebook)
    print("\n".join([*(f"{grade.notebook}: {problem}" for problem in grade.problems), str(grade.table())]))
    if settings.gradescope:
        write_text(settings.gradescope, json.dumps(grade.as_gradescope(), indent=1) + "\n")
    return grade.as_json()


def _course_timings(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import room

    if settings.out:
        check_writable(settings.out)
    answer = room.timings(settings.notebooks)
    table = room.timings_table(answer)
    print("\n".join([*answer["problems"], str(table)]))
    if settings.out:
        write_text(settings.out, table.markdown() + "\n")
    return answer


def _course_summary(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain import room

    machines = room.read_reports(settings.files)
    print(room.summary(machines))
    return {"ok": all(machine["ok"] for machine in machines), "machines": machines}


def _course_prepare(settings: argparse.Namespace) -> dict[str, Any]:
    from helpers.maintain.prepare import prepare

    folder, engines = settings.folder, not settings.without_engines
    prepare(folder, python=settings.python, engines=engines)
    print(f"All is in {folder}. On each machine: make lab OFFLINE={shlex.quote(str(folder))}")
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
