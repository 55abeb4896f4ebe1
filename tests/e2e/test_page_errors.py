"""What the page shows when the server rejects a request or asks for an API key."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.e2e.page import DONE, Open, generate, ready

pytestmark = pytest.mark.serve


def test_seeds_beyond_javascripts_integers_are_rejected(open_page: Open) -> None:
    page = ready(open_page())
    generate(page, "a red circle", steps=2, seed=2**53 + 1)
    expect(page.locator("#seed-wrong")).to_be_visible()
    expect(page.locator(".card")).to_have_count(0)
    generate(page, "a red circle", steps=2, seed=2**53 - 1)
    expect(page.locator(".card .facts")).to_contain_text(f"seed {2**53 - 1}")


def test_errors_are_shown_at_their_fields(open_page: Open) -> None:
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
            complaint="Failed to load resource",
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


def test_it_asks_for_the_key_that_the_server_requires(open_page: Open, shots: Path) -> None:
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
        complaint="Failed to load resource",
        permissions=["clipboard-read", "clipboard-write"],
    )
    expect(page.locator("#key-dialog")).to_be_visible()
    # A user who declines is not asked again.
    page.get_by_role("button", name="Not now").click()
    expect(page.locator("#model")).to_have_text("This server requires an API key.")
    page.clock.run_for(20_000)
    expect(page.locator("#key-dialog")).to_be_hidden()
    page.screenshot(path=shots / "no-key.png")
    page.get_by_role("button", name="Enter key").click()
    expect(page.locator("#key-dialog")).to_be_visible()
    # A key that no header can hold is not kept.
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
