"""Axes as plain JSON, for the profile of a start."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.batching.axis import Axis, Branch, FirstRow, Mask, PerRow, Rows, Shared


class NotWritable(Exception):
    """The axis has no form in JSON."""


_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Tensor, NoneType, bool, int, float, str, list, tuple),
        *(torch.dtype, torch.device, torch.Size),
    )
}
"""Types of shared values that JSON may name. A fixed list: a file must never import code."""

_MASKS = {str(dtype): dtype for dtype in (torch.bool, torch.int32, torch.int64, torch.float32)}
"""Dtypes of masks that JSON may name."""


def to_json(axis: Axis) -> Any:
    """Return ``axis`` as JSON. Raises `NotWritable`."""
    match axis:
        case FirstRow(per_image, None):
            return {"first_row": per_image}
        case FirstRow():
            raise NotWritable("positions of tokens depend on the prompt")
        case Rows(per_image, None):
            return {"rows": per_image}
        case Rows(per_image, prompt_dim):
            return {"prompts": [per_image, prompt_dim]}
        case Mask(dtype):
            if str(dtype) not in _MASKS:
                raise NotWritable(f"a mask is of {dtype}")
            return {"mask": str(dtype)}
        case PerRow():
            return {"per_row": True}
        case Shared(kind):
            if _KINDS.get(kind.__name__) is not kind:
                raise NotWritable(f"an argument is a {kind.__module__}.{kind.__qualname__}")
            return {"shared": kind.__name__}
        case Branch(children):
            if not all(type(key) in (str, int) for key, _ in children):
                raise NotWritable("the keys of an argument are neither names nor numbers")
            return {"branch": [[key, to_json(child)] for key, child in children]}


def from_json(value: Any) -> Axis:
    """Read the result of `to_json`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: ``value`` is not such a result.
    """
    [(name, content)] = value.items()
    match name:
        case "rows" | "first_row":
            if not (isinstance(content, int) and content > 0):
                raise ValueError(f"{content!r} rows")
            return Rows(content) if name == "rows" else FirstRow(content)
        case "prompts":
            per_image, prompt_dim = content
            if not all(isinstance(number, int) for number in content):
                raise ValueError(f"{content!r} prompts")
            return Rows(per_image, prompt_dim)
        case "mask":
            return Mask(_MASKS[content])
        case "per_row":
            return PerRow()
        case "shared":
            return Shared(_KINDS[content])
        case "branch":
            return Branch(tuple((key, from_json(child)) for key, child in content))
        case _:
            raise ValueError(f"{name!r} is no axis")
