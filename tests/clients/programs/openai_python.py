"""The calls of OpenAI's Python client: ``python openai_python.py URL [CALL…]``."""

import sys
from typing import Any

from openai import OpenAI
from report import CHAT_MODEL, OPENAIS_MODEL, PROMPT, blue_png, blue_url, decoded, report

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)


def generate(**options: Any) -> list[bytes]:
    answer = client.images.generate(**{"model": "demo", "prompt": PROMPT} | options)
    return [decoded(image.b64_json or image.url) for image in answer.data]


def stream() -> list[bytes]:
    events = client.images.generate(model="demo", prompt=PROMPT, stream=True, partial_images=1)
    return [decoded(event.b64_json) for event in events]


def edit(number: int = 1, **options: Any) -> list[bytes]:
    images = [("image.png", blue_png())] * number
    answer = client.images.edit(model="demo", prompt=PROMPT, image=images, **options)
    return [decoded(image.b64_json) for image in answer.data]


def respond(chat_model: str = "demo", **options: Any) -> list[bytes]:
    answer = client.responses.create(
        model=chat_model, input=PROMPT, tools=[{"type": "image_generation"} | options]
    )
    return [decoded(call.result) for call in answer.output]


def respond_in_a_stream() -> list[bytes]:
    tool = {"type": "image_generation", "partial_images": 1}
    with client.responses.stream(model="demo", input=PROMPT, tools=[tool]) as events:
        previews = [
            decoded(event.partial_image_b64)
            for event in events
            if event.type == "response.image_generation_call.partial_image"
        ]
        return [*previews, decoded(events.get_final_response().output[0].result)]


def respond_with_an_edit() -> list[bytes]:
    content = [
        {"type": "input_text", "text": PROMPT},
        {"type": "input_image", "image_url": blue_url(), "detail": "auto"},
    ]
    answer = client.responses.create(
        model="demo",
        input=[{"role": "user", "content": content}],
        tools=[{"type": "image_generation"}],
    )
    assert answer.output[0].action == "edit"
    return [decoded(answer.output[0].result)]


def vary() -> list[bytes]:
    answer = client.images.create_variation(image=("image.png", blue_png()))
    return [decoded(image.b64_json) for image in answer.data]


report(
    {
        "generate": generate,
        "generate, OpenAI's model": lambda: generate(model=OPENAIS_MODEL),
        "generate, as a URL": lambda: generate(response_format="url"),
        "generate, stream": stream,
        "edit": edit,
        "edit, with a mask": lambda: edit(mask=("mask.png", blue_png(b"\0"))),
        "edit of two images": lambda: edit(2),
        "variation": vary,
        "Responses": respond,
        "Responses, OpenAI's model": lambda: respond(CHAT_MODEL, model=OPENAIS_MODEL),
        "Responses, stream": respond_in_a_stream,
        "Responses, edit": respond_with_an_edit,
    }
)
