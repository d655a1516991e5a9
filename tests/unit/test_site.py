"""The web site of the notebooks: what stands on its pages, and that each link on it leads somewhere."""

import json
import re
from urllib.parse import unquote

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")
bs4 = pytest.importorskip("bs4", reason="the notebook tools are not in this environment")

from helpers.display import Table
from helpers.errors import InputError
from helpers.maintain import notebooks, site
from helpers.paths import PROJECT

SOURCES = notebooks.select(notebooks.NOTEBOOKS)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The folder of the site of the committed notebooks, and its pages as trees."""
    folder = tmp_path_factory.mktemp("build") / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GITHUB_REPOSITORY", "some-body/a.course")  # as a workflow of GitHub's sets them
        patch.setenv("GITHUB_REF_NAME", "more/pages")
        site.write_site([site.convert(path.stem, notebooks.read(path)) for path in SOURCES], folder)
    return folder, {page.name: tree(page.read_text(encoding="utf-8")) for page in folder.glob("*.html")}


def tree(html: str):
    return bs4.BeautifulSoup(html, "html.parser")


def page_of(*cells):
    page = site.convert("00_made", nbformat.v4.new_notebook(cells=list(cells)))
    return page, tree(page.body)


def lost_links(pages) -> list[str]:
    """Links inside the site whose page or place on it is not there."""
    lost = []
    for name, page in pages.items():
        for link in page.select("a[href]"):
            target, _, anchor = str(link["href"]).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = pages.get(unquote(target) or name)
            if there is None or (anchor and not there.find(id=unquote(anchor))):
                lost.append(f"{name}: {link['href']}")
    return lost


def test_every_link_inside_the_site_leads_somewhere_on_it(course):
    assert lost_links(course[1]) == []
    pages = {"a.html": tree('<a href="b.html">x</a><a href="#y">y</a><a href="a.html">a</a>')}
    assert lost_links(pages) == ["a.html: b.html", "a.html: #y"]


# As Codespaces ("Facilitating quick creation and resumption of codespaces"), Binder ("Get started", labpath) and Colab
# ("Using Google Colab with GitHub") document them; what is behind "path" has to be in the tree.
LAUNCHES = {
    "Codespaces": r"https://codespaces\.new/some-body/a\.course/tree/more/pages",
    "Binder": r"https://mybinder\.org/v2/gh/some-body/a\.course/more%2Fpages\?labpath=(?P<path>notebooks%2F\w+\.ipynb)",
    "Colab": r"https://colab\.research\.google\.com/github/some-body/a\.course/blob/more/pages/(?P<path>.+)",
}


def test_launch_links_have_the_documented_forms_and_lead_to_files_of_the_course(course):
    for path in SOURCES:
        page = course[1][f"{path.stem}.html"]
        links = {link.get_text(): link["href"] for link in page.select(".launch a")}
        assert links.keys() == LAUNCHES.keys()
        for name, form in LAUNCHES.items():
            match = re.fullmatch(form, links[name])
            assert match and all(PROJECT / unquote(inside) == path for inside in match.groupdict().values())
        words = " ".join(page.select_one(".launch").get_text().split())
        assert words.startswith(
            "Run it in Codespaces, Binder, Colab (there with a new first cell: %pip install git+https://"
        )
    for needed in (".devcontainer/devcontainer.json", "Dockerfile"):  # of Codespaces; of Binder, in this order
        assert (PROJECT / needed).is_file()


def test_without_a_repository_there_are_no_launch_links(tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    page, _ = page_of(nbformat.v4.new_markdown_cell("# New"))
    site.write_site([page], tmp_path / "site")
    assert "launch" not in (tmp_path / "site/00_made.html").read_text()


def test_sentences_that_a_cell_prints_wrap_and_columns_do_not():
    def printed(text):
        cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)])
        return page_of(cell)[1].select_one(".output pre").get("class", [])

    assert "sentences" in printed("It is faster here. Each kernel reads what it needs once.\n")
    assert "sentences" not in printed("backend  TPOT\naot      0.42\n")
    assert "sentences" not in printed("for (i) {\n  x += 1;\n}\n")


def test_the_pages_follow_the_reading_order(course):
    folder, pages = course
    name, visited = "index.html", []
    while following := pages[name].select_one("a[rel=next]"):
        before, name = name, following["href"]
        back = pages[name].select_one("a[rel=prev]")
        assert (back["href"] if back else "index.html") == before
        visited.append(name)
    assert visited == [f"{path.stem}.html" for path in SOURCES]
    assert [link["href"] for link in pages["index.html"].select(".notebooks h3 a")] == visited


def test_headings_go_down_one_step_at_a_time_and_pictures_have_words(course):
    for name, page in course[1].items():
        levels = [int(heading.name[1]) for heading in page.select("h1, h2, h3, h4, h5, h6")]
        assert levels.count(1) == 1 and levels[0] == 1, name
        assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False)), name
        assert all(len(picture.get("alt", "")) > 20 for picture in page.select("main img")), name


def test_nothing_on_a_page_is_fetched_from_elsewhere(course):
    for name, page in course[1].items():
        fetched = [
            tag.get("src") or tag.get("href") for tag in page.select("script[src], link[href], img[src], iframe")
        ]
        known = {"style.css", "site.js", "data:", "data:image/png;base64"}
        assert {text.split(",")[0] for text in fetched} <= known, name


def test_the_search_index_has_each_section_with_its_text(course):
    folder, pages = course
    text = (folder / "search.js").read_text(encoding="utf-8")
    sections = json.loads(text.removeprefix("const SECTIONS = ").removesuffix(";\n"))
    headings = sum(len(page.select("main h2, main h3")) for name, page in pages.items() if name != "index.html")
    assert len(sections) == headings + len(pages) - 1
    (end,) = [s for s in sections if s["file"] == "05_troubleshoot.html" and "never stops" in s["title"]]
    assert "<|end|>" in end["text"]


def test_a_picture_keeps_its_text_and_a_table_its_caption():
    data = {"image/png": "iVBORw0KGgo=", "text/plain": "a picture"}
    picture = nbformat.v4.new_output(
        "display_data", data=data, metadata={"image/png": {"alt": "Bars: 1 & 2", "unconfined": True}}
    )
    html = Table("Sizes & names", ("", "MB"), [("a", "1.5")])._repr_html_()
    table = nbformat.v4.new_output("display_data", data={"text/html": html, "text/plain": "a table"})
    _, page = page_of(nbformat.v4.new_code_cell("1", outputs=[picture, table]))
    assert page.img["alt"] == "Bars: 1 & 2"
    assert page.select_one(".scroll > table") and page.select_one(".scroll")["aria-label"] == "Sizes & names"
    assert [cell.get_text() for cell in page.select("th")] == ["MB", "a"]  # the empty corner heads nothing


def test_a_solution_stays_hidden_until_it_is_asked_for():
    _, page = page_of(
        nbformat.v4.new_markdown_cell("<details>\n<summary>Solutions</summary>\n\nforty-two\n\n</details>")
    )
    assert "forty-two" in page.details.get_text()


def test_what_a_cell_printed_is_text_on_the_page():
    printed = nbformat.v4.new_output("stream", name="stdout", text="<script>alert(1)</script> \x1b[31mred\x1b[0m")
    page, body = page_of(
        nbformat.v4.new_markdown_cell("# A & B\n\nWhat <b>it</b> is.\n\n## One\n\n[on](01_next.ipynb#x)"),
        nbformat.v4.new_code_cell("x = '<b>'", outputs=[printed]),
    )
    assert not body.script and "<script>alert(1)</script>" in body.get_text()
    assert (page.title, page.lead) == ("A & B", "What  it  is.")
    assert body.a["href"] == "01_next.html#x"
    assert page.sections[1].title == "One" and "x = '<b>'" in page.sections[1].text


def test_another_folder_is_not_replaced_by_a_site(tmp_path, monkeypatch):
    """helpers run --out ~ had deleted somebody's ~/site."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.md").write_text("mine")
    with pytest.raises(InputError, match="no site of the course"):
        notebooks.run_all(tmp_path, ["03"])
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    for out in (notebooks.NOTEBOOKS, tmp_path / "work"):
        with pytest.raises(InputError, match="notebooks to work in"):
            notebooks.run_all(out, ["03"])
    with pytest.raises(InputError, match="no site of the course"):
        site.write_site([], tmp_path / "site")
    assert (tmp_path / "site/index.md").read_text() == "mine"


def test_a_site_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/old.html").write_text("old")
    (tmp_path / "site/search.js").write_text("old")
    page, _ = page_of(nbformat.v4.new_markdown_cell("# New"))
    site.write_site([page], tmp_path / "site")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["site"]
    assert {p.name for p in (tmp_path / "site").iterdir()} == {
        "00_made.html", "index.html", "search.js", "site.js", "style.css",
    }  # fmt: skip
