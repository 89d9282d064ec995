"""The page in a real browser: opened from disk, sorted, filtered, pointed at, on a phone.

Debian's chromium, driven by Playwright; where either is missing the tests skip and say so.
"""

import os
import shutil

import pytest
import report_data as data

from kfade.cli import main

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("plotly", reason="the page needs plotly: pip install 'kfade[report]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs chromium: apt-get install chromium", allow_module_level=True)

# Without these it looks for the network at every start, and refuses to run as root.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    folders = map(str, data.write_everything(folder / "in"))
    assert main(["report", *folders, "--out", str(folder / "report.html")]) == 0
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page; at the end nothing may have gone wrong, or been asked of any network."""
    complaints: list[str] = []
    contexts = []

    def open_page(width: int = 1280, height: int = 900, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url == address or complaints.append(f"asked for {r.url}"))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [c for c in complaints if not c.startswith("asked for data:")] == []


def draw_all(page) -> None:
    """Scroll through the charts, which are drawn when they come near."""
    plots = page.locator(".plot")
    for index in range(plots.count()):
        plots.nth(index).scroll_into_view_if_needed()
        plots.nth(index).locator(".main-svg").first.wait_for()


def column(page, number: int) -> list[str]:
    return (
        page.locator("table.sortable")
        .first.locator(f"tbody td:nth-child({number})")
        .all_inner_texts()
    )


def test_charts_are_drawn_and_tell_when_pointed_at(opened):
    page = opened()
    assert page.title() == "2 runs side by side · kfade report"  # no hostile script ran
    draw_all(page)
    figure = page.locator("#figure-forget-quality")
    assert figure.locator(".scatterlayer .point").count() > 20
    figure.scroll_into_view_if_needed()
    point = figure.locator(".scatterlayer .trace").first.locator(".point").first.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    label = figure.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert "model utility: " in (label.text_content() or "")


def test_the_toolbar_stands_above_the_points(opened):
    page = opened()
    draw_all(page)
    figure = page.locator("#figure-kl-seconds")
    figure.locator(".plot").hover()
    tools, area = (
        figure.locator(".modebar").bounding_box(),
        figure.locator(".bglayer .bg, .nsewdrag"),
    )
    assert tools["y"] + tools["height"] <= area.first.bounding_box()["y"]


def test_logarithmic_axes_have_their_ticks(opened):
    page = opened()
    draw_all(page)
    for axis in ("x", "y"):
        ticks = page.locator(f"#figure-kl-seconds .{axis}tick")
        assert ticks.count() >= 3


def test_a_series_is_hidden_by_its_key(opened):
    page = opened()
    draw_all(page)
    figure = page.locator("#figure-seconds")
    bars = figure.locator(".barlayer .point")
    assert bars.count() == 10
    button = figure.locator(".key button").first
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "document.querySelectorAll('#figure-seconds .barlayer .point').length === 5"
    )
    assert button.get_attribute("aria-pressed") == "false"


def test_tables_are_sorted_by_key_and_by_mouse(opened):
    page = opened()
    assert column(page, 1) == ["ekfac", "identity"]
    head = page.locator("table.sortable").first.locator("th").nth(4)
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, 5) == ["5", "9"]
    assert column(page, 1) == ["identity", "ekfac"]
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, 5) == ["9", "5"]


def test_completions_are_filtered_ordered_and_read_token_by_token(opened):
    page = opened()
    section = page.locator("#completions")
    count = section.locator("output")
    assert count.inner_text() == "120 of 120"
    assert "<script>" in section.locator("article h3").first.inner_text()  # shown as it is
    assert section.locator("article").count() == 6
    section.get_by_role("button", name="Show more").click()
    assert section.locator("article").count() == 12
    section.get_by_label("Show", exact=True).select_option("ekfac")
    assert count.inner_text() == "60 of 120"
    section.get_by_label("Find").fill("subject 12,")
    assert count.inner_text() == "1 of 120"
    assert section.locator("article").count() == 1
    section.get_by_label("Find").fill("")
    section.get_by_label("Order").select_option("length")
    lengths = [int(text.split()[-2]) for text in section.locator(".facts").all_inner_texts()]
    assert lengths == sorted(lengths, reverse=True)
    bubble = page.locator("#bubble")
    section.locator(".tokens span").nth(2).hover()
    assert bubble.inner_text().endswith("nats")
    page.mouse.move(0, 0)
    section.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    first = bubble.inner_text()
    page.keyboard.press("ArrowRight")
    assert bubble.is_visible()
    assert bubble.inner_text() != first
    page.keyboard.press("Escape")
    assert bubble.is_hidden()


def test_answers_are_found(opened):
    page = opened()
    section = page.locator("#generations")
    section.get_by_label("Show", exact=True).select_option("ekfac: forget")
    assert section.locator("output").inner_text().startswith("40 of ")
    section.get_by_label("Order").select_option("lost")
    text = section.locator("article").first.inner_text()
    assert "Before" in text
    assert "I do not know" in text


def test_formulas_show_on_focus(opened):
    page = opened()
    page.get_by_role("button", name="What loss on the forget set is").focus()
    assert "−log p(token)" in page.locator("#bubble").inner_text()


def test_light_and_dark(opened):
    page = opened(scheme="dark")
    draw_all(page)
    page.evaluate("scrollTo(0, 0)")
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.plot .xtitle')).fill"
    dark, dark_ink = page.evaluate(paper), page.evaluate(ink)
    page.get_by_role("button", name="Switch between light and dark").click()
    page.wait_for_function(f"{ink} !== '{dark_ink}'")
    assert page.evaluate(paper) != dark
    page.reload()
    assert page.evaluate(paper) != dark  # it is remembered


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(opened, width):
    page = opened(width, 800)
    draw_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folder = os.environ.get("KFADE_SCREENSHOTS")  # for a person to look at
    if folder:
        page.screenshot(path=f"{folder}/report-{width}.png", full_page=True)
