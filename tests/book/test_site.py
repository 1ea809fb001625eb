"""The rendered site in a real browser: typeset equations, figures, verdicts, no error, and nothing leaves the machine."""

import functools
import json
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib import ledger

pytestmark = [pytest.mark.gate, pytest.mark.browser]

CHAPTERS = ["1_dbn", "2_autorate", "3_bngd", "4_bsum", "5_dsgd"]
PAGES = ["index", *CHAPTERS, "6_synthesis", "7_scoreboard", "8_errata", "library", "notation", "reproduce"]
PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(built):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built.folder / "_build" / "html"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/book"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    missing = [name for name, path in PROGRAMS.items() if path is None]
    if missing:
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail(f"{' and '.join(missing)} must be installed")
        pytest.skip(f"{' and '.join(missing)} not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--window-size=1300,1600"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(PROGRAMS["chromedriver"]))
    yield driver
    driver.quit()


def settle(browser):
    """Wait until MathJax, where the page has it, has typeset everything."""
    browser.set_script_timeout(60)
    browser.execute_async_script(
        "const done = arguments[0];"
        "if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(() => done()); else done();"
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_error_and_asks_nobody_else(site, browser, page):
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(f"{site}/{page}.html")
    settle(browser)
    asked = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    outside = [url for url in asked if not url.startswith((site.removesuffix("/book"), "data:", "blob:"))]
    assert not outside
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [e for e in errors if "favicon" not in e]
    assert browser.execute_script("return document.querySelectorAll('mjx-merror').length") == 0


@pytest.mark.parametrize("page", CHAPTERS)
def test_a_chapter_is_typeset_with_figures_and_verdicts(site, browser, built, page):
    browser.get(f"{site}/{page}.html")
    settle(browser)
    count = functools.partial(browser.execute_script, "return document.querySelectorAll(arguments[0]).length")
    records = ledger.read(built.folder / f"_build/ledger/smoke/seed-0/{page.split('_')[1]}.jsonl")
    assert count("mjx-container") > 100
    assert count("figure img.only-light") == count("figure img.only-dark") >= 5
    for record in records:
        assert count(f"#claim-{record['claim']} .verdict-badge") == 1, record["claim"]
    broken = browser.execute_script(
        "return [...document.images].filter(i => i.complete && i.naturalWidth === 0).map(i => i.src.slice(0, 80))"
    )
    assert not broken
    without = browser.execute_script("return [...document.images].filter(i => !i.alt).map(i => i.src.slice(0, 80))")
    assert not without
    hidden = "return [...document.querySelectorAll('figure > figcaption')].filter(c => !c.offsetHeight).length"
    assert browser.execute_script(hidden) == 0, "a caption is not shown"
    stray = browser.execute_script(
        "return [...document.querySelectorAll('article p, article li, article td, article figcaption, .verdict-card *')]"
        ".filter(e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.includes('$')))"
        ".map(e => [...e.innerText].slice(0, 80).join(''))"
    )
    assert not stray, "mathematics that is not typeset"
    tables = browser.execute_script(
        "return [...document.querySelectorAll('article p')].map(p => p.innerText.split('\\n')[0])"
        ".filter(line => line.startsWith('|') && line.endsWith('|')).length"
    )
    assert tables == 0, "a table that is not rendered"


def test_the_theme_shows_one_picture_of_each_figure(site, browser):
    browser.get(f"{site}/3_bngd.html")
    shown = "return [...document.querySelectorAll('figure img')].filter(i => i.offsetParent).map(i => i.className)"
    for theme in ("light", "dark"):
        browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        assert set(browser.execute_script(shown)) == {f"only-{theme}"}
        grounds = browser.execute_script(
            "return [...document.querySelectorAll('div.cell_output .text_html, figure img')]"
            ".map(e => getComputedStyle(e).backgroundColor)"
        )
        assert set(grounds) == {"rgba(0, 0, 0, 0)"}, f"output of the {theme} page stands on a ground of its own"


def test_the_scoreboard_filters_and_links_to_the_evidence(site, browser, built):
    browser.get(f"{site}/7_scoreboard.html")
    settle(browser)
    rows = "return [...document.querySelectorAll('table.filterable tbody tr')].filter(r => !r.hidden).length"
    everything = browser.execute_script(rows)
    assert everything == len(ledger.load_registry())
    browser.execute_script(
        "const s = document.querySelector('.table-filter select'); s.value = 'dsgd';"
        "s.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert browser.execute_script(rows) == len(ledger.load_registry().of("dsgd"))
    target = browser.execute_script("return document.querySelector('table.filterable a').getAttribute('href')")
    page, anchor = target.split("#")
    browser.get(f"{site}/{page}#{anchor}")
    assert browser.execute_script("return document.getElementById(arguments[0]) !== null", anchor)


@pytest.mark.parametrize("page", [*CHAPTERS, "7_scoreboard", "8_errata"])
def test_no_table_is_wider_than_its_place(site, browser, page):
    browser.get(f"{site}/{page}.html")
    settle(browser)
    wide = browser.execute_script(
        "return [...document.querySelectorAll('table.claims-table')]"
        ".filter(t => t.offsetWidth > t.parentElement.clientWidth + 1).map(t => t.innerText.slice(0, 60))"
    )
    assert not wide


@pytest.mark.parametrize("page", CHAPTERS)
def test_a_phone_can_read_a_chapter_without_scrolling_sideways(site, browser, page):
    browser.set_window_size(400, 900)
    try:
        browser.get(f"{site}/{page}.html")
        settle(browser)
        assert browser.execute_script("window.scrollTo(200, 0); return window.scrollX") == 0
        wide = browser.execute_script(
            "const edge = document.documentElement.clientWidth + 1;"
            "return [...document.querySelectorAll('article.bd-article > section > *')]"
            ".filter(e => e.getBoundingClientRect().right > edge).map(e => e.outerHTML.slice(0, 80))"
        )
        assert not wide
    finally:
        browser.set_window_size(1300, 1600)
