"""The Responses API: answers by OpenAI's types, and what becomes of each of its fields."""

import base64
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from openai.types.responses.tool_param import ImageGeneration
from pydantic import TypeAdapter

from serve_app.config.gateway import GatewayConfig
from serve_app.errors import ContentPolicyViolation, Overloaded
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.openai_fields import REJECTED as REJECTED_OF_IMAGES
from serve_app.gateway.responses.answers import EVENT_NAMES
from serve_app.gateway.responses.fields import REJECTED, WITHOUT_EFFECT, ResponsesRequest
from serve_app.gateway.responses.translation import MASK, TOOL_FIELDS
from serve_app.gateway.routes import create_api
from tests.docs.pages import rendered
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.conftest import decoded, error_of
from tests.gateway.openai_client import png
from tests.gateway.responses.bodies import HOME_ASSISTANT, IMAGE_TOOL, attached
from tests.gateway.test_streaming import events_of

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"input": "a red circle", "tools": [IMAGE_TOOL]}


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


BLUE = url_of(png())
IMAGE = {"type": "input_image", "image_url": BLUE, "detail": "auto"}
TEXT = {"type": "input_text", "text": "a red circle"}


def client_of(backend: FakeBackend, **gateway: Any) -> httpx.AsyncClient:
    settings = GatewayConfig(**{"model_aliases": {"gpt-*": "demo"}, **gateway})
    config = CONFIG.model_copy(update={"gateway": settings})
    transport = httpx.ASGITransport(
        create_api(config, backend, KeyRing(None, None)), raise_app_exceptions=False
    )
    return httpx.AsyncClient(transport=transport, base_url="http://test/v1")


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend) as session:
        yield session


async def respond(client: httpx.AsyncClient, body: object) -> httpx.Response:
    return await client.post("/responses", json=body)


def parsed(response: httpx.Response) -> Any:
    """Return a response by OpenAI's strict types."""
    assert response.status_code == 200, response.text
    return Response.model_validate_json(response.content, strict=True)


def streamed(response: httpx.Response) -> list[Any]:
    """Return the events by OpenAI's strict types, after a check of their names and numbers."""
    parser: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    found = []
    for number, (name, data) in enumerate(events_of(response)):
        event = parser.validate_json(json.dumps(data), strict=True)
        assert (event.type, event.sequence_number) == (name, number)
        found.append(event)
    order = [EVENT_NAMES.index(event.type) for event in found]
    assert order == sorted(order)
    return found


def as_tool(**fields: Any) -> dict[str, Any]:
    return BODY | {"tools": [IMAGE_TOOL | fields]}


