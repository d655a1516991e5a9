"""How an error is told: three lines in a terminal, one JSON object where a command has --json, and in a notebook
a few lines under a folded traceback."""

import argparse
import errno
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbconvert import HTMLExporter, PythonExporter
from torch._inductor.exc import CppCompileError, InductorError

from helpers import BuildRecipe, basic, build_engine, cli, errors, paths, progress, recipe, store
from helpers.backends.aot import compile
from helpers.bench import records
from helpers.course import experiments
from helpers.course.lab.compiled import compile_module
from helpers.course.learner import work_folder
from helpers.errors import BuildError, CourseError, OutOfMemory, StoreError
from helpers.machine import doctor
from helpers.maintain import notebooks, room
from helpers.model.checkpoint import BUNDLED
from helpers.paths import PROJECT, own_store_first


@pytest.fixture(autouse=True)
def _empty_store(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "engines"))
    monkeypatch.chdir(tmp_path)


def commands(parser, name=()):
    """The command lines of a parser, such as ("model", "get"), each with its own parser."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield name, parser
    for action in inner:
        for word, child in action.choices.items():
            yield from commands(child, (*name, word))


def test_every_command_takes_it():
    every = dict(commands(cli._parser()))
    assert {("build",), ("model", "get"), ("env", "list"), ("doctor",)} <= set(every)
    for name, parser in every.items():
        assert "--json" in parser.format_help(), name


def test_a_tilde_that_no_shell_replaced_is_the_home_in_every_path(monkeypatch, tmp_path):
    """bash replaces it in `--out ~/x` and not in `--out=~/x`, which made a folder named ~; Python never does."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    options = [(name, action) for name, parser in commands(cli._parser()) for action in parser._actions]
    paths = [(name, action) for name, action in options if action.type not in (None, int, float, str)]
    assert len(paths) >= 10 and Path not in {action.type for _, action in paths}
    for name, action in paths:
        assert str(action.type("~/x")) == str(tmp_path / "home/x"), (name, action.dest)
    written = recipe.write(BuildRecipe(), "~/a.toml")
    assert written == tmp_path / "home/a.toml" and recipe.read("~/a.toml") == BuildRecipe()
    experiments.write_rows([{"ms": 1.0}], "~/rows.json")
    assert experiments.read_rows("~/rows.json") == [{"ms": 1.0}]
    (tmp_path / "home/an-engine").mkdir()
    (tmp_path / "home/an-engine/manifest.json").write_text("{}")
    assert store.find("~/an-engine") == tmp_path / "home/an-engine"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def answer(capsys, *words, status):
    assert cli.main([*words, "--json"]) == status
    told = capsys.readouterr()
    return json.loads(told.out), told.err


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["build", "nowhere.toml"], "RecipeError"),
        (["build", "--model", "nowhere"], "ModelError"),
        (["inspect", "nothing"], "EngineNotFound"),
        (["verify", "nothing"], "EngineNotFound"),
        (["generate", "nothing", "hello"], "EngineNotFound"),
        (["chat", "nothing"], "EngineNotFound"),
        (["remove", "nothing"], "EngineNotFound"),
        (["bench", "--batch", "x"], "InputError"),
        (["bench", "--compare", "a.json", "b.json"], "InputError"),
        (["run", "99"], "InputError"),
        (["doctor", "nowhere.toml"], "RecipeError"),
        (["explain", str(BUNDLED / "model.safetensors")], "InputError"),
        (["gpu-check", "--only", "nothing"], "InputError"),
        (["model", "get", "../.."], "ModelError"),
        (["bake"], "InputError"),
        (["build", "--precision"], "InputError"),
        ([], "InputError"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else value,
)
def test_an_error_is_an_object_and_words_for_people(words, kind, capsys):
    told, people = answer(capsys, *words, status=1)
    assert set(told) == {"ok", "error"} and told["ok"] is False
    assert set(told["error"]) == {"type", "what", "cause", "fix"} and told["error"]["type"] == kind
    assert issubclass(getattr(errors, kind), CourseError) and told["error"]["what"]
    assert people.strip()


