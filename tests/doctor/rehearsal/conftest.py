"""A fake cluster with an operator, and a fixture that rehearses in it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.doctor.fake_cluster import Object
from tests.doctor.rehearsal.fake_operator import OperatorApi
from tests.doctor.rehearsal.rehearsals import Run


@pytest.fixture
def api() -> Iterator[OperatorApi]:
    with OperatorApi().serving() as api:
        assert isinstance(api, OperatorApi)
        yield api


@pytest.fixture
def run(api: OperatorApi, tmp_path: Path) -> Callable[..., Run]:
    def start(*overlay: Object, at: Callable[[float], None] = lambda _: None) -> Run:
        return Run(api, tmp_path, *overlay, at=at)

    return start
