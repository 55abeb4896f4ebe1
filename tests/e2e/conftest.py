"""The served demo that tests share, and the browser."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page
from ray import serve

from tests.browser import running_browser
from tests.e2e.page import ELSEWHERE, Open
from tests.serve_process import connected, demo_config, free_port, start_serve
from tests.waiting import wait_until


@dataclass(frozen=True)
class Server:
    """A running application."""

    url: str
    ray_address: str
    log: Path
    first_image_s: float
    """Time from the start of the process to the first finished image."""


@pytest.fixture(scope="package")
def server(report: Callable[[str], None]) -> Iterator[Server]:
    """``serve run`` with configs/demo.yaml, after its first image.

    It ends with the tests of this folder: an idle Ray cluster takes time of the processor.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started_at = monotonic()
    running = start_serve(demo_config(port))

    def first_image() -> bool:
        running.check_running()
        try:
            body = {"prompt": "a red circle on a blue background", "seed": 1}
            response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=20)
        except httpx.TransportError:
            return False
        return response.status_code == 200

    try:
        try:
            wait_until(first_image, deadline_s=150, every_s=0.2, what="the first image")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{running.log.read_text()[-5000:]}") from None
        took_s = monotonic() - started_at
        report(f"serve run to the first image: {took_s:.1f} s")
        yield Server(url, running.ray_address, running.log, took_s)
    finally:
        running.stop()


@pytest.fixture(scope="module")
def generator(server: Server) -> Iterator[Any]:
    """A handle to the running generator, for its engine's statistics."""
    with connected(server.ray_address):
        yield serve.get_deployment_handle("Generator", "diffusion-serve")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for which `ELSEWHERE` is this machine."""
    with running_browser(f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1") as browser:
        yield browser


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """The folder of the screenshots; SCREENSHOTS names one that outlives the test."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Open]:
    """Open the page in a new context; console errors and foreign requests fail the test."""
    complaints: list[str] = []
    expected: list[str] = []
    contexts = []

    def open_(
        before: Callable[[Page], None] = lambda page: None,
        complaint: str = "",
        host: str = "127.0.0.1",
        **options: Any,
    ) -> Page:
        url = server.url.replace("127.0.0.1", host)
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()
        expected.extend([complaint] if complaint else [])
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: complaints.append(message.text) if message.type == "error" else None,
        )
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((url, "data:", "blob:"))
                else complaints.append(f"request to {request.url}")
            ),
        )
        before(page)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    unexpected = [text for text in complaints if not any(part in text for part in expected)]
    assert unexpected == []
