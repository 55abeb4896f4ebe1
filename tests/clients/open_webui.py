"""Open WebUI, started for real and used in a browser."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page

from tests.browser import running_browser
from tests.clients.client import Outcomes
from tests.clients.programs.report import PROMPT, blue_png
from tests.serve_process import free_port
from tests.waiting import wait_until

START_S = 180.0
ANSWER_MS = 60_000

ENGINES = {"generate": "openai", "edit": "openai", "txt2img": "automatic1111"}
"""The engine of each call, a setting of Open WebUI."""


@dataclass(frozen=True, eq=False)
class OpenWebui:
    """Open WebUI, in an environment of its own."""

    python: Path
    shots: Path
    """Folder of the screenshot."""
    save: Callable[[bytes, Path], None]
    name: str = "Open WebUI"
    how: str = "run in a browser"

    def version(self) -> str:
        code = "from importlib.metadata import version; print(version('open-webui'))"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def make(self, url: str, calls: Sequence[str]) -> Outcomes:
        outcomes: Outcomes = {}
        for engine in dict.fromkeys(ENGINES.values()):
            names = [name for name in calls or ENGINES if ENGINES[name] == engine]
            if not names:
                continue
            with self._running(url, engine) as address, running_browser() as browser:
                for name in names:
                    page = browser.new_page(viewport={"width": 1000, "height": 520})
                    outcomes[name] = self._generate(page, address, name)
                    page.close()
        return outcomes

    @contextmanager
    def _running(self, url: str, engine: str) -> Iterator[str]:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "output.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [self.python.with_name("open-webui"), "serve", "--port", str(port)],
                    cwd=folder,
                    env=os.environ | _settings(url, engine, folder),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            address = f"http://127.0.0.1:{port}"

            def ready() -> bool:
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    return httpx.get(f"{address}/health", timeout=5).status_code == 200
                except httpx.TransportError:
                    return False

            try:
                wait_until(ready, deadline_s=START_S, every_s=0.5, what="Open WebUI")
                yield address
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)

    def _generate(self, page: Page, address: str, call: str) -> dict[str, Any]:
        page.set_default_timeout(ANSWER_MS)
        page.goto(f"{address}/playground/images")
        news = page.get_by_role("button", name="Okay, Let's Go!")
        prompt = page.get_by_placeholder("Describe")
        news.or_(prompt).first.wait_for()
        if news.is_visible():
            news.click()
        if call == "edit":
            image = {"name": "image.png", "mimeType": "image/png", "buffer": blue_png()}
            page.locator("input[type=file]").first.set_input_files(image)  # type: ignore[arg-type]
        page.locator("textarea").last.fill(PROMPT)
        page.get_by_role("button", name="Run", exact=True).click()
        made = page.locator("img[src*='/api/v1/files/']")
        failed = page.locator("[data-sonner-toast][data-type=error]")
        made.or_(failed).first.wait_for()
        if failed.count():
            return {"status": None, "message": failed.first.inner_text()}
        sides = made.last.evaluate(
            "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
        )
        if call == "generate":
            page.locator("[data-sonner-toast]").first.wait_for(state="detached")
            self.save(page.screenshot(animations="disabled"), self.shots / "open-webui.png")
        return {"images": [sides]}


def _settings(url: str, engine: str, folder: str) -> dict[str, str]:
    """Return the variables that set Open WebUI up: no users, and this server for images."""
    openai = {"OPENAI_API_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none"}
    settings = {
        "DATA_DIR": folder,
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "none",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "ENABLE_OLLAMA_API": "False",
        "RAG_EMBEDDING_ENGINE": "openai",
        "ENABLE_IMAGE_GENERATION": "True",
        "ENABLE_IMAGE_EDIT": "True",
        "IMAGE_GENERATION_ENGINE": engine,
        "IMAGE_GENERATION_MODEL": "demo",
        "IMAGE_EDIT_MODEL": "demo",
        "IMAGE_SIZE": "64x64",
        "IMAGE_STEPS": "20",
        "AUTOMATIC1111_BASE_URL": url,
    }
    images = {f"IMAGES_{name}": value for name, value in openai.items()}
    edits = {f"IMAGES_EDIT_{name}": value for name, value in openai.items()}
    return settings | openai | images | edits
