"""Fixtures for tests of starts."""

import logging
import shutil
from pathlib import Path

import pytest

from serve_app.engine.engine import Engine
from tests.engine.startup.starts import TINY, config, tiny


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, every_batch_pays: None) -> Path:
    """Profile of a start of the tiny pipeline; tests must not change it."""
    path = tmp_path_factory.mktemp("kept") / "profile.json"
    with Engine(tiny(), TINY, config(path)):
        pass
    return path


@pytest.fixture
def profile(kept: Path, tmp_path: Path) -> Path:
    """Copy of the profile for one test."""
    return Path(shutil.copy(kept, tmp_path / "profile.json"))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Log of the test, from level INFO."""
    caplog.set_level(logging.INFO)
    return caplog
