"""The report pages in a real browser: they show what was measured, and their controls work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; on Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A page that fails the test for anything it logs as an error."""
    page = browser.new_page(viewport={"width": 1200, "height": 1400})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    page.close()
    assert not faults


@pytest.fixture(scope="module")
def evaluation(fake_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    rows = [f'{{"instruction": "Explain item {n}.", "input": "", "output": "Item {n} is plain."}}' for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    words = [
        "--arm",
        "base",
        "--arm",
        "starter",
        "--held-out",
        str(folder / "rows.jsonl"),
        "--out",
        str(folder / "out"),
    ]
    command = [sys.executable, "-m", "evalharness", "run", "--url", fake_server, *words, "--max-tokens", "12"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "out"


def test_the_evaluation_report_filters_and_sorts(page, evaluation: Path):
    page.goto(f"file://{evaluation / 'report.html'}")
    assert page.locator("h1").inner_text()
    assert page.locator("svg").count() >= 1
    rows = page.locator("#samples tbody tr")
    assert rows.count() == 12
    page.fill("#filter-text", "item 7")
    assert page.locator("#samples tbody tr:visible").count() == 1
    assert page.locator("#shown").inner_text() == "1 of 12"
    page.fill("#filter-text", "")
    page.locator("#samples thead button").first.click()
    first = rows.first.locator("td").first.get_attribute("data-value")
    page.locator("#samples thead button").first.click()
    assert rows.first.locator("td").first.get_attribute("data-value") != first


def test_nothing_is_wider_than_the_page(page, evaluation: Path):
    for width in (390, 1200):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(f"file://{evaluation / 'report.html'}")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_load_report_shows_its_distribution(page, fake_server: str, tmp_path: Path):
    words = ["--arm", "base", "--arm", "starter", "--users", "2", "--seconds", "3", "--max-tokens", "8"]
    command = [sys.executable, "-m", "evalharness", "load", "--url", fake_server, *words, "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    page.goto(f"file://{tmp_path / 'load.html'}")
    assert page.locator("svg").count() >= 1
    assert "starter" in page.locator("body").inner_text()
