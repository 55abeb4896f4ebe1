"""Requests as programs send them that know OpenAI's API."""

from dataclasses import dataclass
from typing import Any

from tests.fakes.backend import CONFIG

KINDS = ("generate", "edit", "edit of two images")


@dataclass(frozen=True)
class Call:
    """A request of a program."""

    program: str
    fields: dict[str, Any]
    """Fields of the JSON body of a generation, or of the form of an edit."""
    files: tuple[str, ...] = ()
    """Names of the form's files."""
    warnings: tuple[str, ...] = ()
    """Fields without effect."""
    reads: str = "b64_json"
    """Where the program looks for the image."""

    @property
    def kind(self) -> str:
        return KINDS[sum(name != "mask" for name in self.files)]


_OURS = {"model": CONFIG.model.id}
"""The user of the program chooses the model."""
_GPT = {"model": "gpt-image-1"}
_B64 = {"response_format": "b64_json"}
_ONE = {"prompt": "x", "n": "1", "size": "64x64"}
_AUTO = {"quality": "auto", "size": "auto"}
_TWO = ("image[]", "image[]")

CALLS = (
    Call("Open WebUI", _OURS | _B64 | {"prompt": "x", "n": 1, "size": "64x64"}),
    Call("Open WebUI", _OURS | _B64 | {"prompt": "x", "background": "auto"}, ("image",)),
    Call("Open WebUI", _OURS | _ONE, ("image[]",)),
    Call("Open WebUI", _OURS | _B64 | _ONE, _TWO),
    Call(
        "LibreChat",
        _GPT | _AUTO | {"prompt": "x", "n": 1, "background": "auto", "output_format": "png"},
    ),
    Call("LibreChat", _GPT | _AUTO | {"prompt": "x"}, ("image[]",)),
    Call("LibreChat", _GPT | _AUTO | {"prompt": "x"}, _TWO),
    Call(
        "n8n",
        _B64
        | {"prompt": "x", "model": "dall-e-3", "quality": "hd", "size": "64x64", "style": "vivid"},
        warnings=("style",),
    ),
    Call("n8n", _B64 | _ONE | {"model": "dall-e-2", "user": "a"}, ("image", "mask")),
    Call(
        "n8n",
        _GPT
        | {
            "prompt": "x",
            "n": "1",
            "size": "auto",
            "quality": "high",
            "background": "auto",
            "input_fidelity": "high",
            "output_format": "webp",
            "output_compression": "85",
        },
        ("image[]",),
        warnings=("input_fidelity",),
    ),
    Call("n8n", _GPT | _AUTO | {"prompt": "x", "n": "1"}, _TWO),
    Call(
        "LangChain",
        {"model": "dall-e-2", "prompt": "x", "n": 1, "size": "64x64", "quality": "standard"},
        reads="url",
    ),
    Call("Vercel AI SDK", _OURS | _B64 | {"prompt": "x", "n": 1, "size": "64x64"}),
    Call("Vercel AI SDK", _OURS | _ONE, ("image",)),
    Call("Vercel AI SDK", _OURS | _ONE, _TWO),
    Call("InvokeAI", _B64 | {"prompt": "x", "n": 1, "size": "64x64", "seed": 7}),
    Call("InvokeAI", _B64 | _ONE, ("image", "mask")),
    Call("InvokeAI", _B64 | _ONE, _TWO),
)
