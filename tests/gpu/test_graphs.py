"""CUDA graphs on a GPU: real captures, and what happens if one fails."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.graphs import CudaCapture, Graphs
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import psnr_db
from serve_app.engine.timer import median_seconds
from tests.benchmarks.speed import record_calls
from tests.full_size import sd15
from tests.gpu.test_engine import APART_DB, four_requests, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = torch.device("cuda")
SIDE = 512
REPEATS = 5


def test_an_engine_with_graphs_generates_the_images_of_one_without(
    report: Callable[[str], None],
) -> None:
    model = ModelConfig.model_validate(
        {
            "id": "sd15",
            "device": "cuda",
            "default_size_px": (SIDE, SIDE),
            "speed": {"cuda_graphs": True},
        }
    )
    pipeline = LoadedPipeline(sd15(DEVICE, torch.bfloat16), model)
    graphs = pipeline.graphs
    assert graphs is not None
    requests = four_requests(SIDE)
    with graphs.mode("off"):
        separate = [pipeline.generate(params)[0].cpu() for params in requests]
        args, kwargs = record_calls(pipeline, requests[0])[1]
    config = EngineConfig(scheduling="fifo", max_batch_size=4, warmup_sizes_px=((SIDE, SIDE),))
    with Engine(pipeline, model, config) as engine:
        [once] = generate(engine, requests[:1])
        together = generate(engine, requests)
    worst = min(psnr_db(*pair) for pair in zip(separate, together, strict=True))

    def run() -> object:
        return pipeline.denoisers["unet"](*args, **kwargs)

    with torch.no_grad():
        with graphs.mode("off"):
            call_s = median_seconds(run, REPEATS)
        replay_s = median_seconds(run, REPEATS)
    report(
        f"{torch.cuda.get_device_name()}, SD 1.5 at {SIDE}x{SIDE}, one image: a call takes "
        f"{1000 * call_s:.1f} ms, with {len(graphs)} graphs {1000 * replay_s:.1f} ms; PSNR alone "
        f"{psnr_db(separate[0], once):.1f} dB, of four together {worst:.1f} dB"
    )
    others = max(psnr_db(separate[0], other) for other in separate[1:])
    assert psnr_db(separate[0], once) > others + APART_DB
    assert worst > others + APART_DB


class _Network(nn.Module):
    """A network with a table of the last length that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.table = torch.empty(0)
        self.waits = False
        self.extra_bytes = 0

    def forward(self, sample: Tensor) -> Tensor:
        if len(self.table) != len(sample):
            self.table = torch.arange(len(sample), device=sample.device).float().unsqueeze(1)
        hidden = self.layer(sample) + self.table
        if self.waits:
            hidden = hidden * hidden.max().item()
        if self.extra_bytes:
            hidden = hidden + torch.empty(self.extra_bytes, dtype=torch.uint8, device=DEVICE)[0]
        return hidden.relu()


@pytest.fixture
def network() -> _Network:
    torch.manual_seed(0)
    return _Network().to(DEVICE)


@pytest.fixture
def graphs(network: _Network) -> Graphs:
    return Graphs({"unet": network}, DEVICE, tuple, CudaCapture())


def _capture(graphs: Graphs, network: _Network, rows: int) -> None:
    with graphs.mode("capture"), torch.no_grad():
        network(torch.ones(rows, 64, device=DEVICE))


def _is_right(graphs: Graphs, network: _Network, rows: int) -> bool:
    """Return whether a graph gave the output of the network."""
    sample = torch.randn(rows, 64, device=DEVICE)
    with torch.no_grad():
        output = network(sample)
        is_replayed = graphs.replayed is not None
        with graphs.mode("off"):
            expected = network(sample)
    torch.testing.assert_close(output, expected)
    return is_replayed


def test_graphs_of_one_pool_repeat_their_calls_in_any_order(
    network: _Network, graphs: Graphs
) -> None:
    for rows in (4, 8, 2):
        _capture(graphs, network, rows)
    for rows in (2, 8, 4, 4, 2, 8):
        assert _is_right(graphs, network, rows)
    with torch.no_grad():
        kept = network(torch.ones(4, 64, device=DEVICE))
    copy = kept.clone()
    for rows in (2, 4, 8):
        assert _is_right(graphs, network, rows)
    assert torch.equal(kept, copy)


def test_a_graph_reads_a_table_that_the_network_has_dropped(
    network: _Network, graphs: Graphs
) -> None:
    _capture(graphs, network, 4)
    with torch.no_grad():
        network(torch.ones(5, 64, device=DEVICE))  # not captured; drops the table for four
    gc.collect()
    torch.cuda.empty_cache()
    spoilt = [torch.full((4, 1), float("nan"), device=DEVICE) for _ in range(1000)]
    assert _is_right(graphs, network, 4)
    del spoilt


def test_a_call_that_waits_for_the_gpu_is_not_captured(network: _Network, graphs: Graphs) -> None:
    network.waits = True
    with pytest.raises(RuntimeError, match="synchroniz"):
        _capture(graphs, network, 4)
    assert not _is_right(graphs, network, 4)
    network.waits = False
    _capture(graphs, network, 4)
    assert _is_right(graphs, network, 4)


def test_a_lack_of_memory_leaves_the_gpu_usable(network: _Network, graphs: Graphs) -> None:
    network.extra_bytes = 2**50
    with pytest.raises(torch.OutOfMemoryError):
        _capture(graphs, network, 4)
    network.extra_bytes = 0
    _capture(graphs, network, 4)
    assert _is_right(graphs, network, 4)
