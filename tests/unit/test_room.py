"""An instructor's numbers: the time of each section, the machines of a room, slides."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers import cli
from helpers.errors import InputError
from helpers.machine import hardware
from helpers.maintain import notebooks, room, site
from helpers.paths import PROJECT

code, markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
REPORT = {"ok": True, "checks": [{"name": "engines", "status": "OK", "found": "50 GB free", "fix": ""}]}


def test_cells_count_to_the_section_that_they_stand_in():
    top = [markdown("# T\n\none two"), code("1")]
    first = [markdown("## A\nthree"), code(""), code("2"), markdown("### deep"), code("3")]
    nb = nbformat.v4.new_notebook(cells=[*top, *first, markdown("## B")])
    parts = room.sections(nb, "00", {1: 1.0, 2: 2.0, 3: 4.0})
    known = [("", 4, 1, 1.0), ("A", 5, 2, 6.0), ("B", 2, 0, 0.0)]
    assert [(part.title, part.words, part.cells, part.seconds) for part in parts] == known


def test_timings_tell_how_long_cells_ran_and_what_they_held(tmp_path):
    sleep = "import time\nx = bytearray(300_000_000)\ntime.sleep(1.5)"
    nb = nbformat.v4.new_notebook(cells=[markdown("# T"), markdown("## Slow"), code(sleep), code("1/0")])
    nbformat.write(nb, tmp_path / "00_made.ipynb")
    answer = room.timings(folder=tmp_path)
    assert not answer["ok"] and "ZeroDivisionError" in answer["problems"][0]
    slow = next(part for part in answer["sections"] if part["title"] == "Slow")
    assert slow["seconds"] >= 1.5 and slow["cells"] == 2
    assert answer["peak_bytes"]["00_made"] > 300_000_000
    assert re.search(r"00_made +0\.\d +0\.\d +2 +0\.\d", str(room.timings_table(answer)))
    assert json.loads(json.dumps(answer)) == answer


def machine(name, learners=4, free=13, **changes):
    return REPORT | {
        "host": name, "cores": 8, "learners": learners, "free_bytes": free * 2**30, "room_for": free // 3,
        "disk_for": 9,
        "versions": {"Python": "3.12.1", "torch": "2.13.0"},
    } | changes  # fmt: skip


def test_memory_for_too_few_learners_is_not_ready(monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda: 7 * 2**30)
    assert room.describe(REPORT, 2)["ok"] and not room.describe(REPORT, 3)["ok"]
    assert not room.describe(REPORT | {"ok": False}, 1)["ok"]
    line = str(room.summary([room.describe(REPORT, 3)])).splitlines()[-1]
    assert "NOT READY" in line and "memory for 2 of 3 learners" in line
    monkeypatch.setattr(hardware, "free_memory", lambda: 90 * 2**30)
    monkeypatch.setattr(hardware, "free_cores", lambda: 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3.5e9))
    line = str(room.summary([room.describe(REPORT, 3)])).splitlines()[-1]
    assert " ready" in line and "disk for 1 of 3; cores for 2 of 3" in line
    monkeypatch.setenv("COURSE_ENGINES", "/proc/none")  # the doctor says so in its own line
    assert room.describe(REPORT, 1)["disk_for"] == 0
    with pytest.raises(InputError, match="0 learners"):
        room.describe(REPORT, 0)


def test_a_summary_has_a_line_a_machine_and_names_what_differs(tmp_path, capsys):
    broken = {"name": "C++ compiler", "status": "failure", "found": "none", "fix": "apt install g++"}
    other = {"Python": "3.12.1", "torch": "2.9.1"}
    reports = [machine("one"), machine("two", ok=False, checks=[broken]), machine("three", versions=other)]
    files = [tmp_path / f"{report['host']}.json" for report in reports]
    for file, report in zip(files, reports, strict=True):
        file.write_text(json.dumps(report))
    assert cli.main(["course", "summary", *map(str, files)]) == 1
    one, two, three = capsys.readouterr().out.splitlines()[2:]
    assert re.match(r"one +ready +8 +13 +4 +0$", one)
    assert "NOT READY" in two and "C++ compiler: none" in two
    assert "ready" in three and three.endswith("torch 2.9.1, not 2.13.0")


def test_machines_of_one_name_are_told_apart_by_their_reports(tmp_path):
    files = [tmp_path / f"{seat}.json" for seat in ("seat-01", "seat-02", "seat-03")]
    for file, name in zip(files, ("lab", "lab", "desk"), strict=True):
        file.write_text(json.dumps(machine(name)))
    hosts = [row[0] for row in room.summary(room.read_reports(files)).rows]
    assert hosts == [f"lab ({files[0]})", f"lab ({files[1]})", "desk"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checks": 3}', "\0"])
def test_a_file_that_is_no_report_is_named(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InputError, match=r"m\.json is no report"):
        room.read_reports([tmp_path / "m.json"])


def test_slides_begin_at_sections_and_fetch_nothing_from_another_host(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[markdown("# T"), markdown("## A"), code("1"), markdown("text"), code("2")])
    with pytest.raises(InputError, match=r"reveal\.js is not there") as refused:
        site.write_slides("00_made", nb, tmp_path)
    assert re.fullmatch(r"\(mkdir .*\)", refused.value.fix)  # the terminal stays where it is
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "reveal.js/dist").mkdir(parents=True)
    (tmp_path / "reveal.js/dist/reveal.js").touch()
    text = site.write_slides("00_made", nb, tmp_path).read_text(encoding="utf-8")
    assert [cell.metadata.slideshow.slide_type for cell in nb.cells] == ["slide", "slide", "-", "subslide", "-"]
    fetched = re.findall(r"""<(?:script|link|img)[^>]*\s(?:src|href)=["']?([^"'\s>]+)""", text)
    assert fetched and all(address.startswith("reveal.js/") for address in fetched)
    assert "theme/white.css" in text  # its fonts lie beside it; other themes fetch theirs
    assert not re.search(r"""https?://[^"' ]+\.(?:js|css)|\bimport\b .* from|\brequire\(""", text)


def plan_rows(text: str) -> list[list[str]]:
    """The rows of the table of plans: what, minutes, what, minutes."""
    table = text[text.index("| half a day |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]


def test_the_plans_of_a_day_add_up_and_leave_time_to_read():
    text = (PROJECT / "docs/instructors.md").read_text(encoding="utf-8")
    *rows, together = plan_rows(text)
    for minutes in (1, 3):
        assert sum(int(row[minutes] or 0) for row in rows) == int(together[minutes])
    for name, minutes in [(row[2], int(row[3])) for row in rows if row[2][:2].isdigit()]:
        (source,) = notebooks.select(notebooks.NOTEBOOKS, [name[:2]])
        words = sum(part.words for part in room.sections(notebooks.read(source), source.stem, {}))
        assert minutes >= 2 * words / room.WORDS_PER_MINUTE + 10, name


def test_the_profile_for_a_hub_sets_what_kubespawner_documents():
    text = (PROJECT / "docs/instructors.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(block, "profile", "exec"), {"c": SimpleNamespace(KubeSpawner=(spawner := SimpleNamespace()))})
    # https://jupyterhub-kubespawner.readthedocs.io/en/latest/spawner.html
    (profile,) = spawner.profile_list
    assert profile.keys() <= {"display_name", "slug", "description", "default", "kubespawner_override"}
    traits = {"image", "cpu_guarantee", "cpu_limit", "mem_guarantee", "mem_limit", "environment", "cmd", "notebook_dir"}
    # volumes would replace the hub's own, and with them the learner's home
    assert profile["kubespawner_override"].keys() <= traits
    assert (
        profile["kubespawner_override"]["notebook_dir"] == profile["kubespawner_override"]["environment"]["COURSE_WORK"]
    )
    assert all(isinstance(value, str) for value in profile["kubespawner_override"]["environment"].values())


def test_a_report_of_what_failed_says_what_it_says(tmp_path):
    told = {"type": "StoreError", "what": "The folder cannot be made.", "cause": "It is full.", "fix": "Free some."}
    (tmp_path / "pc.json").write_text(json.dumps({"error": told}))
    with pytest.raises(InputError, match="pc.json: The folder cannot be made") as refused:
        room.read_reports([tmp_path / "pc.json"])
    assert (refused.value.cause, refused.value.fix) == ("It is full.", "Free some.")
