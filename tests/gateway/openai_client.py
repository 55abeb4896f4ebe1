"""OpenAI's Python client in front of the API on a free port, and what its requests lead to."""

import base64
import io
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import openai
import uvicorn
from openai.types import ImagesResponse
from PIL import Image

from serve_app.config.models import AppConfig
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.protocol.backend import GenerationBackend, GenerationEvent
from serve_app.protocol.params import GenerationParams, ModelInfo
from tests.gateway.openai_parameters import Method
from tests.serve_process import free_port
from tests.waiting import wait_until

COLORS: dict[str, Any] = {"blue": (0, 0, 255), "transparent": (0, 0, 0, 0)}


@cache
def png(color: str = "blue") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if color == "transparent" else "RGB", (64, 64), COLORS[color]).save(
        buffer, "png"
    )
    return buffer.getvalue()


class Recording:
    """A backend that keeps the parameters of its calls."""

    def __init__(self, backend: GenerationBackend) -> None:
        self._backend = backend
        self.received: list[GenerationParams] = []

    async def generate(
        self, params: GenerationParams, *rest: Any
    ) -> AsyncGenerator[GenerationEvent, None]:
        self.received.append(params)
        async with aclosing(self._backend.generate(params, *rest)) as events:
            async for event in events:
                yield event

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        return await self._backend.describe(deadline_s)

    async def check_ready(self) -> None:
        await self._backend.check_ready()


@dataclass(frozen=True)
class Api:
    """The API on a free port."""

    client: openai.OpenAI
    backend: Recording


@contextmanager
def served(config: AppConfig, backend: GenerationBackend) -> Iterator[Api]:
    """Serve the API, with a client of it."""
    recording = Recording(backend)
    port = free_port()
    app = create_api(config, recording, KeyRing(None, None))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, name="gateway")
    thread.start()
    try:
        wait_until(lambda: server.started, what="the gateway")
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield Api(client, recording)
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Outcome:
    """The answer to a request of the client."""

    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    answer: Any = None
    """The response, or the last event of a stream."""
    events: list[str] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    received: list[GenerationParams] = field(default_factory=list)
    """What the backend got."""

    @property
    def images(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(file)) for file in self.files]


def send(api: Api, method: Method, stream: bool, arguments: Mapping[str, Any]) -> Outcome:
    """Send a request by the client's method."""
    required = {"prompt": "x"} | ({"image": png()} if method == "edit" else {})
    given = required | ({"stream": True} if stream else {}) | arguments
    call = getattr(api.client.images, method)
    return _outcome(api, stream, lambda: call(**given))


def send_json(api: Api, arguments: Mapping[str, Any]) -> Outcome:
    """Send an edit as JSON, with its files as data URLs. The client has no method for it."""
    body = {"prompt": "x", "image": png()} | arguments
    images = body.pop("image")
    body["images"] = [_reference(one) for one in (images if isinstance(images, list) else [images])]
    for name in ("mask", "markup"):
        if name in body:
            body[name] = _reference(body[name])
    post, kind = api.client.post, ImagesResponse
    return _outcome(api, False, lambda: post("/images/edits", body=body, cast_to=kind))


def _reference(data: bytes) -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}


def _outcome(api: Api, stream: bool, call: Callable[[], Any]) -> Outcome:
    outcome = Outcome()
    api.backend.received.clear()
    try:
        found = call()
        if stream:
            events = list(found)
            outcome.events = [event.type for event in events]
            outcome.answer = events[-1]
            outcome.files = [base64.b64decode(outcome.answer.b64_json)]
        else:
            outcome.answer = found
            outcome.files = [base64.b64decode(image.b64_json) for image in found.data]
    except openai.APIStatusError as error:
        outcome.status, outcome.error = error.status_code, error.response.json()["error"]
    outcome.received = list(api.backend.received)
    return outcome
