"""The measurement of a start: which batches of a size are worth their longer calls."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from serve_app.config.models import EngineConfig
from serve_app.engine.startup import measurement
from tests.engine.startup.starts import start, tiny

SIDE = 32


class Device:
    """A device on which a call for n requests takes ``shared + (1 - shared) * n`` seconds."""

    def __init__(self, shared: float, slow: tuple[int, ...] = ()) -> None:
        self._shared = shared
        self._slow = list(slow)
        self._rows = 0
        self.sizes: list[int] = []

    def note(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._rows = args[0].shape[0]

    def median_seconds(self, run: Callable[[], object], _: int) -> float:
        run()
        size = self._rows // 2  # a request has two rows, with guidance
        self.sizes.append(size)
        seconds = self._shared + (1 - self._shared) * size
        if size in self._slow:  # once
            self._slow.remove(size)
            return 2 * seconds
        return seconds


def measured_cap(device: Device, monkeypatch: pytest.MonkeyPatch) -> int:
    """Start an engine on this device; return the batch cap."""
    monkeypatch.setattr(measurement, "median_seconds", device.median_seconds)
    pipeline = tiny()
    handle = pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(device.note)
    try:
        started = start(pipeline, EngineConfig(max_batch_size=16, warmup_sizes_px=((SIDE, SIDE),)))
    finally:
        handle.remove()
    return started.cost.caps[SIDE, SIDE]


def test_batches_are_measured_while_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_cap(Device(shared=0.9), monkeypatch) == 16
    flat = Device(shared=0.0)
    assert measured_cap(flat, monkeypatch) == 1
    assert set(flat.sizes) == {1, 2}


@pytest.mark.parametrize("size", [2, 4, 16])
def test_a_slow_moment_of_the_machine_does_not_cap_the_batches(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured_cap(Device(shared=0.9, slow=(size,)), monkeypatch) == 16
