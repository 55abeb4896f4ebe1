"""Jobs that run in greenlets and meet at the ``forward`` of modules.

Knows nothing of queues, clocks or batches. The engine starts a `Job` for each request; when the
job's pipeline calls a watched module, the job parks and the engine gets control back, with the
call in its hand. The engine answers it, alone or together with others, and the job goes on.

Greenlets belong to the thread that started them: one thread does all of this.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A place to meet at: the ``forward`` of a module."""

    module: nn.Module
    network: nn.Module
    """What the module is a part of, or the module itself."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the network's weights."""
        weights = next(self.network.parameters(), None)
        return None if weights is None else weights.dtype

    def cast(self, dtype: torch.dtype | None) -> None:
        """Bring the network's weights to ``dtype``, if they are not."""
        if dtype is not None and self.dtype != dtype:
            nn.Module.to(self.network, dtype)  # diffusers' own warns each time


@dataclass(frozen=True)
class Call:
    """One call of a watched module, waiting for its answer."""

    site: str
    """Where: the module's name in the pipeline, such as ``unet``."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype | None = None
    """Of the network's weights at the time of the call."""


class Job(Generic[T]):
    """A function that runs until it calls a watched module, again and again, until it returns.

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
        self._resume(self._greenlet.switch)

    def resume(self, output: Any) -> None:
        """Answer the call and run up to the next one, or to the end."""
        self._resume(lambda: self._greenlet.switch(output))

    def fail(self, error: Exception) -> None:
        """Raise ``error`` from the call, inside the job."""
        self._resume(lambda: self._greenlet.throw(error))

    def kill(self) -> None:
        """End the job where it stands; its ``finally`` blocks run. Does nothing to a dead one."""
        while not self.finished:  # a ``finally`` block may call the network once more
            self._resume(lambda: self._greenlet.throw(GreenletExit))
        self.call = None

    def _resume(self, switch: Callable[[], Any]) -> None:
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
    """Replaces ``forward`` of the modules at the given sites; `close` puts it back.

    A call from outside a job goes straight through, so the modules stay usable.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = sites
        self._dtypes = {name: site.dtype for name, site in sites.items()}
        # What someone had put there before, as offloading does.
        self._own = {name: vars(site.module).get("forward") for name, site in sites.items()}
        self._forwards = {name: site.module.forward for name, site in sites.items()}
        for name, site in sites.items():
            site.module.forward = self._meeting(name)

    def _meeting(self, name: str) -> Callable[..., Any]:
        forward, site = self._forwards[name], self._sites[name]

        @functools.wraps(forward)  # pipelines look at the signature
        def meet(*args: Any, **kwargs: Any) -> Any:
            current = getcurrent()
            if isinstance(current, _JobGreenlet):
                assert current.parent is not None
                call = Call(name, args, kwargs, site.dtype)
                site.cast(self._dtypes[name])
                return current.parent.switch(call)
            return forward(*args, **kwargs)

        return meet

    def forward(self, call: Call) -> Any:
        """Run the real module, with its network as it was when the call was made.

        Some pipelines widen the VAE before they decode and narrow it at their end. While one is
        parked in between, others find the VAE as it was loaded.
        """
        self._sites[call.site].cast(call.dtype)
        return self._forwards[call.site](*call.args, **call.kwargs)

    def signature_of(self, site: str) -> Callable[..., Any]:
        """The real ``forward`` of the module, to look at and not to call."""
        return self._forwards[site]

    def close(self) -> None:
        for name, site in self._sites.items():
            vars(site.module).pop("forward", None)
            if (own := self._own[name]) is not None:
                site.module.forward = own
