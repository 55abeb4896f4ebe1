"""Fixtures for all tests. Ray is told to keep to itself before anything imports it."""

import os
from collections.abc import Iterator

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.pipeline import LoadedPipeline

settings.register_profile("serve", deadline=None)  # a busy machine is no failure
settings.load_profile("serve")

DEMO = ModelConfig(id="demo", device="cpu", default_steps=20)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Where ``async`` tests run."""
    return "asyncio"


@pytest.fixture(scope="session")
def demo_pipeline() -> LoadedPipeline:
    """The shipped model, without an engine: what running alone paints."""
    return LoadedPipeline.load(DEMO)


@pytest.fixture
def demo_engine(demo_pipeline: LoadedPipeline) -> Iterator[Engine]:
    """A fresh engine on the shipped model; ends with the test."""
    engine = Engine(demo_pipeline, DEMO, EngineConfig())
    yield engine
    engine.close(drain=False)
