"""Edits on the page: an image, a mask that is brushed, a strength."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.e2e.page import DONE, Open, generate, image_of, ready
from tests.waiting import wait_until
from tools.demo_model.scenes import Scene, SceneObject, render

pytestmark = pytest.mark.serve


def star_on_blue() -> tuple[np.ndarray, Any]:
    """An image with a star on the right, and its file as the browser chooses it."""
    star = SceneObject("star", "red", 0.78, 0.5, 0.2)
    image = render(Scene("blue", (star,)), 320, 320)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return image, {"name": "star.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def brushed(page: Page) -> np.ndarray:
    """Brushed part of the mask: 255, rows by columns."""
    data = page.evaluate("document.getElementById('mask').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))))[..., 3]


def test_an_image_is_regenerated_where_it_is_brushed(open_page: Open, shots: Path) -> None:
    page = ready(open_page())
    source, file = star_on_blue()
    page.set_input_files("#file", file)
    page.fill("#brush", "30")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] - 5, steps=10)
    page.mouse.up()
    page.screenshot(path=shots / "mask.png")
    page.fill("#strength", "1")
    generate(page, "a yellow square on white", seed=3)
    expect(page.locator(DONE)).to_have_count(1)
    image = image_of(page)
    before = np.asarray(Image.fromarray(source).resize((64, 64))).astype(float)
    assert np.abs(image - before)[:, 36:].mean() < 15  # kept
    assert np.abs(image - before)[:, 4:20].mean() > 40  # regenerated
    mask = brushed(page)
    # Without a mask the whole image changes.
    page.get_by_role("button", name="Clear mask").click()
    generate(page, "a yellow square on white", seed=3)
    expect(page.locator(DONE)).to_have_count(2)
    assert np.abs(image_of(page) - before)[:, 36:].mean() > 40
    page.get_by_role("button", name="Remove image").click()
    generate(page, "a yellow square on white", seed=3)
    expect(page.locator(DONE)).to_have_count(3)
    # The settings of an edit include its image, its mask and its strength.
    page.locator(DONE).nth(2).get_by_role("button", name="Use these").click()
    expect(page.locator("#editor")).to_be_visible()
    expect(page.locator("#strength-shown")).to_have_text("1")
    wait_until(lambda: np.array_equal(brushed(page) > 0, mask > 0), what="the mask")
    page.click("#generate")
    expect(page.locator(DONE)).to_have_count(4)
    assert np.abs(image_of(page) - image).max() <= 1
    page.locator(DONE).nth(1).get_by_role("button", name="Use these").click()
    expect(page.locator("#editor")).to_be_hidden()
    expect(page.locator("#strength-shown")).to_have_text("model default")


def test_a_mask_can_be_brushed_by_keyboard(open_page: Open, shots: Path) -> None:
    page = ready(open_page())
    _, file = star_on_blue()
    page.set_input_files("#file", file)
    wait_until(lambda: brushed(page).shape == (320, 320), what="the image")
    page.focus("#file")
    page.keyboard.press("Tab")
    expect(page.locator("#mask")).to_be_focused()
    expect(page.locator("#cursor")).to_be_visible()
    for _ in range(15):
        page.keyboard.press("ArrowLeft")
    assert not brushed(page).any()
    page.keyboard.press("Space")
    for _ in range(10):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.screenshot(path=shots / "keyboard.png")
    rows, columns = np.nonzero(brushed(page))
    assert 60 < np.median(columns) < 68  # at 0.5 - 15/50 of the width
    assert rows.min() < 100
    assert rows.max() < 200
    page.fill("#prompt", "a yellow square on white")
    page.keyboard.press("Control+Enter")
    expect(page.locator(DONE)).to_have_count(1)
    expect(page.locator(".download-mask")).to_be_visible()
