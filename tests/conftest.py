"""Fixtures for all tests, and the environment of Ray, which must be set before its import."""

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
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling import cost

settings.register_profile("serve", deadline=None)  # a busy machine is not a failure
settings.load_profile("serve")

# A shell in whose background this runs makes it ignore Ctrl-C; processes of tests inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes of pytest-xdist that each use all cores slow each other down: on two cores, tests of the
# engine took 2.7 times as long.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

MEASURED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # set in a process of pytest-xdist
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
    """Return a function that prints a measured result at the end of the run."""
    return pytestconfig.stash[MEASURED].append


FIFO = EngineConfig(scheduling="fifo", max_backlog_s=1e6)
"""Full batches without deadlines or rejections, so that no outcome depends on a clock."""

DEMO = ModelConfig(id="demo", device="cpu", default_steps=20)


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    """Switch gradients on again: pipeline calls that overlap can leave them off in their thread."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run ``async`` tests on asyncio."""
    return "asyncio"


@pytest.fixture(scope="module")
def every_batch_pays() -> Iterator[None]:
    """Let every batch size pay: on a busy machine, two in a batch can cost more than two calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "WORTHWHILE_GAIN", 0.0)
        yield


@pytest.fixture
def log_stays_ours() -> Iterator[None]:
    """Restore this package's logger after a test that attaches it to Serve's."""
    ours = logging.getLogger("serve_app")
    level, propagate, handlers = ours.level, ours.propagate, ours.handlers
    yield
    ours.setLevel(level)
    ours.propagate, ours.handlers = propagate, handlers


@pytest.fixture(scope="session")
def demo_pipeline() -> LoadedPipeline:
    """The shipped model without an engine: the reference for requests that run alone."""
    return LoadedPipeline.load(DEMO)


@pytest.fixture(scope="session")
def start_profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file in which the first engine of this run keeps its certification for the next ones."""
    return str(tmp_path_factory.mktemp("profile") / "demo.json")


@pytest.fixture
def demo_engine(demo_pipeline: LoadedPipeline, start_profile: str) -> Iterator[Engine]:
    """A new engine on the shipped model, closed at the end of the test."""
    engine = Engine(demo_pipeline, DEMO, EngineConfig(profile_path=start_profile))
    yield engine
    engine.close(drain=False)