def test_an_answer_is_an_object(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "examine", lambda needed: iter([doctor.failure("broken", "Mend.", name="B")]))
    assert answer(capsys, "list", status=0)[0] == {"ok": True, "engines": []}
    assert answer(capsys, "verify", status=0)[0] == {"ok": True, "whole": [], "damaged": {}}
    told, people = answer(capsys, "doctor", status=1)
    assert not told["ok"] and told["checks"] == [{"status": "failure", "found": "broken", "fix": "Mend.", "name": "B"}]
    assert not people  # gpu-check reads both together
    told, people = answer(capsys, "explain", "Killed", status=0)
    assert "more memory" in told["troubles"][0]["fix"] and "It means:" in people
    assert answer(capsys, "explain", "nothing known", status=1)[0] == {"ok": False, "troubles": []}
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    for log, text in zip(logs, ("Killed", "OSError: [Errno 24] Too many open files"), strict=True):
        log.write_text(text)
    told, people = answer(capsys, "explain", *map(str, logs), status=0)
    assert len(told["troubles"]) == 2 and "Killed" in people and "Too many open files" in people
    assert answer(capsys, "explain", "misspelt.log", status=1)[0]["error"]["type"] == "InputError"
    assert "misspelt" in answer(capsys, "explain", str(logs[0]), "misspelt.log", status=1)[0]["error"]["what"]
    assert {"model", "folder"} <= set(answer(capsys, "model", "list", status=0)[0]["models"][0])
    assert len(answer(capsys, "env", "list", status=0)[0]["environments"]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can limit a process's memory this way")
@pytest.mark.parametrize(("words", "megabytes"), [("build --json", 150), ("doctor --json", 200)])
def test_what_has_no_memory_to_begin_with_is_told(words, megabytes):
    """The doctor gets some more: with 150, Python itself fails at times in one of its threads, without an exception."""
    import resource

    command = [sys.executable, "-m", "helpers", *words.split()]
    few = partial(resource.setrlimit, resource.RLIMIT_AS, (megabytes * 2**20,) * 2)
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=few)
    told = json.loads(done.stdout)
    assert done.returncode == 1 and not told["ok"] and "Traceback" not in done.stderr
    error = told.get("error") or next(check for check in told["checks"] if check["name"] == "memory")
    assert error["fix"] and error.get("status", "failure") == "failure" and error.get("type") in (None, "OutOfMemory")


def test_an_error_is_three_lines_in_a_terminal(capsys):
    assert cli.main(["inspect", "nothing"]) == 1
    told = capsys.readouterr()
    kind, cause, fix = told.err.strip().split("\n")
    assert not told.out and kind.startswith("EngineNotFound: ")
    assert cause.startswith("Likely cause: ") and fix.startswith("Fix: ")


def test_a_prompt_that_is_the_options_name_is_a_prompt(capsys):
    assert cli.main(["generate", "nothing", "--", "--json"]) == 1
    assert not capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_programs_explain_themselves_where_python_has_dropped_what_documents_them(monkeypatch, capsys):
    """As python -OO does."""
    for program in (basic, build_engine):
        monkeypatch.setattr(program, "__doc__", None)
        monkeypatch.setattr(sys, "argv", ["program", "--help"])
        with pytest.raises(SystemExit, match="0"):
            program.main()
    assert capsys.readouterr().out.count("ngine") > 2


def test_an_answer_that_cannot_be_written_is_told():
    for words in (["list", "--json"], ["inspect", "nothing", "--json"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "helpers", *words]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1 and done.stderr and "Traceback" not in done.stderr


# ---- in a notebook ----------------------------------------------------------------------------------------


HOSTILE = "raise CourseError('a \\ud800 <b>bold</b> \\x1b[31m', cause='c', fix='f') from ValueError('<i>deep</i>')"


@pytest.mark.parametrize("handle", [None, SimpleNamespace()])  # what display gives: nothing, or what has no `update`
def test_a_notebook_that_cannot_show_progress_ends_no_work(handle, monkeypatch):
    def display(*_, **__):
        return handle or 1 / 0

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    with progress.Progress("a build") as shown, shown.phase("compile"):
        pass
    assert list(shown.seconds) == ["compile"]


def test_a_setting_that_an_error_gives_is_one_word_to_a_shell(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "my engines"))
    assert shlex.split(own_store_first()) == [f"COURSE_ENGINES=~/engines{os.pathsep}{tmp_path / 'my engines'}"]


