"""The header ``Range``, as in RFC 9110."""

import re

_ONE_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*", re.IGNORECASE)


class RangeBeyondEnd(Exception):
    """The range has none of the file's bytes."""


def requested_range(header: str, size: int) -> range | None:
    """Return the bytes that a header asks for, of a file of ``size`` bytes.

    ``None`` stands for the whole file: without a header, or for one that a server may ignore, which
    is not understood or asks for several parts.

    Raises:
        RangeBeyondEnd: if the file has none of them.
    """
    found = _ONE_RANGE.fullmatch(header)
    if found is None:
        return None
    first, last = found.groups()
    if first:
        if last and int(last) < int(first):
            return None
        part = range(int(first), min(int(last) + 1, size) if last else size)
    elif last:
        part = range(max(0, size - int(last)), size)
    else:
        return None
    if not part:
        raise RangeBeyondEnd
    return part
