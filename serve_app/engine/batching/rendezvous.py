"""Jobs that run in greenlets and park at the ``forward`` of modules.

The engine starts a `Job` for each request. When the job's pipeline calls a watched module, the job
parks, and the engine gets control back together with the `Call`. The engine runs the call, by
itself or merged with others, and resumes the job with the output. This module knows no queues,
clocks or batches.

Greenlets belong to the thread that started them, so one thread does all of this.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """A module at whose ``forward`` jobs park."""

    module: nn.Module
    network: nn.Module
    """Network that contains the module, or the module itself."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the network's weights; ``None`` without weights."""
        weights = next(self.network.parameters(), None)
        return None if weights is None else weights.dtype

    def cast(self, dtype: torch.dtype | None) -> None:
        """Convert the network's weights to ``dtype``, unless they have it."""
        if dtype is not None and self.dtype != dtype:
            nn.Module.to(self.network, dtype)  # diffusers' own method warns each time


@dataclass(frozen=True)
class Call:
    """One call of a watched module, waiting for its output."""

    site: str
    """Name of the module in the pipeline, such as ``unet``."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype | None = None
    """Dtype of the network's weights at the time of the call."""
    forward: Callable[..., Any] | None = None
    """Real ``forward`` of the copy that was called; ``None`` for the module of the site itself."""


class Job(Generic[T]):
    """A function that runs until it calls a watched module, again and again, until it returns.

    Attributes:
        call: call at which the job is parked; ``None`` before it starts and after it ends.
        result: return value of the function; valid once `finished` without an `error`.
        error: exception that the function raised.
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
        """Return ``output`` from the call, and run up to the next call, or to the end."""
        self._resume(lambda: self._greenlet.switch(output))

    def fail(self, error: Exception) -> None:
        """Raise ``error`` from the call, inside the job."""
        self._resume(lambda: self._greenlet.throw(error))

    def kill(self) -> None:
        """End a parked job; its ``finally`` blocks run. Does nothing to a finished job."""
        while not self.finished:  # a ``finally`` block may call the network once more
            self._resume(lambda: self._greenlet.throw(GreenletExit))
        self.call = None

    def _resume(self, switch: Callable[[], Any]) -> None:
        self.call = None
        # A job parks by a switch to its parent, and ends there: the engine's own greenlet.
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
    """Type of the greenlets that may park."""


class Parking:
    """Replacement of one module's ``forward``: parks the job that calls it."""

    def __init__(
        self,
        name: str,
        site: Site,
        forward: Callable[..., Any],
        dtype: torch.dtype | None,
        copied: bool = False,
    ) -> None:
        functools.update_wrapper(self, forward)  # pipelines inspect the signature
        self._name = name
        self._site = site
        self._forward = forward
        self._dtype = dtype
        self._copied = copied

    def of_copy(self, module: nn.Module) -> "Parking":
        """Return the replacement for a copy of the module, which parks at the same site.

        Returns this one if ``forward`` was replaced before, because nobody knows how to copy that.
        """
        if getattr(self._forward, "__self__", None) is not self._site.module:
            return self
        forward = MethodType(type(module).forward, module)
        return Parking(self._name, self._site, forward, self._dtype, copied=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if not isinstance(current, _JobGreenlet):
            return self._forward(*args, **kwargs)
        assert current.parent is not None
        own = self._forward if self._copied else None
        call = Call(self._name, args, kwargs, self._site.dtype, own)
        self._site.cast(self._dtype)
        return current.parent.switch(call)


class Rendezvous:
    """Replacement of ``forward`` at the given sites, until `close` restores it.

    A call from outside a job runs at once, so the modules stay usable.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = sites
        # A forward that was replaced before, for example by offloading.
        self._own = {name: vars(site.module).get("forward") for name, site in sites.items()}
        self._forwards = {name: site.module.forward for name, site in sites.items()}
        for name, site in sites.items():
            site.module.forward = Parking(name, site, self._forwards[name], site.dtype)

    def forward(self, call: Call) -> Any:
        """Run the real module, with its network in the dtype of the time of the call.

        Some pipelines convert the VAE to float32 before they decode, and back at their end. While
        such a job is parked, other jobs see the VAE as it was loaded.
        """
        self._sites[call.site].cast(call.dtype)
        forward = call.forward or self._forwards[call.site]
        return forward(*call.args, **call.kwargs)

    def signature_of(self, site: str) -> Callable[..., Any]:
        """Return the real ``forward`` of the module, for inspection only."""
        return self._forwards[site]

    def close(self) -> None:
        """Restore the ``forward`` of every module."""
        for name, site in self._sites.items():
            vars(site.module).pop("forward", None)
            if (own := self._own[name]) is not None:
                site.module.forward = own
