"""The calls of LangChain: ``python langchain_calls.py URL [CALL…]``."""

import sys
from typing import Any

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from langchain_openai import ChatOpenAI
from report import CHAT_MODEL, OPENAIS_MODEL, PROMPT, blue_url, decoded, report

OURS: dict[str, Any] = {"base_url": sys.argv[1], "api_key": "none", "max_retries": 0}


def wrap(**options: Any) -> list[bytes]:
    """Use the wrapper of DALL-E, which reads addresses."""
    answer = DallEAPIWrapper(**OURS, **options).run(PROMPT)
    return [decoded(url) for url in answer.split("\n")]


def respond(chat_model: str = "demo", content: Any = PROMPT, **options: Any) -> list[bytes]:
    chat = ChatOpenAI(model=chat_model, use_responses_api=True, **OURS)
    tool = {"type": "image_generation"} | options
    answer = chat.bind_tools([tool]).invoke([{"role": "user", "content": content}])
    return [
        decoded(block["result"])
        for block in answer.content
        if block["type"] == "image_generation_call"
    ]


def respond_in_a_stream() -> list[bytes]:
    chat = ChatOpenAI(model="demo", use_responses_api=True, **OURS)
    tool = {"type": "image_generation"}
    blocks = [block for chunk in chat.bind_tools([tool]).stream(PROMPT) for block in chunk.content]
    return [decoded(block["result"]) for block in blocks if block.get("result")]


CONTENT = [
    {"type": "text", "text": PROMPT},
    {"type": "image_url", "image_url": {"url": blue_url()}},
]

report(
    {
        "generate, as a URL": lambda: wrap(model="demo", size="64x64"),
        "generate, as a URL, OpenAI's model": lambda: wrap(size="64x64"),
        "Responses": respond,
        "Responses, OpenAI's model": lambda: respond(CHAT_MODEL, model=OPENAIS_MODEL),
        "Responses, stream": respond_in_a_stream,
        "Responses, edit": lambda: respond(content=CONTENT),
    }
)
