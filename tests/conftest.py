"""Fixtures for all tests, and the environment of Ray, which must be set before its import."""

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DASHBOARD_STARTUP_TIMEOUT_S"] = "300"  # a busy machine is not a failure
# Ray starts replicas with niceness 15: they would wait for the tests that run at the same time.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, it is how Ray spells it
os.environ["HF_HUB_OFFLINE"] = "1"
# The profiles of servers that tests start lie there, not in the cache of the user who runs them.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="diffusion-serve-tests-")

import pytest
import torch
from hypothesis import settings

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling import cost
from serve_app.engine.startup import warmup

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

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

LONG_FIRST = ("serve", "slow")
"""Markers in the order in which files with them run. Files without any fill the last minutes."""

ONE_SERVER = {
    f"tests/e2e/test_{name}.py"
    for name in (
        "doctor",
        "metrics",
        "openai_app",
        "page",
        "page_edits",
        "page_errors",
        "router",
        "serve",
    )
}
"""Files whose fixture ``server`` is the same. They run one after another, so it starts once."""

MEASURED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


@cache
def starts_ray(file: str) -> bool:
    """Return whether tests of a file, which is relative to the repository, start Ray clusters."""
    return "pytest.mark.serve" in Path(__file__).parents[1].joinpath(file).read_text()


def work_unit(node_id: str) -> str:
    """Return what one worker runs without a break: a file, or all files that start Ray clusters.

    Two clusters that start on two cores at the same time may miss the time limits of Ray.
    """
    file = node_id.split("::")[0]
    return "tests that start Ray clusters" if starts_ray(file) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return the scheduler of ``--dist loadfile`` for these units of work."""
    from xdist.scheduler import LoadFileScheduling

    class LoadUnits(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return work_unit(nodeid)

    return LoadUnits(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, so that no worker waits minutes for the last file of another.

    pytest-xdist would start with the files that have the most tests, and end with a single test
    that installs everything or starts a server.
    """
    sizes = Counter(work_unit(item.nodeid) for item in items)
    lengths = Counter(item.nodeid.split("::")[0] for item in items)
    ranks = dict.fromkeys(sizes, len(LONG_FIRST))
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        for name in marks & {*LONG_FIRST} if "gpu" not in marks else ():
            unit = work_unit(item.nodeid)
            ranks[unit] = min(ranks[unit], LONG_FIRST.index(name))

    def place(item: pytest.Item) -> tuple[int, int, str, int, int, str]:
        file = item.nodeid.split("::")[0]
        unit = work_unit(file)
        # The shared server is idle while other files of its folder run: they run before it starts.
        last = 1 + (file in ONE_SERVER) if file.startswith("tests/e2e/") else 0
        return ranks[unit], -sizes[unit], unit, last, -lengths[file], file

    items.sort(key=place)


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


FIFO = EngineConfig(scheduling="fifo", max_backlog_s=1e6, warmup_sizes_px=())
"""Full batches without deadlines, rejections or caps, so that no outcome depends on a clock."""

DEMO = ModelConfig(id="demo", device="cpu", default_steps=20)


@contextmanager
def profiles_in(folder: Path | None) -> Iterator[None]:
    """Let engines that start keep their profiles in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "profile_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_profile_by_default() -> Iterator[None]:
    """Let no engine reuse what another test has found out about a pipeline that it changed."""
    with profiles_in(None):
        yield


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for the starts of pipelines that no test has changed."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def reused_starts(profiles: Path) -> Iterator[None]:
    """Certify a pipeline once in this run, for modules that change it after the start at most.

    A start of the shipped model takes 4 s of a core, and 0.1 s with the profile of an earlier one.
    """
    with profiles_in(profiles):
        yield


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


@pytest.fixture
def demo_engine(demo_pipeline: LoadedPipeline, profiles: Path) -> Iterator[Engine]:
    """A new engine on the shipped model, closed at the end of the test."""
    with profiles_in(profiles):
        engine = Engine(demo_pipeline, DEMO)
    yield engine
    engine.close(drain=False)
