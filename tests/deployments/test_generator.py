import itertools
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from serve_app.config.models import AppConfig
from serve_app.deployments import generator
from serve_app.deployments.generator import Generator, check_assigned_gpus
from serve_app.engine import admission, runner, timer
from serve_app.engine import engine as engine_module
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ConfigError
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.gateway.schemas import PARTS
from serve_app.metrics.gateway import REQUESTS
from serve_app.protocol.backend import GenerationEvent, ModelState
from serve_app.protocol.images import EncodedImage, Encoding, PartialImage
from serve_app.protocol.params import GenerationParams, ModelInfo
from tests.conftest import DEMO, FIFO

pytestmark = pytest.mark.usefixtures("reused_starts")


def test_a_replica_gets_a_gpu_unless_the_config_says_otherwise() -> None:
    assert Generator.ray_actor_options["num_gpus"] == 1


def test_an_assigned_gpu_that_torch_cannot_use_is_explained() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    with pytest.raises(
        ConfigError, match=r"GPU 0, 3 .*num_gpus of the deployment Generator-a to 0"
    ):
        check_assigned_gpus(["0", "3"], "auto", "Generator-a")


def test_without_an_assigned_gpu_torch_is_not_used() -> None:
    check_assigned_gpus([], "auto", "Generator")


def test_an_unwanted_gpu_is_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_assigned_gpus(["0", "3"], "cpu", "Generator")
    assert "GPU 0, 3" in caplog.text
    assert "not used" in caplog.text


class Replica:
    """The generator's own code on an engine, as a `GenerationBackend`, without Ray."""

    def __init__(self, engine: Engine) -> None:
        self._generator: Any = object.__new__(Generator.func_or_class)
        self._generator._replica, self._generator._engine = "r1", engine

    async def generate(self, *args: Any) -> AsyncGenerator[GenerationEvent, None]:
        async for event in self._generator.generate(*args):
            yield event

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        info: ModelInfo = await self._generator.describe()
        return info

    async def check_ready(self) -> None:
        await self.describe()

    async def state(self) -> ModelState:
        return "running"

    @property
    def known(self) -> ModelInfo | None:
        info: ModelInfo = self._generator._engine.info
        return info


@contextmanager
def broken_denoiser(pipeline: LoadedPipeline) -> Iterator[None]:
    """Make every denoiser call fail."""

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    [denoiser] = pipeline.denoisers.values()
    layer = next(part for part in denoiser.modules() if isinstance(part, nn.Conv2d))
    hook = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


async def ask(engine: Engine, **body: Any) -> tuple[httpx.Response, float]:
    """Send a request through a gateway; return the answer and the client's waiting time."""
    api = create_api(AppConfig(model=DEMO), Replica(engine), KeyRing(None, None))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        started_at = time.perf_counter()
        response = await client.post("/v1/images/generations", json={"prompt": "x"} | body)
        return response, time.perf_counter() - started_at


@pytest.mark.anyio
@pytest.mark.parametrize("off_s", [-7.0, 7.0])
async def test_a_wrong_clock_changes_no_timing(
    demo_pipeline: LoadedPipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    off_s: float,
) -> None:
    """The replica's machine has another uptime and a wrong clock."""
    there = SimpleNamespace(
        time=lambda: time.time() + off_s, perf_counter=lambda: time.perf_counter() + 1_000
    )
    caplog.set_level(logging.INFO, "serve_app.gateway.requests_log")
    for module in (engine_module, admission, runner, timer, generator):
        monkeypatch.setattr(module, "time", there)
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        response, waited_s = await ask(engine, num_inference_steps=5, n=2)
    timings = response.json()["timings"]
    parts_s = [timings[f"{part}_s"] for part in PARTS]
    assert sum(parts_s) == pytest.approx(timings["total_s"])
    assert timings["total_s"] <= waited_s
    assert min(parts_s) >= 0
    assert min(parts_s[1:]) > 0  # nothing was cut
    [line] = [one for one in caplog.records if one.name == "serve_app.gateway.requests_log"]
    assert [vars(line)[f"{part}_s"] for part in PARTS[:-1]] == pytest.approx(parts_s[:-1], abs=1e-4)
    assert vars(line)["total_s"] < waited_s + 1e-4


