"""The fake device waits where CUDA does, and gives the values of the CPU."""

import pytest
import torch

from tests.fakes.async_device import NAME, async_device
from tests.fakes.known_waits import KNOWN


@pytest.mark.parametrize("name", KNOWN)
def test_it_notes_what_waits(name: str) -> None:
    waits, operation = KNOWN[name]
    with async_device() as device, torch.no_grad():
        operation(torch.device(NAME))
    assert bool(device.waits) == waits, device.waits


def test_devices_are_not_mixed() -> None:
    with async_device(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=NAME) + torch.ones(2)


def test_values_are_those_of_the_cpu() -> None:
    with async_device():
        table = torch.arange(6.0, device=NAME).reshape(2, 3)
        table[0, 1] = 7
        table += 1
        assert table.cpu().tolist() == [[1, 8, 3], [4, 5, 6]]
        assert torch.tensor([3, 4], device=NAME).cpu().tolist() == [3, 4]


def test_only_waiting_lets_the_time_of_the_device_pass() -> None:
    with async_device() as device:
        device.launch_s = device.compute_s = 0.0
        device.launch(2.0)
        device.launch(1.0)
        assert device.now() == 0.0
        start, end = device.new_event(), device.new_event()
        start.record()
        device.launch(0.5)
        end.record()
        assert not start.query()
        start.synchronize()
        assert device.now() == 3.0
        torch.ones(1, device=NAME).item()
        assert device.now() == 3.5
        assert start.elapsed_time(end) == 500.0