@pytest.mark.parametrize("variable", ["COURSE_ENGINES", "COURSE_MODELS", "COURSE_WORK"])
def test_a_relative_folder_is_refused_because_a_notebook_works_in_another(variable, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "my folder")
    ask = {"COURSE_ENGINES": paths.engines_folder, "COURSE_MODELS": paths.models_folder}.get(variable, work_folder)
    with pytest.raises(StoreError, match="another folder for a terminal than for a notebook") as refused:
        ask()
    assert f"export {variable}='{tmp_path}/my folder'" in refused.value.fix and not list(tmp_path.iterdir())


def test_the_folder_that_an_error_gives_is_another_one_and_the_rest_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COURSE_ENGINES", os.pathsep.join(["~/engines", str(tmp_path / "shared")]))
    (tmp_path / "shared").mkdir()
    assert own_store_first() == f"COURSE_ENGINES=~/engines-2:{tmp_path / 'engines'}:{tmp_path / 'shared'}"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "engines" not in str(path) and access(path, mode))
    assert own_store_first() == f"COURSE_ENGINES=~/engines-2:{tmp_path / 'shared'}"


def test_every_command_that_an_error_gives_works_in_any_terminal():
    """`python` and `pip` may be another environment's, or none; `helpers` is the course's command line."""
    for path in (PROJECT / "helpers").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "fix" in line or "install" in line:
                assert not re.search(r"(?<!PYTHON} -m )\bpip install|python -m (helpers (?!\.)|pip|ensurepip)", line), (
                    line
                )


def test_what_a_notebook_shows_because_it_is_slow_here_is_nothing_in_its_committed_outputs(monkeypatch):
    shown, updates = threading.Event(), []

    def update(data, raw):
        updates.append(data)
        if len(updates) > 1:
            shown.set()

    monkeypatch.setattr("IPython.display.display", lambda *_, **__: SimpleNamespace(update=update))
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(progress, "SILENT_S", 0.0)
    with progress.shown_if_slow("Starting PyTorch", "import"):
        assert shown.wait(60) and "Starting PyTorch" in updates[1]["text/plain"]
    last = nbformat.v4.new_output("display_data", data=updates[-1])
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("load(name)", outputs=[last])])
    notebooks.tidy(nb)
    assert nb.cells[0].outputs == []


def test_a_notebook_shows_a_few_lines_and_folds_the_traceback():
    """In whatever runs it: the cell still fails, for `raises-exception` and sys.last_value; what only shows text has
    the lines; the page has the traceback once, closed, and nothing in it is a page of its own."""
    nb = nbformat.v4.new_notebook()
    for source in (f"from helpers import CourseError\n{HOSTILE}", "import sys\nsys.last_value.fix", "1 / 0"):
        nb.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": ["raises-exception"]}))
    NotebookClient(nb, kernel_name="python3").execute()
    folded, error = nb.cells[0].outputs
    assert error.output_type == "error" and error.ename == "CourseError"
    assert error.traceback == ["CourseError: a \\ud800 <b>bold</b> \\x1b[31m\nLikely cause: c\nFix: f"]
    assert list(folded.data) == ["text/html"]
    page = folded.data["text/html"]
    assert page.startswith("<details><summary>") and page.count("Traceback (most recent call last)") == 1
    assert "ValueError: &lt;i&gt;deep" in page and "<i>" not in page and "<b>" not in page and "\x1b" not in page
    assert "IPython" not in page and "raise CourseError(" in page
    assert nb.cells[1].outputs[0].data["text/plain"] == "'f'"
    assert [output.output_type for output in nb.cells[2].outputs] == ["error"]  # another's error is as ever
    html, _ = HTMLExporter().from_notebook_node(nb)
    assert html.count("<summary>Where it happened</summary>") == 1
    text, _ = PythonExporter().from_notebook_node(nb)
    assert "details" not in text


