"""Tests of the servers that ``tests.benchmarks.peers`` compares, and of its statistics."""

import asyncio
import base64
import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import psnr_db
from serve_app.protocol.params import GenerationParams
from tests.benchmarks.overload import KINDS, PATH, Kind
from tests.benchmarks.peers import batch, lock
from tests.benchmarks.peers.load import (
    LOADS,
    Answer,
    Load,
    Request,
    at_once,
    measured,
    percentile,
    run,
    weights,
)
from tests.benchmarks.peers.report import Row, aims, show, summaries
from tests.benchmarks.peers.servers import overridden
from tests.serve_process import demo_config, free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

SMALL, LARGE = Kind(32, 2, 0.5), Kind(48, 1, 0.5)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, what="uvicorn")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def lock_url() -> Iterator[str]:
    with served(lock.app) as url:
        yield url


@pytest.fixture(scope="module")
def batch_url() -> Iterator[str]:
    with served(batch.app) as url:
        yield url


class Recorder:
    """Records the calls of a peer's ``generate``, and holds the first one until `release`."""

    def __init__(self, generate: Callable[[Any], Any]) -> None:
        self._generate = generate
        self._released = Event()
        self.calls: list[Any] = []

    def __call__(self, requests: Any) -> Any:
        self.calls.append(requests)
        assert self._released.wait(60)
        return self._generate(requests)

    def release(self) -> None:
        self._released.set()


def send_in_order(
    url: str, requests: list[Request], waiting: Callable[[], int], recorder: Recorder
) -> list[Answer]:
    """Send each request after the arrival of the last one, while the first one generates.

    The second one waits for the first call: within 50 ms of the first it could join its batch.
    """

    def answer(request: Request) -> Answer:
        return asyncio.run(at_once(url, [request]))[0]

    with ThreadPoolExecutor(len(requests)) as clients:
        futures: list[Future[Answer]] = []
        for number, request in enumerate(requests):
            futures.append(clients.submit(answer, request))
            wait_until(lambda number=number: recorder.calls and waiting() == number, what="arrival")
        recorder.release()
        return [future.result() for future in futures]


def pixels_of(answer: Answer) -> torch.Tensor:
    image = answer.image()
    assert image is not None, answer.response.text
    return torch.tensor(image).permute(2, 0, 1) / 255


def alone(pipeline: LoadedPipeline, request: Request) -> torch.Tensor:
    side = request.kind.side_px
    prompt = request.body["prompt"]
    params = GenerationParams(
        prompt, request.seed, width=side, height=side, num_inference_steps=request.kind.steps
    )
    return pipeline.generate(params)[0]


