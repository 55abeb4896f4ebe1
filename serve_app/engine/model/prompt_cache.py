"""What text encoders said of prompts, so that a repeated one costs nothing."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)


class NotCacheable(Exception):
    """Two such arguments cannot be told to be equal."""


def content_key(value: Any) -> Hashable:
    """Equal for equal arguments. Raises `NotCacheable` for any but plain values and lists."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, list | tuple):
        return (type(value), *map(content_key, value))
    if isinstance(value, dict):
        return (dict, *((key, content_key(item)) for key, item in value.items()))
    raise NotCacheable


class PromptCache:
    """Least recently used first out, within ``max_bytes`` of tensors. For one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.held_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: Hashable, encode: Callable[[], Any]) -> Any:
        """What ``encode`` returned for an equal key, or returns now."""
        if (entry := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
            self.hits += 1
            return entry[0]
        self.misses += 1
        value = encode()
        size = _tensor_bytes(value)
        # Another request may have encoded the same meanwhile: encoding gives way to others.
        if size is not None and size <= self._max_bytes and key not in self._entries:
            self._entries[key] = (value, size)
            self.held_bytes += size
            while self.held_bytes > self._max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.held_bytes -= freed
        return value


def _tensor_bytes(value: Any) -> int | None:
    """None if it holds more than can be counted."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        sizes = [_tensor_bytes(item) for item in value]
        return None if None in sizes else sum(size or 0 for size in sizes)
    return 0 if isinstance(value, _PLAIN) else None
