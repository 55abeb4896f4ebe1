"""The page in a real browser, in front of the real server."""

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.e2e.conftest import Server
from tests.waiting import wait_until
from tools.demo_model.scenes import Scene, SceneObject, render

pytestmark = pytest.mark.serve

# A busy machine generates slowly; an event that never comes still fails.
expect.set_options(timeout=30_000)

PREVIEW = ".card.generating .canvas.seen img"
DONE = ".card.done"

ELSEWHERE = "gpu-box.example"
"""Another name of this machine, which browsers take for another one: not secure without TLS."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        reason = "no Chromium is installed (Debian: apt-get install chromium)"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    # As root, which continuous integration often is, Chromium has no sandbox. It shall not phone.
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    names = [f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1", "--no-proxy-server"]
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", *quiet, *names]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go, to be looked at: a folder of one's own with SCREENSHOTS=folder."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Open]:
    """Opens the page in a context of its own; nothing may be complained of or asked elsewhere."""
    complaints: list[str] = []
    expected: list[str] = []
    contexts = []

    def open_(
        before: Callable[[Page], None] = lambda page: None,
        complains: str = "",
        host: str = "127.0.0.1",
        **options: Any,
    ) -> Page:
        url = server.url.replace("127.0.0.1", host)
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        expected.extend([complains] if complains else [])
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
                else complaints.append(f"asked {request.url}")
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


def ready(page: Page) -> Page:
    """When it knows the model."""
    expect(page.locator("#size option").nth(1)).to_be_attached()
    return page


def generate(page: Page, prompt: str, steps: int | None = None, seed: int | None = None) -> None:
    page.fill("#prompt", prompt)
    page.fill("#num_inference_steps", "" if steps is None else str(steps))
    page.fill("#seed", "" if seed is None else str(seed))
    page.click("#generate")


def image_of(page: Page, card: str = DONE) -> np.ndarray:
    source = page.locator(f"{card} .canvas img").first.get_attribute("src")
    assert source is not None
    assert source.startswith("data:image/png;base64,")
    data = base64.b64decode(source.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def running_on(generator: Any) -> int:
    """Requests in the engine, read in a thread because Playwright has a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        stats = pool.submit(lambda: generator.stats.remote().result(timeout_s=20)).result()
    running: int = stats.running
    return running


def test_a_prompt_becomes_a_image_before_ones_eyes(open_page: Open, shots: Path) -> None:
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


def test_cancelling_frees_the_place_and_a_reload_begins_anew(
    open_page: Open, generator: Any
) -> None:
    page = ready(open_page())
    generate(page, "a blue star on pink", steps=200)
    page.wait_for_selector(PREVIEW)
    assert running_on(generator) == 1
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".card.cancelled .state")).to_have_text("Cancelled.")
    wait_until(lambda: running_on(generator) == 0, what="the place to be free")
    generate(page, "a blue star on pink", steps=200)
    page.wait_for_selector(".card.generating")
    page.keyboard.press("Escape")
    expect(page.locator(".card.cancelled")).to_have_count(2)
    generate(page, "a blue star on pink", steps=200)
    page.wait_for_selector(PREVIEW)
    ready(page).reload()
    wait_until(lambda: running_on(generator) == 0, what="the place to be free")
    ready(page)
    expect(page.locator(".card")).to_have_count(0)
    generate(page, "a blue star on pink", steps=4)
    expect(page.locator(DONE)).to_have_count(1)


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


def test_a_image_is_generated_anew_where_it_is_brushed(open_page: Open, shots: Path) -> None:
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
    assert np.abs(image - before)[:, 4:20].mean() > 40  # generated anew
    mask = brushed(page)
    # Without the mask all of it changes, by as much as one says.
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
    expect(page.locator("#strength-shown")).to_have_text("the model's own")


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
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    [data] = json.loads(done.stdout)["data"]
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB"))
    assert np.abs(again - image_of(page)).max() <= 1


def test_over_plain_http_from_another_machine_it_copies_as_well(open_page: Open) -> None:
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


