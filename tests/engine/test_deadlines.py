"""Deadlines, the backlog and priorities: which requests an engine admits, and in which order."""

import time
from dataclasses import replace

import pytest

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import (
    InvalidRequest,
)
from serve_app.protocol.events import Completed, Event, Failed, Progress, Queued
from serve_app.protocol.params import INITIAL, RequestContext
from tests.conftest import DEMO
from tests.engine.engines import hold, measured, params, rejected, submitted
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("reused_starts")

ROOM = EngineConfig(max_backlog_s=1000.0)
"""A queue that is not full, even where a slow machine predicts long times."""


def test_a_deadline_that_cannot_be_met_is_rejected(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, ROOM) as engine:
        long_s = measured(engine)
        numbers = [submitted(engine, params(num_inference_steps=100))[0] for _ in range(2)]
        short = params(num_inference_steps=50)
        error = rejected(submitted(engine, replace(short, deadline_s=0.6 * long_s))[1])
        assert error.param == "deadline_s"
        assert error.retry_after_s is not None
        assert 1 <= error.retry_after_s < 3 * long_s + 1
        assert 0 < error.work_s < long_s
        assert str(error).startswith("about ")
        assert "cannot be done within" in str(error)
        assert [entry.what for entry in engine.stats().log if entry.request > numbers[-1]] == [
            "rejected"
        ]
        assert isinstance(submitted(engine, replace(short, deadline_s=100.0))[1], Queued)
        assert isinstance(submitted(engine, short)[1], Queued)  # it has no deadline
        engine.close(drain=False)


def test_an_infeasible_deadline_is_an_invalid_request(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO, ROOM) as engine:
        long_s = measured(engine)
        before = engine.replica_load()
        _, event, _ = submitted(engine, params(num_inference_steps=100, deadline_s=long_s / 4))
        assert isinstance(event, Failed)
        assert isinstance(event.error, InvalidRequest)
        assert event.error.param == "deadline_s"
        assert "on an idle replica" in str(event.error)
        # More replicas would not help, so it is no offered load.
        assert engine.replica_load().arrival_rate <= before.arrival_rate
        assert engine.replica_load().mean_work_s == before.mean_work_s


def test_no_later_request_makes_an_earlier_one_miss_its_deadline(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO, ROOM) as engine:
        long_s = measured(engine)
        _, event, _ = submitted(engine, params(num_inference_steps=100, deadline_s=1.5 * long_s))
        assert isinstance(event, Queued)
        # Another size, and more urgent: it would go first, and make the other late.
        urgent = params(num_inference_steps=60, width=96, deadline_s=1.4 * long_s)
        error = rejected(submitted(engine, urgent)[1])
        assert "would make another request miss its deadline" in str(error)
        engine.close(drain=False)


def test_a_backlog_has_a_limit_and_a_reserve_for_retries(
    demo_pipeline: LoadedPipeline,
) -> None:
    limit_s = 4.0
    config = EngineConfig(max_backlog_s=limit_s, max_running=2)
    with Engine(demo_pipeline, DEMO, config) as engine:
        measured(engine)
        request = params(num_inference_steps=30)

        def filled(context: RequestContext) -> list[Event]:
            events = []
            while len(events) < 50:
                events.append(submitted(engine, request, context)[1])
                if isinstance(events[-1], Failed):
                    break
            return events

        first = filled(INITIAL)
        error = rejected(first[-1])
        assert "the queue is full" in str(error)
        assert error.retry_after_s is not None
        assert error.retry_after_s >= 1
        load = engine.replica_load()
        assert 0.8 * limit_s < load.backlog_s < 2 * limit_s
        second = filled(RequestContext(is_retry=True))
        rejected(second[-1])
        assert 1.6 * limit_s < engine.replica_load().backlog_s < 4 * limit_s
        # Offered load counts a rejected request once, and its retry not.
        assert 30 * load.arrival_rate > load.backlog_s
        assert engine.replica_load().arrival_rate <= load.arrival_rate
        engine.close(drain=False)


def test_an_idle_engine_admits_a_request_longer_than_its_limit(
    demo_pipeline: LoadedPipeline,
) -> None:
    config = EngineConfig(max_backlog_s=0.001)
    with Engine(demo_pipeline, DEMO, config) as engine:
        measured(engine)
        order = RequestContext(order="ten images")
        ten = [submitted(engine, params(seed=seed), order) for seed in range(10)]
        assert all(isinstance(event, Queued) for _, event, _ in ten)
        rejected(submitted(engine, params())[1])
        rejected(submitted(engine, params(), RequestContext(order="others"))[1])
        wait_until(lambda: not engine.replica_load().backlog_s)
        assert isinstance(submitted(engine, params())[1], Queued)


