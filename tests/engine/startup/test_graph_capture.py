"""The capture of CUDA graphs at start-up, with a fake of the capture itself."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup import graph_capture
from serve_app.engine.startup.certification import certify
from serve_app.engine.startup.comparison import largest_difference
from serve_app.engine.startup.graph_capture import GraphCapture
from serve_app.protocol.events import Completed
from serve_app.protocol.params import GenerationParams
from tests.fakes.cuda_graphs import FakeCapture, with_graphs
from tests.lora import ADAPTER_FILE, save_adapter
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX

SIZE = WIDTH_PX, HEIGHT_PX
ROUNDING = 1e-5


@pytest.fixture
def every_graph_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every graph: a fake one takes as long as the call."""
    monkeypatch.setattr(graph_capture, "WORTHWHILE", float("inf"))


def _loaded(family: str) -> tuple[LoadedPipeline, ModelConfig]:
    model = ModelConfig(
        id=family, device="cpu", default_size_px=SIZE, call_kwargs=CALL_KWARGS.get(family, {})
    )
    return LoadedPipeline(FAMILIES[family](), model), model


class _Start:
    """A pipeline whose graphs are captured without an engine."""

    def __init__(self, family: str = "stable-diffusion") -> None:
        self.pipeline, _ = _loaded(family)
        self.graphs, self.capture = with_graphs(self.pipeline)
        self.rendezvous = Rendezvous(self.pipeline.sites)

    def run(self, most: int, padded: bool = False) -> int:
        """Capture, and return the number of graphs."""
        specs = certify(self.pipeline, self.rendezvous).specs
        with torch.no_grad():
            capture = GraphCapture(self.pipeline, self.graphs, self.rendezvous, specs, padded)
            capture.capture(SIZE, most)
        return len(self.graphs)


@pytest.fixture
def start() -> Iterator[_Start]:
    start = _Start()
    yield start
    start.rendezvous.close()


@pytest.mark.usefixtures("every_batch_pays", "every_graph_gains")
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_generate_the_images_that_calls_generate(family: str) -> None:
    plain, _ = _loaded(family)
    requests = [
        GenerationParams(
            "a cat sees a dog",  # as many tokens as at the start: some families do not pad
            seed,
            width=WIDTH_PX,
            height=HEIGHT_PX,
            num_inference_steps=3 + seed,
            guidance_scale=(1.0, 4.0)[seed % 2],
        )
        for seed in range(4)
    ]
    requests.append(replace(requests[0], width=HEIGHT_PX, height=WIDTH_PX))  # not captured
    separate = [plain.generate(request)[0] for request in requests]
    pipeline, model = _loaded(family)
    graphs, capture = with_graphs(pipeline)
    config = EngineConfig(scheduling="fifo", max_batch_size=3, warmup_sizes_px=(SIZE,))
    with Engine(pipeline, model, config) as engine:
        known, captures, replays = len(graphs), capture.captures, capture.replays
        assert known >= 3
        streams = [engine.stream(request) for request in requests]
        ends = [list(stream)[-1] for stream in streams]
        assert engine.stats().mean_batch_size > 1
    # Batches of requests with and without guidance may have numbers of rows that no graph has.
    assert capture.replays - replays >= 3
    assert (len(graphs), capture.captures) == (known, captures)  # none while requests wait
    together = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert largest_difference(separate, together) < ROUNDING


@pytest.mark.usefixtures("every_graph_gains")
def test_requests_with_adapters_run_without_graphs(tmp_path: Path) -> None:
    save_adapter(tmp_path, seed=1)
    model = ModelConfig(id="demo", device="cpu", loras={"ink": str(tmp_path / ADAPTER_FILE)})
    request = GenerationParams("a red circle", 1, width=64, height=64, num_inference_steps=3)
    requests = [request, replace(request, lora=(("ink", 1.0),)), request]
    plain = LoadedPipeline.load(model)
    separate = [plain.generate(request)[0] for request in requests]
    pipeline = LoadedPipeline.load(model)
    _, capture = with_graphs(pipeline)
    config = EngineConfig(max_batch_size=2, warmup_sizes_px=((64, 64),))
    together, replays = [], []
    with Engine(pipeline, model, config) as engine:
        for request in requests:
            before = capture.replays
            together.append(engine.generate(request).pixels)
            replays.append(capture.replays - before)
    assert replays[0] >= 3
    assert replays == [replays[0], 0, replays[0]]
    assert largest_difference(separate, together) < ROUNDING


@pytest.mark.usefixtures("every_graph_gains")
def test_each_shape_has_one_graph(start: _Start) -> None:
    """Four requests without guidance have as many rows as two with it. Compiled, none is three."""
    assert start.run(4, padded=True) == 5  # 2, 4 and 8 rows, then 1 and 2: one timestep, or two
    assert start.capture.captures == 5


def test_a_graph_that_is_not_faster_is_not_kept(
    start: _Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_capture, "WORTHWHILE", 0.0)
    assert start.run(3) == 0
    assert start.capture.captures == 2  # of one request, with guidance and without


@pytest.mark.usefixtures("every_graph_gains")
def test_larger_batches_are_left_out_when_memory_runs_out(
    start: _Start, caplog: pytest.LogCaptureFixture
) -> None:
    start.capture.fail_at[2] = torch.OutOfMemoryError("no memory")
    assert start.run(3) == 4  # of one with guidance, and of three without
    assert "no CUDA graphs for 2 requests and more: OutOfMemoryError: no memory" in caplog.text


@pytest.mark.usefixtures("every_graph_gains")
def test_a_graph_of_calls_that_depend_on_more_than_their_inputs_is_dropped(
    start: _Start, caplog: pytest.LogCaptureFixture
) -> None:
    start.capture.is_stale = True
    assert start.run(2) == 0
    assert "the output depends on more than the inputs" in caplog.text


@pytest.mark.usefixtures("every_graph_gains")
def test_a_graph_with_another_output_is_dropped(
    start: _Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = start.capture.__call__

    def spoilt(run: object) -> object:
        return capture(lambda: [tensor + 1 for tensor in run()])  # type: ignore[operator]

    monkeypatch.setattr(start.graphs, "_capture", spoilt)
    assert start.run(1) == 0
    assert "the output depends on more than the inputs" in caplog.text


@pytest.mark.usefixtures("every_graph_gains")
def test_the_log_has_the_number_of_graphs(start: _Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        start.run(1)
    assert "2 CUDA graphs for images of 64x32, in 0 MiB" in caplog.text


def test_the_fake_writes_to_the_memory_of_the_capture() -> None:
    value = torch.tensor([1.0])
    replay, output = FakeCapture()(lambda: [value * 2])
    place = output[0].data_ptr()
    value.fill_(5.0)
    replay()
    assert output[0].tolist() == [10.0]
    assert output[0].data_ptr() == place
