import gc
import random
from typing import Any

import pytest
import torch

from serve_app.config.models import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import InvalidRequest
from serve_app.metrics.export import report
from serve_app.metrics.labels import SIZES
from serve_app.metrics.registry import ENGINE
from serve_app.protocol.events import Completed, Event, Progress
from serve_app.protocol.load import ReplicaLoad
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("reused_starts")


def sample(name: str, model: str, **labels: str) -> float | None:
    return ENGINE.get_sample_value(f"diffusion_serve_{name}", {"model": model, **labels})


def metered(pipeline: LoadedPipeline, model: str, **config: Any) -> Engine:
    """An engine whose series no other test counts in."""
    return Engine(pipeline, DEMO, EngineConfig(**config), metrics=EngineMetrics(model))


def params(**options: Any) -> GenerationParams:
    asked: dict[str, Any] = {"seed": 1, "num_inference_steps": 4} | options
    return GenerationParams("a red circle on blue", **asked)


def test_images_steps_and_calls_are_counted(demo_pipeline: LoadedPipeline) -> None:
    with metered(demo_pipeline, "counted") as engine:
        engine.generate(params())
        engine.generate(params(width=96, height=64))
        denoiser_calls = engine.stats().denoiser_calls
    assert sample("images_total", "counted", size="64") == 1
    assert sample("images_total", "counted", size="128") == 1
    assert sample("pixels_total", "counted") == 64 * 64 + 96 * 64
    assert sample("steps_total", "counted", size="64") == 4
    assert sample("step_seconds_count", "counted", size="128") == 4
    assert sample("batch_size_count", "counted") == denoiser_calls == 8
    assert sample("batch_size_sum", "counted") == engine.stats().steps
    spent = {
        activity: sample("device_seconds_total", "counted", activity=activity)
        for activity in ("denoise", "encode", "decode")
    }
    assert all(seconds is not None and seconds > 0 for seconds in spent.values()), spent
    assert sample("deadlines_total", "counted", outcome="met", set_by="server") is not None
    kept = [
        sample("deadlines_total", "counted", outcome=outcome, set_by="server") or 0
        for outcome in ("met", "missed")
    ]
    assert sum(kept) == 2


def test_a_shared_call_counts_once_and_each_of_its_steps(
    demo_pipeline: LoadedPipeline,
) -> None:
    with metered(demo_pipeline, "shared", scheduling="fifo") as engine:
        streams = [engine.stream(params(seed=seed, num_inference_steps=20)) for seed in range(4)]
        for stream in streams:
            list(stream)
    calls, steps = sample("batch_size_count", "shared"), sample("steps_total", "shared", size="64")
    assert steps == 80
    assert calls is not None
    assert calls < 60


def test_deadlines_of_clients_and_of_the_server_are_counted_apart(
    demo_pipeline: LoadedPipeline,
) -> None:
    with metered(demo_pipeline, "deadlines") as engine:
        engine.generate(params(deadline_s=60.0))
        engine.generate(params(priority="batch"))
    assert sample("deadlines_total", "deadlines", outcome="met", set_by="client") == 1
    assert sample("deadlines_total", "deadlines", outcome="met", set_by="server") == 0
    assert sample("deadlines_total", "deadlines", outcome="missed", set_by="server") == 0


def test_request_states_are_read_from_the_engine(demo_pipeline: LoadedPipeline) -> None:
    def states() -> dict[str, float | None]:
        return {
            state: sample("engine_requests", "standing", state=state)
            for state in ("queued", "parked", "running")
        }

    with metered(demo_pipeline, "standing", max_running=1, max_backlog_s=1e6) as engine:
        engine.generate(params())  # teaches the costs
        wait_until(lambda: states() == {"queued": 0, "parked": 0, "running": 0})
        assert sample("backlog_seconds", "standing", priority="interactive") == 0
        seen: list[Event] = []
        numbers = [
            engine.submit(params(seed=seed, num_inference_steps=100), seen.append)
            for seed in (1, 2, 3)
        ]
        wait_until(lambda: states() == {"queued": 2, "parked": 0, "running": 1})
        assert (sample("backlog_seconds", "standing", priority="interactive") or 0) > 0
        for number in numbers:
            engine.cancel(number)
        wait_until(lambda: states() == {"queued": 0, "parked": 0, "running": 0})
        assert sample("cancellation_seconds_count", "standing") == 3
        assert (sample("cancellation_seconds_sum", "standing") or 9) < 3.0
        assert any(isinstance(event, Progress) for event in seen)


def test_rejections_are_counted_by_reason(
    demo_pipeline: LoadedPipeline,
) -> None:
    with metered(demo_pipeline, "refused") as engine:
        engine.generate(params())
        with pytest.raises(InvalidRequest):
            engine.generate(params(num_inference_steps=100, deadline_s=0.001))
    assert sample("rejections_total", "refused", reason="deadline") == 1
    assert sample("rejections_total", "refused", reason="backlog") == 0


def test_running_out_of_memory_is_counted(demo_pipeline: LoadedPipeline) -> None:
    def only_one_fits(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 2:  # with guidance, two rows a request
            raise torch.OutOfMemoryError("CUDA out of memory")

    with metered(demo_pipeline, "out of memory", scheduling="fifo") as engine:
        assert sample("out_of_memory_total", "out of memory") == 0
        handle = demo_pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(only_one_fits)
        try:
            for stream in [engine.stream(params(seed=seed)) for seed in range(4)]:
                assert isinstance(list(stream)[-1], Completed)
        finally:
            handle.remove()
    assert (sample("out_of_memory_total", "out of memory") or 0) > 0


def test_metrics_do_not_keep_a_closed_engine_alive() -> None:
    class Engineered:
        def replica_load(self) -> ReplicaLoad:
            return ReplicaLoad(backlog_s=1.5)

        def count(self, state: str) -> int:
            return 1

        def stuck(self) -> float:
            return 0.5

    metrics, engine = EngineMetrics("gone"), Engineered()
    metrics.watch(engine.replica_load, engine.count, engine.stuck, None)
    assert sample("stuck_ratio", "gone") == 0.5
    assert sample("backlog_seconds", "gone", priority="interactive") == 1.5
    del engine
    gc.collect()
    value = sample("backlog_seconds", "gone", priority="interactive")
    assert value != value  # not a number


def test_pauses_count_when_they_are_long() -> None:
    metrics = EngineMetrics("paused")
    metrics.paused(0.01)
    metrics.paused(0.4)
    assert sample("engine_stall_seconds_count", "paused") == 1


def test_odd_sizes_make_no_series() -> None:
    metrics, draw = EngineMetrics("fuzzed"), random.Random(1)

    def series() -> int:
        samples = [one for family in report("engine", "a").families for one in family.samples]
        ours = [one for one in samples if one.labels.get("model") == "fuzzed"]
        assert {one.labels["size"] for one in ours if "size" in one.labels} <= set(SIZES)
        return len(ours)

    for most in (40, 400, 4_000):
        for _ in range(500):
            size = draw.randrange(1, most), draw.randrange(1, most)
            metrics.called(size, draw.randrange(1, 64), draw.random())
            metrics.generated(size)
    few = series()
    for _ in range(3_000):
        size = draw.randrange(1, 5_000), draw.randrange(1, 5_000)
        metrics.called(size, draw.randrange(1, 64), draw.random())
        metrics.generated(size)
    assert series() == few < 300