async def test_a_response_has_the_image_and_what_made_it(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve_app.gateway.requests_log")
    tool = IMAGE_TOOL | {"size": "48x32", "output_format": "webp", "seed": 7, "quality": "low"}
    tool |= {"partial_images": 1}
    raw = await respond(client, BODY | {"tools": [tool], "metadata": {"a": "b"}, "user": "u"})
    answer = parsed(raw)
    [call] = answer.output
    image = decoded(call.result)
    assert (image.size, image.format) == ((48, 32), "WEBP")
    assert (call.size, call.quality, call.action, call.seed) == ("48x32", "low", "generate", 7)
    assert (answer.status, answer.metadata, answer.user) == ("completed", {"a": "b"}, "u")
    assert answer.tools[0].to_dict() == tool
    assert answer.usage.total_tokens == 0
    assert answer.tool_usage.image_gen.output_tokens == 6
    assert raw.json()["timings"]["total_s"] > 0
    assert "partial_images" in " ".join(answer.warnings)
    [params] = backend.received
    assert (params.prompt, params.num_inference_steps) == ("a red circle", 10)
    assert answer.safety_identifier == "u"
    assert "for 'u': 48x32, 10 steps, seed 7: completed" in caplog.text


async def test_home_assistant_gets_its_image(client: httpx.AsyncClient) -> None:
    for body, action in (
        (HOME_ASSISTANT, "generate"),
        (attached(HOME_ASSISTANT, BLUE), "edit"),
    ):
        events = streamed(await respond(client, body))
        [done] = [event.item for event in events if event.type == "response.output_item.done"]
        assert decoded(done.result).format == "PNG"
        assert (done.action, done.output_format, done.size) == (action, "png", "64x64")
        assert events[-1].response.output == [done]
        warnings = " ".join(events[-1].response.warnings)
        named = ("input_fidelity", "developer", "reasoning", "include", "store", "service_tier")
        assert all(name in warnings for name in named)


async def test_a_stream_has_previews_and_every_event(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    events = streamed(await respond(client, as_tool(partial_images=2) | {"stream": True}))
    names = [event.type for event in events]
    assert names == [*EVENT_NAMES[:6], EVENT_NAMES[5], *EVENT_NAMES[6:-1]]
    assert [event.partial_image_index for event in events[5:7]] == [0, 1]
    assert decoded(events[5].partial_image_b64).size == (64, 64)
    assert {event.response.id for event in events if hasattr(event, "response")} == {
        events[0].response.id
    }
    assert events[2].item.result is None
    assert events[-1].response.output == [events[-2].item]
    assert len(backend.received) == 1


async def test_the_texts_of_the_user_are_the_prompt(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    for given, prompt in (
        ("a red circle", "a red circle"),
        ([{"role": "user", "content": "a red circle"}], "a red circle"),
        ([{"role": "user", "content": [TEXT, {"type": "input_text", "text": "b"}]}], None),
        ([{"role": "user", "content": [TEXT]}, {"role": "user", "content": "b"}], None),
        (
            [{"role": "system", "content": "draw"}, {"role": "user", "content": [TEXT]}],
            TEXT["text"],
        ),
    ):
        parsed(await respond(client, BODY | {"input": given}))
        assert backend.received[-1].prompt == (prompt or "a red circle\nb")


async def test_an_image_and_a_mask_make_an_edit(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    mask = {"image_url": url_of(png("transparent"))}
    tool = IMAGE_TOOL | {"input_image_mask": mask, "strength": 0.5, "action": "edit"}
    body = {"input": [{"role": "user", "content": [TEXT, IMAGE]}], "tools": [tool]}
    answer = parsed(await respond(client, body))
    assert answer.output[0].action == "edit"
    assert answer.tools[0].input_image_mask is None
    [params] = backend.received
    assert params.image is not None
    assert params.mask_image is not None
    assert params.strength == 0.5


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "required"),
        ({"input": "x"}, "tools", "no language model"),
        (BODY | {"tools": []}, "tools", '"type": "image_generation"'),
        (BODY | {"tools": [IMAGE_TOOL] * 2}, "tools", "twice"),
        (BODY | {"tools": [{"type": "function", "name": "f"}, IMAGE_TOOL]}, "tools.0", "function"),
        (BODY | {"tool_choice": "none"}, "tool_choice", "'auto'"),
        (BODY | {"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'auto'"),
        (BODY | {"model": "other"}, "model", "'demo'"),
        (BODY | {"text": {"format": {"type": "json_object"}}}, "text.format", "image"),
        (BODY | {"sed": 1}, "sed", "unknown field"),
        (BODY | {"metadata": {"a": 1}}, "metadata.a", "string"),
        (BODY | {"input": ""}, "input", "input"),
        (BODY | {"input": []}, "input", "describe the image"),
        (BODY | {"input": [{"role": "user", "content": [IMAGE]}]}, "input", "describe"),
        (BODY | {"input": [{"role": "user", "content": [TEXT, IMAGE, IMAGE]}]}, "input", "2 im"),
        (BODY | {"input": [{"role": "assistant", "content": "x"}]}, "input.0", "conversation"),
        (BODY | {"input": [{"type": "image_generation_call"}]}, "input.0", "image_generation_call"),
        (BODY | {"input": [{"role": "user"}]}, "input.0.content", "required"),
        (BODY | {"input": [{"role": "u", "content": ""}]}, "input.0.role", "'user'"),
        (
            BODY | {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input.0.content.0.type",
            "'input_file'",
        ),
        (
            BODY | {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input.0.content.0.text",
            "required",
        ),
        (
            BODY | {"input": [{"role": "user", "content": [IMAGE | {"image_url": "http://x/a"}]}]},
            "input.0.content.0.image_url",
            "data URL",
        ),
        (
            BODY | {"input": [{"role": "user", "content": [IMAGE | {"file_id": "file_1"}]}]},
            "input.0.content.0.file_id",
            "stores no files",
        ),
        (
            BODY
            | {
                "input": [
                    {"role": "user", "content": [TEXT, IMAGE | {"image_url": url_of(png()[:90])}]}
                ]
            },
            "input",
            "cannot be read",
        ),
        (as_tool(size="1x1"), "tools.0.size", "tools.0.size"),
        (as_tool(background="transparent"), "tools.0.background", "opaque"),
        (as_tool(output_format="gif"), "tools.0.output_format", "'png'"),
        (as_tool(frame_count=2), "tools.0.frame_count", "animations"),
        (as_tool(partial_images=[1]), "tools.0.partial_images", "integer"),
        (
            as_tool(partial_images=4) | {"stream": True},
            "tools.0.partial_images",
            "less than or equal to 3",
        ),
        (as_tool(n=2), "tools.0.n", "unknown field"),
        (as_tool(action="edit"), "tools.0.action", "input_image"),
        (as_tool(strength=0.5), "tools.0.strength", "input_image"),
        (as_tool(input_image_mask={"image_url": BLUE}), "tools.0.input_image_mask", "input_image"),
        (as_tool(model="other"), "tools.0.model", "'demo'"),
        (as_tool(seed=-1), "tools.0.seed", "greater than or equal to 0"),
    ],
)
async def test_what_cannot_be_honoured_is_named(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(await respond(client, body), 404 if param.endswith("model") else 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("name", sorted(REJECTED))
async def test_fields_of_a_stored_or_later_response_are_rejected(
    client: httpx.AsyncClient, name: str
) -> None:
    error = error_of(await respond(client, BODY | {name: "x"}), 400)
    assert error["param"] == name
    parsed(await respond(client, BODY | {name: None}))
    parsed(await respond(client, BODY | {name: False}))


async def test_every_parameter_of_openais_client_is_known(client: httpx.AsyncClient) -> None:
    given = get_type_hints(ResponseCreateParamsStreaming).keys()
    assert given == WITHOUT_EFFECT | REJECTED.keys() | ResponsesRequest.model_fields.keys()
    of_the_tool = get_type_hints(ImageGeneration).keys()
    assert of_the_tool <= TOOL_FIELDS | REJECTED_OF_IMAGES.keys() | {"type", "action", MASK}
    answer = parsed(await respond(client, BODY | dict.fromkeys(WITHOUT_EFFECT - {"text"}, 1)))
    assert all(name in " ".join(answer.warnings) for name in WITHOUT_EFFECT - {"text"})


async def test_the_page_has_every_parameter() -> None:
    page = rendered("guide/responses")
    for name in get_type_hints(ResponseCreateParamsStreaming):
        assert re.search(rf"^\| .*`{name}\b", page, re.MULTILINE), name


async def test_other_tools_are_named_where_the_choice_is_the_image_tool(
    client: httpx.AsyncClient,
) -> None:
    tools = [{"type": "web_search"}, IMAGE_TOOL]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [IMAGE_TOOL]}
    for choice in (IMAGE_TOOL, allowed):
        answer = parsed(await respond(client, BODY | {"tools": tools, "tool_choice": choice}))
        assert answer.tool_choice.type == "image_generation"
        assert "tools.0" in " ".join(answer.warnings)


async def test_unknown_fields_are_dropped_where_the_config_ignores_them(
    backend: FakeBackend,
) -> None:
    async with client_of(backend, unknown_fields="ignore") as client:
        answer = parsed(await respond(client, as_tool(cfg=1) | {"extra": 1}))
        assert "extra" in " ".join(answer.warnings)
        assert "tools.0.cfg" in " ".join(answer.warnings)


async def test_a_key_given_twice_is_named(client: httpx.AsyncClient) -> None:
    content = json.dumps(BODY)[:-3] + ', "seed": 1, "seed": 2}]}'
    error = error_of(await client.post("/responses", content=content), 400)
    assert "seed is given twice" in error["message"]


async def test_nothing_below_is_stored(client: httpx.AsyncClient) -> None:
    for method, path in (
        ("GET", "resp_1"),
        ("DELETE", "resp_1"),
        ("POST", "resp_1/cancel"),
        ("GET", "resp_1/input_items"),
        ("POST", "input_tokens"),
    ):
        error = error_of(await client.request(method, f"/responses/{path}"), 400)
        assert "stores no responses" in error["message"]


@pytest.mark.usefixtures("old")
async def test_errors_have_a_status_before_the_stream_and_an_event_in_it(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    streaming = BODY | {"stream": True}
    backend.error = Overloaded("too many requests are waiting", retry_after_s=3.0)
    error = error_of(await respond(client, streaming), 429)
    assert error["code"] == "overloaded"
    backend.error = None
    for problem, code in (
        (ContentPolicyViolation("flagged"), "image_content_policy_violation"),
        (Overloaded("a replica was lost"), "rate_limit_exceeded"),
        (RuntimeError("secret"), "server_error"),
    ):
        backend.error_in_the_middle = problem
        failed = streamed(await respond(client, streaming))[-1]
        assert (failed.type, failed.response.status) == ("response.failed", "failed")
        assert failed.response.error.code == code
        assert failed.response.output[0].status == "failed"
        assert "secret" not in failed.response.error.message
