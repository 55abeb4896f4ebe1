"""Fixtures for all tests. Ray is told to keep to itself before anything imports it."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.scheduling import cost

settings.register_profile("serve", deadline=None)  # a busy machine is no failure
settings.load_profile("serve")

# A shell that runs this in the background has it ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes of pytest-xdist that each use all cores wait for each other: on two cores, tests of the
# engine took 2.7 times as long.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

MEASURED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # in a process of pytest-xdist
    if output is not None:
        output["measured"] = session.config.stash[MEASURED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[MEASURED] += getattr(node, "workeroutput", {}).get("measured", [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if lines := config.stash[MEASURED]:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Shows a measured figure at the end of the run, passed tests included."""
    return pytestconfig.stash[MEASURED].append


FIFO = EngineConfig(scheduling="fifo", max_backlog_s=1e6)
"""Full batches whatever becomes of deadlines, nobody refused: what happens is up to no clock."""

DEMO = ModelConfig(id="demo", device="cpu", default_steps=20)


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    """Pipelines whose calls end in another order than they began leave them off in their thread."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Where ``async`` tests run."""
    return "asyncio"


@pytest.fixture(scope="module")
def every_batch_pays() -> Iterator[None]:
    """Caps of batches are up to no clock: on a busy machine, two may cost more than one and one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "WORTHWHILE_GAIN", 0.0)
        yield


@pytest.fixture
def log_stays_ours() -> Iterator[None]:
    """For what hands the log lines of this package to Serve's logger."""
    ours = logging.getLogger("serve_app")
    level, propagate, handlers = ours.level, ours.propagate, ours.handlers
    yield
    ours.setLevel(level)
    ours.propagate, ours.handlers = propagate, handlers


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
