"""Cache of encoded prompts: a repeated prompt, with the same images, skips the encoders."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from serve_app.engine.batching.axis import map_tensors

_PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)


class NotCacheable(Exception):
    """The arguments cannot be compared with those of another call."""


def content_key(value: Any) -> Hashable:
    """Return a key that is equal for equal arguments.

    Raises:
        NotCacheable: ``value`` contains more than plain values, images, lists and dicts.
    """
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, Image):  # some text encoders read the images of an edit
        digest = hashlib.blake2b(value.tobytes(), digest_size=16).digest()
        return (Image, value.mode, value.size, digest)
    if isinstance(value, list | tuple):
        return (type(value), *map(content_key, value))
    if isinstance(value, dict):
        return (dict, *((key, content_key(item)) for key, item in value.items()))
    raise NotCacheable


class PromptCache:
    """LRU cache that holds at most ``max_bytes`` of tensors; for one thread.

    Attributes:
        held_bytes: size of the tensors in the cache.
        hits: number of results that came from the cache.
        misses: number of results that were encoded.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.held_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: Hashable, encode: Callable[[], Any]) -> Any:
        """Return a copy of the cached result of ``key``, or call ``encode`` and cache its result.

        A pipeline may write into what it gets.
        """
        if (entry := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
            self.hits += 1
            return map_tensors(Tensor.clone, entry[0])
        self.misses += 1
        value = encode()
        size = _tensor_bytes(value)
        # Another request may have cached the same key: encoding yields to other requests.
        if size is not None and size <= self._max_bytes and key not in self._entries:
            self._entries[key] = (map_tensors(Tensor.clone, value), size)
            self.held_bytes += size
            while self.held_bytes > self._max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.held_bytes -= freed
        return value


def _tensor_bytes(value: Any) -> int | None:
    """Return the size of all tensors; ``None`` if ``value`` contains an unknown type."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        sizes = [_tensor_bytes(item) for item in value]
        return None if None in sizes else sum(size or 0 for size in sizes)
    return 0 if isinstance(value, _PLAIN) else None
