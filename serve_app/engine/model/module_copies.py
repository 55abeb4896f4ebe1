"""Copies of a network for single requests: modules of their own, with the same weights.

Some decoders keep frames in their layers from one call to the next. In a copy they keep those of
one request only. Some families convert the VAE to float32 while it decodes, as SDXL in float16
does. A copy then uses converted weights, and no other request sees that. Copies that are converted
alike share these weights, which exist while one of them uses them.
"""

import functools
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from serve_app.engine.batching.rendezvous import Parking

Kind = tuple[torch.dtype, torch.device]
"""Dtype and device of a tensor: what a conversion changes."""


class ModuleCopies:
    """Copies of one network. Used by the engine's thread only."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._converted: _Conversions = WeakValueDictionary()

    def new(self) -> nn.Module:
        """Return a copy. Watched modules of it park at the sites of the original."""
        copies: dict[nn.Module, nn.Module] = {}  # a module may be at two places

        def of(module: nn.Module) -> nn.Module:
            if module not in copies:
                # As `copy.copy` does it, in a third of the time: there are hundreds for each
                # request.
                copied = copies[module] = object.__new__(_copied_class(cast(Any, type(module))))
                attributes = vars(copied)
                attributes |= vars(module)
                attributes.pop("_compiled_call_impl", None)  # it calls the original
                attributes["_modules"] = {
                    name: None if child is None else of(child)
                    for name, child in module._modules.items()
                }
                attributes["_original"] = module
                attributes["_conversions"] = self._converted
                if isinstance(forward := attributes.get("forward"), Parking):
                    attributes["forward"] = forward.of_copy(copied)
            return copies[module]

        return of(self._network)

    def release(self, copied: nn.Module) -> None:
        """Give a copy the weights of the original again, so that converted ones can go.

        Its request may have ended early, and a copy lives until the next garbage collection.
        """
        if self._converted:
            for module in copied.modules():
                cast(_Copied, module)._use(None)


class _ConvertedWeights:
    """Parameters and buffers of one module, converted."""

    def __init__(self, module: nn.Module, kinds: tuple[Kind, ...]) -> None:
        each = iter(kinds)

        def converted(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            dtype, device = next(each)
            return tensor.detach().to(device, dtype)

        self.parameters = {
            name: None if (new := converted(old)) is None else nn.Parameter(new, new.requires_grad)
            for name, old in module._parameters.items()
        }
        self.buffers = {name: converted(old) for name, old in module._buffers.items()}


_Conversions = WeakValueDictionary[tuple[nn.Module, tuple[Kind, ...]], _ConvertedWeights]


class _Copied(nn.Module):
    """The part of a copied module that converts it: it exchanges the weights, not their content."""

    _original: nn.Module
    _conversions: _Conversions
    _weights: _ConvertedWeights | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Copied":
        """Convert this module and those inside it: ``to``, ``float``, ``half`` and so on."""

        @functools.cache
        def target(kind: Kind) -> Kind:
            probe = fn(torch.empty(0, dtype=kind[0], device=kind[1]))
            return probe.dtype, probe.device

        for module in self.modules() if recurse else (self,):
            cast(_Copied, module)._convert(target)
        return self

    def _convert(self, target: Callable[[Kind], Kind]) -> None:
        wanted = tuple(map(target, _kinds(self)))
        if wanted == _kinds(self._original):
            self._use(None)
            return
        key = self._original, wanted
        weights = self._conversions.get(key)
        if weights is None:
            weights = self._conversions[key] = _ConvertedWeights(self._original, wanted)
        self._use(weights)

    def _use(self, weights: _ConvertedWeights | None) -> None:
        """Take converted weights, or with ``None`` those of the original."""
        attributes: dict[str, Any] = vars(self)
        attributes["_weights"] = weights  # keeps them in `_conversions`
        original = self._original
        attributes["_parameters"] = original._parameters if weights is None else weights.parameters
        attributes["_buffers"] = original._buffers if weights is None else weights.buffers


@functools.cache
def _copied_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class whose instances differ from those of ``kind`` in how they are converted."""
    return type(kind.__name__, (_Copied, kind), {"__module__": kind.__module__})


def _kinds(module: nn.Module) -> tuple[Kind, ...]:
    """Return the kinds of a module's own parameters and buffers."""
    own = (*module._parameters.values(), *module._buffers.values())
    return tuple((tensor.dtype, tensor.device) for tensor in own if tensor is not None)
