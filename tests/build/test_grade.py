"""Grading runs a learner's notebook and counts the points of this run."""

import json

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers.cli import main
from helpers.course import learner
from helpers.course.exercises import frame
from helpers.maintain import classroom, notebooks

CELLS = [
    "from helpers import BuildRecipe\nfrom helpers.course.exercises import check",
    'check("00.3", "max_tokens")\ncheck("00.3", "max_batch_size")',  # right in the end
    "1 / 0",  # and the next cell runs all the same
    'check("00.5", BuildRecipe(max_input_len=64, max_seq_len=256))',
    'check("00.4", None)',
]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    path = tmp_path / "00_of_anna.ipynb"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="Right.")]  # an earlier run's, which proves nothing
    nbformat.write(nb, path)
    return path


def test_points_are_those_of_the_run(notebook, tmp_path, capsys):
    learner.record_answer("00.1", "right", "x")  # of the instructor's own work
    before = (tmp_path / "work" / learner.FILE).read_text()
    text = notebook.read_bytes()
    assert main(["course", "grade", str(notebook), "--json", "--gradescope", str(tmp_path / "results.json")]) == 0
    answer = json.loads(capsys.readouterr().out)
    states = {mark["number"]: (mark["state"], mark["points"], mark["of"]) for mark in answer["marks"]}
    assert states["00.3"] == ("right", 1, 1) and states["00.5"] == ("wrong", 0, 2)
    assert {states[number][0] for number in ("00.1", "00.2", "00.4", "00.6")} == {"open"}
    assert answer["points"] == 1 and answer["of"] == sum(of for _, _, of in states.values())
    assert any("ZeroDivisionError" in problem for problem in answer["problems"])
    tests = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert sum(test["score"] for test in tests) == 1 and sum(test["max_score"] for test in tests) == answer["of"]
    assert (tmp_path / "work" / learner.FILE).read_text() == before and notebook.read_bytes() == text


def test_the_notebook_here_is_graded_also_where_the_instructor_has_a_copy_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    right, open_ = "from helpers.course.exercises import check\ncheck('00.3', 'max_batch_size')", "1"
    for folder, cell in (("anna", right), ("work", open_)):
        (tmp_path / folder).mkdir()
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        notebooks.write(nb, tmp_path / folder / "00_start_here.ipynb")
    monkeypatch.chdir(tmp_path / "anna")
    for name, folder, points in (("00_start_here", tmp_path / "anna", 1), ("00", tmp_path / "work", 0)):
        assert main(["course", "grade", name]) == 0
        assert f"{folder / '00_start_here.ipynb'}: {points} of" in capsys.readouterr().out


def test_a_notebook_that_sets_its_folder_is_graded_like_others(tmp_path, monkeypatch):
    """As the course tells whoever has a checkout that is read-only."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    cells = [
        f"import os\nos.environ['COURSE_WORK'] = {str(tmp_path / 'theirs')!r}",
        "from helpers.course.exercises import check\ncheck('00.3', 0)\ncheck('00.3', 1)\ncheck('01.1', 1)",
    ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebooks.write(nb, tmp_path / "00_bob.ipynb")
    grade = classroom.grade(str(tmp_path / "00_bob.ipynb"))
    assert {mark.state for mark in grade.marks} > {"open"} and not (tmp_path / "theirs").exists()
    assert grade.problems == ["it answers 01.1, of another notebook than its name begins with"]


def test_exercises_that_could_not_be_run_here_are_named(tmp_path, monkeypatch):
    """Notebook 06, where its model is not on the machine that grades: it had 0 points, and nothing said why."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    cells = ["from helpers.course.skip import need_model\nneed_model('nobody/nothing')", "check('06.1', 1)", "1"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebooks.write(nb, tmp_path / "06_eve.ipynb")
    (problem,) = classroom.grade(str(tmp_path / "06_eve.ipynb")).problems
    assert "not run" in problem and "helpers model get nobody/nothing" in problem and "(cell 2)" in problem


def test_what_cannot_be_graded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    (tmp_path / "homework.ipynb").write_text("{}")
    for name, words in (
        (str(tmp_path / "homework.ipynb"), "has no exercises"),
        ("03", "no copy"),
        ("99", "no notebook"),
    ):
        assert main(["course", "grade", name]) == 1
        assert words in capsys.readouterr().err


def test_the_commands_of_the_learner(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    assert main(["course", "copy"]) == 0 and (tmp_path / "work" / "00_start_here.ipynb").exists()
    assert main(["course", "reset", "03"]) == 0 and len(list((tmp_path / "work").glob("03_generate.20*"))) == 1
    assert main(["course", "solution", "03.5"]) == 0 and "topk(2)" in capsys.readouterr().out
    assert main(["course", "progress"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "03.5" in line)
    assert line.split()[-1] == "shown"
    assert main(["course", "solution", "03.99"]) == 1 and classroom.progress()


@pytest.mark.parametrize("name", ["00_start_here", "03_generate"])
def test_a_notebook_with_the_solutions_in_it_has_all_points(name, stories_fp32, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    nb = notebooks.read(notebooks.NOTEBOOKS / f"{name}.ipynb")
    for number, task in frame.exercises_of(name[:2]).items():
        (cell,) = [cell for cell in nb.cells if f'check("{number}"' in cell.source]
        before = cell.source.partition("answer_")[0].partition("def ")[0]  # what the cell gives to work with
        cell.source = f'{before}{task.solution.partition("```python")[2].partition("```")[0]}\ncheck("{number}", answer)'
    notebooks.write(nb, tmp_path / f"{name}.ipynb")
    grade = classroom.grade(str(tmp_path / f"{name}.ipynb"))
    assert [(mark.number, mark.state) for mark in grade.marks if mark.state != "right"] == [] == grade.problems
    assert grade.as_json()["points"] == grade.as_json()["of"]
