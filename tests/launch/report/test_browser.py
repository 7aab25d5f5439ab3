"""The page in a real browser: nothing fails, everything shows, texts stay texts, and a keyboard is enough."""

import pytest

from launch.report.page import render, report_of
from tests.browser import CHROMIUM, Browser
from tests.lacking import lacking
from tests.launch.report.made_up import HOSTILE, judged_pipeline, pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        lacking("no chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    page = folder / "report.html"
    page.write_text(render(report_of([judged_pipeline(folder / "study", text=HOSTILE)])))
    return f"file://{page}"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1400])
def test_everything_shows_and_nothing_fails(browser, address, width, dark):
    browser.look(width=width, dark=dark, phone=width < 500)
    browser.open(address)
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.said == []
    assert browser.run("window.hacked === undefined && !document.querySelector('main img')")
    assert browser.run("document.documentElement.scrollWidth") <= width
    shown = browser.run(
        "[...document.querySelectorAll('figure')].map(each => {"
        " const box = each.querySelector('svg').getBoundingClientRect();"
        " return [each.id, box.width, each.querySelectorAll('polyline, circle, rect').length];})"
    )
    assert len(shown) > 20
    assert all(across > 250 and pieces for _, across, pieces in shown)
    ink, back = browser.run("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
    assert (_light(back) > _light(ink)) != dark


def _light(color: str) -> int:
    return sum(int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(","))


def test_a_keyboard_reaches_everything(browser, address):
    browser.look(width=1400)
    browser.open(address)
    wanted = browser.run("document.querySelectorAll('a[href], button, summary, figure, pre:not(details pre)').length")
    browser.run("document.activeElement.blur(); window.reached = new Set()")
    for _ in range(wanted):
        browser.press("Tab")
        browser.run("window.reached.add(document.activeElement)")
    assert browser.run("window.reached.size") == wanted
    browser.run("document.getElementById('reward-loss').focus()")
    for key in ("ArrowRight", "ArrowRight", "End"):
        browser.press(key)
    assert browser.run("document.querySelector('#reward-loss .readout').textContent").startswith("step 40: training 0.")
    browser.run("document.querySelector('#reward details summary').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('#reward details').open")


def test_a_radar_plot_reads_its_categories_to_keys_and_pointer(browser, address):
    browser.look(width=1400)
    browser.open(address)
    browser.run("document.getElementById('grade-radar').focus()")
    for key in ("ArrowRight", "ArrowRight"):
        browser.press(key)
    said = "document.querySelector('#grade-radar .readout').textContent"
    assert browser.run(said).startswith("roleplay: ") and "dpo" in browser.run(said)
    ends = browser.run(
        "['x2', 'y2'].map(name => Number(document.querySelector('#grade-radar .cursor').getAttribute(name)))"
    )
    assert ends == pytest.approx([220 + 136 * 0.5**0.5, 160 - 136 * 0.5**0.5])
    browser.run(
        "(() => { const svg = document.querySelector('#grade-radar svg'), box = svg.getBoundingClientRect();"
        " const at = {clientX: box.right - 20, clientY: box.top + box.height / 2};"
        " svg.dispatchEvent(new PointerEvent('pointermove', at));"
        "})()"
    )
    assert browser.run(said).startswith("reasoning: ")


def test_a_heading_sorts_by_its_numbers_both_ways(browser, address):
    browser.open(address)
    column = "[...document.querySelectorAll('#evaluate tbody tr')].map(row => row.cells[2].textContent).join()"
    browser.run("document.querySelectorAll('#evaluate thead button')[2].focus()")
    browser.press("Enter")
    assert browser.run(column) == "0.200,0.700"
    browser.press("Enter")
    assert browser.run(column) == "0.700,0.200"
    assert browser.run("document.querySelectorAll('#evaluate thead th')[2].getAttribute('aria-sort')") == "descending"


def test_plotly_draws_what_is_looked_at_and_paper_has_the_svg(browser, tmp_path):
    plotly = "window.Plotly = {react: (place, traces) => { place.dataset.traces = JSON.stringify(traces); }}"
    page = tmp_path / "report.html"
    page.write_text(render(report_of([pipeline(tmp_path / "study", text=HOSTILE)]), plotly=plotly))
    browser.look(width=1400)
    browser.open(f"file://{page}")
    browser.run("document.querySelector('#reward-margins').scrollIntoView()")
    browser.run("new Promise(done => setTimeout(done, 300))")
    band = "JSON.parse(document.querySelector('#reward-margins .live-plot').dataset.traces)"
    assert browser.run(f"{band}.map(each => each.fill || '')") == ["", "tonexty", ""]
    assert browser.run(f"{band}[2].y.length") == 40 and browser.said == []
    shown = "getComputedStyle(document.querySelector('#reward-margins svg')).display"
    assert browser.run(shown) == "none"
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run(shown) == "block"
    browser.call("Emulation.setEmulatedMedia", media="")


def test_colors_can_be_chosen_and_paper_is_white(browser, address):
    browser.look(width=1400)
    browser.open(address)
    browser.run("localStorage.clear(); document.getElementById('theme').dataset.theme = 'light'")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.run("localStorage.clear()")
