"""The export of points beside Otter-Grader's own, of the same marks: Otter runs here, where it is installed."""

import json

import pytest

otter = pytest.importorskip("otter.test_files", reason="needs Otter: pip install otter-grader")
pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers.maintain.classroom import Grade, Mark

MARKS = [Mark("00.1", "Count", 1, 1, "right"), Mark("00.2", "Write", 0, 3, "wrong"), Mark("00.3", "Find", 0, 2, "open")]


def of_otter(marks):
    """Otter's results.json for an assignment with a public test for each mark, which it runs."""
    from otter.run.run_autograder.autograder_config import AutograderConfig

    files = []
    for mark in marks:
        case = {"code": f">>> {mark.state == 'right'}\nTrue", "hidden": False}
        spec = {"name": f"{mark.number} {mark.title}", "points": mark.of, "suites": [{"cases": [case]}]}
        files.append(otter.OKTestFile.from_spec(spec))
        files[-1].run({})
    results = otter.GradingResults(files)
    results.set_output("00_start")
    return results.to_gradescope_dict(AutograderConfig({"show_all_public": True, "show_stdout": True}))


def test_the_export_has_otters_fields_and_points():
    theirs, ours = of_otter(MARKS), json.loads(json.dumps(Grade("00_start", MARKS, []).as_gradescope()))
    assert set(theirs) == set(ours)
    summary, *tests = theirs["tests"]  # the first says how all public tests went, and has no points
    assert "score" not in summary and set(summary) <= set(ours["tests"][0])
    for own, other in zip(ours["tests"], tests, strict=True):
        assert set(other) <= set(own) and set(own) - set(other) <= set(summary)
        for field in ("name", "score", "max_score", "visibility"):
            assert own[field] == other[field]
