"""The page in a browser, for models that differ in what they need, before fake backends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from playwright.sync_api import Browser, Page, expect

from serve_app.config.models import AppConfig, parse_app_config
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.protocol.loras import LoraStatus
from serve_app.protocol.params import ModelInfo
from tests.browser import running_browser
from tests.e2e.page import DONE, generate, ready
from tests.fakes.backend import CONFIG, INFO, LIMITS, FakeBackend
from tests.gateway.served import served
from tests.gateway.test_edit_models import EDITS, FILL
from tests.gateway.test_edits import file_of, halves
from tests.waiting import wait_until

BOTH = replace(INFO, tasks=("text-to-image", "inpainting"), default_strengths={"inpainting": 1.0})
TWO = parse_app_config(
    {
        "models": [{"id": "small"}, {"id": "org/large"}],
        "engine": {"limits": LIMITS.model_dump()},
    }
)

LARGE = replace(
    INFO,
    id="org/large",
    pipeline="LargePipeline",
    default_width=128,
    default_height=128,
    default_steps=30,
    takes_negative_prompt=False,
    tasks=("text-to-image",),
    default_strengths={},
    noise_schedulers=("euler",),
    loras=(),
    limits=LIMITS.model_copy(update={"max_steps": 40}),
)

Open = Callable[..., Page]


class FromZero(FakeBackend):
    """A backend without replicas; the first request starts one."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.info = replace(INFO, id=model)
        self.replicas = "at_zero"

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        self.replicas = "running"
        return await super().describe(deadline_s)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open the page before backends. An error of its scripts, or of the server, fails the test."""
    complaints: list[str] = []
    with ExitStack() as stack:

        def open_(*backends: FakeBackend, config: AppConfig = CONFIG) -> Page:
            url = stack.enter_context(served(create_api(config, backends, KeyRing(None, None))))
            page = browser.new_page()
            stack.callback(page.close)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "response",
                lambda answer: (
                    complaints.append(f"{answer.status} {answer.url}")
                    if answer.status >= 400
                    else None
                ),
            )
            page.goto(url)
            return page

        yield open_
    assert complaints == []


def choose_image(page: Page) -> None:
    file = {"name": "a.png", "mimeType": "image/png", "buffer": file_of(halves())}
    page.set_input_files("#file", file)
    expect(page.locator("#editor")).to_be_visible()
    loaded = "document.getElementById('mask').width === 64"
    wait_until(lambda: page.evaluate(loaded), what="the image")


def brush(page: Page) -> None:
    page.focus("#mask")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")


def test_an_inpainting_model_asks_for_an_image_and_a_mask(open_page: Open) -> None:
    backend = FakeBackend()
    backend.info = replace(FILL, default_strengths={})
    page = ready(open_page(backend))
    expect(page.locator("#drop")).to_contain_text("This model needs an image")
    generate(page, "a star")
    expect(page.locator("#file-wrong")).to_contain_text("This model needs an image")
    choose_image(page)
    expect(page.locator("#mask-hint")).to_contain_text("This model needs a mask.")
    expect(page.locator("#strength-field")).to_be_hidden()
    page.click("#generate")
    expect(page.locator("#file-wrong")).to_contain_text("This model needs a mask: brush")
    expect(page.locator("#mask")).to_be_focused()
    assert backend.received == []
    brush(page)
    page.click("#generate")
    expect(page.locator(DONE)).to_have_count(1)
    expect(page.locator("#file-wrong")).to_have_count(0)
    [params] = backend.received
    assert params.task == "inpainting"
    assert params.strength is None


def test_an_edit_model_asks_for_an_image_and_has_no_strength(open_page: Open) -> None:
    backend = FakeBackend()
    backend.info = EDITS
    page = ready(open_page(backend))
    generate(page, "a star")
    expect(page.locator("#file-wrong")).to_contain_text("This model needs an image")
    choose_image(page)
    for hidden in ("#strength-field", "#mask", "#mask-hint"):
        expect(page.locator(hidden)).to_be_hidden()
    page.click("#generate")
    expect(page.locator(DONE)).to_have_count(1)
    assert [params.task for params in backend.received] == ["image-to-image"]


def test_an_image_is_optional_where_a_prompt_is_enough(open_page: Open) -> None:
    backend = FakeBackend()
    backend.info = BOTH
    page = ready(open_page(backend))
    expect(page.locator("#drop")).to_contain_text("Start from an image")
    generate(page, "a star")
    expect(page.locator(DONE)).to_have_count(1)
    choose_image(page)
    page.fill("#strength", "0.5")
    page.click("#generate")
    expect(page.locator("#file-wrong")).to_contain_text("This model needs a mask")
    brush(page)
    page.click("#generate")
    expect(page.locator(DONE)).to_have_count(2)
    assert [params.strength for params in backend.received] == [None, 0.5]


def test_a_strength_is_sent_for_the_tasks_that_take_one(open_page: Open) -> None:
    backend = FakeBackend()
    backend.info = replace(INFO, default_strengths={"inpainting": 1.0})
    page = ready(open_page(backend))
    choose_image(page)
    page.fill("#strength", "0.5")
    generate(page, "a star")
    expect(page.locator(DONE)).to_have_count(1)
    brush(page)
    page.click("#generate")
    expect(page.locator(DONE)).to_have_count(2)
    sent = [(params.task, params.strength) for params in backend.received]
    assert sent == [("image-to-image", None), ("inpainting", 0.5)]


def test_the_first_request_starts_the_first_of_several_models(open_page: Open) -> None:
    small, large = FromZero("small"), FromZero("org/large")
    page = open_page(small, large, config=TWO)
    expect(page.locator("#model")).to_have_text("small · it starts with the first request")
    assert small.described_for == []
    generate(page, "a star")
    expect(page.locator(DONE)).to_have_count(1)
    assert len(small.received) == 1
    ready(page)
    expect(page.locator("#model")).to_have_text("small · SomePipeline")
    assert large.described_for == large.received == []


def test_a_failed_model_is_not_the_first_one(open_page: Open) -> None:
    small, large = FromZero("small"), FromZero("org/large")
    small.replicas = "failed"
    page = open_page(small, large, config=TWO)
    expect(page.locator("#model")).to_have_text("org/large · it starts with the first request")
    generate(page, "a star")
    expect(page.locator(DONE)).to_have_count(1)
    assert small.received == []
    assert len(large.received) == 1


def options_of(page: Page, select: str) -> list[str]:
    return page.locator(f"{select} option").all_text_contents()


def test_the_form_follows_the_chosen_model(open_page: Open) -> None:
    small, large = FakeBackend(), FakeBackend()
    small.info, large.info = replace(INFO, id="small"), LARGE
    page = ready(open_page(small, large, config=TWO))
    assert options_of(page, "#model-choice") == ["small · running", "org/large · running"]
    assert options_of(page, "#scheduler") == ["model default", "euler", "ddim"]
    assert options_of(page, "#lora") == ["none", "pixel", "ink"]
    page.click("#more summary")
    page.fill("#negative_prompt", "rain")
    page.select_option("#scheduler", "ddim")
    page.select_option("#lora", "ink")
    page.select_option("#size", "64x64")
    choose_image(page)

    page.select_option("#model-choice", "org/large")
    expect(page.locator("#model")).to_have_text("org/large · LargePipeline")
    for hidden in ("#negative_prompt", "#lora", "#source"):
        expect(page.locator(hidden)).to_be_hidden()
    assert options_of(page, "#scheduler") == ["model default", "euler"]
    assert "128 × 128" in options_of(page, "#size")  # noqa: RUF001
    assert page.get_attribute("#num_inference_steps", "placeholder") == "30"
    generate(page, "a star", steps=41)
    expect(page.locator("#num_inference_steps-wrong")).to_be_visible()
    generate(page, "a star", steps=40)
    expect(page.locator(DONE)).to_have_count(1)
    expect(page.locator(".facts").first).to_contain_text("org/large · 128 × 128")  # noqa: RUF001
    [params] = large.received
    assert (params.task, params.negative_prompt, params.noise_scheduler, params.lora) == (
        "text-to-image", None, None, (),
    )  # fmt: skip

    page.select_option("#model-choice", "small")
    generate(page, "a circle", steps=41)
    expect(page.locator(DONE)).to_have_count(2)
    [params] = small.received
    assert (params.task, params.negative_prompt) == ("image-to-image", "rain")

    page.locator(".card", has_text="a star").get_by_role("button", name="Use these").click()
    expect(page.locator("#model-choice")).to_have_value("org/large")
    page.locator(".card", has_text="a circle").get_by_role("button", name="Run again").click()
    expect(page.locator(DONE)).to_have_count(3)
    assert (len(small.received), len(large.received)) == (2, 1)
    expect(page.locator("#model-choice")).to_have_value("org/large")


def test_adapters_on_demand_are_offered(open_page: Open) -> None:
    backend = FakeBackend()
    backend.info = replace(INFO, loras=(), partial_loras={}, loras_on_demand=True)
    backend.adapters = (LoraStatus("ink", True, 1), LoraStatus("styles/oil", True, 0))
    page = ready(open_page(backend))
    page.click("#more summary")
    expect(page.locator("#lora option")).to_have_text(["none", "ink", "styles/oil"])
    page.select_option("#lora", "styles/oil")
    generate(page, "a star")
    expect(page.locator(DONE)).to_have_count(1)
    assert [params.lora for params in backend.received] == [(("styles/oil", 1.0),)]


def test_the_choice_shows_states_and_stays_until_its_model_has_started(open_page: Open) -> None:
    small, large = FakeBackend(), FromZero("org/large")
    small.info = replace(INFO, id="small")
    page = ready(open_page(small, large, config=TWO))
    assert options_of(page, "#model-choice") == ["small · running", "org/large · at zero"]
    page.select_option("#model-choice", "org/large")
    expect(page.locator("#model")).to_have_text("org/large · it starts with the first request")
    assert options_of(page, "#size") == ["auto"]
    assert large.described_for == []
    generate(page, "a star")
    expect(page.locator(DONE)).to_have_count(1)
    ready(page)
    expect(page.locator("#model")).to_have_text("org/large · SomePipeline")
    assert options_of(page, "#model-choice") == ["small · running", "org/large · running"]
    small.replicas = "failed"
    page.focus("#model-choice")
    expect(page.locator("#model-choice option").first).to_have_text("small · failed")
    expect(page.locator("#model-choice")).to_have_value("org/large")
    assert (small.received, len(large.received)) == ([], 1)


def test_a_single_model_has_no_choice(open_page: Open) -> None:
    backend = FakeBackend()
    page = ready(open_page(backend))
    expect(page.locator("#model-choice")).to_be_hidden()
    with page.expect_request("**/v1/images/generations") as sent:
        generate(page, "a star")
    assert "model" not in sent.value.post_data_json
    expect(page.locator(DONE)).to_have_count(1)
