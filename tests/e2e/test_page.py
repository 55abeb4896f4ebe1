"""The page in a real browser, in front of the real server: generating, cancelling, copying."""

import base64
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.e2e.page import DONE, ELSEWHERE, PREVIEW, Open, generate, image_of, ready, running_on
from tests.waiting import wait_until

pytestmark = pytest.mark.serve


def test_a_prompt_becomes_an_image_with_previews(open_page: Open, shots: Path) -> None:
    page = ready(open_page())
    page.screenshot(path=shots / "idle.png")
    expect(page.locator("#prompt")).to_be_focused()
    # By keyboard alone.
    page.keyboard.type("a red circle on a blue background")
    page.keyboard.press("Control+Enter")
    expect(page.locator(DONE)).to_have_count(1)
    generate(page, "a small cyan cross at the top left, orange background", steps=150, seed=11)
    page.wait_for_selector(PREVIEW)
    expect(page.locator(".card.generating .state")).to_contain_text("of 150")
    page.screenshot(path=shots / "generating.png")
    preview = image_of(page, ".card.generating")
    expect(page.locator(DONE)).to_have_count(2)
    image = image_of(page)
    assert preview.shape == image.shape == (64, 64, 3)
    assert 1 < np.abs(preview - image).mean() < 40
    facts = page.locator(".facts").first
    expect(facts).to_contain_text("64 × 64 · 150 steps · seed 11")  # noqa: RUF001
    generate(page, "a large pink star on black")
    expect(page.locator(DONE)).to_have_count(3)
    page.screenshot(path=shots / "gallery.png")
    # A generated image can be repeated.
    page.locator(".card", has_text="cyan cross").get_by_role("button", name="Use these").click()
    assert page.input_value("#seed") == "11"
    assert page.input_value("#num_inference_steps") == "150"
    page.locator(".card", has_text="red circle").get_by_role("button", name="Run again").click()
    expect(page.locator(DONE)).to_have_count(4)
    seeds = [text.split("seed ")[1] for text in page.locator(".facts").all_inner_texts()]
    assert len(set(seeds)) == 4


def test_cancelling_frees_the_slot_and_a_reload_clears_the_page(
    open_page: Open, generator: Any
) -> None:
    page = ready(open_page())
    generate(page, "a blue star on pink", steps=200)
    page.wait_for_selector(PREVIEW)
    assert running_on(generator) == 1
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".card.cancelled .state")).to_have_text("Cancelled.")
    wait_until(lambda: running_on(generator) == 0, what="the slot to be free")
    generate(page, "a blue star on pink", steps=200)
    page.wait_for_selector(".card.generating")
    page.keyboard.press("Escape")
    expect(page.locator(".card.cancelled")).to_have_count(2)
    generate(page, "a blue star on pink", steps=200)
    page.wait_for_selector(PREVIEW)
    ready(page).reload()
    wait_until(lambda: running_on(generator) == 0, what="the slot to be free")
    ready(page)
    expect(page.locator(".card")).to_have_count(0)
    generate(page, "a blue star on pink", steps=4)
    expect(page.locator(DONE)).to_have_count(1)


@pytest.mark.parametrize("edit", [False, True])
def test_the_copied_command_generates_the_same_image(
    open_page: Open, tmp_path: Path, edit: bool
) -> None:
    page = ready(open_page(permissions=["clipboard-read", "clipboard-write"]))
    if edit:
        path = tmp_path / 'it\'s "mine"; a, b\\c.png'
        Image.new("RGB", (64, 64), "red").save(path)
        page.set_input_files("#file", path)
    generate(page, "a 'red' circle; $HOME on \"blue\"", steps=5)
    expect(page.locator(DONE)).to_have_count(1)
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator(".card .state")).to_have_text("Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240
    )
    [data] = json.loads(done.stdout)["data"]
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB"))
    assert np.abs(again - image_of(page)).max() <= 1


def test_the_command_can_be_copied_over_plain_http(open_page: Open) -> None:
    page = ready(open_page(host=ELSEWHERE))
    assert page.evaluate("[window.isSecureContext, typeof navigator.clipboard]") == [
        False,
        "undefined",
    ]
    generate(page, "a red circle", steps=2, seed=5)
    expect(page.locator(DONE)).to_have_count(1)
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator(".card .state")).to_have_text("Copied.")
    page.fill("#prompt", "")
    page.focus("#prompt")
    page.keyboard.press("Control+V")
    command = page.input_value("#prompt")
    assert command.startswith("curl -sS 'http://gpu-box.example:")
    assert '"seed":5' in command


def test_it_fits_a_phone_and_follows_the_color_scheme(open_page: Open, shots: Path) -> None:
    phone = ready(open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True))
    generate(phone, "a green ring on white", steps=8)
    expect(phone.locator(DONE)).to_have_count(1)
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    low = phone.evaluate(
        "[...document.querySelectorAll('button, select, input:not(.quiet), .buttons a')]"
        ".filter((e) => e.checkVisibility() && e.getBoundingClientRect().height > 1)"
        ".filter((e) => e.getBoundingClientRect().height < 40).map((e) => e.outerHTML)"
    )
    assert low == []
    phone.screenshot(path=shots / "phone.png", full_page=True)
    colors = []
    for scheme in ("light", "dark"):
        page = ready(open_page(color_scheme=scheme))
        colors.append(
            page.evaluate(
                "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
            )
        )
        generate(page, "a green ring on white", steps=8)
        expect(page.locator(DONE)).to_have_count(1)
        page.screenshot(path=shots / f"{scheme}.png")
    assert colors[0][0] != colors[1][0]
    assert colors[0][1] != colors[1][1]