def test_a_batch_has_requests_of_one_kind_in_their_order(
    batch_url: str, demo_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(batch.generate)
    monkeypatch.setattr(batch, "generate", recorder)
    kinds = [LARGE, SMALL, LARGE, SMALL, replace(SMALL, steps=1), *[SMALL] * 7]
    requests = [Request(kind, seed) for seed, kind in enumerate(kinds)]

    def waiting() -> int:
        return len(batch.waiting)

    answers = send_in_order(batch_url, requests, waiting, recorder)
    seeds = [[request.seed for request in call] for call in recorder.calls]
    assert seeds == [[0], [1, 3, 5, 6, 7, 8, 9, 10], [2], [4], [11]]
    for request, answer in zip(requests, answers, strict=True):
        assert psnr_db(alone(demo_pipeline, request), pixels_of(answer)) > 50


def test_a_request_waits_for_others(batch_url: str) -> None:
    [answer] = asyncio.run(at_once(batch_url, [Request(Kind(32, 1, 1.0), 1)]))
    assert answer.image() is not None
    assert answer.took_s > 0.05


def test_a_failed_batch_is_an_error_of_its_requests_only(
    batch_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(requests: list[batch.ImageRequest]) -> list[Image.Image]:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(batch, "generate", fail)
        [failed] = asyncio.run(at_once(batch_url, [Request(SMALL, 1)]))
    [done] = asyncio.run(at_once(batch_url, [Request(SMALL, 1)]))
    assert (failed.response.status_code, failed.image()) == (500, None)
    assert done.image() is not None


def test_lock_generates_one_at_a_time_in_their_order(
    lock_url: str, demo_pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(lock.generate)
    monkeypatch.setattr(lock, "generate", recorder)
    requests = [Request(kind, seed) for seed, kind in enumerate([LARGE, SMALL, LARGE, SMALL])]

    answers = send_in_order(lock_url, requests, lock.one_thread._work_queue.qsize, recorder)
    assert [call.seed for call in recorder.calls] == [0, 1, 2, 3]
    for request, answer in zip(requests, answers, strict=True):
        assert psnr_db(alone(demo_pipeline, request), pixels_of(answer)) > 50


@pytest.mark.parametrize("name", ["lock", "batch"])
def test_a_peer_is_short_and_rejects_what_it_cannot_read(
    name: str, request: pytest.FixtureRequest
) -> None:
    text = (Path(lock.__file__).parent / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    url = request.getfixturevalue(f"{name}_url")
    assert httpx.post(f"{url}{PATH}", json={"prompt": "a star", "size": "big"}).status_code == 422


def test_a_closed_loop_keeps_all_clients_busy(batch_url: str) -> None:
    load = Load("short", 3, (SMALL, LARGE), settle_s=0.2, window_s=0.6)
    answers = asyncio.run(run(batch_url, load, seed=1))
    assert all(answer.image() is not None for answer in answers)
    assert max(answer.sent_s for answer in answers) < 0.8 < answers[-1].ended_s
    sent = sorted(answers, key=lambda answer: answer.sent_s)
    assert len({one.request for one in sent} - set(itertools.islice(load.requests(1), 999))) == 0
    busy_s = sum(min(one.ended_s, 0.8) - one.sent_s for one in answers)
    assert busy_s > 2 * 0.8  # nearly 3 clients times 0.8 s


def test_each_seed_has_its_requests_with_the_shares_of_the_mix() -> None:
    load = LOADS[-1]
    first = list(itertools.islice(load.requests(0), 2000))
    assert first == list(itertools.islice(load.requests(0), 2000))
    other = list(itertools.islice(load.requests(1), 2000))
    assert not {request.seed for request in first} & {request.seed for request in other}
    for kind in KINDS:
        share = sum(request.kind == kind for request in first) / len(first)
        assert share == pytest.approx(kind.share, abs=0.04)
    assert len({request.body["prompt"] for request in first}) > 100
    assert first[0].body == first[0].body


def answer(kind: Kind, sent_s: float, ended_s: float, right: bool = True) -> Answer:
    """Return an answer with a black image, of another size if it is not right."""
    file = io.BytesIO()
    Image.new("RGB", (kind.side_px, kind.side_px if right else 8)).save(file, "png")
    data = [{"b64_json": base64.b64encode(file.getvalue()).decode()}]
    response = httpx.Response(200, json={"data": data})
    return Answer(Request(kind, 0), sent_s, ended_s, response)


def test_throughput_counts_from_answer_to_answer() -> None:
    """Batches of 4 every 3 s are 4/3 images/s, wherever the window cuts them."""
    answers = [
        answer(SMALL, 3.0 * number, 3.0 * number + 3.0) for number in range(6) for _ in range(4)
    ]
    for settle_s, window_s in ((3.0, 12.0), (4.0, 9.5), (1.0, 13.0), (5.9, 6.2)):
        load = Load("", 4, (SMALL,), settle_s, window_s)
        found = measured(load, answers, {SMALL: 1.0})
        assert found.images_per_s == found.answers_per_s == pytest.approx(4 / 3)


def test_an_image_counts_by_the_solo_time_of_its_kind() -> None:
    load = Load("", 1, (SMALL, LARGE), settle_s=0, window_s=10)
    weight_of = weights(load.kinds, {SMALL: 1.0, LARGE: 3.0})
    assert weight_of == {SMALL: 0.5, LARGE: 1.5}
    answers = [answer(SMALL, 0, 1), answer(LARGE, 1, 4), answer(SMALL, 4, 5)]
    found = measured(load, answers, weight_of)
    assert found.images_per_s == pytest.approx(2.5 / 5)
    assert found.answers_per_s == pytest.approx(3 / 5)


def test_latency_is_that_of_all_requests_in_flight_in_the_window() -> None:
    load = Load("", 2, (SMALL,), settle_s=10, window_s=10)
    answers = [
        answer(SMALL, 0, 9),  # ended before it
        answer(SMALL, 9, 11),
        answer(SMALL, 11, 15),
        answer(SMALL, 15, 45),  # waited for
        answer(SMALL, 18, 19, right=False),
    ]
    found = measured(load, answers, {SMALL: 1.0})
    assert (found.answers, found.wrong) == (3, 1)
    assert (found.p50_s, found.p95_s) == (4, 30)
    assert found.answers_per_s == pytest.approx(2 / 6)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(20, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.05, 0.5, 0.95, 1.0)] == [
        1,
        1,
        10,
        19,
        20,
    ]


def row(
    number: int, load: int, server: str, images_per_s: float, p50_s: float, p95_s: float
) -> Row:
    name = LOADS[load].name
    batch_size = 5.0 if server == "ours" else None
    return Row(
        number,
        name,
        server,
        images_per_s,
        images_per_s,
        p50_s,
        p95_s,
        9,
        0,
        batch_size,
        1,
        0.9,
        0.1,
        0.2,
    )


ROWS = [
    row(0, 2, "lock", 1.0, 10.0, 20.0),
    row(0, 2, "batch", 2.0, 11.0, 16.0),
    row(0, 2, "ours", 3.0, 2.0, 32.0),
    row(1, 2, "lock", 4.0, 10.0, 20.0),
    row(1, 2, "batch", 2.0, 5.0, 16.0),
    row(1, 2, "ours", 4.0, 2.0, 16.0),
    row(2, 2, "lock", 1.0, 10.0, 20.0),
    row(2, 2, "batch", 1.0, 10.0, 10.0),
    row(2, 2, "ours", 1.4, 2.5, 10.0),
]


def test_ratios_are_those_of_a_round() -> None:
    lock_row, batch_row, ours = summaries(ROWS)
    assert [one.server for one in (lock_row, batch_row, ours)] == ["lock", "batch", "ours"]
    assert ours.spans["images_per_s"].show() == "3.00 (1.40..4.00)"
    assert ours.ratios["batch"]["images_per_s"].show() == "1.50 (1.40..2.00)"
    assert ours.ratios["lock"]["p95_s"].median == 0.8
    assert lock_row.ratios["lock"]["p50_s"].show() == "1.00"
    assert "mean_batch_size" not in lock_row.spans
    table = show([lock_row, batch_row, ours]).splitlines()
    assert len(table) == 4
    assert table[3].split("  ")[0] == "16 clients, mixed"


def test_a_target_names_the_better_peer_of_each_round() -> None:
    verdicts = {aim.text: aim.verdict for aim in aims(ROWS, psnr_db=90.0)}
    assert verdicts == {
        "1 client, alike: images/s at least 0.97 x lock": "not measured",
        "8 clients, alike: images/s at least 0.95 x batch": "not measured",
        "8 clients, alike: p95 at most 1.1 x batch": "not measured",
        "16 clients, mixed: images/s at least 1.3 x the better peer": "met: 1.4",
        "16 clients, mixed: p50 at most 0.3 x the better peer": "met: 0.25",
        "16 clients, mixed: p95 at most 1.2 x the better peer": "met: 1",
        "answers without the requested image: none": "met: 0",
        "same images: PSNR at least 40 dB": "met: 90",
    }
    failed = [replace(one, wrong=1) for one in ROWS]
    last = [aim.verdict for aim in aims(failed, psnr_db=20.0)][-2:]
    assert last == ["missed: 9", "missed: 20"]
    without = [one for one in ROWS if one.server != "lock"]
    assert aims(without, psnr_db=90.0)[3].verdict == "not measured"


def test_an_override_changes_our_config() -> None:
    config = overridden(demo_config(1), ["engine.scheduling=fifo", "engine.limits.max_steps=9"])
    engine = config["applications"][0]["args"]["engine"]
    assert (engine["scheduling"], engine["limits"]["max_steps"]) == ("fifo", 9)
    with pytest.raises(ValueError, match=r"write engine\.KEY=VALUE"):
        overridden(demo_config(1), ["engine.scheduling"])
