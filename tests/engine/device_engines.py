"""Engines on the fake asynchronous device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from serve_app.engine.batching.rendezvous import Call, Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.startup import warmup
from serve_app.engine.startup.noise_scheduler_trials import SchedulerTrials
from tests.fakes.async_device import AsyncDevice, async_device


@contextmanager
def device_of_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncDevice]:
    """Yield a device that engines use; calls of networks take its ``call_s``, and are in its log.

    Noise schedulers are offered untried: their trials take most of a start, and wait as they like.
    """
    run, forward = Engine._run, Rendezvous.forward

    with async_device() as device:

        def run_there(engine: Engine) -> None:
            with device.used_here():
                run(engine)

        def logged(rendezvous: Rendezvous, call: Call) -> Any:
            device.log.append(f"call {call.site}")
            device.launch(device.call_s)
            return forward(rendezvous, call)

        monkeypatch.setattr(warmup, "try_noise_schedulers", lambda *_: SchedulerTrials({}))
        monkeypatch.setattr(Engine, "_run", run_there)
        monkeypatch.setattr(Rendezvous, "forward", logged)
        for name, use in (
            ("Event", device.new_event),
            ("is_initialized", lambda: True),
            ("synchronize", device.wait),
            ("empty_cache", lambda: None),
        ):
            monkeypatch.setattr(torch.cuda, name, use)
        monkeypatch.setattr(time, "perf_counter", device.now)
        yield device


def placed(build: Callable[[], DiffusionPipeline], device: AsyncDevice) -> DiffusionPipeline:
    """Return a pipeline whose networks are on the device."""
    pipeline = build()
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            device.place(component)
    return pipeline
