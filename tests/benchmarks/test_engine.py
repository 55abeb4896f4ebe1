"""Tests of the calculations behind the benchmarks' results."""

from collections import Counter
from contextlib import ExitStack

import pytest
from torch import nn
from torch.utils.hooks import RemovableHandle

from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import psnr_db
from serve_app.protocol.events import Completed
from tests.benchmarks.aims import aims
from tests.benchmarks.efficiency import REPEATS, BareCalls, busy_s
from tests.benchmarks.engine import Row
from tests.benchmarks.saturation import Saturated
from tests.benchmarks.stopwatch import Stopwatch
from tests.benchmarks.ways import Arrival, Kind, with_engine
from tests.conftest import DEMO, FIFO
from tests.fakes.clock import ManualClock

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("reused_starts")]

KIND = Kind(32, 32, steps=3, share=1.0)


def test_overlapping_spans_count_once() -> None:
    assert busy_s([]) == 0
    assert busy_s([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == pytest.approx(4.0)


def test_a_layer_does_not_count_the_layers_that_it_calls() -> None:
    clock = ManualClock()

    class Engine:
        def call(self, work_s: float) -> None:
            clock.advance(1.0)
            self.part(work_s)
            self.part(work_s)
            clock.advance(2.0)

        def part(self, work_s: float) -> None:
            clock.advance(work_s)
            if work_s == 7.0:
                raise RuntimeError("it failed")

    stopwatch = Stopwatch(clock.now)
    places = [(Engine, "call", "call"), (Engine, "part", lambda _, work_s: f"part of {work_s:g} s")]
    with stopwatch.watching(places):
        Engine().call(5.0)
        with pytest.raises(RuntimeError):
            Engine().call(7.0)
    Engine().call(5.0)  # not watched
    assert stopwatch.spent_ms() == {"part of 5 s": 10_000, "call": 4_000, "part of 7 s": 7_000}


def test_the_timed_calls_are_those_that_ran(demo_pipeline: LoadedPipeline) -> None:
    """The denoiser is timed with the rows of the merged calls, and all other networks too."""
    seen: Counter[tuple[str, int]] = Counter()

    def count(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(
            lambda _, args: seen.update([(name, args[0].shape[0])])
        )

    networks = demo_pipeline.stock.components
    firsts = {
        "unet": networks["unet"].conv_in,
        "vae": networks["vae"].decoder.mid_block.resnets[0],
        "vae's end": networks["vae"].decoder.conv_out,
    }
    calls = BareCalls(demo_pipeline)
    with ExitStack() as hooks, Engine(demo_pipeline, DEMO, FIFO) as engine:
        with calls.noted():
            for name, module in firsts.items():
                hooks.callback(count(name, module).remove)
            streams = [engine.stream(KIND.params(seed)) for seed in range(5)]
            assert all(isinstance(list(events)[-1], Completed) for events in streams)
        engine.close()
        ran = seen.copy()
        seen.clear()
        bare_s = calls.seconds()
    assert bare_s.keys() == {"text_encoder", "unet", "vae"}
    assert min(bare_s.values()) > 0
    assert ("unet", 10) in ran  # five requests with guidance
    assert seen == dict.fromkeys(ran, 1 + REPEATS)
    noted: Counter[str] = Counter()
    for (name, _), times in calls.counts.items():
        noted[name] += times
    assert noted["unet"] == sum(count for (name, _), count in ran.items() if name == "unet")
    assert noted["vae.decoder.conv_out"] == 5


def test_a_trace_is_served_and_reported(demo_pipeline: LoadedPipeline) -> None:
    serve = with_engine(demo_pipeline, DEMO, FIFO, keep_images=True)
    served = serve([Arrival(0.0, KIND, seed) for seed in range(3)])
    assert served.report is not None
    assert served.report.efficiency > 0
    assert sorted(served.images) == [0, 1, 2]
    for seed, image in served.images.items():
        assert psnr_db(demo_pipeline.generate(KIND.params(seed))[0], image) > 60


def row(way: str, slo: float, load: float = 0.9) -> Row:
    return Row(load, way, 1.0, 1.0, 1.0, 1.0, 1.0, slo, None)


def test_each_target_is_met_missed_or_not_measured() -> None:
    rows = [
        row("one at a time", 0.3),
        row("whole batches", 0.48),
        row("engine, fifo", 0.5),
        row("engine, on_time", 0.87),
        row("engine, on_time", 0.1, load=1.1),
    ]
    saturated = [
        Saturated(512, 512, 20, 16, 1.0, 2.6, 0.5, 40.0, 0.01),
        Saturated(512, 512, 4, 16, 1.0, 2.6, 0.8, 40.0, 0.02),
    ]
    verdicts = {aim.text: aim.verdict for aim in aims("sd15", rows, saturated)}
    assert verdicts == {
        "sd15 at 512x512, 16 waiting: 2.5 times one at a time": "met: 2.6",
        "sdxl at 512x512, 16 waiting: 1.7 times one at a time": "not measured",
        "sd15 at 1024x1024, 16 waiting: 1.1 times one at a time": "not measured",
        "sdxl at 1024x1024, 16 waiting: 1.1 times one at a time": "not measured",
        "sdxl at 1024x1024, 25 steps: efficiency 0.95": "not measured",
        "sd15 at 512x512, 4 steps: efficiency 0.85": "missed: 0.8",
        "at 0.9 of capacity, 85% in time": "met: 0.87",
        "at 0.9 of capacity, 40 points above both stock ways": "missed: 0.39",
    }
    assert {aim.verdict for aim in aims("demo", [], [])} == {"not measured"}
