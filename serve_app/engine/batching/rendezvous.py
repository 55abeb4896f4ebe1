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

from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from serve_app.engine.batching.transfers import on_one_device

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One call of a watched module, waiting for its output."""

    site: str
    """Name of the module in the pipeline, such as ``unet``."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Callable[..., Any] | None = None
    """Real ``forward`` of the copy that was called; ``None`` for the module of the site itself."""


Answer = Callable[[Call, Callable[[Call], Any]], Any]
"""Returns the output of a call. Its second argument parks the job until the engine has made it."""


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

    def __init__(self, run: Callable[[], T], answer: Answer | None = None) -> None:
        """``answer`` gets each call in place of the engine, and may pass it on."""
        self.call = None
        self.error = None
        self._greenlet = _JobGreenlet(run)
        self._greenlet.answer = answer

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

    answer: Answer | None


class Parking:
    """Replacement of one module's ``forward``: parks the job that calls it."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        forward: Callable[..., Any],
        begins: Callable[[str], None],
        copied: bool = False,
    ) -> None:
        functools.update_wrapper(self, forward)  # pipelines inspect the signature
        self._name = name
        self._module = module
        self._forward = forward
        self._begins = begins
        self._copied = copied

    def of_copy(self, module: nn.Module) -> "Parking":
        """Return the replacement for a copy of the module, which parks at the same site.

        Returns this one if ``forward`` was replaced before, because nobody knows how to copy that.
        """
        if getattr(self._forward, "__self__", None) is not self._module:
            return self
        forward = MethodType(type(module).forward, module)
        return Parking(self._name, self._module, forward, self._begins, copied=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if not isinstance(current, _JobGreenlet):
            args, kwargs = on_one_device((args, kwargs))
            self._begins(self._name)
            return self._forward(*args, **kwargs)
        assert current.parent is not None
        own = self._forward if self._copied else None
        call = Call(self._name, args, kwargs, own)
        if current.answer is not None:
            return current.answer(call, current.parent.switch)
        return current.parent.switch(call)


class Rendezvous:
    """Replacement of ``forward`` at the given sites, until `close` restores it.

    A site is a module at whose ``forward`` jobs park. A call from outside a job runs at once, so
    the modules stay usable.
    """

    on_call: Callable[[str], None] | None = None
    """Receives the site of each call before it runs."""

    def __init__(self, sites: Mapping[str, nn.Module]) -> None:
        self._sites = sites
        # A forward that was replaced before, for example by offloading.
        self._own = {name: vars(module).get("forward") for name, module in sites.items()}
        self._forwards = {name: module.forward for name, module in sites.items()}
        for name, module in sites.items():
            module.forward = Parking(name, module, self._forwards[name], self._begins)

    def _begins(self, site: str) -> None:
        if self.on_call is not None:
            self.on_call(site)

    def forward(self, call: Call) -> Any:
        """Run the real module."""
        self._begins(call.site)
        forward = call.forward or self._forwards[call.site]
        args, kwargs = on_one_device((call.args, call.kwargs))
        return forward(*args, **kwargs)

    def signature_of(self, site: str) -> Callable[..., Any]:
        """Return the real ``forward`` of the module, for inspection only."""
        return self._forwards[site]

    def close(self) -> None:
        """Restore the ``forward`` of every module."""
        for name, module in self._sites.items():
            vars(module).pop("forward", None)
            if (own := self._own[name]) is not None:
                module.forward = own
