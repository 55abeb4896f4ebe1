"""Bodies that would be read otherwise than they were meant are rejected, not guessed."""

import httpx
import pytest

from tests.fakes.backend import FakeBackend
from tests.gateway.conftest import error_of
from tests.gateway.test_edits import edit, file_of, halves

pytestmark = pytest.mark.anyio

IMAGE = file_of(halves())


def part(name: str, value: bytes, headers: bytes = b"", file: str = "") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    disposition += f'; filename="{file}"' if file else ""
    return b"\r\n".join([b"--xyz", disposition.encode(), *headers.splitlines(), b"", value, b""])


async def send(
    client: httpx.AsyncClient,
    *parts: bytes,
    end: bytes = b"--xyz--\r\n",
    kind: str = "multipart/form-data; boundary=xyz",
) -> httpx.Response:
    """Send a form with an image and these parts."""
    assert b"--xyz" not in IMAGE
    content = part("image", IMAGE, file="a.png") + b"".join(parts) + end
    return await client.post("/v1/images/edits", content=content, headers={"content-type": kind})


@pytest.mark.parametrize("prompt", ["é", "東京", "Москва", "\N{DOG}"])
async def test_a_prompt_of_a_form_is_in_utf_8(
    client: httpx.AsyncClient, backend: FakeBackend, prompt: str
) -> None:
    response = await send(client, part("prompt", prompt.encode()))
    assert response.status_code == 200, response.text
    assert backend.received[-1].prompt == prompt


@pytest.mark.parametrize(
    ("prompt", "encoding"), [("é", "latin-1"), ("東京", "shift-jis"), ("Москва", "cp1251")]
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
async def test_text_of_a_form_in_another_encoding_is_rejected(
    client: httpx.AsyncClient, backend: FakeBackend, prompt: str, encoding: str, name: str
) -> None:
    """It was read as Latin-1, so that the model got other words."""
    parts = [part(name, prompt.encode(encoding))]
    if name != "prompt":
        parts.append(part("prompt", b"x"))
    error = error_of(await send(client, *parts), 400)
    assert (error["param"], "UTF-8" in error["message"]) == (name, True)
    assert backend.received == []


@pytest.mark.parametrize("charset", ["iso-8859-1", "utf-16"])
async def test_a_part_in_another_encoding_is_rejected(
    client: httpx.AsyncClient, backend: FakeBackend, charset: str
) -> None:
    headers = f"Content-Type: text/plain; charset={charset}".encode()
    error = error_of(await send(client, part("prompt", b"a cat", headers)), 400)
    assert error["param"] == "prompt"
    assert charset in error["message"]
    for allowed in ("utf-8", '"UTF-8"', "us-ascii"):
        headers = f"Content-Type: text/plain; charset={allowed}".encode()
        response = await send(client, part("prompt", b"a cat", headers))
        assert response.status_code == 200, response.text
    assert {params.prompt for params in backend.received} == {"a cat"}


@pytest.mark.parametrize("coding", ["base64", "quoted-printable"])
async def test_a_part_in_a_transfer_encoding_is_rejected(
    client: httpx.AsyncClient, backend: FakeBackend, coding: str
) -> None:
    """Its letters were taken for the prompt."""
    headers = f"Content-Transfer-Encoding: {coding}".encode()
    error = error_of(await send(client, part("prompt", b"YSBjYXQ=", headers)), 400)
    assert error["param"] == "prompt"
    assert f"Content-Transfer-Encoding is {coding!r}" in error["message"]
    for allowed in (b"8bit", b"Binary", b"7bit"):
        headers = b"Content-Transfer-Encoding: " + allowed
        assert (await send(client, part("prompt", b"a", headers))).status_code == 200
    assert len(backend.received) == 3


@pytest.mark.parametrize("end", [b"", b"--xyz", b"--xyz\r\n", b"--xy"])
async def test_a_form_without_its_end_is_rejected(
    client: httpx.AsyncClient, backend: FakeBackend, end: bytes
) -> None:
    """Its last field was dropped: a seed, or a mask."""
    parts = [part("prompt", b"a"), part("seed", b"7")]
    error = error_of(await send(client, *parts, end=end), 400)
    assert "closing boundary" in error["message"]
    assert backend.received == []


@pytest.mark.parametrize("tail", [b"--xyz--", b"--xyz--\r\n", b"--xyz--\r\nan epilogue"])
async def test_text_after_the_end_of_a_form_is_ignored(
    client: httpx.AsyncClient, backend: FakeBackend, tail: bytes
) -> None:
    """The standard of MIME says so."""
    response = await send(client, part("prompt", b"a"), part("seed", b"7"), end=tail)
    assert response.status_code == 200, response.text
    assert backend.received[-1].seed == 7


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"prompt": "a cat", "prompt": "a dog"}', "prompt"),
        (b'{"prompt": "a", "seed": 1, "seed": 1}', "seed"),
        (b'{"prompt": "a", "seed": 1, "seed": null}', "seed"),
        (b'{"prompt": "a", "lora": {"ink": 1, "ink": 0.5}}', "ink"),
        (b'{"prompt": "a", "s\\u0065ed": 1, "seed": 1}', "seed"),
    ],
)
async def test_a_key_that_is_given_twice_is_rejected(
    client: httpx.AsyncClient, backend: FakeBackend, content: bytes, param: str
) -> None:
    """The last one won, as in forms nothing does."""
    error = error_of(await client.post("/v1/images/generations", content=content), 400)
    assert error["param"] == param
    assert "twice" in error["message"]
    assert backend.received == []


