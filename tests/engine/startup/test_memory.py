"""No batch is tried that the memory of smaller ones rules out."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from serve_app.config.models import EngineConfig
from serve_app.engine import device
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup import certification, warmup
from serve_app.engine.startup.memory import MARGIN, MemoryTrend, largest_fitting
from tests.engine.startup.starts import start, tiny

T = TypeVar("T")
GIB = 2**30


@pytest.mark.parametrize(
    ("peaks", "available", "largest"),
    [
        ({}, 10 * GIB, None),
        ({1: GIB}, 10 * GIB, None),  # one batch has no growth
        ({1: 2 * GIB, 2: 3 * GIB}, 10 * GIB, 8),  # 1 GiB, and 1 for each request, within 9
        ({1: 2 * GIB, 2: 3 * GIB, 4: 6 * GIB}, 10 * GIB, 6),  # the steepest growth counts
        ({1: 2 * GIB, 2: 3 * GIB}, GIB, 2),  # both did fit
        ({1: GIB, 2: GIB}, 10 * GIB, None),  # a constant need limits nothing
    ],
)
def test_the_largest_batch_follows_from_the_growth(
    peaks: dict[int, int], available: int, largest: int | None
) -> None:
    assert largest_fitting(peaks, available) == largest


@given(
    fixed=st.integers(0, 10 * GIB),
    each=st.integers(1, GIB),
    available=st.integers(0, 100 * GIB),
    measured=st.integers(2, 8),
)
def test_a_predicted_batch_fits_and_leaves_the_margin(
    fixed: int, each: int, available: int, measured: int
) -> None:
    peaks = {batch: fixed + batch * each for batch in range(1, measured + 1)}
    largest = largest_fitting(peaks, available)
    assert largest is not None
    if largest > measured:
        assert fixed + largest * each <= available * (1 - MARGIN) + 1
    if largest >= measured:
        assert fixed + (largest + 1) * each > available * (1 - MARGIN) - 1 or largest == measured


class Card:
    """A card of a certain size, which counts the rows of the denoiser's calls."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.tried: list[int] = []
        self.peak = 0

    def available(self) -> int:
        return self.rows * GIB

    def measure(self, call: Callable[[], T]) -> tuple[T, int]:
        self.peak = 0
        result = call()
        return result, self.peak

    def note(self, _: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].shape[0]
        self.tried.append(rows)
        self.peak = max(self.peak, rows * GIB)
        if rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def pipeline() -> LoadedPipeline:
    return tiny()


@pytest.mark.slow
@pytest.mark.usefixtures("every_batch_pays")
def test_a_start_on_a_small_card_never_runs_out_of_memory(
    pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(rows=14)  # seven requests with guidance; with the margin, six
    for module in (certification, warmup):
        monkeypatch.setattr(module, "memory_meter", lambda _: card)
    handle = pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(card.note)
    config = EngineConfig(max_batch_size=16, warmup_sizes_px=((32, 32),))
    try:
        started = start(pipeline, config)
    finally:
        handle.remove()
    assert max(card.tried) == 12
    assert started.certificate.batch_size == 6
    assert started.cost.caps == {(32, 32): 6}


def test_without_a_meter_every_batch_is_tried() -> None:
    trend = MemoryTrend(None)
    assert trend.run(1, lambda: "output") == "output"
    assert trend.fitting(1_000) == 1_000
    assert device.memory_meter(torch.device("cpu")) is None
