"""Operations of which it is known whether the host waits for a GPU in them."""

from collections.abc import Callable
from typing import Any

import torch

KNOWN: dict[str, tuple[bool, Callable[[torch.device], Any]]] = {
    "item": (True, lambda on: torch.zeros((), device=on).item()),
    "bool": (True, lambda on: bool(torch.zeros((), device=on) > 0)),
    "int": (True, lambda on: int(torch.zeros((), device=on))),
    "equal": (True, lambda on: torch.equal(torch.zeros(2, device=on), torch.zeros(2, device=on))),
    "nonzero": (True, lambda on: torch.ones(2, device=on).nonzero()),
    "unique": (True, lambda on: torch.zeros(2, device=on).unique()),
    "mask": (True, lambda on: torch.ones(2, device=on)[torch.ones(2, device=on) > 0]),
    "masked_select": (
        True,
        lambda on: torch.ones(2, device=on).masked_select(torch.ones(2, device=on) > 0),
    ),
    "table of the CPU, index of the device": (
        True,
        lambda on: torch.arange(5.0)[torch.full((), 2, device=on)],
    ),
    "table of the device, index of the CPU": (
        True,
        lambda on: torch.zeros(5, device=on)[torch.tensor([2])],
    ),
    "table of the device, list": (True, lambda on: torch.zeros(5, device=on)[[2]]),
    "table of the device, scalar of the CPU": (
        False,
        lambda on: torch.zeros(5, device=on)[torch.tensor(2)],
    ),
    "table and index of the device": (
        False,
        lambda on: torch.zeros(5, device=on)[torch.zeros(2, dtype=torch.long, device=on)],
    ),
    "tensor": (True, lambda on: torch.tensor([1.0, 2.0], device=on)),
    "scalar tensor": (True, lambda on: torch.tensor(1.0, device=on)),
    "factories": (
        False,
        lambda on: [
            torch.zeros(2, device=on),
            torch.arange(3, device=on),
            torch.full((), 2.0, device=on),
        ],
    ),
    "to the device": (True, lambda on: torch.ones(2).to(on)),
    "pinned to the device": (True, lambda on: torch.ones(2).pin_memory().to(on)),
    "pinned to the device, without blocking": (
        False,
        lambda on: torch.ones(2).pin_memory().to(on, non_blocking=True),
    ),
    "copy_ of pinned, without blocking": (
        False,
        lambda on: torch.empty(2, device=on).copy_(
            torch.empty(2, pin_memory=True), non_blocking=True
        ),
    ),
    "to the CPU": (True, lambda on: torch.ones(2, device=on).cpu()),
    "to the CPU, without blocking": (
        False,
        lambda on: torch.ones(2, device=on).to("cpu", non_blocking=True),
    ),
    "arithmetic with a scalar of the CPU": (
        False,
        lambda on: torch.ones(2, device=on) * torch.tensor(2.0),
    ),
    "clamp": (False, lambda on: torch.ones(2, device=on).clamp(min=torch.zeros((), device=on))),
    "solve": (
        True,
        lambda on: torch.linalg.solve(torch.eye(2, device=on), torch.ones(2, device=on)),
    ),
    "solve_ex": (
        False,
        lambda on: torch.linalg.solve_ex(torch.eye(2, device=on), torch.ones(2, device=on)),
    ),
    "iteration": (False, lambda on: list(torch.ones(2, device=on))),
}
"""What waits for a device, and what does not: ``(waits, operation)`` by name."""
