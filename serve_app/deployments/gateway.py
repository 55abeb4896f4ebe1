"""The gateway as a Ray Serve deployment, and the handle through which it reaches the generator."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.config.environment import KEYS_VARIABLE, keys_in_environment
from serve_app.config.models import AppConfig
from serve_app.deployments.ray_compat import (
    CancelledAsDisconnect,
    address_beyond_loopback,
    handle_to,
)
from serve_app.deployments.replicas import REFRESH_EVERY_S, Replicas, ReplicaStatus
from serve_app.deployments.scrape import Scraper
from serve_app.errors import DeadlineExceeded, DiffusionServeError, Overloaded, Unavailable
from serve_app.gateway.auth import KeyRing
from serve_app.gateway.routes import create_api
from serve_app.metrics.export import Report
from serve_app.metrics.gateway import WAITING_FOR_REPLICA
from serve_app.protocol.backend import GenerationEvent
from serve_app.protocol.images import Encoding, PartialImage
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext
from serve_app.serve_log import log_through_serve

if TYPE_CHECKING:
    from serve_app.gateway.tracing import Tracing

logger = logging.getLogger(__name__)

REPLICA_ATTEMPTS = 3
"""Replicas that one request is sent to, one after the other, when they are lost."""

HEALTH_TIMEOUT_S = 2.0

MAX_HELD = 1_024
"""Requests that wait for a replica that is starting. As many again may wait for the first replica,
in Serve's own queue."""

OPEN_TO_ALL = f"""
****************************************************************************************************
*  NO API KEY IS CONFIGURED, and this server listens on %s: anyone there may use the GPU.
*  Make a key with `diffusion-serve key NAME` and name its file in gateway.keys_path, or set
*  {KEYS_VARIABLE}. Or set http_options.host to 127.0.0.1.
****************************************************************************************************
"""

FIRST_ANSWER_WITHIN_S = 5.0
"""Time in which a running replica admits or rejects a request."""


