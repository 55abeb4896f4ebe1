"""The calls of LiteLLM: ``python litellm_calls.py URL [CALL…]``."""

import io
import sys
from typing import Any

import litellm
from report import CHAT_MODEL, OPENAIS_MODEL, PROMPT, blue_png, decoded, report

litellm.suppress_debug_info = True
OURS: dict[str, Any] = {"api_base": sys.argv[1], "api_key": "none", "max_retries": 0}


def generate(model: str = "demo", **options: Any) -> list[bytes]:
    answer = litellm.image_generation(model=f"openai/{model}", prompt=PROMPT, **OURS, **options)
    return [decoded(image.b64_json or image.url) for image in answer.data]


def edit(number: int = 1) -> list[bytes]:
    images = []
    for _ in range(number):
        file = io.BytesIO(blue_png())
        file.name = "image.png"
        images.append(file)
    answer = litellm.image_edit(model="openai/demo", prompt=PROMPT, image=images, **OURS)
    return [decoded(image.b64_json) for image in answer.data]


def respond(chat_model: str = "demo", **options: Any) -> list[bytes]:
    tool = {"type": "image_generation"} | options
    answer = litellm.responses(model=f"openai/{chat_model}", input=PROMPT, tools=[tool], **OURS)
    return [decoded(call.result) for call in answer.output]


def respond_in_a_stream() -> list[bytes]:
    tool = {"type": "image_generation"}
    events = litellm.responses(model="openai/demo", input=PROMPT, tools=[tool], stream=True, **OURS)
    found = []
    for event in events:
        if event.type == "response.completed":
            found += [decoded(call.result) for call in event.response.output]
    return found


report(
    {
        "generate": generate,
        "generate, OpenAI's model": lambda: generate(OPENAIS_MODEL),
        "edit": edit,
        "edit of two images": lambda: edit(2),
        "Responses": respond,
        "Responses, OpenAI's model": lambda: respond(CHAT_MODEL, model=OPENAIS_MODEL),
        "Responses, stream": respond_in_a_stream,
    }
)
