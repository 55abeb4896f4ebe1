"""Which parked calls run next. Pure Python: no torch, no clock, no engine.

The engine asks once for every denoiser call. A policy is anything with `choose`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Candidate:
    """A parked call as a policy sees it."""

    request: int
    """Number of the request; lower came earlier."""
    key: Hashable
    """Candidates with equal keys may run together; ``None`` runs alone."""
    parked_at: int
    """The engine's tick at which it parked."""


class Policy(Protocol):
    """Chooses what runs in the next denoiser call."""

    def choose(self, parked: Sequence[Candidate], max_batch_size: int) -> list[Candidate]:
        """At least one and at most ``max_batch_size`` of ``parked``, which may run together."""
        ...


class Fifo:
    """The call that has waited longest leads; those that fit with it follow in order.

    Every shape gets its turn, so requests of different sizes advance side by side.
    """

    def choose(self, parked: Sequence[Candidate], max_batch_size: int) -> list[Candidate]:
        waiting = sorted(parked, key=lambda candidate: (candidate.parked_at, candidate.request))
        leader = waiting[0]
        if leader.key is None:
            return [leader]
        return [candidate for candidate in waiting if candidate.key == leader.key][:max_batch_size]