async def test_an_adapter_that_is_given_twice_is_rejected(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    error = error_of(await edit(client, IMAGE, lora='{"ink": 1, "ink": 2}'), 400)
    assert "twice" in error["message"]
    error = error_of(await edit(client, IMAGE, **{"lora[ink]": "1", "lora": '{"ink": 2}'}), 400)
    assert "twice" in error["message"]
    assert backend.received == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'\xef\xbb\xbf{"prompt": "a"}', "application/json"),
        ('{"prompt": "a"}'.encode("utf-16"), "application/json; charset=utf-16"),
        ('{"prompt": "é"}'.encode("latin-1"), "application/json; charset=iso-8859-1"),
        (b'{"prompt": "a"} x', "application/json"),
        (b'{"prompt": "a"}{"prompt": "b"}', "application/json"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
        (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na', "multipart/form-data"),
    ],
    ids=repr,
)
async def test_a_body_that_is_no_json_in_utf_8_is_rejected(
    client: httpx.AsyncClient, backend: FakeBackend, content: bytes, kind: str
) -> None:
    response = await client.post(
        "/v1/images/generations", content=content, headers={"content-type": kind}
    )
    assert "not JSON" in error_of(response, 400)["message"]
    assert backend.received == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "seed": true}',
        b'{"prompt": "a", "seed": 7.0}',
        b'{"prompt": "a", "stream": 1}',
        b'{"prompt": "a", "stream": "false"}',
    ],
)
async def test_types_of_json_are_strict(client: httpx.AsyncClient, body: bytes) -> None:
    error_of(await client.post("/v1/images/generations", content=body), 400)


@pytest.mark.parametrize(
    ("value", "streams"),
    [("true", True), ("True", True), ("1", True), ("false", False), ("False", False), ("0", False)],
)
async def test_booleans_of_a_form_are_words_or_digits(
    client: httpx.AsyncClient, value: str, streams: bool
) -> None:
    response = await edit(client, IMAGE, stream=value)
    assert response.headers["content-type"].startswith("text/event-stream") == streams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stream", "2"),
        ("stream", ""),
        ("stream", "null"),
        ("n", "1.5"),
        ("seed", "0x10"),
        ("seed", "1e3"),
        ("guidance_scale", "2,5"),
        ("guidance_scale", "nan"),
        ("size", ""),
    ],
)
async def test_other_values_of_a_form_are_rejected(
    client: httpx.AsyncClient, backend: FakeBackend, name: str, value: str
) -> None:
    assert error_of(await edit(client, IMAGE, **{name: value}), 400)["param"] == name
    assert backend.received == []


@pytest.mark.parametrize(
    "prompt",
    [
        "(a:1.2) [b] {c|d} <lora:ink:0.8>",
        "e\N{COMBINING ACUTE ACCENT}",
        " a\r\nb ",
        "a\0b",
        "\ue000",  # for private use
        "\U0001fae8",  # newer than Python's tables
    ],
)
async def test_prompts_are_passed_on_as_they_are(
    client: httpx.AsyncClient, backend: FakeBackend, prompt: str
) -> None:
    """Neither weights nor adapters in a prompt are read, and letters are not normalized."""
    body = {"prompt": prompt, "negative_prompt": prompt}
    assert (await client.post("/v1/images/generations", json=body)).status_code == 200
    assert (backend.received[-1].prompt, backend.received[-1].negative_prompt) == (prompt, prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        " ",
        "\n\t",
        "\N{EM SPACE}",
        "\N{NO-BREAK SPACE}",
        "\N{ZERO WIDTH SPACE}",
        "\0",
        "\ufeff \x1b",
    ],
)
async def test_a_prompt_without_a_visible_character_is_empty(
    client: httpx.AsyncClient, backend: FakeBackend, prompt: str
) -> None:
    response = await client.post("/v1/images/generations", json={"prompt": prompt})
    error = error_of(response, 400)
    assert (error["param"], "empty" in error["message"]) == ("prompt", True)
    assert backend.received == []