class ServeBackend:
    """A `GenerationBackend` behind a Serve handle."""

    def __init__(
        self,
        generator: DeploymentHandle[Any],
        max_hold_s: float,
        max_deadline_s: float,
        replicas: Replicas | None = None,
    ) -> None:
        """Set the limits: how long a request may wait for a replica, and then be generated."""
        self._generator = generator
        self._max_hold_s = max_hold_s
        self._max_deadline_s = max_deadline_s
        self._replicas = replicas or Replicas.of(generator)
        self._info: ModelInfo | None = None
        self._held = 0

    async def generate(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncGenerator[GenerationEvent, None]:
        loop = asyncio.get_running_loop()
        waited_s = 0.0 if context.sent_at is None else time.time() - context.sent_at
        sent_at = loop.time() - waited_s
        due_at = sent_at + (params.deadline_s or math.inf)
        hold_until = min(sent_at + self._max_hold_s, due_at)
        remaining_s = self._max_deadline_s
        rejection: DiffusionServeError = Unavailable(
            "the replicas that generated this request were lost; try again."
        )
        partial_images = 0  # sent so far
        lost = 0
        # The same seed generates the same image and previews on another replica.
        while lost < REPLICA_ATTEMPTS:
            began_at: float | None = None
            answer_until = max(hold_until, loop.time() + self._answer_s)
            try:
                generation = self._events(params, encoding, progress, context)
                async with aclosing(self._in_time(generation, answer_until, remaining_s)) as events:
                    async for event in events:
                        began_at = began_at or loop.time()
                        if isinstance(event, PartialImage):
                            if event.index < partial_images:
                                continue
                            partial_images += 1
                        yield event
                return
            except (RayActorError, ObjectLostError):
                lost += 1  # the replica or its node died
            except Unavailable as error:
                lost += 1  # the replica is stopping
                rejection = error
            except Overloaded as error:
                rejected_at = loop.time()
                room_in_s = error.retry_after_s  # None if Serve's queue for the first one is full
                if room_in_s is None or not await self._hold(hold_until, room_in_s):
                    status = await self._replicas.refresh()
                    raise _adjusted_to_replicas(error, status, loop.time() - rejected_at) from None
                context = replace(context, is_retry=True)
            except TimeoutError:
                raise await self._no_replica(answer_until - sent_at) from None
            if began_at is not None:  # time spent generating does not count as waiting
                generated_s = loop.time() - began_at
                remaining_s -= generated_s
                hold_until = min(hold_until + generated_s, due_at)
        raise rejection

    @property
    def _answer_s(self) -> float:
        """Time for the first answer. A running engine rejects too short deadlines itself."""
        return min(self._max_hold_s, FIRST_ANSWER_WITHIN_S)

    async def _in_time(
        self, events: AsyncGenerator[GenerationEvent, None], first_by: float, seconds: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Pass events on within two time limits.

        Raises:
            TimeoutError: if the first event is not there at ``first_by``, on the loop's clock.
            DeadlineExceeded: if the last event is not there ``seconds`` after the first.
        """
        async with aclosing(events):
            async with asyncio.timeout_at(first_by):
                with self._replicas.watched():
                    event = await anext(events)
            end_at = asyncio.get_running_loop().time() + seconds
            while True:
                yield event
                try:
                    async with asyncio.timeout_at(end_at):
                        event = await anext(events)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"the image was not done within {self._max_deadline_s:g} s; its request "
                        "was cancelled."
                    ) from None

    async def _hold(self, until: float, room_in_s: float) -> bool:
        """Wait for a starting replica, or for room in another; return whether to try again."""
        loop = asyncio.get_running_loop()
        room_at = loop.time() + room_in_s
        status = await self._replicas.refresh()
        in_time = loop.time() + (status.ready_in_s or 0.0) <= until
        if not (status.coming and in_time and self._held < MAX_HELD):
            return False
        wanted = status.running + 1
        self._held += 1
        WAITING_FOR_REPLICA.set(self._held)
        try:
            while status.running < wanted and loop.time() < room_at:
                if not status.coming or loop.time() > until:
                    return False
                await asyncio.sleep(REFRESH_EVERY_S)
                status = await self._replicas.refresh()
            return True
        finally:
            self._held -= 1
            WAITING_FOR_REPLICA.set(self._held)

    async def _events(
        self, params: GenerationParams, encoding: Encoding, progress: bool, context: RequestContext
    ) -> AsyncGenerator[GenerationEvent, None]:
        generate: Any = self._generator.options(stream=True).generate
        events = generate.remote(params, encoding, progress, context)
        ended = False
        try:
            with _as_raised():
                async for event in events:
                    yield event
            ended = True
        finally:
            if not ended:
                events.cancel()

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        # Cached, because all replicas of an application run the same model.
        if self._info is None:
            hold_s = min(self._max_hold_s, deadline_s or math.inf)
            self._info = await self._describe(max(hold_s, self._answer_s))
        return self._info

    async def check_ready(self) -> None:
        await self._describe(HEALTH_TIMEOUT_S)

    async def _describe(self, timeout_s: float) -> ModelInfo:
        try:
            async with asyncio.timeout(timeout_s):
                with self._replicas.watched():
                    info: ModelInfo = await self._call("describe")
            return info
        except TimeoutError:
            raise await self._no_replica(timeout_s) from None
        except RayActorError:
            raise Unavailable("the replica was lost; try again.") from None
        except Overloaded as error:
            raise _adjusted_to_replicas(error, await self._replicas.refresh()) from None

    async def _no_replica(self, waited_s: float) -> Unavailable:
        """Make the error for a wait in vain; the next replica's start sets its retry time."""
        status = await self._replicas.refresh()
        return Unavailable(
            f"no replica was ready within {waited_s:.3g} s; try again later.",
            retry_after_s=status.ready_in_s,
        )

    async def _call(self, method: str) -> Any:
        response = getattr(self._generator, method).remote()
        try:
            with _as_raised():
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


def _adjusted_to_replicas(
    rejection: Overloaded, status: ReplicaStatus, waited_s: float = 0.0
) -> Overloaded:
    """Adjust one replica's rejection, ``waited_s`` seconds old, to the state of all replicas.

    There is room when that replica has some, or when the next one has started. The work of the
    retry is divided by the replicas that run by then. Without any known time, none is given.
    """
    times_s = list(status.ready_s[:1])
    if rejection.retry_after_s is not None:
        times_s.append(max(0.0, rejection.retry_after_s - waited_s))
    retry_after_s = min(times_s, default=None)
    running = status.running
    if retry_after_s is not None:
        running += sum(ready_s <= retry_after_s for ready_s in status.ready_s)
    work_s = rejection.work_s / max(1, running)
    return Overloaded(rejection.message, rejection.param, retry_after_s, work_s)


@contextmanager
def _as_raised() -> Iterator[None]:
    """Convert Ray's errors to this project's, and unwrap errors that a replica raised."""
    try:
        yield
    except BackPressureError:
        raise Overloaded("too many requests are waiting; try again later.") from None
    except DeploymentUnavailableError:
        raise Unavailable("the model could not be started; see the server's log.") from None
    except RayTaskError as error:
        if isinstance(error.cause, DiffusionServeError):
            raise error.cause from None
        raise


# Far more requests than the generator accepts: a full gateway must still answer /health and reject
# the rest. Nodes with the label get no gateway, because they come and go: a gateway would keep an
# unused GPU node alive, or be lost with a spot node.
@serve.deployment(
    ray_actor_options={"num_cpus": 0.5, "label_selector": {"diffusion-serve/gateway": "!no"}},
    max_ongoing_requests=10_000,
)
@serve.ingress()
class Gateway:
    """Answers HTTP for the whole application."""

    def __init__(self, config: AppConfig, generator: "DeploymentHandle[Any]") -> None:
        log_through_serve()
        self._config = config
        context = serve.get_replica_context()
        replicas = Replicas.of(generator)
        limits = config.engine.limits
        self._backend = ServeBackend(
            generator, config.gateway.max_hold_s, limits.max_deadline_s, replicas
        )
        peers: DeploymentHandle[Any] = handle_to(context.deployment, context.app_name)
        name = context.replica_id.unique_id
        self._scraper = Scraper(config.model.id, name, peers, generator, replicas)
        self._keys = KeyRing(config.gateway.keys_file, keys_in_environment())
        if not self._keys and (host := address_beyond_loopback()):
            logger.warning(OPEN_TO_ALL, host)
        self._tracing = _tracing(config, name) if config.gateway.tracing else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        traced = None if self._tracing is None else self._tracing.middleware
        api = create_api(self._config, self._backend, self._keys, self._scraper.gather, traced)
        api.add_middleware(CancelledAsDisconnect)
        return api

    async def metrics(self) -> Report:
        """Return this replica's metrics, for the gateway that answers a scrape."""
        return self._scraper.own()

    def __del__(self) -> None:
        """Send the last traces. Serve calls it when the last request has ended."""
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.close()


def _tracing(config: AppConfig, replica: str) -> "Tracing":
    from serve_app.gateway.tracing import Tracing  # an optional dependency

    return Tracing.to_collector(config, replica)
