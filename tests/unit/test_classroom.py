"""The learner's copies of the notebooks, and what the notebooks ask of them."""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers.course import learner
from helpers.course.exercises import frame
from helpers.errors import InputError, StoreError
from helpers.maintain import classroom, notebooks
from helpers.maintain.classroom import Grade, Mark
from helpers.paths import PROJECT

NOTEBOOKS = {path.stem: path for path in notebooks.select(notebooks.NOTEBOOKS)}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture
def course(tmp_path):
    """A course of two notebooks, with outputs."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("00_start", "03_generate"):
        publish(folder / f"{name}.ipynb", "print(1)")
    return folder


def publish(path, *sources):
    cells = [nbformat.v4.new_code_cell(source, execution_count=1) for source in sources]
    cells[0].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def change(path, source=None, **fields):
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].update(fields)
    nb.cells[0].source = source or nb.cells[0].source
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}  # as JupyterLab does
    nbformat.write(nb, path)


def sources(path):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


def test_make_lab_opens_the_copies_where_they_are(tmp_path):
    """A ~ that no shell replaced (a hub's profile, /etc/environment) means the same to both lines of the target."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *jupyterlab*) echo "open $3";; *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--old-file=.venv/.set-up", f"PY={python}", "lab"],
        cwd=PROJECT,
        env={**own, "HOME": str(tmp_path), "COURSE_WORK": "~/my work"},
        capture_output=True,
        text=True,
        check=False,
    )
    start = tmp_path / "my work" / "00_start_here.ipynb"
    assert start.exists() and f"open {start}\n" in done.stdout, done.stderr


def test_copies_have_no_outputs_and_a_second_call_changes_nothing(course, work):
    assert classroom.update(course) == []
    assert sorted(path.name for path in work.iterdir()) == ["00_start.ipynb", "03_generate.ipynb"]
    cell = nbformat.read(work / "00_start.ipynb", as_version=4).cells[0]
    assert (cell.source, cell.outputs, cell.execution_count) == ("print(1)", [], None)
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    assert classroom.update(course) == [] and before == {path: path.stat().st_mtime_ns for path in work.iterdir()}


def test_a_copy_that_was_only_opened_follows_the_course(course, work):
    classroom.update(course)
    change(work / "00_start.ipynb")
    publish(course / "00_start.ipynb", "print(2)")
    assert classroom.update(course) == [] and sources(work / "00_start.ipynb") == ["print(2)"]


@pytest.mark.parametrize(
    "touch", [{"source": "print(7)"}, {"execution_count": 1}, {"outputs": [nbformat.v4.new_output("stream", text="1")]}]
)
def test_a_copy_that_was_worked_in_is_kept_and_the_learner_told(course, work, touch):
    classroom.update(course)
    change(work / "03_generate.ipynb", **touch)
    theirs = (work / "03_generate.ipynb").read_bytes()
    assert classroom.update(course) == []  # the course has nothing new
    publish(course / "03_generate.ipynb", "print(2)")
    (remark,) = classroom.update(course)
    assert "helpers course reset 03" in remark and (work / "03_generate.ipynb").read_bytes() == theirs


def test_a_damaged_copy_and_one_of_unknown_origin_lose_nothing(course, work):
    work.mkdir()
    (work / "00_start.ipynb").write_text("{")
    publish(work / "03_generate.ipynb", "mine()")
    damaged, unknown = classroom.update(course)
    assert "cannot be read" in damaged and "made from" in unknown and "you have worked" not in damaged + unknown
    assert (work / "00_start.ipynb").read_text() == "{" and sources(work / "03_generate.ipynb") == ["mine()"]


def test_a_notebook_is_named_whole_where_a_copy_lies_beside_it(course, work):
    shutil.copy(course / "03_generate.ipynb", course / "03_generate-Copy1.ipynb")
    with pytest.raises(InputError, match="03_generate-Copy1, 03_generate"):
        classroom.reset("03", course)
    classroom.reset("03_generate", course)
    assert [path.name for path in work.glob("*.ipynb")] == ["03_generate.ipynb"]


def test_reset_brings_one_back_and_keeps_theirs_under_a_dated_name(course, work):
    classroom.update(course)
    for mine in ("mine()", "mine_too()"):
        change(work / "03_generate.ipynb", mine)
        kept = classroom.reset("03", course)
        assert kept.name.startswith("03_generate.20") and sources(kept) == [mine]
        assert sources(work / "03_generate.ipynb") == ["print(1)"]
    assert len(list(work.glob("03_generate.20*.ipynb"))) == 2
    for name, words in (("09", "no notebook"), ("0", "names 2")):
        with pytest.raises(InputError, match=words):
            classroom.reset(name, course)


