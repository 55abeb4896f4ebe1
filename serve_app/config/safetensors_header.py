"""Headers of safetensors files: the tensors that a file holds, read without their numbers.

A file is the length of its header in 8 bytes, the header in JSON, and the numbers without gaps.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from serve_app.errors import ModelLoadError

_HEADER_LIMIT = 100 * 2**20
"""The format's own limit for its header."""

LFS_POINTER = b"version https://git-lfs"
"""The start of the file that Git LFS leaves in place of a large one that it has not fetched."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor: the format's name of its type, its shape and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file, by name.

    Raises:
        ModelLoadError: if the file is missing, cannot be read, or is not what its name says.
    """
    start = b""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
            opened.seek(8)
            [length] = struct.unpack("<Q", start[:8])
            if length > _HEADER_LIMIT:
                raise ValueError("its header has no end")
            text = opened.read(length)
        if len(text) < length:
            raise ValueError("it is cut off in its header")
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, tensor in header.items():
            first, last = tensor["data_offsets"]
            end = max(end, last)
            tensors[name] = TensorHeader(tensor["dtype"], tuple(tensor["shape"]), last - first)
        if not tensors:
            raise ValueError("it lists no tensors")
        size, expected = file.stat().st_size, 8 + length + end
        if size < expected:
            raise ValueError(f"it is cut off after {size} of {expected} bytes")
        if size > expected:
            raise ValueError(f"it has {size} bytes, and its header describes {expected}")
    except OSError as error:
        raise ModelLoadError(
            f"{file} cannot be read: {error.strerror}. Check that it exists, its owner and mode."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelLoadError(
            f"{file} has no weights, it is {_describe(start, error)}. Fetch it again: `git lfs "
            "pull`, or `hf download`."
        ) from None
    return tensors


def _describe(start: bytes, error: Exception) -> str:
    """Say what a file is instead, judged by its first bytes."""
    if not start:
        return "empty"
    if start.startswith(LFS_POINTER):
        return "a Git LFS pointer"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "a pickle"
    if start.lstrip().startswith(b"<"):
        return "a web page"
    return f"damaged ({error})"
