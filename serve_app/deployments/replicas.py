"""How many replicas of a deployment there are and how many are coming, by Serve's controller."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import DeploymentDetails

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""The controller is asked at most so often, and only while somebody wants to know."""

ANSWER_WITHIN_S = 2.0

ASSUMED_COLD_START_S = 60.0
"""Until one was seen; the policy assumes the same."""

_UNSEEN_SHARE = 0.1
"""Of a start: by so much its length may be wrong for want of a look at the right time."""

_SPREAD = 0.2
"""Share of a start by which the next may take longer, without being called late."""


@dataclass(frozen=True)
class ReplicaStatus:
    """The replicas of a deployment at one time."""

    running: int
    coming: int
    """Starting, or not even that while there is no node for them."""
    ready_s: tuple[float, ...] = ()
    """Until each of those that are starting should run, the next one first; where none runs and
    none is starting, until one would that is asked for now."""
    target: int = 0
    """As many as there should be."""
    states: Mapping[str, int] = field(default_factory=dict)
    """How many are in each of Serve's states, in lower case."""

    @property
    def ready_in_s(self) -> float | None:
        """Until the next one; none if there is none to wait for."""
        return self.ready_s[0] if self.ready_s else None


async def ask_controller(app: str, deployment: str) -> DeploymentDetails:
    client: Any = _get_global_client()
    details: DeploymentDetails = await client._controller.get_deployment_details.remote(
        app, deployment
    )
    return details


class Replicas:
    """Looks when asked, or while somebody waits, and learns how long replicas take to start."""

    def __init__(self, ask: Callable[[], Awaitable[DeploymentDetails]]) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._looked_at: float | None = None
        self._status = ReplicaStatus(1, 0)  # as good as anything before the first answer
        self._seen_at = -math.inf  # in Unix time, as all below
        self._starting: dict[str, float] = {}  # since when
        self._cold_start_s: float | None = None
        self._waiting: set[object] = set()
        self._watch: asyncio.Task[None] | None = None

    async def look(self) -> ReplicaStatus:
        """As it was a second ago at most; when the controller does not answer, as it last said."""
        async with self._lock:
            now = time.monotonic()
            if self._looked_at is None or now - self._looked_at >= LOOK_EVERY_S:
                try:
                    async with asyncio.timeout(ANSWER_WITHIN_S):
                        self._status = self._seen(await self._ask(), time.time())
                except (RayError, RayServeException, TimeoutError) as error:
                    logger.warning("Serve's controller does not say what is starting: %r", error)
                self._looked_at = time.monotonic()
            return self._status

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Whoever waits here for long has it look by itself: so it sees when a start ends."""
        waiting = object()
        timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._watch_for, waiting)
        try:
            yield
        finally:
            timer.cancel()
            self._waiting.discard(waiting)

    def _watch_for(self, waiting: object) -> None:
        self._waiting.add(waiting)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look_on())

    async def _look_on(self) -> None:
        watched = True
        while watched:
            watched = bool(self._waiting)  # once more after that: what they waited for is there
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    def _seen(self, details: DeploymentDetails, now: float) -> ReplicaStatus:
        unseen_s, self._seen_at = now - self._seen_at, now
        running = {replica.replica_id for replica in details.replicas if replica.state == "RUNNING"}
        for replica_id in running & self._starting.keys():
            took_s = now - self._starting[replica_id]
            # It has run since an unknown time between the two looks.
            if unseen_s <= max(2 * LOOK_EVERY_S, _UNSEEN_SHARE * took_s):
                self._cold_start_s = took_s
        self._starting = {
            replica.replica_id: replica.start_time_s
            for replica in details.replicas
            if replica.state == "STARTING"
        }
        ages_s = [now - since for since in self._starting.values()]
        if not (ages_s or running):
            ages_s = [0.0]
        ready_s = tuple(sorted(self._remaining_s(age_s) for age_s in ages_s))
        coming = max(0, details.target_num_replicas - len(running))
        states = dict.fromkeys((state.value.lower() for state in ReplicaState), 0)
        states |= Counter(replica.state.lower() for replica in details.replicas)
        return ReplicaStatus(len(running), coming, ready_s, details.target_num_replicas, states)

    def _remaining_s(self, age_s: float) -> float:
        """Of a start. The longer one is overdue, the longer it is likely to take still."""
        known_s = self._cold_start_s or ASSUMED_COLD_START_S
        return max(known_s - age_s, age_s - (1 - _SPREAD) * known_s)
