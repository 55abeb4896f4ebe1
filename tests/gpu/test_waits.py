"""Waits for a GPU, as CUDA itself reports them: the fake device of the other tests must agree."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import pytest
import torch

from serve_app.engine.engine import Engine
from serve_app.engine.model.noise_schedulers import NOISE_SCHEDULERS
from serve_app.engine.request import Request
from serve_app.engine.runner import Runner
from tests.engine.test_waits import CONFIG, loaded, request, together, with_scheduler
from tests.fakes.known_waits import KNOWN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = torch.device("cuda")


@contextmanager
def waits_raise(active: bool = True) -> Iterator[None]:
    """Let every operation raise that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error" if active else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", KNOWN)
def test_cuda_waits_where_the_fake_device_does(name: str) -> None:
    waits, operation = KNOWN[name]
    operation(DEVICE)  # the first call may set up a library
    if waits:
        with pytest.raises(RuntimeError, match="synchroniz"), waits_raise():
            operation(DEVICE)
    else:
        with waits_raise():
            operation(DEVICE)


def test_no_noise_scheduler_waits_between_two_denoiser_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switch = Runner._switch

    def strict(runner: Runner, one: Request, resume: Callable[[], None]) -> None:
        with waits_raise(one.calls > 0 and one.steps_left > 1):
            switch(runner, one, resume)

    pipeline, model = loaded(with_scheduler(diffusers.DDIMScheduler)().to(DEVICE))
    with Engine(pipeline, model, CONFIG) as engine:
        assert pipeline.timesteps_on_cpu
        monkeypatch.setattr(Runner, "_switch", strict)
        for name in NOISE_SCHEDULERS:
            # A wait fails the request, and with it this test.
            together(engine, [request(seed, noise_scheduler=name) for seed in (1, 2)])
