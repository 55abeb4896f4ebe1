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
from serve_app.engine import admission, runner
from serve_app.engine import engine as engine_module
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ConfigError
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.gateway.schemas import PARTS
from serve_app.protocol.backend import GenerationEvent
from serve_app.protocol.params import ModelInfo
from tests.conftest import DEMO, FIFO


def test_a_replica_gets_a_gpu_unless_the_config_says_otherwise() -> None:
    assert Generator.ray_actor_options["num_gpus"] == 1


def test_an_assigned_gpu_that_torch_cannot_use_is_explained() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    with pytest.raises(ConfigError, match=r"GPU 0, 3 .*num_gpus of the deployment Generator to 0"):
        check_assigned_gpus(["0", "3"], "auto")


def test_without_an_assigned_gpu_torch_is_not_used() -> None:
    check_assigned_gpus([], "auto")


def test_an_unwanted_gpu_is_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_assigned_gpus(["0", "3"], "cpu")
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
    for module in (engine_module, admission, runner, generator):
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
