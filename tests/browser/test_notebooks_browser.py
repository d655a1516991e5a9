"""Notebooks run by the buttons of JupyterLab and Notebook 7: one in every run, in JupyterLab; all in `make nightly`."""

import time

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from jupyter_pages import browser, jupyter, picture, run_all, visit, wait_for  # noqa: F401 (three are fixtures)
from promises import NIGHTLY

from helpers.maintain import notebooks

ALL = [path.stem for path in notebooks.select(notebooks.NOTEBOOKS)]


@pytest.mark.promise("a notebook runs by the buttons of JupyterLab and Notebook 7", 1, 2 * len(ALL))
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("app", ["lab", "notebook"] if NIGHTLY else ["lab"])
@pytest.mark.parametrize("name", ALL if NIGHTLY else ALL[:1])
def test_a_notebook_runs_by_its_buttons(visit, jupyter, stories_fp32, name, app):
    """As a learner has it: without outputs. stories_fp32: notebook 00's engine, so that it is compiled once."""
    nb = nbformat.read(notebooks.NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    page = visit(nb, app, f"{name}-{app}")
    run_all(page)
    file, last = jupyter[0] / f"{page.name}.ipynb", [cell for cell in nb.cells if cell.cell_type == "code"][-1].id

    def outputs_of_the_last_cell():
        page.keyboard.press("Control+s")
        time.sleep(1)
        saved = nbformat.read(file, as_version=4).cells
        return next(cell.outputs for cell in saved if cell.id == last)

    wait_for(outputs_of_the_last_cell, 2000 if NIGHTLY else 120)
    picture(page, f"notebook-{page.name}")
    for cell in nbformat.read(file, as_version=4).cells:
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        assert bool(errors) == ("raises-exception" in cell.metadata.get("tags", [])), errors
    assert page.problems == []
