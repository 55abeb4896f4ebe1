"""Clients that cannot run here: their requests, as they send them."""

import base64
import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from tests.clients.client import Outcomes
from tests.clients.programs.report import blue_png, blue_url
from tests.gateway.front_ends import CALLS
from tests.gateway.responses.bodies import HOME_ASSISTANT, attached
from tests.gateway.sdapi.clients import IMAGE_TO_IMAGE, TEXT_TO_IMAGE

RUN = ("Open WebUI", "LangChain", "Vercel AI SDK")
"""Clients among these whose real calls are made."""

Call = Callable[[httpx.Client], httpx.Response]


@dataclass(frozen=True, eq=False)
class Replayed:
    """A client's requests."""

    name: str
    calls: dict[str, Call]
    how: str = "body replayed"

    def version(self) -> str:
        return ""

    def make(self, url: str, calls: Sequence[str]) -> Outcomes:
        with httpx.Client(base_url=url, timeout=240) as client:
            return {name: _outcome(self.calls[name](client)) for name in calls or self.calls}


def replayed_clients() -> list[Replayed]:
    """Return the clients with all of their calls."""
    found: dict[str, dict[str, Call]] = {}

    def add(client: str, call: str, path: str, **request: Any) -> None:
        if client not in RUN:
            found.setdefault(client, {})[call] = lambda session: session.post(path, **request)

    for one in CALLS:
        kinds = found.get(one.program, {})
        call = one.kind if one.kind not in kinds else f"{one.kind}, {one.fields['model']}"
        if one.files:
            sent = [(part, ("image.png", _image_for(part), "image/png")) for part in one.files]
            add(one.program, call, "/v1/images/edits", data=one.fields, files=sent)
        else:
            add(one.program, call, "/v1/images/generations", json=one.fields)
    for name, body in TEXT_TO_IMAGE.items():
        add(name, "txt2img", "/sdapi/v1/txt2img", json=body)
    encoded = base64.b64encode(blue_png()).decode()
    mask = {"mask": encoded, "inpainting_fill": 1}
    for call, given in (("img2img", {}), ("img2img, with a mask", mask)):
        body = IMAGE_TO_IMAGE | {"init_images": [encoded]} | given
        add("webuiapi", call, "/sdapi/v1/img2img", json=body)
    add("Home Assistant", "Responses, stream", "/v1/responses", json=HOME_ASSISTANT)
    body = attached(HOME_ASSISTANT, blue_url())
    add("Home Assistant", "Responses, edit", "/v1/responses", json=body)
    return [Replayed(name, calls) for name, calls in sorted(found.items())]


def _outcome(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        error = response.json()["error"]
        return {"status": response.status_code, "message": error["message"]}
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = response.text.splitlines()
        [done] = [
            json.loads(data.removeprefix("data: "))
            for name, data in itertools.pairwise(lines)
            if name == "event: response.output_item.done"
        ]
        images = [done["item"]["result"]]
    else:
        answer = response.json()
        images = answer.get("images") or [image["b64_json"] for image in answer["data"]]
    return {"images": [_size_of(base64.b64decode(image)) for image in images]}


def _image_for(part: str) -> bytes:
    """Return the file for a part of a form: a mask is transparent in its right half."""
    return blue_png(b"\0" if part == "mask" else b"\xff")


def _size_of(file: bytes) -> list[int]:
    with Image.open(io.BytesIO(file)) as image:
        return list(image.size)
