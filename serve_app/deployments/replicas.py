"""The number of running and starting replicas of a deployment, from Serve's controller."""

import asyncio
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentDetails

from serve_app.deployments.ray_compat import REPLICA_STATES, STARTUP_FAILED, deployment_details
from serve_app.protocol.backend import ModelState
from serve_app.protocol.cold_start import ASSUMED_COLD_START_S, smoothed_cold_start

logger = logging.getLogger(__name__)

REFRESH_EVERY_S = 1.0
"""Least time between two calls of the controller. It is called only while a caller waits."""

ANSWER_WITHIN_S = 2.0

_INTERVAL_SHARE = 0.1
"""Share of a start's length by which its observed end may be late."""

_SPREAD = 0.2
"""Share of a start's length by which the next start may be longer without being overdue."""


@dataclass(frozen=True)
class ReplicaStatus:
    """The replicas of a deployment at one time."""

    running: int
    coming: int
    """Replicas that are starting, or wait for a node."""
    ready_s: tuple[float, ...] = ()
    """Seconds until each starting replica should run, the next one first. If none runs or starts,
    the time of a start from now."""
    target: int = 0
    """Number of replicas that the controller aims at."""
    states: Mapping[str, int] = field(default_factory=dict)
    """Number of replicas in each of Serve's states, in lower case."""
    failed: bool = False
    """The last start failed, and none has begun since."""
    given_up: bool = False
    """Serve starts no further replica: it has tried as often as it should, and none ever ran."""
    reported: bool = True
    """The controller has reported them; otherwise all of this is a guess."""

    @property
    def state(self) -> ModelState:
        """The state of all of them together."""
        if not self.reported:
            return "unknown"
        if self.running:
            return "running"
        if self.failed:
            return "failed"
        return "starting" if self.coming or self.states.get("starting") else "at_zero"

    @property
    def ready_in_s(self) -> float | None:
        """Seconds until the next one; ``None`` if none is coming."""
        return self.ready_s[0] if self.ready_s else None


class Replicas:
    """A cached view of one deployment's replicas, which learns how long they take to start.

    It is refreshed on demand, and by itself while a caller waits in `watched`.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[DeploymentDetails]],
        cold_start_s: float | None = None,
    ) -> None:
        """Set the call of the controller, which may raise Ray's errors, and a known start time."""
        self._fetch = fetch
        self._lock = asyncio.Lock()
        self._refreshed_at: float | None = None
        self._status = ReplicaStatus(1, 0, reported=False)
        self._updated_at = -math.inf  # in Unix time, as all below
        self._starting: dict[str, float] = {}  # since when
        self.cold_start_s = cold_start_s
        """Smoothed duration of a start; None before one was observed."""
        self._failed = False
        self._has_run = False
        self._waiting: dict[object, Callable[[], None]] = {}
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, deployment: DeploymentHandle[Any]) -> "Replicas":
        """Watch the replicas behind a handle."""
        app, name = deployment.app_name, deployment.deployment_name
        return cls(functools.partial(deployment_details, app, name))

    async def refresh(self) -> ReplicaStatus:
        """Return the status, at most `REFRESH_EVERY_S` old.

        If the controller does not answer, the last known status is returned.
        """
        async with self._lock:
            now = time.monotonic()
            if self._refreshed_at is None or now - self._refreshed_at >= REFRESH_EVERY_S:
                try:
                    async with asyncio.timeout(ANSWER_WITHIN_S):
                        self._status = self.observe(await self._fetch(), time.time())
                except (RayError, RayServeException, TimeoutError) as error:
                    logger.warning("Serve's controller does not report its replicas: %r", error)
                self._refreshed_at = time.monotonic()
            return self._status

    @contextmanager
    def watched(self, on_given_up: Callable[[], None]) -> Iterator[None]:
        """Refresh periodically while the caller waits here, to observe when a start ends.

        Serve's handle goes on waiting when no replica will start: ``on_given_up`` is called then.
        """
        waiting = object()
        timer = asyncio.get_running_loop().call_later(
            REFRESH_EVERY_S, self._watch_for, waiting, on_given_up
        )
        try:
            yield
        finally:
            timer.cancel()
            self._waiting.pop(waiting, None)

    def _watch_for(self, waiting: object, on_given_up: Callable[[], None]) -> None:
        self._waiting[waiting] = on_given_up
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._keep_refreshed())

    async def _keep_refreshed(self) -> None:
        watched = True
        while watched:
            watched = bool(self._waiting)  # once more after that, to see the new replica
            status = await self.refresh()
            for on_given_up in tuple(self._waiting.values()) if status.given_up else ():
                try:
                    on_given_up()
                except Exception:  # the others wait on
                    logger.exception("a request did not notice that no replica will start")
            await asyncio.sleep(REFRESH_EVERY_S)

    def observe(self, details: DeploymentDetails, now: float) -> ReplicaStatus:
        """Learn from the controller's report at ``now``, in Unix time; return the status."""
        interval_s, self._updated_at = now - self._updated_at, now
        running = {replica.replica_id for replica in details.replicas if replica.state == "RUNNING"}
        for replica_id in running & self._starting.keys():
            took_s = now - self._starting[replica_id]
            # It became ready at an unknown time between the two refreshes.
            if interval_s <= max(2 * REFRESH_EVERY_S, _INTERVAL_SHARE * took_s):
                self.cold_start_s = smoothed_cold_start(self.cold_start_s, took_s)
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
        states = dict.fromkeys((state.lower() for state in REPLICA_STATES), 0)
        states |= Counter(replica.state.lower() for replica in details.replicas)
        self._has_run = self._has_run or bool(running)
        target = details.target_num_replicas
        alive = bool(running or self._starting)
        failing = not alive and details.status_trigger == STARTUP_FAILED
        # Serve forgets the failure when it aims at no replica.
        self._failed = failing or (self._failed and not alive and target == 0)
        given_up = failing and target > 0 and not self._has_run
        return ReplicaStatus(len(running), coming, ready_s, target, states, self._failed, given_up)

    def _remaining_s(self, age_s: float) -> float:
        """Estimate the rest of a start. A long overdue start is likely to take longer still."""
        known_s = self.cold_start_s or ASSUMED_COLD_START_S
        return max(known_s - age_s, age_s - (1 - _SPREAD) * known_s)
