"""The page of AUTOMATIC1111's API has the fields and settings that the code has."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app.gateway.sdapi.fields import (
    ACCELERATION,
    CHECKPOINT,
    REJECTED,
    SETTINGS,
    ImageToImageRequest,
)
from tests.docs.pages import rendered
from tests.gateway.sdapi.gateway import SMALL, answered, warnings_of

pytestmark = pytest.mark.anyio


def _documented() -> Iterator[tuple[str, str, list[Any]]]:
    """Yield the name, the result and the accepted values of each row of the page's tables."""
    for line in rendered("guide/sdapi").splitlines():
        if found := re.match(r"\| `(\w+)` \| (honoured|400) \|([^|]*)\|", line):
            yield (
                found[1],
                found[2],
                [json.loads(value) for value in re.findall("`(.+?)`", found[3])],
            )


async def test_the_tables_of_the_page_have_what_the_code_has(client: httpx.AsyncClient) -> None:
    found: dict[str, set[str]] = {"honoured": set(), "400": set()}
    for name, result, accepted in _documented():
        found[result].add(name)
        for value in accepted:
            fields = {"override_settings": {name: value}} if name in SETTINGS else {name: value}
            assert warnings_of(await answered(client, **SMALL, **fields)) == ""
        if result == "400":
            rule = {**REJECTED, **SETTINGS}[name]
            assert set(rule.off) <= {*map(_frozen, accepted)}
    assert found["400"] == REJECTED.keys() | SETTINGS.keys()
    assert found["honoured"] == ImageToImageRequest.model_fields.keys() | {
        CHECKPOINT,
        ACCELERATION,
    }


def _frozen(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value
