"""Metrics of all replicas of the application, gathered through Serve's handles.

The gateway that receives a scrape answers for its peers as well. Each scrape reaches another
gateway, so with its own counters alone they would seem to jump.
"""

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app import __version__
from serve_app.deployments.broadcast import Answers, ask_all
from serve_app.deployments.replicas import Replicas
from serve_app.metrics.application import REPLICAS, SCRAPE, SCRAPED, TARGET_REPLICAS
from serve_app.metrics.export import Report, report
from serve_app.metrics.gateway import GATEWAY_INFO

ANSWER_WITHIN_S = 3.0
"""Time for each replica: less than Prometheus's timeout of 10 s, and enough for one under load."""


@dataclass(frozen=True)
class WatchedModel:
    """The deployment of one model."""

    id: str
    """Name of the model in the API."""
    generator: DeploymentHandle[Any]
    replicas: Replicas


class Scraper:
    """Gathers the reports of one application, from the replicas of all its deployments."""

    def __init__(
        self, replica: str, gateway: DeploymentHandle[Any], models: Sequence[WatchedModel]
    ) -> None:
        """Prepare for one gateway, whose own id is ``replica``.

        What concerns no model has the label of the first one.
        """
        self._replica = replica
        self._gateway = gateway
        self._models = tuple(models)
        self._gathering: asyncio.Task[Sequence[Report]] | None = None
        for model in models:
            GATEWAY_INFO.labels(model.id, __version__, socket.gethostname()).info({})

    def own(self) -> Report:
        """Report the metrics of this replica."""
        return report("gateway", self._replica)

    async def gather(self) -> Sequence[Report]:
        """Return one report for each replica that answers in time, and one of the application.

        Concurrent calls share one answer.
        """
        if self._gathering is None or self._gathering.done():
            self._gathering = asyncio.create_task(self._gather())
        return await asyncio.shield(self._gathering)

    async def _gather(self) -> Sequence[Report]:
        started_at = time.perf_counter()
        gateways, *generators = await asyncio.gather(
            _reports(self._gateway),
            *(_collect_model(model) for model in self._models),
        )
        # Its own report is made here: Serve may not count this replica as running yet.
        own = self.own()
        others = {one.replica: one for one in gateways.answered if one.replica != own.replica}
        default = self._models[0].id
        silent = gateways.called - len(gateways.answered)
        _count(default, self._gateway, 1 + len(others), silent)
        SCRAPE.labels(default).set(time.perf_counter() - started_at)
        engines = [one for answers in generators for one in answers.answered]
        return [report("application", None), own, *others.values(), *engines]


async def _reports(deployment: DeploymentHandle[Any]) -> Answers[Report]:
    return await ask_all(deployment, "metrics", Report, ANSWER_WITHIN_S)


async def _collect_model(model: WatchedModel) -> Answers[Report]:
    """Call every running replica of a model, and set its metrics of the application."""
    status, answers = await asyncio.gather(model.replicas.refresh(), _reports(model.generator))
    for state, count in status.states.items():
        REPLICAS.labels(model.id, state).set(count)
    TARGET_REPLICAS.labels(model.id).set(status.target)
    silent = max(answers.called, status.running) - len(answers.answered)
    _count(model.id, model.generator, len(answers.answered), silent)
    return answers


def _count(model: str, deployment: DeploymentHandle[Any], answered: int, silent: int) -> None:
    name = deployment.deployment_name
    SCRAPED.labels(model, name, "answered").set(answered)
    SCRAPED.labels(model, name, "silent").set(silent)
