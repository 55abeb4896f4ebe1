"""Metrics of all replicas of the application, gathered through Serve's handles.

The gateway that receives a scrape answers for its peers as well. Each scrape reaches another
gateway, so with its own counters alone they would seem to jump.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app import __version__
from serve_app.deployments.ray_compat import call_all_replicas
from serve_app.deployments.replicas import Replicas
from serve_app.metrics.application import REPLICAS, SCRAPE, SCRAPED, TARGET_REPLICAS
from serve_app.metrics.export import Report, report
from serve_app.metrics.gateway import GATEWAY_INFO

logger = logging.getLogger(__name__)

ANSWER_WITHIN_S = 3.0
"""Time for each replica: less than Prometheus's timeout of 10 s, and enough for one under load."""


class Scraper:
    """Gathers the reports of one application, from the replicas of its two deployments."""

    def __init__(
        self,
        model: str,
        replica: str,
        gateway: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        replicas: Replicas,
    ) -> None:
        """Prepare for one gateway: ``replica`` is its own id, ``replicas`` are the generator's."""
        self._model = model
        self._replica = replica
        self._gateway = gateway
        self._generator = generator
        self._replicas = replicas
        self._gathering: asyncio.Task[Sequence[Report]] | None = None
        GATEWAY_INFO.labels(model, __version__, socket.gethostname()).info({})

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
        status, generators, gateways = await asyncio.gather(
            self._replicas.refresh(), _collect(self._generator), _collect(self._gateway)
        )
        # Its own report is made here: Serve may not count this replica as running yet.
        own = self.own()
        others = {one.replica: one for one in gateways.answered if one.replica != own.replica}
        for state, count in status.states.items():
            REPLICAS.labels(self._model, state).set(count)
        TARGET_REPLICAS.labels(self._model).set(status.target)
        for handle, answered, silent in (
            (
                self._generator,
                len(generators.answered),
                max(generators.called, status.running) - len(generators.answered),
            ),
            (self._gateway, 1 + len(others), gateways.called - len(gateways.answered)),
        ):
            name = handle.deployment_name
            SCRAPED.labels(self._model, name, "answered").set(answered)
            SCRAPED.labels(self._model, name, "silent").set(silent)
        SCRAPE.labels(self._model).set(time.perf_counter() - started_at)
        return [report("application", None), own, *others.values(), *generators.answered]


@dataclass(frozen=True)
class _Answers:
    answered: list[Report]
    called: int


async def _collect(deployment: DeploymentHandle[Any]) -> _Answers:
    """Call every running replica, each with its own time limit."""
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            results = await call_all_replicas(deployment, "metrics")
    except (RayServeException, TimeoutError):
        return _Answers([], 0)  # it has no replica
    answers = await asyncio.gather(*map(_answer, results))
    return _Answers([one for one in answers if one is not None], len(answers))


async def _answer(result: Any) -> Report | None:
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            answer: Report = await result.get_async()
            return answer
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("a replica does not report its metrics: %r", error)
        result.cancel()
        return None
