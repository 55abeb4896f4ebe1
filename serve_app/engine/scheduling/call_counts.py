"""How many denoiser calls a request makes, learned where some are answered by extrapolation."""

from collections.abc import Hashable

_WEIGHT = 0.1
"""Weight of a new request in a smoothed share."""

_MOST_KINDS = 64
"""Limit of known kinds of requests: clients choose them."""

Kind = tuple[Hashable, int]
"""Everything that the share depends on, the number of steps last."""


class CallCounts:
    """Predictor of the share of its denoiser calls that a request makes.

    The number of steps decides most: the shorter a step, the straighter the outputs.
    """

    def __init__(self) -> None:
        self._shares: dict[Kind, float] = {}

    def observe(self, kind: Kind, made: int, answered: int) -> None:
        """Add the calls of a finished request: those made, and those answered without one."""
        if not made:
            return
        share = made / (made + answered)
        known = self._shares.pop(kind, share)
        if len(self._shares) >= _MOST_KINDS:
            del self._shares[next(iter(self._shares))]  # the one that was seen longest ago
        self._shares[kind] = (1 - _WEIGHT) * known + _WEIGHT * share

    def share(self, kind: Kind) -> float:
        """Return the share that a request will make: 1 while nothing is known of such requests.

        A share of fewer steps is no less than that of more, so it may stand in for it.
        """
        if kind in self._shares:
            return self._shares[kind]
        of, steps = kind
        fewer = [known for known in self._shares if known[0] == of and known[1] < steps]
        return self._shares[max(fewer, key=lambda known: known[1])] if fewer else 1.0
