"""Simulate the share of time that a GPU is busy: ``python -m tests.benchmarks.busy_share``.

The engine serves a tiny Stable Diffusion on the simulated asynchronous device of `tests.fakes`. A
denoiser call takes a fixed time there, and each operation of torch a fixed time of the host. Both
the waits of stock pipelines and the engine's own way are simulated, with each noise scheduler.
"""

import contextlib
import json
import threading
from pathlib import Path
from typing import Annotated, Any

import diffusers
import pytest
import torch
import typer
from torch import Tensor

from serve_app.config.models import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.noise_schedulers import NOISE_SCHEDULERS
from serve_app.protocol.params import GenerationParams
from tests.engine.device_engines import device_of_engines, placed
from tests.engine.engines import result_of
from tests.engine.test_waits import loaded, stock_waits, with_scheduler
from tests.fakes.async_device import AsyncDevice
from tests.tiny_pipelines import HEIGHT_PX, WIDTH_PX

CALLS_MS = (5, 20, 70)
BATCHES = (1, 4, 16)
STEPS = 6
"""Steps of a request; heun and pndm make more calls."""

LAUNCH_US = 10
"""Microseconds of the host for each operation on the device, in Python and in the driver."""

COMPUTE_US = 2
"""Microseconds of the host for each operation with scalars of its own."""


class Denoiser:
    """Replacement of the denoiser's ``forward`` that notes when the device runs each call."""

    def __init__(self, device: AsyncDevice) -> None:
        self._device = device
        self._calls: list[tuple[float, int]] = []

    def __call__(self, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        self._calls.append((self._device.free_at, len(sample)))
        return (sample.clone(),)

    def take_busy_share(self) -> float:
        """Return the share of the time from the first to the last call of the largest batch."""
        largest = max(rows for _, rows in self._calls)
        ended_s = [at for at, rows in self._calls if rows == largest]
        self._calls.clear()
        return (len(ended_s) - 1) * self._device.call_s / (ended_s[-1] - ended_s[0])


def generate(engine: Engine, name: str, batch: int) -> None:
    """Generate images of as many requests, which begin together."""
    size = {"width": WIDTH_PX, "height": HEIGHT_PX}
    options: dict[str, Any] = {"num_inference_steps": STEPS, "noise_scheduler": name, **size}
    submitted = threading.Event()

    def hold() -> None:
        submitted.wait()

    engine._commands.put(hold)
    requests = [GenerationParams("a circle", seed, **options) for seed in range(batch)]
    streams = [engine.stream(request) for request in requests]
    submitted.set()
    for stream in streams:
        result_of(list(stream))


def simulate(stock: bool) -> list[dict[str, Any]]:
    """Return a row for each noise scheduler, time of a call and batch size."""
    rows = []
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        device_of_engines(monkeypatch) as device,
    ):
        device.launch_s, device.compute_s = LAUNCH_US / 1e6, COMPUTE_US / 1e6
        pipeline, model = loaded(placed(with_scheduler(diffusers.DDIMScheduler), device))
        most = max(BATCHES)
        config = EngineConfig(max_batch_size=most, max_running=most, scheduling="fifo")
        with Engine(pipeline, model, config) as engine:
            if stock:
                stock_waits(engine, monkeypatch)
            denoiser = Denoiser(device)
            engine._executor.rendezvous._forwards["unet"] = denoiser
            for name in NOISE_SCHEDULERS:
                for call_ms in CALLS_MS:
                    device.call_s = call_ms / 1000
                    for batch in BATCHES:
                        generate(engine, name, batch)
                        share = denoiser.take_busy_share()
                        row = {"noise_scheduler": name, "call_ms": call_ms, "batch": batch}
                        rows.append({**row, "stock": stock, "busy_share": round(share, 4)})
                        typer.echo(f"{name} {call_ms} ms, batch {batch}: {share:.1%} {stock=}")
    return rows


def main(
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the shares, and write them."""
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(None):
        rows = [row for stock in (True, False) for row in simulate(stock)]
    if output is not None:
        result = {
            "command": "python -m tests.benchmarks.busy_share",
            "launch_us": LAUNCH_US,
            "compute_us": COMPUTE_US,
            "steps": STEPS,
            "rows": rows,
        }
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
