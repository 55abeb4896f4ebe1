"""The watchdog: a call that does not end is reported and ends its requests; a slow one may last."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.config.models import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.receivers import Receivers
from serve_app.engine.timer import CallTimer
from serve_app.engine.watchdog import FIRST_TIMES, PREDICTED_TIMES, Stuck, Task, Watchdog
from serve_app.errors import ModelLoadError, Unavailable
from serve_app.protocol.events import Event, Failed, Progress, Queued
from tests.conftest import DEMO, FIFO
from tests.engine.engines import has_stopped, params
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("reused_starts")

SOON = FIFO.model_copy(update={"stuck_after_s": 1.0})
"""Calls that ran before are stuck after a second, first ones after ten."""


@contextmanager
def hanging(module: nn.Module, from_call: int = 1) -> Iterator[threading.Event]:
    """Make the module hang from this call on, until the block ends; yield an event for that."""
    calls, hangs, released = 0, threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls >= from_call:
            hangs.set()
            released.wait()

    handle = module.register_forward_pre_hook(hang)
    try:
        yield hangs
    finally:
        released.set()
        handle.remove()


def unet_of(pipeline: LoadedPipeline) -> nn.Module:
    return pipeline.denoisers["unet"].conv_in


def decoder_of(pipeline: LoadedPipeline) -> nn.Module:
    block: nn.Module = pipeline.stock.vae.decoder.mid_block.resnets[0]
    return block


@contextmanager
def its_thread_ends() -> Iterator[None]:
    """Wait for the end of the engine's thread that the block starts.

    It gives the pipeline its modules back then, which those of a later engine must not lose.
    """
    before = set(threading.enumerate())
    yield
    started = [one for one in threading.enumerate() if one.name == "engine" and one not in before]
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()


def ends_of(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, Queued | Progress)]


@pytest.mark.parametrize(
    ("module", "from_call", "what"),
    [(unet_of, 3, "unet (2 requests of 64x64)"), (decoder_of, 1, "mid_block (1 request of 64x64)")],
)
def test_a_call_that_hangs_ends_every_request_from_outside(
    demo_pipeline: LoadedPipeline,
    caplog: pytest.LogCaptureFixture,
    module: Callable[[LoadedPipeline], nn.Module],
    from_call: int,
    what: str,
) -> None:
    """Running and waiting requests, and one that the engine has not seen yet."""
    with its_thread_ends():
        engine = Engine(demo_pipeline, DEMO, SOON.model_copy(update={"max_running": 2}))
        engine.generate(params())  # so that the kinds of its calls are known
        inboxes: list[list[Event]] = [[] for _ in range(4)]
        with hanging(module(demo_pipeline), from_call) as hangs:
            for seed in range(3):
                engine.submit(params(seed=seed), inboxes[seed].append)
            assert hangs.wait(60)
            assert engine.stats().running == 2
            engine.submit(params(seed=3), inboxes[3].append)
            wait_until(lambda: has_stopped(engine), deadline_s=60)
            for inbox in inboxes:
                [end] = ends_of(inbox)
                assert isinstance(end, Failed)
                assert isinstance(end.error, Unavailable)
            with pytest.raises(Unavailable) as caught:
                engine.check()
            message = str(caught.value)
            assert what in message
            assert "has not ended after" in message
            assert "its predicted time is" in message
            assert "engine.stuck_after_s" in message
            assert "released.wait()" in caplog.text  # the log shows where the thread is
            with pytest.raises(Unavailable):
                engine.submit(params(), print)
            assert engine.wait_for_loss()
            engine.close(drain=False)  # does not wait for the thread
    # If the call ends after all, the thread ends too, and no request gets a second last event.
    assert [len(ends_of(inbox)) for inbox in inboxes] == [1] * 4
    assert torch.isfinite(demo_pipeline.generate(params(num_inference_steps=1))).all()


def test_a_wait_for_the_device_that_hangs_is_noticed(demo_pipeline: LoadedPipeline) -> None:
    """On a GPU a hung call returns at once, and the wait for it does not."""
    released = threading.Event()
    hangs = False

    class DeviceEvent:
        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            if hangs:
                released.wait()

        def elapsed_time(self, end_event: Any, /) -> float:
            return 1.0

    with its_thread_ends():
        engine = Engine(demo_pipeline, DEMO, SOON)
        engine._executor._timer = CallTimer(torch.device("cuda"), DeviceEvent)
        try:
            engine.generate(params())
            hangs = True
            with pytest.raises(Unavailable):
                engine.generate(params())
            with pytest.raises(Unavailable, match="has not ended after"):
                engine.check()
        finally:
            released.set()
            engine.close(drain=False)


@pytest.mark.parametrize("module", [unet_of, decoder_of])
def test_a_start_that_hangs_fails(
    demo_pipeline: LoadedPipeline, module: Callable[[LoadedPipeline], nn.Module]
) -> None:
    config = EngineConfig(stuck_after_s=0.3)
    with (
        its_thread_ends(),
        hanging(module(demo_pipeline), from_call=2),
        pytest.raises(ModelLoadError, match=r"Stuck: .* at start-up has not ended after"),
    ):
        Engine(demo_pipeline, DEMO, config)


def test_an_idle_engine_and_one_between_requests_are_not_stuck(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO, SOON) as engine:
        for _ in range(2):
            engine.generate(params())
            wait_until(lambda: engine._watchdog._task is None)
            assert engine._watchdog.observe(1e6) is None
            assert engine._watchdog.observe(1e6) is None
        assert engine._watchdog.share() == 0
        engine.check()


def reported_after_s(watchdog: Watchdog, task: Task) -> float:
    """Begin a call; return the seconds after which it counts as stuck."""
    watchdog.begin(task)
    age_s = -1.0  # the first observation sees the call begin
    while watchdog.observe(1.0) is None:
        age_s += 1.0
        assert age_s < 1e5
    return age_s


def ignore(stuck: Stuck) -> None:
    pass


def test_the_first_call_of_a_kind_may_take_longer() -> None:
    """It may compile, choose kernels, load or move weights. So may one that is always the first."""
    watchdog = Watchdog(60, ignore)
    for kind in (("unet", 1), ("unet", 2)):
        assert reported_after_s(watchdog, Task("unet", kind=kind)) == 60 * FIRST_TIMES
        assert reported_after_s(watchdog, Task("unet", kind=kind)) == 60
    assert reported_after_s(watchdog, Task("unet", kind=("unet", 1))) == 60
    for _ in range(2):
        assert reported_after_s(watchdog, Task("other")) == 60 * FIRST_TIMES
    for _ in range(2):
        watchdog.begin_start_up("unet")
        assert watchdog.observe(0) is None
        assert watchdog.observe(60 * FIRST_TIMES) is None
        assert watchdog.observe(1) is not None


def test_a_call_that_is_predicted_to_last_may_last() -> None:
    watchdog = Watchdog(60, ignore)
    task = Task("unet", (1024, 1024), 4, predicted_s=30.0, kind="unet")
    assert reported_after_s(watchdog, task) == max(60 * FIRST_TIMES, 30 * PREDICTED_TIMES)
    watchdog.begin(Task("unet", (1024, 1024), 4, predicted_s=31.0, kind="unet"))
    assert watchdog.observe(0) is None
    assert watchdog.observe(31 * PREDICTED_TIMES) is None
    assert watchdog.share() == 1
    stuck = watchdog.observe(1)
    assert str(stuck) == (
        "unet (4 requests of 1024x1024) has not ended after 621 s: its predicted time is 31 s, its "
        "limit 620 s (engine.stuck_after_s)"
    )


def test_time_counts_only_while_the_same_call_runs() -> None:
    watchdog = Watchdog(1, ignore)
    for _ in range(100):
        watchdog.begin(Task("unet", kind="unet"))
        assert watchdog.observe(1) is None
        assert watchdog.observe(1) is None
    watchdog.begin(None)
    for _ in range(100):
        assert watchdog.observe(1) is None


def test_a_request_gets_one_last_event_whoever_sends_it() -> None:
    receivers, events = Receivers(), list[Event]()
    send = receivers.add(1, events.append)
    send(Progress(1, 2))

    def broken(event: Event) -> None:
        raise RuntimeError("receiver")

    receivers.add(2, broken)
    receivers.add(3, events.append)
    receivers.fail_all(Unavailable("stuck"))
    send(Progress(2, 2))
    send(Failed(Unavailable("late")))
    assert [str(event.error) for event in events[1:] if isinstance(event, Failed)] == ["stuck"] * 2
    assert len(events) == 3
