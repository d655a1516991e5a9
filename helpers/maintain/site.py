"""One small web site from the executed notebooks: a page each, an index, search, and no request to any other host.

nbconvert turns cells into HTML; the frame around them is pages/page.html.j2. Nothing has to be installed or fetched for
it, and it also works from a folder, without a server.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from helpers.errors import InputError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from nbformat import NotebookNode

FILES = Path(__file__).with_name("pages")
COURSE = "TensorRT-LLM, step by step"


@dataclass
class Section:
    """A heading, its level and its anchor, and the text up to the next one."""

    page: str
    file: str
    title: str
    level: int = 1
    id: str = ""
    text: str = ""


@dataclass
class Page:
    """One notebook on the site."""

    file: str
    title: str
    lead: str  # the paragraph below the title
    body: str  # HTML
    sections: list[Section] = field(default_factory=list)


def check_replaceable(out: Path) -> None:
    """InputError where the folder of a site holds something else: it would be lost."""
    if out.exists() and not (out / "search.js").exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} is there, and is no site of the course's.",
            cause="The site would be written in its place.",
            fix="Give --out another folder.",
        )


def write_site(pages: Sequence[Page], out: Path) -> None:
    """Write the site of these pages, in reading order. The folder is replaced as a whole. Raises InputError."""
    from jinja2 import Environment, FileSystemLoader

    check_replaceable(out)
    template = Environment(loader=FileSystemLoader(FILES), trim_blocks=True).get_template("page.html.j2")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("style.css", "site.js"):
        shutil.copyfile(FILES / name, partial / name)
    sections = [asdict(section) for page in pages for section in page.sections]
    # a script, not JSON: a page that was opened from a folder may not fetch files
    _write(partial / "search.js", f"const SECTIONS = {json.dumps(sections, ensure_ascii=False)};\n")
    repository = os.environ.get("GITHUB_REPOSITORY", "")  # a workflow of GitHub's sets it
    frame: dict[str, Any] = {"course": COURSE, "pages": pages, "repository": repository}
    _write(partial / "index.html", template.render(frame, title=COURSE, body="", next=pages[0] if pages else None))
    for previous, page, following in zip([None, *pages], pages, [*pages[1:], None], strict=False):
        turn = {"previous": previous, "next": following, "launch": launch_links(repository, page.file)}
        _write(partial / page.file, template.render(frame, title=page.title, body=page.body, **turn))
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)


def launch_links(repository: str, file: str) -> dict[str, str]:
    """Where a page's notebook can be run: name and address, as Codespaces, Binder and Colab document them. None where
    the repository has no name."""
    if not repository:
        return {}
    branch = os.environ.get("GITHUB_REF_NAME") or "main"
    notebook = f"notebooks/{file.removesuffix('.html')}.ipynb"
    binder = f"{repository}/{quote(branch, safe='')}?labpath={quote(notebook, safe='')}"
    return {
        "Codespaces": f"https://codespaces.new/{repository}/tree/{branch}",
        "Binder": f"https://mybinder.org/v2/gh/{binder}",
        "Colab": f"https://colab.research.google.com/github/{repository}/blob/{branch}/{notebook}",
    }


def convert(name: str, nb: NotebookNode) -> Page:
    """A notebook's cells as HTML, with what the index and the search need of them."""
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    html, _ = exporter.from_notebook_node(nb)
    soup = BeautifulSoup(html, "html.parser")
    for link in soup.select("a.anchor-link"):
        link.decompose()
    for link in soup.select("a[href]"):
        link["href"] = re.sub(r"^([\w./-]+)\.ipynb\b", r"\1.html", str(link["href"]))  # from page to page
    for cell in soup.select(".cell[id]"):
        del cell["id"]  # "cell-id=...": nothing links there
    for table in soup.select("table"):
        _let_scroll(soup, table)
    for output in soup.select(".output pre"):
        if not re.search(r"\S  |^ ", output.get_text(), re.MULTILINE):  # columns and code keep their lines
            output["class"] = "sentences"
    title, lead = soup.find("h1"), soup.select_one("h1 ~ p")
    page = Page(f"{name}.html", title.get_text() if title else name, lead.get_text(" ") if lead else "", str(soup))
    page.sections = _sections(soup, page)
    return page


def write_slides(name: str, nb: NotebookNode, folder: Path) -> Path:
    """nbconvert's slides: a section begins a slide, each further cell of text one below it, code goes with its text.
    They need reveal.js in folder/reveal.js, and nothing from another host."""
    from nbconvert import SlidesExporter

    if not (folder / "reveal.js/dist/reveal.js").is_file():
        place = shlex.quote(str(folder))
        raise InputError(
            f"{folder / 'reveal.js'} is not there, which slides are shown with.",
            cause="It is no Python package, and the course downloads nothing unasked.",
            fix=f"(mkdir -p {place} && cd {place} && npm pack reveal.js@4 && tar xf reveal.js-4*.tgz && "
            "mv package reveal.js)",
        )
    for cell in nb.cells:
        head = cell.cell_type == "markdown" and re.match("##? ", cell.source)
        kind = "slide" if head else "subslide" if cell.cell_type == "markdown" else "-"
        cell.metadata["slideshow"] = {"slide_type": kind}
    exporter = SlidesExporter(reveal_url_prefix="reveal.js", reveal_theme="white", mathjax_url="")
    exporter.raw_template = (FILES / "slides.html.j2").read_text(encoding="utf-8")
    page = folder / f"{name}.slides.html"
    _write(page, exporter.from_notebook_node(nb)[0])
    return page


def _let_scroll(soup: BeautifulSoup, table: Any) -> None:
    """Put a table into a box that scrolls, and let no cell be wider than a phone or narrower than its words."""
    caption = table.find("caption")
    label = caption.get_text() if caption else "Table"
    table.wrap(soup.new_tag("div", attrs={"class": "scroll", "role": "group", "aria-label": label}))
    for cell in table.select("caption, td, th"):
        if not cell.get_text(strip=True):
            cell.name = "td"  # an empty corner heads nothing
            cell.attrs.pop("scope", None)
        inner = soup.new_tag("div", attrs={"class": "cell-text"})
        for child in list(cell.children):
            inner.append(child.extract())
        cell.append(inner)


def _sections(soup: BeautifulSoup, page: Page) -> list[Section]:
    """The page cut at its headings of the second and third degree; outputs are left out of the text."""
    sections = [Section(page.title, page.file, page.title)]
    for node in soup.select("h2[id], h3[id], p, li, td, .input_area pre, .rendered_html pre"):
        if node.name in ("h2", "h3"):
            sections.append(Section(page.title, page.file, node.get_text(), int(node.name[1]), str(node["id"])))
        elif not node.find_parent(class_="output"):
            sections[-1].text += " ".join(node.get_text(" ").split()) + " "
    return sections


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