def test_a_folded_traceback_names_no_folder_of_this_machine():
    page = f"<pre>File &quot;{PROJECT}/helpers/engine.py&quot;, File &quot;{sys.prefix}/lib/x.py&quot;</pre>"
    output = notebooks.scrub(nbformat.v4.new_output("display_data", {"text/html": page}))
    wanted = "<pre>File &quot;helpers/engine.py&quot;, File &quot;&lt;python&gt;/lib/x.py&quot;</pre>"
    assert output.data["text/html"] == wanted


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (CppCompileError(["g++"], "g++: fatal error: Killed signal terminated program cc1plus"), OutOfMemory, "Killed"),
        (CppCompileError(["g++"], "cc1plus: out of memory allocating 65536 bytes"), OutOfMemory, "2 GiB"),
        (CppCompileError(["g++"], "x.cpp:1: error: no such type"), BuildError, "another compiler"),
        (InductorError(MemoryError(), None), OutOfMemory, "MemoryError"),
        (InductorError(OSError(errno.ENOMEM, "Cannot allocate memory"), None), OutOfMemory, "Cannot allocate"),
        (InductorError(OSError(errno.EAGAIN, "x"), None), BuildError, "room for another process"),
        (InductorError(AssertionError("of its own"), None), BuildError, "PyTorch's compiler"),
    ],
    ids=str,
)
def test_only_a_compiler_that_refuses_is_told_as_one(error, kind, words, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    with pytest.raises(kind) as told:
        compile._compile(None, tmp_path / "decode_b1.pt2", {}, "cpu", 1)
    assert words in str(told.value) and ("C++" in told.value.cause) == ("another compiler" in words)


def test_the_laboratorys_compiler_tells_its_errors_in_words(monkeypatch):
    def fail(*_, **__):
        raise InductorError(OSError(errno.ENOSPC, "x"), None)

    monkeypatch.setattr("torch._inductor.compile", fail)
    with pytest.raises(BuildError, match="Compiling the module") as told:
        compile_module(torch.nn.GELU(), (torch.zeros(4),))
    assert "disk is full" in told.value.cause and "doctor" in told.value.fix


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.EAGAIN, "x"), "another process"),
        (OSError(errno.ENOMEM, "x"), "more memory"),
        (OSError(errno.EIO, "x"), "disk or its network"),
        (OSError(errno.ENOLCK, "x"), "local disk"),
        (RuntimeError(os.strerror(errno.EMFILE)), "files open"),  # of a library that passes on words only
        (OSError(errno.EPIPE, os.strerror(errno.EACCES)), ""),  # the number counts, not the words beside it
        (OSError("not a valid model"), ""),
    ],
    ids=str,
)
def test_the_cause_of_a_refusal_is_told_only_where_it_is_known(error, cause):
    assert cause in errors.why_refused(error) and bool(cause) == bool(errors.why_refused(error))


@pytest.mark.parametrize(
    "read", [recipe.read, records.read, notebooks.read, experiments.read_rows, lambda path: room.read_reports([path])]
)
def test_a_file_that_the_system_refuses_is_not_told_as_one_of_another_kind(read, tmp_path):
    path = tmp_path / "named.json"
    path.symlink_to(path)  # refused to any user
    with pytest.raises(CourseError, match="'?named.json'? cannot be read") as told:
        read(path)
    assert "link" in told.value.cause and "another file" in told.value.fix


def test_whatever_runs_from_a_terminal_tells_its_errors_in_words():
    """Our own processes, which nobody starts by hand, answer whoever has started them."""
    ours = {str(PROJECT / "helpers" / path) for path in ("model/chat_process.py", "machine/worker.py")}
    texts = {str(path): path.read_text(encoding="utf-8") for path in (PROJECT / "helpers").rglob("*.py")}
    programs = {name: text for name, text in texts.items() if '\nif __name__ == "__main__":' in text}
    assert ours < set(programs)
    assert [name for name, text in programs.items() if name not in ours and "status_of(main)" not in text] == []
