"""Requests from HTTP to the image and back, through Ray Serve as it is deployed."""

import asyncio
import base64
import io
import json
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
import ray
from PIL import Image

from serve_app.deployments.backend import ServeBackend
from serve_app.deployments.replicas import Replicas
from serve_app.engine.stats import EngineStats
from serve_app.errors import InvalidRequest
from serve_app.protocol.images import Encoding
from serve_app.protocol.params import GenerationParams
from tests.e2e.conftest import Server
from tests.serve_process import demo_config, free_port, start_serve
from tests.waiting import wait_until
from tools.demo_model.judge import read
from tools.demo_model.scenes import Scene, SceneObject, render

pytestmark = pytest.mark.serve


def _decode(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def _post(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=480)


def _ready(server: Server) -> int:
    return httpx.get(f"{server.url}/ready", timeout=20).status_code


def _kill_replica() -> None:
    [name] = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "#Generator#" in actor["name"]
    ]
    ray.kill(ray.get_actor(name, namespace="serve"))


def _stats(generator: Any) -> EngineStats:
    stats: EngineStats = generator.stats.remote().result(timeout_s=20)
    return stats


def test_an_image_shows_what_the_prompt_describes(server: Server) -> None:
    response = _post(server, prompt="a red circle on a blue background", seed=1)
    assert response.status_code == 200, response.text
    image = _decode(response.json()["data"][0]["b64_json"])
    assert (image.format, image.size) == ("PNG", (64, 64))
    seen = read(np.asarray(image))
    assert seen.background == "blue"
    assert [(item.color, item.shape) for item in seen.objects] == [("red", "circle")]


def test_the_log_reports_a_replicas_start(server: Server) -> None:
    """It has the age of the process and the phases of the engine's start."""
    log = server.log.read_text()
    assert re.search(r"model demo: loading in a process that is \d+\.\d s old", log)
    assert re.search(
        r"model demo: ready after \d+\.\d\d s: load .* compile 0\.00 s; certification", log
    )