def test_siblings_that_cannot_be_done_in_time_are_rejected(
    demo_pipeline: LoadedPipeline,
) -> None:
    """Also on an idle engine, which admits each of them alone, even if it may be a little late."""
    config = EngineConfig(max_batch_size=1, profile_path="none")  # no other test has it
    with Engine(demo_pipeline, DEMO, config) as engine:
        long_s = measured(engine)
        long = params(num_inference_steps=100, deadline_s=0.8 * long_s)
        number, event, inbox = submitted(engine, long)
        assert isinstance(event, Queued)
        engine.cancel(number)
        inbox.get(timeout=120)
        order = RequestContext(order="ten images")
        # Ten times their work is four times the deadline, so that a machine that becomes twice as
        # fast meanwhile still cannot do them all.
        long = replace(long, deadline_s=2.5 * engine.cost.predict_steps((64, 64), 100))
        ten = [submitted(engine, replace(long, seed=seed), order)[1] for seed in range(10)]
        assert isinstance(ten[0], Queued)
        for event in ten[6:]:
            error = rejected(event)
            assert error.param == "deadline_s"
            assert "the images of this request cannot all be done within" in str(error)
        engine.close(drain=False)


def test_rejections_name_reserved_and_low_priority_work(
    demo_pipeline: LoadedPipeline,
) -> None:
    with Engine(demo_pipeline, DEMO, ROOM) as engine:
        long_s = measured(engine)
        long = params(num_inference_steps=100)
        submitted(engine, long)
        error = rejected(submitted(engine, long, RequestContext(reserved_s=3000.0))[1])
        assert "3000.0 s are reserved for retries" in str(error)
        # In multiples of its own work: on a slow machine, too, only the reserve makes it late.
        soon, reserved_s = replace(long, deadline_s=5 * long_s), 12 * long_s
        error = rejected(submitted(engine, soon, RequestContext(reserved_s=reserved_s))[1])
        assert f"{reserved_s:.1f} s are reserved for retries" in str(error)
        assert "cannot be done within" in str(error)
        engine.close(drain=False)
    limits = LimitsConfig(max_deadline_s=0.01)
    with Engine(demo_pipeline, DEMO, EngineConfig(limits=limits)) as engine:
        measured(engine)
        batch = params(num_inference_steps=100, priority="batch")
        submitted(engine, batch)
        error = rejected(submitted(engine, batch)[1])
        assert "about 0.0 s of work are queued" not in str(error)
        engine.close(drain=False)


def test_time_on_the_way_counts_for_the_deadline(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, ROOM) as engine:
        long_s = measured(engine)
        long = params(num_inference_steps=100, deadline_s=2 * long_s)
        rejected(submitted(engine, long, RequestContext(sent_at=time.time() - 1.8 * long_s))[1])
        _, event, inbox = submitted(
            engine, params(num_inference_steps=1), RequestContext(sent_at=time.time() - 3.0)
        )
        while not isinstance(event, Completed):
            event = inbox.get(timeout=120)
        assert event.result.timings.queue_s < 3  # timings do not use the clocks of two machines


def test_low_priority_work_yields_at_the_next_step_and_fills_idle_time(
    demo_pipeline: LoadedPipeline,
) -> None:
    """It does not slow the others either."""
    with Engine(demo_pipeline, DEMO, ROOM) as engine:
        measured(engine)
        batch = params(num_inference_steps=100, width=96, height=96, priority="batch")
        held = [hold(engine, replace(batch, seed=seed)) for seed in range(3)]
        assert held[0][2].wait(60)

        def step_of(number: int) -> int:
            steps = [e.step for e in held[number][1] if isinstance(e, Progress)]
            return max(steps, default=0)

        before = sum(step_of(number) for number in range(3))
        engine.generate(params(num_inference_steps=20))
        # At most the call that was running for each of them, and the one after it.
        assert sum(step_of(number) for number in range(3)) <= before + 6
        wait_until(lambda: sum(step_of(number) for number in range(3)) > before + 6)
        assert engine.replica_load().batch_backlog_s > 0
        assert engine.replica_load().backlog_s == 0
        engine.close(drain=False)


def test_low_priority_work_takes_half_of_the_slots(demo_pipeline: LoadedPipeline) -> None:
    with Engine(demo_pipeline, DEMO, EngineConfig(max_running=4)) as engine:
        for seed in range(6):
            submitted(engine, params(num_inference_steps=100, seed=seed, priority="batch"))
        wait_until(lambda: engine.stats().running == 2)
        engine.generate(params(num_inference_steps=5))
        assert engine.stats().waiting == 4
        engine.close(drain=False)
