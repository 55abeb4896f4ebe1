"""Files in JSON bodies: in base64, or in a data URL."""

import base64
import re

from serve_app.errors import InvalidRequest

_DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)

_MOST_SHOWN = 40
"""Characters of a URL that an error repeats."""


def check_data_url(url: str, param: str) -> None:
    """Check that a URL begins as a data URL does. Others are not fetched: they may lead anywhere.

    Raises:
        InvalidRequest: it is no data URL with base64.
    """
    if _DATA_URL.match(url) is None:
        raise InvalidRequest(
            f"{param} is {url[:_MOST_SHOWN]!r}; it must be a data URL with base64, as in "
            "data:image/png;base64,iVBORw0…. This server fetches no other URLs.",
            param,
        )


def file_of_url(url: str, param: str) -> bytes:
    """Decode the file in a data URL.

    Raises:
        InvalidRequest: it is no data URL with base64.
    """
    check_data_url(url, param)
    return file_of(url, param)


def file_of(text: str, param: str) -> bytes:
    """Decode a file in base64, or in a data URL.

    Raises:
        InvalidRequest: it is neither.
    """
    start = _DATA_URL.match(text)
    encoded = text[start.end() :] if start else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise InvalidRequest(
            f"{param} must be an image in base64, or a data URL with base64.", param
        ) from None
