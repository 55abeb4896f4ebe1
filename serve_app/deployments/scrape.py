"""Asks all replicas of the application for their figures, through Serve's handles.

The gateway that is asked answers for its fellows as well: a scrape reaches one of them, and another
one the next time, whose counters would seem to jump.
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
from serve_app.deployments.replicas import Replicas
from serve_app.metrics import (
    GATEWAY_INFO,
    REPLICAS,
    SCRAPE,
    SCRAPED,
    TARGET_REPLICAS,
    Report,
    report,
)

logger = logging.getLogger(__name__)

ANSWER_WITHIN_S = 3.0
"""Of a replica: less than the 10 s that Prometheus waits, and more than one under load takes."""


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
        """``replica``: of the gateway, this one; ``replicas``: those of the generator."""
        self._model = model
        self._replica = replica
        self._gateway = gateway
        self._generator = generator
        self._replicas = replicas
        self._gathering: asyncio.Task[Sequence[Report]] | None = None
        GATEWAY_INFO.labels(model, __version__, socket.gethostname()).info({})

    def own(self) -> Report:
        """Of this replica."""
        return report("gateway", self._replica)

    async def gather(self) -> Sequence[Report]:
        """One for each replica that answers in time, and one of the application.

        Who asks while others are being answered gets the same.
        """
        if self._gathering is None or self._gathering.done():
            self._gathering = asyncio.create_task(self._gather())
        return await asyncio.shield(self._gathering)

    async def _gather(self) -> Sequence[Report]:
        started_at = time.perf_counter()
        status, generators, gateways = await asyncio.gather(
            self._replicas.look(), _ask(self._generator), _ask(self._gateway)
        )
        # Its own without asking: Serve may not count it as running yet.
        own = self.own()
        others = {one.replica: one for one in gateways.answered if one.replica != own.replica}
        for state, count in status.states.items():
            REPLICAS.labels(self._model, state).set(count)
        TARGET_REPLICAS.labels(self._model).set(status.target)
        for handle, answered, silent in (
            (
                self._generator,
                len(generators.answered),
                max(generators.asked, status.running) - len(generators.answered),
            ),
            (self._gateway, 1 + len(others), gateways.asked - len(gateways.answered)),
        ):
            name = handle.deployment_name
            SCRAPED.labels(self._model, name, "answered").set(answered)
            SCRAPED.labels(self._model, name, "silent").set(silent)
        SCRAPE.labels(self._model).set(time.perf_counter() - started_at)
        return [report("application", None), own, *others.values(), *generators.answered]


@dataclass(frozen=True)
class _Answers:
    answered: list[Report]
    asked: int


async def _ask(deployment: DeploymentHandle[Any]) -> _Answers:
    """Every replica that runs, each with a time of its own to answer in."""
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            # Not results_async(), which gives up all answers when one is late.
            response: Any = deployment.broadcast("metrics")
            results = await response._fetch_replica_results_async()
    except (RayServeException, TimeoutError):
        return _Answers([], 0)  # it has no replica
    said = await asyncio.gather(*map(_answer, results))
    return _Answers([one for one in said if one is not None], len(said))


async def _answer(result: Any) -> Report | None:
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            answer: Report = await result.get_async()
            return answer
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("a replica does not tell its figures: %r", error)
        result.cancel()
        return None
