"""Fixtures of the deployments."""

import pytest

from serve_app.deployments import backend as deployment
from serve_app.deployments import replicas
from tests.fakes.serve_handle import Growing


@pytest.fixture(autouse=True)
def _replicas_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "STOPPING_S", 0.001)


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Growing:
    monkeypatch.setattr(deployment, "REFRESH_EVERY_S", 0.001)
    monkeypatch.setattr(replicas, "REFRESH_EVERY_S", 0.0)
    return Growing()
