"""Server-sent events, as a client reads them."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from serve_app.errors import GenerationFailed, Overloaded
from serve_app.gateway import streaming
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from tests.fakes.backend import CONFIG, FakeBackend
from tests.gateway.conftest import decoded, error_of, post

pytestmark = pytest.mark.anyio


def events_of(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """Return (event, data) of each event, without comments."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = lines
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


@pytest.mark.usefixtures("old")
async def test_partial_images_and_the_image(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "seed": 4, "size": "48x32", "output_format": "webp", "stream": True}
    events = events_of(await post(client, body | {"partial_images": 2}))
    assert [name for name, _ in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    for name, data in events:
        assert data["type"] == name
        image = decoded(data["b64_json"])
        assert (image.size, image.format) == ((48, 32), "WEBP")
        expected = ("48x32", "medium", "opaque", "webp")
        assert (
            data["size"],
            data["quality"],
            data["background"],
            data["output_format"],
        ) == expected
        assert data["created_at"] > 1_700_000_000
    assert [data["partial_image_index"] for _, data in events[:2]] == [0, 1]
    completed = events[-1][1]
    assert completed["usage"]["output_tokens"] == 6
    assert completed["seed"] == 4
    assert completed["timings"]["denoise_s"] == 1.0
    assert completed["warnings"] == ["a warning"]


async def test_previews_are_spread_over_the_steps(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    for steps, count, expected in (
        (20, 2, (7, 13)),
        (20, 3, (5, 10, 15)),
        (2, 3, (1,)),
        (1, 3, ()),
    ):
        body = {"prompt": "x", "num_inference_steps": steps, "stream": True}
        events_of(await post(client, body | {"partial_images": count}))
        assert backend.received[-1].preview_steps == expected


async def test_progress_is_sent_on_request_only(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "stream": True, "partial_images": 1}
    names = [name for name, _ in events_of(await post(client, body))]
    assert "image_generation.progress" not in names
    events = events_of(await post(client, body | {"progress": True}))
    assert [name.removeprefix("image_generation.") for name, _ in events] == [
        "progress",
        "progress",
        "partial_image",
        "completed",
    ]
    waiting, generating = events[0][1], events[1][1]
    assert (waiting["step"], waiting["queue_position"], waiting["eta_s"]) == (0, 0, 1.5)
    assert (generating["step"], generating["queue_position"], generating["eta_s"]) == (
        10,
        None,
        0.5,
    )
    assert generating["total_steps"] == waiting["total_steps"] == 20


async def test_an_immediate_rejection_has_its_own_status(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.error = Overloaded("full.", retry_after_s=3)
    response = await post(client, {"prompt": "x", "stream": True})
    assert error_of(response, 429)["message"] == "full. There will be room in 3 s."
    assert response.headers["retry-after"] == "3"


async def test_a_later_failure_is_an_event(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error_in_the_middle = GenerationFailed("/secret")
    body = {"prompt": "x", "stream": True, "partial_images": 1}
    [_, (name, data)] = events_of(await post(client, body))
    assert name == "error"
    assert data["error"].keys() == {"message", "type", "param", "code"}
    assert data["error"]["code"] == "generation_failed"
    assert "secret" not in data["error"]["message"]
    assert "/secret" in caplog.text


async def test_a_long_wait_gets_heartbeats_and_a_late_rejection_is_an_event(
    client: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "ACCEPTED_WITHIN_S", 0.01)
    monkeypatch.setattr(streaming, "HEARTBEAT_S", 0.02)
    backend.accepting.clear()
    backend.error = Overloaded("full after all")
    answer = asyncio.ensure_future(post(client, {"prompt": "x", "stream": True}))
    while not backend.received:
        await asyncio.sleep(0.001)
    asyncio.get_running_loop().call_later(0.2, backend.accepting.set)
    response = await answer
    assert sum(line.startswith(": ping") for line in response.text.splitlines()) >= 2
    [(name, data)] = events_of(response)
    assert (name, data["error"]["message"]) == ("error", "full after all")


async def test_a_disconnect_cancels_the_generation(backend: FakeBackend) -> None:
    backend.slow_seed = 1
    body = json.dumps({"prompt": "x", "seed": 1, "stream": True, "progress": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while not sent:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.extend([message["body"]] if message.get("body") else [])

    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/images/generations",
        "raw_path": b"/v1/images/generations",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    api = create_api(CONFIG, backend, KeyRing(None, None))
    await api(scope, receive, send)  # type: ignore[arg-type]
    assert b"image_generation.progress" in sent[0]
    assert backend.cancelled == 1
