"""The LoRA adapters of one replica, as it reports them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoraInfo:
    """One adapter that requests may name."""

    name: str
    loaded: bool
    """True if it is in the memory of the replica."""
    on_demand: bool
    """True if a request loads it; False if the start did."""


@dataclass(frozen=True)
class LoraList:
    """The adapters of one replica."""

    loras: tuple[LoraInfo, ...]


@dataclass(frozen=True)
class LoraStatus:
    """One adapter on all replicas of a model."""

    name: str
    on_demand: bool
    replicas: int
    """Number of replicas that have it in memory."""


def status_of(lists: Sequence[LoraList]) -> tuple[LoraStatus, ...]:
    """Return the adapters of all replicas: those of the start first, then the others by name."""
    on_demand: dict[str, bool] = {}
    replicas: Counter[str] = Counter()
    for one in (lora for each in lists for lora in each.loras):
        on_demand.setdefault(one.name, one.on_demand)
        replicas[one.name] += one.loaded
    names = sorted(on_demand, key=lambda name: (on_demand[name], on_demand[name] and name))
    return tuple(LoraStatus(name, on_demand[name], replicas[name]) for name in names)