def test_the_openai_client_works(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(
            model="demo",
            prompt="two small yellow squares on black",
            size="64x64",
            n=2,
            extra_body={"seed": 3, "num_inference_steps": 8},
        )
        assert answer.data is not None
        images = [_decode(data.b64_json) for data in answer.data]
        assert [image.size for image in images] == [(64, 64)] * 2
        assert images[0].tobytes() != images[1].tobytes()
        assert [model.id for model in client.models.list()] == ["demo"]
        with pytest.raises(openai.BadRequestError, match="multiples of 8") as caught:
            client.images.generate(model="demo", prompt="x", size="63x64")  # type: ignore[call-overload]
        assert caught.value.param == "size"
        with pytest.raises(openai.NotFoundError, match="demo"):
            client.images.generate(model="dall-e-3", prompt="x")


def test_the_openai_client_streams_previews(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        events = list(
            client.images.generate(
                model="demo",
                prompt="a large red circle on a blue background",
                stream=True,
                partial_images=2,
                extra_body={"seed": 1},
            )
        )
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    first, second, finished = [
        np.asarray(_decode(event.b64_json).convert("RGB")).astype(float) for event in events
    ]
    assert first.shape == second.shape == finished.shape == (64, 64, 3)
    # Previews approach the image: each is nearer than the one before, and than another image.
    distances = [np.abs(partial - finished).mean() for partial in (first, second)]
    other = _post(server, prompt="a small yellow square on black", seed=1).json()
    unrelated = np.asarray(_decode(other["data"][0]["b64_json"])).astype(float)
    assert distances[1] < distances[0] < np.abs(unrelated - finished).mean() / 2
    assert isinstance(events[-1], openai.types.ImageGenCompletedEvent)
    assert events[-1].usage.output_tokens == 16


def test_the_openai_client_passes_on_unknown_events(server: Server) -> None:
    body = {"seed": 1, "progress": True, "num_inference_steps": 8}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.images.generate(prompt="x", stream=True, extra_body=body)
        *progress, finished = stream
    assert finished.type == "image_generation.completed"
    assert {event.type for event in progress} == {"image_generation.progress"}
    assert [event.total_steps for event in progress] == [8] * len(progress)  # type: ignore[union-attr]


def test_the_openai_client_edits_with_a_mask(server: Server) -> None:
    star = SceneObject("star", "red", 0.75, 0.5, 0.2)
    source = Image.fromarray(render(Scene("blue", (star,)), 128, 128))
    mask = Image.new("RGBA", source.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    files = []
    for image in (source, mask):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        files.append(buffer.getvalue())
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        def edit(**options: Any) -> Any:
            return client.images.edit(
                image=("source.png", files[0]),
                prompt="a green square on white",
                extra_body={"seed": 2, "strength": 1.0},
                **options,
            )

        answer = edit(mask=("mask.png", files[1]))
        generated = np.asarray(_decode(answer.data[0].b64_json).convert("RGB")).astype(float)
        streamed = list(edit(mask=("mask.png", files[1]), stream=True, partial_images=1))
        anew = np.asarray(_decode(edit().data[0].b64_json).convert("RGB")).astype(float)
    before = np.asarray(source.resize((64, 64))).astype(float)
    assert (generated == before)[:, 40:].all()  # kept
    assert np.abs(generated - before)[:, :28].mean() > 40  # regenerated
    assert np.abs(anew - before)[:, 40:].mean() > 40
    assert [event.type for event in streamed] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    again = np.asarray(_decode(streamed[-1].b64_json).convert("RGB")).astype(float)
    assert np.abs(again - generated).max() <= 1


def test_a_client_that_gives_up_frees_its_slot(server: Server, generator: Any) -> None:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=0.5
    ) as client:
        long: Any = {"num_inference_steps": 200}
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(prompt="x", size="128x128", extra_body=long)  # type: ignore[call-overload]
        wait_until(lambda: _stats(generator).running == 0, what="the slot to be free")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.images.generate(
            prompt="x", stream=True, partial_images=3, extra_body=long | {"progress": True}
        )
        next(iter(stream))
        stream.close()
        wait_until(lambda: _stats(generator).running == 0, what="the slot to be free")


def test_every_response_has_one_request_id_and_keeps_the_clients_own(server: Server) -> None:
    for path in ("/v1/models", "/nothing", "/", "/health"):
        own = httpx.get(f"{server.url}{path}", headers={"x-request-id": "call-7"}, timeout=20)
        assert own.headers.get_list("x-request-id") == ["call-7"]
        [drawn] = httpx.get(f"{server.url}{path}", timeout=20).headers.get_list("x-request-id")
        assert len(drawn) > 20
        for wrong in (b"", b"\xe9", b"a b", b"x" * 201):
            headers = [(b"x-request-id", wrong)]
            response = httpx.get(f"{server.url}{path}", headers=headers, timeout=20)
            assert response.status_code == own.status_code
            [drawn] = response.headers.get_list("x-request-id")
            assert len(drawn) == 36


def test_no_header_changes_the_servers_time_limit(server: Server) -> None:
    response = httpx.post(
        f"{server.url}/v1/images/generations",
        json={"prompt": "x", "num_inference_steps": 20},
        headers={"x-request-timeout-seconds": "0.01"},
        timeout=240,
    )
    assert response.status_code == 200, response.text


def test_a_seed_generates_the_same_image_next_to_other_requests(server: Server) -> None:
    body = {"prompt": "a green ring on white", "seed": 7, "num_inference_steps": 6}
    alone = _decode(_post(server, **body).json()["data"][0]["b64_json"])
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda seed: _post(server, **(body | {"seed": seed})), range(8)))
    assert {response.status_code for response in crowd} == {200}
    together = _decode(crowd[7].json()["data"][0]["b64_json"])
    difference = np.abs(np.asarray(alone).astype(int) - np.asarray(together))
    assert difference.max() <= 1  # one rounding of 255


