"""Jobs that run in greenlets and meet at a network's ``forward``.

Knows nothing of queues, clocks or batches. The engine starts a `Job` for each request; when the
job's pipeline calls a watched network, the job parks and the engine gets control back, with the
call in its hand. The engine answers it, alone or together with others, and the job goes on.

Greenlets belong to the thread that started them: one thread does all of this.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One call of a watched network, waiting for its answer."""

    site: str
    """Which network: its component name in the pipeline, such as ``unet``."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Job(Generic[T]):
    """A function that runs until it calls a watched network, again and again, until it returns.

    Attributes:
        call: what the job waits for; ``None`` before it starts and after it ends.
        result: what the function returned; valid once `finished` without an `error`.
        error: what the function raised.
    """

    call: Call | None
    result: T
    error: BaseException | None

    def __init__(self, run: Callable[[], T]) -> None:
        self.call = None
        self.error = None
        self._greenlet = _JobGreenlet(run)

    @property
    def finished(self) -> bool:
        return bool(self._greenlet.dead)

    def start(self) -> None:
        """Run up to the first call, or to the end."""
        self._go_on(self._greenlet.switch)

    def resume(self, output: Any) -> None:
        """Answer the call and run up to the next one, or to the end."""
        self._go_on(lambda: self._greenlet.switch(output))

    def fail(self, error: Exception) -> None:
        """Raise ``error`` from the call, inside the job."""
        self._go_on(lambda: self._greenlet.throw(error))

    def kill(self) -> None:
        """End the job where it stands; its ``finally`` blocks run. Does nothing to a dead one."""
        while not self.finished:  # a ``finally`` block may call the network once more
            self._go_on(lambda: self._greenlet.throw(GreenletExit))
        self.call = None

    def _go_on(self, switch: Callable[[], Any]) -> None:
        self.call = None
        # The engine's own greenlet is where a job parks to and where it ends.
        self._greenlet.parent = getcurrent()
        try:
            value = switch()
        except BaseException as error:
            self.error = error
            return
        if self.finished:
            self.result = value
        else:
            self.call = value


class _JobGreenlet(greenlet):
    """Marks the greenlets that may park."""


class Rendezvous:
    """Replaces ``forward`` of the given networks; `close` puts it back.

    A call from outside a job goes straight through, so the networks stay usable.
    """

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self._networks = networks
        self._forwards = {site: network.forward for site, network in networks.items()}
        for site, network in networks.items():
            network.forward = self._meeting(site)

    def _meeting(self, site: str) -> Callable[..., Any]:
        forward = self._forwards[site]

        @functools.wraps(forward)  # pipelines look at the signature
        def meet(*args: Any, **kwargs: Any) -> Any:
            current = getcurrent()
            if isinstance(current, _JobGreenlet):
                assert current.parent is not None
                return current.parent.switch(Call(site, args, kwargs))
            return forward(*args, **kwargs)

        return meet

    def forward(self, call: Call) -> Any:
        """Run the real network."""
        return self._forwards[call.site](*call.args, **call.kwargs)

    def signature_of(self, site: str) -> Callable[..., Any]:
        """The real ``forward`` of the network, to look at and not to call."""
        return self._forwards[site]

    def close(self) -> None:
        for network in self._networks.values():
            vars(network).pop("forward", None)
