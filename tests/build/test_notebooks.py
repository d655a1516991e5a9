"""The notebook runner: a cell either runs or is listed as skipped; nothing passes by silence."""

import asyncio
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers import cli
from helpers.errors import InputError
from helpers.maintain import notebooks, site
from helpers.model.checkpoint import BUNDLED
from helpers.paths import PROJECT


def write(folder: Path, *cells: str, name: str = "00_made", **tagged: dict) -> Path:
    """A notebook of these code cells, with the counts of an earlier run, which must not pass for this one;
    `cell_2={...}` is the metadata of the second."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, execution_count=9) for source in cells])
    for key, metadata in tagged.items():
        nb.cells[int(key.removeprefix("cell_")) - 1].metadata.update(metadata)
    folder.mkdir(exist_ok=True)
    nbformat.write(nb, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def run(tmp_path: Path, *cells: str, timeout: int = 60, **tagged: dict):
    return notebooks.run_notebook(write(tmp_path / "notebooks", *cells, **tagged), timeout=timeout)


def text(nb) -> str:
    return str([out for cell in nb.cells for out in cell.get("outputs", [])])


def test_every_cell_runs_in_one_fresh_kernel_in_its_own_folder_or_is_listed_with_its_reason(tmp_path):
    skipping = "from helpers.course.skip import skip\nskip('needs an NVIDIA GPU')"
    tag = {"tags": ["skip-execution"]}
    cells = ["x = 20", "import os", "print(x + 1, os.path.basename(os.getcwd()))", "  ", skipping, "1/0", "1/0"]
    nb, result = run(tmp_path, *cells, cell_6=tag | {"skip_reason": "takes an hour"}, cell_7=tag)
    assert "21 notebooks" in text(nb) and result.cells_run == 3  # the empty cell does not count
    assert result.skipped == [(4, "needs an NVIDIA GPU"), (5, "takes an hour")]
    assert result.problems == ["cell 6 has the tag skip-execution but no skip_reason in its metadata"]


def test_cells_after_a_model_that_is_not_here_are_skipped_with_the_command_that_gets_it(tmp_path):
    need = "from helpers.course.skip import need_model\nneed_model({!r})"
    missing = need.format("nobody/nothing")
    nb, result = run(tmp_path, "1", missing, "1/0", "x = [\n  1,\n]", need.format("stories"), "print(6 * 7)", "None")
    reasons = [reason for _, reason in result.skipped]
    assert [number for number, _ in result.skipped] == [2, 3, 4] and result.ok
    assert "helpers model get nobody/nothing" in reasons[0] and len(set(reasons)) == 1
    assert result.cells_run == 4 and "42" in text(nb)


def test_a_model_without_a_tokenizer_is_told_before_anything_is_built(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model, ignore=shutil.ignore_patterns("tokenizer.json"))
    _, result = run(tmp_path, f"from helpers.course.skip import need_model\nneed_model({str(model)!r})", "1/0")
    assert result.ok and {"no tokenizer.json" in reason for _, reason in result.skipped} == {True}
    assert f"save_pretrained({str(model)!r})" in result.skipped[0][1]  # the folder: what they wrote may be a Hub id
    (model / "tokenizer.model").touch()
    _, result = run(tmp_path, f"from helpers.course.skip import need_model\nneed_model({str(model)!r})")
    assert f"from_pretrained({str(model)!r})" in result.skipped[0][1] and "sentencepiece" in result.skipped[0][1]


def test_the_notebook_on_your_own_model_is_listed_as_skipped_where_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_MODELS", str(tmp_path / "models"))
    nb, result = notebooks.run_notebook(notebooks.NOTEBOOKS / "06_your_own_model.ipynb")
    assert result.ok and result.cells_run == 1  # the versions
    assert len(result.skipped) == len(notebooks.code_cells(nb)) - 1
    (reason,) = {reason for _, reason in result.skipped}
    assert "helpers model get smollm2" in reason


def test_a_failing_cell_is_named_with_its_error_and_the_rest_is_not_passed_over(tmp_path):
    tag = {"tags": ["raises-exception"]}
    _, result = run(tmp_path, "raise OSError", "1", "raise ValueError('seven')", "1", cell_1=tag, cell_2=tag)
    assert result.problems == [
        "cell 2 has the tag raises-exception but raised nothing",
        "cell 3 failed: ValueError: seven",
        "neither run nor listed as skipped: cell 4",
    ]
    assert re.search(r"00_made +0\.\d +1 +0 +FAILED", str(notebooks.table([result])))


def test_a_dead_kernel_is_an_error(tmp_path):
    _, result = run(tmp_path, "1", "import os; os._exit(1)", "1")
    assert result.problems[0].startswith("broke off in cell 2: DeadKernelError")
    assert re.fullmatch(r"neither run nor listed as skipped: cell (2, )?3", result.problems[1])  # 2 may not get to say


def test_a_cell_that_never_ends_is_an_error(tmp_path):
    _, result = run(tmp_path, "while True: pass", "1", timeout=2)
    assert result.problems[0].startswith("broke off in cell 1: CellTimeoutError")


def test_outputs_do_not_name_this_machine(tmp_path):
    nb, _ = run(
        tmp_path,
        f"print({str(PROJECT)!r}, {str(PROJECT / 'helpers')!r}, {str(Path.home() / 'x')!r})",
        "import warnings; warnings.warn('here')",
        "import sys, tempfile; print(sys.executable, tempfile.gettempdir() + '/x')",
    )
    written = nbformat.writes(nb)
    first = nb.cells[0].outputs[0].text
    assert first == ". helpers ~/x\n"
    assert "<cell>:1: UserWarning: here" in text(nb)
    for folder in {str(PROJECT), str(Path.home()), str(tmp_path)}:
        assert folder not in written.replace(nb.cells[0].source, "")
    assert nb.metadata.language_info == {"name": "python"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "/home/ann/scratch/x ~/scratch/y /scratch/z",
            "~/scratch/x ~/scratch/y <tmp>/z",
        ),  # what was replaced is no temporary folder
        ("cd PROJECT && PROJECT/helpers, PROJECT-2", "cd . && helpers, PROJECT-2"),
        ("/usr/bin/g++ /usr/local/cuda", "/usr/bin/g++ /usr/local/cuda"),  # not Python's, though it lies there
        ("LINK/a DISK/b", "~/a ~/b"),
        ("/home/ann-folder /home/anna /home/ann", "/home/ann-folder /home/anna ~/"),  # whole names only
        ("https://scratch/x file:///scratch/x", "https://scratch/x file://<tmp>/x"),  # and no host's
    ],
)
def test_a_folder_is_replaced_once_and_where_it_is_meant(tmp_path, monkeypatch, text, expected):
    (disk := tmp_path / "disk").mkdir()
    (link := tmp_path / "link").symlink_to(disk)
    monkeypatch.setenv("HOME", str(link) if "LINK" in text else "/home/ann")
    monkeypatch.setattr(tempfile, "tempdir", "/scratch")
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    for name, folder in {"PROJECT": PROJECT, "LINK": link, "DISK": disk}.items():
        text, expected = (words.replace(name, str(folder)) for words in (text, expected))
    assert notebooks.scrub({"image/png": text, "text/plain": [text]}) == {"image/png": text, "text/plain": [expected]}
    assert notebooks.scrub({"rows": [(text,)]}) == {"rows": [[expected]]}  # of a report's table


@pytest.mark.parametrize("folder", ["/", "//", "/x", ".", "", "home", "~"])
def test_a_folder_that_may_stand_in_any_text_replaces_nothing(monkeypatch, folder):
    monkeypatch.setenv("HOME", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.setattr(sys, "prefix", folder)
    text = "home / x ~ . 3 / 4 and/or /x /x/y https://home/x //"
    assert notebooks.scrub(text) == text


@pytest.mark.timeout(60)  # the pattern that nbclient would search here takes an hour
def test_one_long_line_is_no_trouble_and_a_cell_without_end_fills_neither_memory_nor_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "MOST_PRINTED", 2_000_000)
    endless = "for i in range(10_000): print('x' * 999)"
    shown = "for i in range(2_500): display('x' * 999)"
    nb, result = run(tmp_path, "print('7' * 10**6)", endless, "print('last')", shown)
    assert nb.cells[0].outputs[0].text == "7" * 10**6 + "\n" and nb.cells[2].outputs[0].text == "last\n"
    left_out = "printed more than 2,000,000 characters; the rest is left out"
    assert result.problems == [f"cell 2 {left_out}", f"cell 4 {left_out}"]
    assert len(nb.cells[3].outputs) < 2_100
    assert 0 < len(nb.cells[1].outputs[0].text) <= 2_000_000


@pytest.mark.timeout(60)  # nbconvert would take hours to colour this page
def test_colours_of_a_terminal_are_no_part_of_an_output():
    coloured = "\x1b[1;31mred\x1b[0m \x1b[ bare\n" * 100_000
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=coloured),
        nbformat.v4.new_output("execute_result", data={"text/plain": coloured}),
        nbformat.v4.new_output("error", ename="E", evalue=coloured, traceback=[coloured]),
    ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])
    notebooks.tidy(nb)
    assert "\x1b" not in nbformat.writes(nb) and nb.cells[0].outputs[0].text.startswith("red ")
    assert "red" in site.convert("page", nb).body


def test_the_pieces_of_a_stream_are_one_text_as_a_terminal_shows_it():
    pieces = [("stderr", "w1\n"), ("stdout", "1 %\r2"), ("stderr", "w2\n"), ("stdout", " %\r3 %\r\nend")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in pieces]
    picture = nbformat.v4.new_output("display_data", data={"text/plain": "p"})
    shown = [(out.name, out.text) for out in notebooks.merged(outputs)]
    assert shown == [("stdout", "3 %\nend"), ("stderr", "w1\nw2\n")]
    assert notebooks.merged([picture, outputs[0], picture]) == [picture, outputs[0], picture]
    assert notebooks.merged([]) == []


def test_widgets_leave_something_to_see(tmp_path):
    nb, result = run(
        tmp_path,
        "import ipywidgets; ipywidgets.IntSlider(3)",
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass",
    )
    assert result.ok
    assert "(A widget: run this cell in JupyterLab to use it.)" in text(nb)
    assert nb.cells[1].outputs == []  # a progress bar is nothing to keep
    assert "widget-view" not in text(nb) and "widgets" not in nb.metadata


def test_run_all_writes_notebooks_and_pages_and_updates_only_what_passed(tmp_path, capsys):
    folder = tmp_path / "notebooks"
    good = write(folder, "print('fine')", name="01_good")
    bad = write(folder, "1/0", name="02_bad")
    before = bad.read_text()
    results = notebooks.run_all(tmp_path / "build", folder=folder, update=True)
    assert [(result.name, result.ok) for result in results] == [("01_good", True), ("02_bad", False)]
    assert "fine" in good.read_text() and bad.read_text() == before
    assert (tmp_path / "build/02_bad.ipynb").is_file()
    assert "fine" in (tmp_path / "build/site/01_good.html").read_text(encoding="utf-8")
    assert "cell   1 of 1" in capsys.readouterr().out


BROKEN = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "a list": lambda _: "[]",
    "deep": lambda _: "[" * 100_000,
    "no cells": lambda text: text.replace('"cells"', '"cell"'),
    "an older format": lambda text: text.replace('"nbformat": 4', '"nbformat": 3'),
    "a version as text": lambda text: text.replace('"nbformat_minor": 5', '"nbformat_minor": "5"'),
    "a source that is a number": lambda text: text.replace('"print(1)"', "1"),
    "half of a surrogate pair": lambda text: text.replace("print(1)", "\\ud800"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_notebook_is_one_failed_row_and_the_next_one_runs(tmp_path, how):
    folder = tmp_path / "notebooks"
    broken = write(folder, "print(1)", name="01_broken")
    damaged = BROKEN[how](broken.read_text())
    assert damaged != broken.read_text()
    broken.write_text(damaged)
    write(folder, "print('fine')", name="02_good")
    first, second = notebooks.run_all(tmp_path / "build", folder=folder, update=True)
    assert [page.name for page in (tmp_path / "build/site").glob("0*.html")] == ["02_good.html"]
    assert "01_broken.ipynb is not a notebook" in first.problems[0] and "Fix:" in first.problems[0]
    assert second.ok and second.cells_run == 1
    assert broken.read_text() == damaged


def test_a_page_that_cannot_be_made_is_a_failed_row(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "convert", lambda *_: [][0])
    write(tmp_path / "notebooks", "1")
    (result,) = notebooks.run_all(tmp_path / "build", folder=tmp_path / "notebooks")
    assert result.problems == ["IndexError: list index out of range"]


def test_the_exit_status_tells(tmp_path, monkeypatch, capsys):
    result = notebooks.NotebookResult("00_made", cells_run=1)
    monkeypatch.setattr(notebooks, "run_all", lambda *_, **__: [result])
    assert cli.main(["run"]) == 0
    result.problems.append("cell 1 failed: ValueError: seven")
    assert cli.main(["run"]) == 1 and "00_made: cell 1 failed" in capsys.readouterr().out
    monkeypatch.setattr(notebooks, "run_all", lambda *_, **__: [])
    assert cli.main(["run"]) == 1  # nothing ran


def test_notebooks_are_named_by_their_beginning(tmp_path):
    first, second = (write(tmp_path, "1", name=name) for name in ("01_a", "02_b"))
    assert notebooks.select(tmp_path) == [first, second]
    assert notebooks.select(tmp_path, ["02"]) == [second]
    with pytest.raises(InputError, match="no notebook named 'x'"):
        notebooks.select(tmp_path, ["x"])


def test_the_table_groups_reasons():
    result = notebooks.NotebookResult("04", 60.0, 5, [(2, "no GPU"), (7, "no GPU"), (8, "slow")])
    assert "no GPU (cells 2, 7); slow (cell 8)" in str(notebooks.table([result]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_not_a_kernel_alone(number):
    async def handled() -> object:
        for each in (signal.SIGINT, signal.SIGTERM):  # as nbclient's own
            asyncio.get_running_loop().add_signal_handler(each, lambda: None)
        notebooks._interruptible()
        return signal.getsignal(number)

    assert asyncio.run(handled()) in (signal.SIG_DFL, signal.default_int_handler)