def test_a_reset_on_a_full_disk_takes_nothing_away(course, work, monkeypatch):
    classroom.update(course)
    before = {path.name: path.read_bytes() for path in work.iterdir()}

    def full(nb, path):
        path.write_text("a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nbformat, "write", full)
    with pytest.raises(StoreError, match="cannot be written") as refused:
        classroom.reset("03", course)
    assert refused.value.fix == "Free some space."  # another folder has none of their work
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_a_notebook_that_was_cut_comes_back_from_where_it_is_of(course, work, monkeypatch):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", course)
    classroom.update(course)
    for path, fix in (
        (course / "03_generate.ipynb", "git -C"),
        (work / "03_generate.ipynb", "helpers course reset 03_generate"),
        (work / "anna.ipynb", "Ask for the whole file"),
    ):
        path.write_text("{")
        with pytest.raises(InputError) as refused:
            notebooks.read(path)
        assert fix in refused.value.fix


def test_where_nothing_can_be_written_it_says_so(course, work, monkeypatch):
    work.write_text("a file, where a folder should be")
    for place in (str(work), "~nobody-of-that-name/work"):
        monkeypatch.setenv("COURSE_WORK", place)
        for call in (lambda: classroom.update(course), lambda: classroom.reset("03", course), classroom.progress):
            with pytest.raises(StoreError, match="COURSE_WORK"):
                call()


def test_progress_is_a_table_of_all_exercises():
    learner.record_answer("00.3", "wrong", "a")
    learner.record_answer("00.3", "right", "b")
    learner.record_answer("03.4", "wrong", "c")
    (table,) = classroom.progress()
    rows = {row[0]: row for row in table.rows}
    assert rows["00.3"][2:5] == ("right", "1 of 1", 2) and rows["03.4"][2:5] == ("tried", "0 of 3", 1)
    assert rows["00.1"][2] == "open" and table.caption.startswith("Exercises: 1 of ")


def test_the_export_is_what_gradescope_reads():
    marks = [
        Mark("00.1", "Count", 1, 1, "right"),
        Mark("00.2", "Write", 0, 3, "wrong"),
        Mark("00.3", "Find", 0, 2, "open"),
    ]
    results = json.loads(json.dumps(Grade("00_start", marks, ["cell 3 failed"]).as_gradescope()))
    # https://github.com/gradescope/autograder_samples, docs/specs.md; the keys are those that Otter-Grader 6 writes
    assert set(results) == {"output", "stdout_visibility", "tests"} and results["stdout_visibility"] == "hidden"
    scores = [(1.0, 1.0, "passed"), (0.0, 3.0, "failed"), (0.0, 2.0, "failed")]
    assert [(t["score"], t["max_score"], t["status"]) for t in results["tests"]] == scores
    assert {t["visibility"] for t in results["tests"]} == {"visible"}
    assert all(isinstance(t["name"], str) and isinstance(t["output"], str) for t in results["tests"])


# ---- the course's own notebooks ------------------------------------------------------------------------------


def calls(stem, *names):
    """(name, arguments, keywords) of each call of these functions, in order."""
    for _, cell in notebooks.code_cells(nbformat.read(NOTEBOOKS[stem], as_version=4)):
        every = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
        for call in sorted(every, key=lambda call: call.lineno):
            if isinstance(call.func, ast.Name) and call.func.id in names:
                values = [argument.value if isinstance(argument, ast.Constant) else None for argument in call.args]
                yield call.func.id, values, {keyword.arg: keyword.value for keyword in call.keywords}


@pytest.mark.parametrize("stem", [stem for stem in NOTEBOOKS if frame.exercises_of(stem[:2])])
def test_each_exercise_is_in_its_notebook_once_after_what_it_is_checked_against(stem):
    order = [(name, values[0], len(values)) for name, values, _ in calls(stem, "freeze", "check")]
    numbers = frame.exercises_of(stem[:2])
    assert order == [("freeze", stem[:2], 1), *(("check", number, 2) for number in numbers)]


@pytest.mark.parametrize("stem", list(NOTEBOOKS))
def test_each_guess_is_asked_for_before_its_result_in_the_same_unit(stem):
    units, revealed = {}, []
    for name, values, keywords in calls(stem, "predict", "reveal"):
        unit = next(key for key in keywords if key != "of")
        if name == "predict":
            assert values[0] not in units and ast.unparse(keywords[unit]) == "None"
            units[values[0]] = unit
        elif values[0]:
            assert units[values[0]] == unit
            revealed.append(values[0])
    if units:
        assert [values for _, values, _ in calls(stem, "summary")] == [[stem[:2]]]
    assert len(revealed) == len(set(revealed))


def test_no_two_guesses_of_the_course_have_one_name():
    names = [values[0] for stem in NOTEBOOKS for _, values, _ in calls(stem, "predict")]
    assert len(names) == len(set(names)) >= 12
