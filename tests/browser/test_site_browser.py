"""The web site in a real browser: accessible, whole on a phone, readable in the dark, and asking no other host."""

import pytest

pytestmark = pytest.mark.browser
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install -e '.[browser]'")

from jupyter_pages import browser  # noqa: F401 (a fixture)

from helpers.maintain import notebooks, site

SOURCES = notebooks.select(notebooks.NOTEBOOKS)
PAGES = ["index.html", *(f"{path.stem}.html" for path in SOURCES)]
SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build") / "site"
    site.write_site([site.convert(path.stem, notebooks.read(path)) for path in SOURCES], folder)
    return folder


@pytest.fixture
def visit(browser, folder):
    """visit(page, size, scheme): the page, opened from its folder as a reader may do."""
    contexts = []

    def open_(name, size="desk", scheme="light"):
        contexts.append(browser.new_context(viewport=SIZES[size], color_scheme=scheme))
        page = contexts[-1].new_page()
        page.requested, page.problems = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
        page.goto((folder / name).as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()


def violations(page) -> list[str]:
    result = axe.Axe().run(page, options={"preload": False})  # preload would fetch the style sheet anew
    return [f"{v['id']}: {node['html'][:200]}" for v in result.response["violations"] for node in v["nodes"]]


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [*((name, "phone", "light") for name in PAGES), *((name, "desk", "dark") for name in PAGES[::2])],
)
def test_a_page_is_accessible_whole_and_by_itself(visit, name, size, scheme):
    page = visit(name, size, scheme)
    assert page.problems == []
    assert all(url.startswith(("file:", "data:")) for url in page.requested)
    page.eval_on_selector_all("details", "nodes => nodes.forEach(node => { node.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
    assert violations(page) == []


def test_axe_sees_what_is_wrong(visit):
    page = visit("index.html")
    page.evaluate("document.querySelector('main').innerHTML += '<img src=\"data:,\"><p style=\"color: #ccc\">pale</p>'")
    assert {line.partition(":")[0] for line in violations(page)} == {"image-alt", "color-contrast"}


def test_long_code_scrolls_in_its_box_and_is_reached_by_keyboard(visit):
    page = visit("02_build_an_engine.html", "phone")
    box = page.locator(".input_area pre[tabindex='0']").first
    assert box.evaluate("node => node.scrollWidth > node.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")


def test_tables_scroll_instead_of_wrapping_to_slivers(visit):
    page = visit("04_compare.html", "phone")
    heights = page.locator("td .cell-text:not(:has(pre))").evaluate_all("cells => cells.map(cell => cell.clientHeight)")
    assert heights and max(heights) < 200  # ten lines
    assert page.locator(".scroll[tabindex='0']").count() > 0


def lightness(page) -> float:
    """Mean lightness of the first picture as it stands on the page, 0 to 255."""
    import io

    from PIL import Image, ImageStat

    shot = page.locator(".output_png img").first.screenshot()
    return ImageStat.Stat(Image.open(io.BytesIO(shot)).convert("L")).mean[0]


def test_pictures_follow_the_page_into_the_dark_and_back(visit):
    page = visit("04_compare.html", scheme="dark")
    assert lightness(page) < 80
    page.get_by_role("button", name="Light").click()
    assert lightness(page) > 175
    page.reload()
    assert lightness(page) > 175  # the choice is kept
    page.get_by_role("button", name="Dark").click()
    assert lightness(page) < 80


def test_search_finds_a_section_and_leads_to_it(visit):
    page = visit("index.html", "phone")
    page.get_by_role("searchbox").fill("tokenizer mismatch")
    status = page.locator("#results [role=status]")
    page.wait_for_function("document.querySelector('#results a')")
    assert "section" in status.inner_text()
    page.locator("#results a").first.click()
    page.wait_for_url("**/05_troubleshoot.html#3.-Tokenizer-mismatch")
    page.get_by_role("searchbox").fill("zzqx")
    page.wait_for_function("document.querySelector('#results [role=status]').textContent === 'Nothing found.'")
    page.keyboard.press("Escape")
    assert page.locator("#results").is_hidden() and page.problems == []
