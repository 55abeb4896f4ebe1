"""A gateway with AUTOMATIC1111's API, and a client of it."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.gateway.sdapi.gateway import Backend, client_of


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
async def client(backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend) as session:
        yield session