@pytest.mark.anyio
async def test_the_line_of_a_request_leads_to_its_traceback(
    demo_pipeline: LoadedPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve_app.gateway.requests_log")
    with Engine(demo_pipeline, DEMO, FIFO) as engine, broken_denoiser(demo_pipeline):
        response, _ = await ask(engine)
    assert response.status_code == 500
    [line] = [one for one in caplog.records if one.name == "serve_app.gateway.requests_log"]
    [cause] = [one for one in caplog.records if one.name == "serve_app.engine.runner"]
    replica, _, number = vars(line)["engine_request"].partition("/")
    assert replica == "r1"
    assert re.search(rf"generation_failed after .* as r1/{number}$", line.getMessage())
    assert cause.getMessage() == f"request {number} failed"
    assert cause.exc_info is not None
    assert "broken" in str(cause.exc_info[1])


@pytest.mark.anyio
async def test_an_image_that_is_not_finite_is_a_500_that_says_so(
    demo_pipeline: LoadedPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """One image of three: there is no answer with a black one."""
    decodings = 0

    def spoil_second(_: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal decodings
        decodings += 1
        return output * float("nan") if decodings == 2 else output

    def failures() -> float:
        labels = {"model": "demo", "outcome": "generation_failed"}
        samples = [one for family in REQUESTS.collect() for one in family.samples]
        return sum(
            one.value
            for one in samples
            if one.name.endswith("_total") and labels.items() <= one.labels.items()
        )

    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        before = failures()
        hook = demo_pipeline.stock.vae.decoder.conv_out.register_forward_hook(spoil_second)
        try:
            response, _ = await ask(engine, num_inference_steps=2, n=3)
        finally:
            hook.remove()
        assert (await ask(engine, num_inference_steps=2))[0].status_code == 200
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "generation_failed"
    assert "the image is not finite (NaN or infinite), in float32." in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert failures() == before + 1
    [line] = [one for one in caplog.records if one.name == "serve_app.engine.runner"]
    assert re.fullmatch(r"request \d+ failed: the image is not finite .*", line.getMessage())


@pytest.mark.anyio
async def test_a_stream_ends_with_an_error_if_the_image_is_not_finite(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        decoder = demo_pipeline.stock.vae.decoder.conv_out
        hook = decoder.register_forward_hook(lambda _, __, output: output / 0)
        try:
            response, _ = await ask(
                engine, num_inference_steps=3, partial_images=2, size="64x64", stream=True
            )
        finally:
            hook.remove()
    names = re.findall(r"^event: (\S+)", response.text, re.MULTILINE)
    assert names == ["image_generation.partial_image"] * 2 + ["error"]
    last = response.text[response.text.rindex("event: error") :]
    assert '"generation_failed"' in last
    assert "the image is not finite" in last


@pytest.mark.anyio
async def test_a_preview_that_is_not_finite_is_left_out(demo_pipeline: LoadedPipeline) -> None:
    """Only the first preview is spoilt, so the image still comes."""
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        preview = engine._runner.previews
        assert preview is not None
        shown = itertools.count()

        def spoilt(latents: torch.Tensor, width: int, height: int) -> torch.Tensor | None:
            bad = next(shown) == 0
            return preview(latents / 0 if bad else latents, width, height)

        engine._runner.previews = spoilt  # type: ignore[assignment]
        params = GenerationParams(
            "x", 1, width=64, height=64, num_inference_steps=4, preview_steps=(1, 2, 3)
        )
        events = [event async for event in Replica(engine).generate(params, Encoding())]
    partial = [event for event in events if isinstance(event, PartialImage)]
    assert [event.index for event in partial] == [0, 1]
    assert isinstance(events[-1], EncodedImage)