def test_seeds_that_javascript_cannot_hold_are_refused(open_page: Open) -> None:
    page = ready(open_page())
    generate(page, "a red circle", steps=2, seed=2**53 + 1)
    expect(page.locator("#seed-wrong")).to_be_visible()
    expect(page.locator(".card")).to_have_count(0)
    generate(page, "a red circle", steps=2, seed=2**53 - 1)
    expect(page.locator(".card .facts")).to_contain_text(f"seed {2**53 - 1}")


def test_it_fits_a_phone_and_the_dark(open_page: Open, shots: Path) -> None:
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


def test_what_goes_wrong_is_said(open_page: Open) -> None:
    answers = [
        {"status": 500, "json": {"error": {"message": "Call 42 has it.", "param": None}}},
        {
            "status": 400,
            "json": {"error": {"message": "seed must be prime.", "param": "seed"}},
        },
        {"status": 400, "json": {"error": {"message": "no such scale.", "param": "lora.ink"}}},
        {
            "status": 429,
            "headers": {"Retry-After": "1"},
            "json": {"error": {"message": "Too many.", "param": None}},
        },
    ]

    def answer(route: Route) -> None:
        if answers:
            route.fulfill(**answers.pop(0))
        else:
            route.continue_()

    page = ready(
        open_page(
            before=lambda page: page.route("**/v1/images/generations", answer),
            complains="Failed to load resource",
        )
    )
    page.click("#generate")
    expect(page.locator("#prompt-wrong")).to_have_text("Describe the image.")
    generate(page, "a red circle", steps=4)
    expect(page.locator(".card.failed .state").first).to_have_text("Call 42 has it.")
    generate(page, "a red circle", steps=4)
    expect(page.locator("#seed-wrong")).to_have_text("seed must be prime.")
    expect(page.locator("#seed")).to_have_attribute("aria-invalid", "true")
    page.evaluate("import('/page/validation.js').then(({ blame }) => blame('seed', 'twice.'))")
    expect(page.locator("#seed-wrong")).to_have_text("twice.")
    generate(page, "a red circle", steps=4)
    expect(page.locator("#lora-wrong")).to_have_count(1)
    generate(page, "a red circle", steps=4)
    expect(page.locator(".card.generating .state")).to_contain_text("Trying again in 1 s")
    expect(page.locator(DONE)).to_have_count(1)
    expect(page.locator("#seed-wrong")).to_have_count(0)


def test_it_asks_for_the_key_that_the_server_wants(open_page: Open, shots: Path) -> None:
    def guard(route: Route) -> None:
        given = route.request.headers.get("authorization")
        if given == "Bearer sk-right":
            route.continue_()
        else:
            message = "this API key is not known here."
            route.fulfill(status=401, json={"error": {"message": message, "param": None}})

    def prepare(page: Page) -> None:
        page.clock.install()
        page.route("**/v1/**", guard)

    page = open_page(
        before=prepare,
        complains="Failed to load resource",
        permissions=["clipboard-read", "clipboard-write"],
    )
    expect(page.locator("#key-dialog")).to_be_visible()
    # The dialog stays closed once it was dismissed.
    page.get_by_role("button", name="Not now").click()
    expect(page.locator("#model")).to_have_text("This server requires an API key.")
    page.clock.run_for(20_000)
    expect(page.locator("#key-dialog")).to_be_hidden()
    page.screenshot(path=shots / "no-key.png")
    page.get_by_role("button", name="Enter key").click()
    expect(page.locator("#key-dialog")).to_be_visible()
    # What cannot be sent is not kept.
    for unsendable in ("ключ", "sk-äöü", "sk right", "sk-…"):
        page.fill("#key", unsendable)
        page.keyboard.press("Enter")
        assert page.evaluate("[document.getElementById('key').validity.customError]") == [True]
        expect(page.locator("#key-dialog")).to_be_visible()
        assert page.evaluate("sessionStorage.getItem('key')") is None
    page.fill("#key", "sk-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-reason")).to_have_text("this API key is not known here.")
    page.screenshot(path=shots / "key.png")
    page.fill("#key", "sk-right")
    page.keyboard.press("Enter")
    ready(page)
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#enter-key")).to_be_hidden()
    generate(page, "a red circle", steps=4)
    expect(page.locator(DONE)).to_have_count(1)
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator(".card .state")).to_have_text("Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert "$KEY" in command
    assert "sk-right" not in command