def test_errors_come_back_in_openais_shape(server: Server) -> None:
    for body, status, param in (
        ({"prompt": "x", "foo": 1}, 400, "foo"),
        ({"prompt": "x", "num_inference_steps": 201}, 400, "num_inference_steps"),
        ({"prompt": "x", "size": "1024x1024"}, 400, "size"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
    ):
        response = _post(server, **body)
        assert response.status_code == status
        assert response.json()["error"]["param"] == param
    big = httpx.post(f"{server.url}/v1/images/generations", content=b"x" * 2_000_000, timeout=120)
    assert (big.status_code, big.json()["error"]["code"]) == (413, "body_too_large")
    assert httpx.get(f"{server.url}/health", timeout=20).json() == {"status": "ok"}


def test_a_rejection_by_the_engine_keeps_its_type_through_ray(generator: Any) -> None:
    params = GenerationParams("x", 1, width=60, height=64)

    async def generate() -> None:
        backend = ServeBackend("demo", generator, 60.0, 60.0, Replicas.of(generator))
        async for _ in backend.generate(params, Encoding()):
            pass

    with pytest.raises(InvalidRequest, match="multiples of 8") as caught:
        asyncio.run(generate())
    assert type(caught.value) is InvalidRequest
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("header", "stream"),
    [("X-Nothing: 1", False), ("X-Nothing: 1", True), ("x-request-disconnect-disabled: ?1", False)],
)
def test_a_disconnect_frees_the_slot_within_one_step(
    server: Server, generator: Any, report: Callable[[str], None], header: str, stream: bool
) -> None:
    """Serve's header against the detection of disconnects does not prevent it."""
    before = {entry.request for entry in _stats(generator).log}
    generated = {"prompt": "a blue star on pink", "seed": 5, "size": "128x128", "stream": stream}
    body = json.dumps(generated | {"num_inference_steps": 200})
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.create_connection((address.hostname, address.port)) as client:
        request = (
            f"POST /v1/images/generations HTTP/1.1\r\nHost: {address.netloc}\r\n{header}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        client.sendall(request.encode())
        # In the middle of the request: some steps are done, many remain.
        start = wait_until(
            lambda: next(
                (
                    entry
                    for entry in _stats(generator).log
                    if entry.what == "started" and entry.request not in before
                ),
                None,
            ),
            what="the request to start",
        )
        wait_until(
            lambda: _stats(generator).denoiser_calls >= start.denoiser_call + 3, what="some steps"
        )
        assert _stats(generator).running == 1
    # The end of the block closed the connection.
    wait_until(lambda: _stats(generator).running == 0, what="the slot to be free")
    denoiser_calls = {
        entry.what: entry.denoiser_call
        for entry in _stats(generator).log
        if entry.request == start.request
    }
    report(
        f"disconnect ({header}, stream {stream}): cancelled at denoiser call "
        f"{denoiser_calls['cancel_requested'] - start.denoiser_call}, slot free at "
        f"{denoiser_calls['cancelled'] - start.denoiser_call}, of 200 it would have taken"
    )
    assert denoiser_calls["cancelled"] - denoiser_calls["cancel_requested"] <= 1
    assert denoiser_calls["cancelled"] < start.denoiser_call + 150
    assert "completed" not in denoiser_calls


def test_a_disconnect_does_not_affect_other_requests(server: Server, generator: Any) -> None:
    def ended(what: str) -> int:
        return sum(entry.what == what for entry in _stats(generator).log)

    before = {what: ended(what) for what in ("cancelled", "completed")}

    async def run() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=480) as client:

            async def post(seed: int, steps: int) -> int:
                body = {"prompt": "a red star on white", "seed": seed, "num_inference_steps": steps}
                return (await client.post("/v1/images/generations", json=body)).status_code

            quitter = asyncio.create_task(post(99, 200))
            others = [asyncio.create_task(post(seed, 60)) for seed in range(4)]

            def all_run() -> bool:
                answered = [other.result() for other in others if other.done()]
                assert not answered, f"answered before all five ran: {answered}"
                return _stats(generator).running == 5

            await asyncio.to_thread(wait_until, all_run, what="all five requests to run")
            quitter.cancel()
            return await asyncio.gather(*others)

    assert asyncio.run(run()) == [200] * 4
    wait_until(lambda: _stats(generator).running == 0)
    assert ended("cancelled") - before["cancelled"] == 1
    assert ended("completed") - before["completed"] == 4


def test_a_lost_replica_loses_no_request(server: Server, generator: Any) -> None:
    body = {"prompt": "a red cross on cyan", "seed": 8, "num_inference_steps": 60, "size": "96x96"}
    undisturbed = _post(server, **body).json()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_post, server, **body)
        wait_until(lambda: _stats(generator).running == 1, what="the request to start")
        _kill_replica()
        wait_until(lambda: _ready(server) == 503, what="/ready to return 503")
        response = answer.result(timeout=480)
    assert response.status_code == 200, response.text
    assert response.json()["data"] == undisturbed["data"]
    assert _ready(server) == 200


def test_a_stream_continues_when_its_replica_is_lost(server: Server, generator: Any) -> None:
    body = {
        "prompt": "a red cross on cyan",
        "seed": 8,
        "num_inference_steps": 60,
        "size": "96x96",
        "stream": True,
        "partial_images": 3,
    }
    wait_until(lambda: _ready(server) == 200, what="a replica", deadline_s=90)

    def read(kill_after: str | None) -> list[str]:
        lines = []
        with httpx.stream(
            "POST", f"{server.url}/v1/images/generations", json=body, timeout=480
        ) as response:
            for line in response.iter_lines():
                if line.startswith("event: "):
                    lines.append(line)
                    if kill_after is not None and line.endswith(kill_after):
                        kill_after = None
                        _kill_replica()
        return lines

    undisturbed = read(kill_after=None)
    assert len(undisturbed) == 4
    assert read(kill_after="partial_image") == undisturbed


def test_a_wrong_config_is_named_in_the_log_and_serves_nothing() -> None:
    port = free_port()
    config = demo_config(port)
    config["applications"][0]["args"]["model"]["path"] = "/no/such/model"  # type: ignore[index]
    running = start_serve(config)
    try:
        wait_until(
            lambda: "the folder /no/such/model does not exist" in running.log.read_text(),
            deadline_s=60,
            what="the error",
        )
        answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=20)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"
    finally:
        running.stop()
