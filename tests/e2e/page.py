"""Steps that tests of the page share, for Playwright."""

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect

# A busy machine generates slowly; an event that never comes still fails.
expect.set_options(timeout=120_000)

PREVIEW = ".card.generating .canvas.seen img"
DONE = ".card.done"

ELSEWHERE = "gpu-box.example"
"""Another name of this machine. Browsers take it for another machine: insecure without TLS."""

Open = Callable[..., Page]
"""The type of the fixture `open_page`."""


def ready(page: Page) -> Page:
    """Wait until the page knows the model, and return the page."""
    expect(page.locator("#size option").nth(1)).to_be_attached()
    return page


def generate(page: Page, prompt: str, steps: int | None = None, seed: int | None = None) -> None:
    """Fill in the form and send it; None leaves the field empty."""
    page.fill("#prompt", prompt)
    page.fill("#num_inference_steps", "" if steps is None else str(steps))
    page.fill("#seed", "" if seed is None else str(seed))
    page.click("#generate")


def image_of(page: Page, card: str = DONE) -> np.ndarray:
    """Return the pixels of the first such card, as floats."""
    source = page.locator(f"{card} .canvas img").first.get_attribute("src")
    assert source is not None
    assert source.startswith("data:image/png;base64,")
    data = base64.b64decode(source.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def running_on(generator: Any) -> int:
    """Count the requests in the engine, in another thread: Playwright has a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        stats = pool.submit(lambda: generator.stats.remote().result(timeout_s=20)).result()
    running: int = stats.running
    return running
