"""Scrapes with scripted replicas. tests/e2e/test_metrics.py has real ones."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.deployments import scrape
from serve_app.deployments.replicas import Replicas
from serve_app.deployments.scrape import Scraper, WatchedModel
from serve_app.metrics.export import Report
from serve_app.metrics.registry import APPLICATION
from tests.fakes.serve_status import always, deployment_status, replica

pytestmark = pytest.mark.anyio


class Answer:
    """The answer of one replica: a report, an error, or none."""

    def __init__(self, outcome: Report | Exception | None) -> None:
        self._outcome = outcome
        self.cancelled = False

    async def get_async(self) -> Report:
        await asyncio.sleep(0)
        if self._outcome is None:
            await asyncio.Event().wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert isinstance(self._outcome, Report)
        return self._outcome

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    def __init__(self, name: str, *outcomes: Report | Exception | None) -> None:
        self.deployment_name = name
        self.answers = [Answer(outcome) for outcome in outcomes]
        self.calls = 0

    def broadcast(self, method: str) -> Any:
        assert method == "metrics"
        self.calls += 1

        async def results() -> list[Answer]:
            if not self.answers:
                raise DeploymentUnavailableError(DeploymentID(name=self.deployment_name))
            return self.answers

        return SimpleNamespace(_fetch_replica_results_async=results)


def status_of(*states: str) -> Callable[[], Any]:
    replicas = [replica(str(index), state) for index, state in enumerate(states)]
    return always(deployment_status(*replicas))


def scraper_of(gateway: Any, generator: Any, *states: str) -> Scraper:
    model = WatchedModel("scraped", generator, Replicas(status_of(*states)))
    return Scraper("own", gateway, [model])


def counted(name: str, **labels: str) -> float | None:
    found = {"model": "scraped", **labels}
    return APPLICATION.get_sample_value(f"diffusion_serve_{name}", found)


def scraped(deployment: str, answer: str) -> float | None:
    return counted("scraped_replicas", deployment=deployment, answer=answer)


async def test_dead_and_hanging_replicas_are_counted_as_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scrape, "ANSWER_WITHIN_S", 0.05)
    generator = Handle("Generator", Report("a", []), ActorDiedError(), None)
    gateway = Handle("Gateway", Report("own", []), Report("other", []))
    states = ("RUNNING", "RUNNING", "RUNNING", "RUNNING", "STARTING")
    reports = await scraper_of(gateway, generator, *states).gather()
    assert [one.replica for one in reports] == [None, "own", "other", "a"]
    assert (scraped("Generator", "answered"), scraped("Generator", "silent")) == (1, 3)
    assert (scraped("Gateway", "answered"), scraped("Gateway", "silent")) == (2, 0)
    assert [answer.cancelled for answer in generator.answers] == [False, True, True]
    assert counted("replicas", state="running") == 4
    assert counted("replicas", state="starting") == 1
    assert counted("replicas", state="stopping") == 0
    assert counted("target_replicas") == 5


async def test_a_gateway_without_replicas_reports_itself() -> None:
    reports = await scraper_of(Handle("Gateway"), Handle("Generator")).gather()
    assert [one.replica for one in reports] == [None, "own"]
    assert (scraped("Generator", "answered"), scraped("Generator", "silent")) == (0, 0)
    assert scraped("Gateway", "answered") == 1


async def test_concurrent_scrapes_share_one_answer() -> None:
    generator = Handle("Generator", Report("a", []))
    scraper = scraper_of(Handle("Gateway"), generator, "RUNNING")
    first, *others = await asyncio.gather(*(scraper.gather() for _ in range(20)))
    assert generator.calls == 1
    assert all(other is first for other in others)
    await scraper.gather()
    assert generator.calls == 2


async def test_a_cancelled_scrape_does_not_cancel_the_others() -> None:
    generator = Handle("Generator", Report("a", []))
    scraper = scraper_of(Handle("Gateway"), generator, "RUNNING")
    impatient, patient = (asyncio.create_task(scraper.gather()) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    assert [one.replica for one in await patient] == [None, "own", "a"]
    assert generator.calls == 1


async def test_each_of_several_models_has_its_replicas() -> None:
    watched = [
        WatchedModel(name, Handle(f"Generator-{name}", *reports), Replicas(status_of(*states)))
        for name, reports, states in (
            ("first", [Report("a", []), Report("b", [])], ["RUNNING", "RUNNING"]),
            ("second", [], ["STARTING"]),
        )
    ]
    reports = await Scraper("own", Handle("Gateway"), watched).gather()
    assert [one.replica for one in reports] == [None, "own", "a", "b"]

    def value(name: str, model: str, **labels: str) -> float | None:
        return APPLICATION.get_sample_value(f"diffusion_serve_{name}", {"model": model, **labels})

    assert value("replicas", "first", state="running") == 2
    assert value("replicas", "second", state="running") == 0
    assert value("replicas", "second", state="starting") == 1
    for model, answered in (("first", 2), ("second", 0)):
        deployment = f"Generator-{model}"
        found = value("scraped_replicas", model, deployment=deployment, answer="answered")
        assert found == answered
    assert value("scraped_replicas", "first", deployment="Gateway", answer="answered") == 1
    assert value("scraped_replicas", "second", deployment="Gateway", answer="answered") is None
