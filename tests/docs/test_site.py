"""The built site in a browser: no errors, no foreign requests, no page wider than the screen."""

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser import running_browser
from tests.fakes.http_server import serving
from tests.nightly import nightly_but
from tools.docs.blocks import ROOT

pytestmark = pytest.mark.slow

WIDTHS = {"desktop": (1280, 860), "phone": (390, 844)}

OVERFLOWING = """
() => {
  const width = document.scrollingElement.scrollWidth;
  if (width <= innerWidth) return [];
  const wide = [...document.querySelectorAll('.md-content *')]
    .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
    .map((one) => `${one.tagName}: ${one.textContent.trim().slice(0, 60)}`);
  return [`${width} pixels wide`, ...wide.slice(0, 5)];
}
"""
"""The width of a page that scrolls sideways, and a few elements that reach out of the screen."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    """The address of the served site."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, directory=str(site), **options)

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


def _listen(page: Page, url: str) -> list[str]:
    """Return the list to which console errors, exceptions and foreign requests will be added."""
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    page.on(
        "console",
        lambda message: (
            problems.append(f"{page.url}: {message.text}") if message.type == "error" else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((url, "data:", "blob:"))
            else problems.append(f"{page.url}: request to {request.url}")
        ),
    )
    return problems


@pytest.mark.parametrize("screen", nightly_but(("phone",), WIDTHS))
def test_every_page_fits_the_screen_without_errors(
    browser: Browser, site: Path, url: str, screen: str
) -> None:
    width, height = WIDTHS[screen]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    problems = _listen(page, url)
    paths = sorted(path.relative_to(site).as_posix() for path in site.rglob("index.html"))
    assert len(paths) > 20
    for path in paths:
        page.goto(f"{url}/{path.removesuffix('index.html')}")
        problems += [f"{path}: {wide}" for wide in page.evaluate(OVERFLOWING)]
    if folder := os.environ.get("SCREENSHOTS"):
        page.goto(url)
        page.screenshot(path=Path(folder) / f"site-{screen}.png")
    context.close()
    assert problems == []


def test_the_search_finds_a_page(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    problems = _listen(page, url)
    page.goto(url)
    page.keyboard.press("/")
    page.keyboard.type("runbook")
    page.locator(".md-search-result__link").first.wait_for()
    assert "runbook" in (page.locator(".md-search-result__link").first.get_attribute("href") or "")
    page.close()
    assert problems == []
