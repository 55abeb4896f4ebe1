"""The generation backend behind a Ray Serve handle: retries, waits and time limits of a request."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.deployments.broadcast import ask_all
from serve_app.deployments.replicas import REFRESH_EVERY_S, Replicas, ReplicaStatus
from serve_app.errors import (
    DeadlineExceeded,
    DiffusionServeError,
    LoraSourceAway,
    Overloaded,
    Unavailable,
)
from serve_app.metrics.gateway import WAITING_FOR_REPLICA
from serve_app.protocol.backend import GenerationEvent, ModelState
from serve_app.protocol.images import Encoding, PartialImage
from serve_app.protocol.loras import LoraList, LoraStatus, status_of
from serve_app.protocol.params import INITIAL, GenerationParams, ModelInfo, RequestContext

REPLICA_ATTEMPTS = 3
"""Replicas that one request is sent to, one after the other, when they are lost."""

STOPPING_S = 2.0
"""Time from the last answer of a replica that is stopping until it is gone."""

HEALTH_TIMEOUT_S = 2.0

LISTED_WITHIN_S = 10.0
"""Time in which a replica lists its LoRA adapters."""

MAX_WAITING = 1_024
"""Requests of one gateway for one model that wait for a replica that is starting. As many again may
wait for the first replica, in Serve's own queue."""

FIRST_ANSWER_WITHIN_S = 5.0
"""Time in which a running replica admits or rejects a request."""

NOT_STARTED = "the model could not be started; see the server's log."


class _NotStarted(Unavailable):
    """No replica of the model could be started: another attempt would fail in the same way."""


@dataclass
class _Patience:
    """The rest of a request's time. Times are on the event loop's clock."""

    wait_until: float
    """Latest time at which a replica must admit it. Generating moves it."""
    due_at: float
    """The client's deadline."""
    generation_s: float
    """Seconds left for generating, on all replicas together."""

    def generated(self, seconds: float) -> None:
        """Count time on a replica that was lost: it is no time spent waiting."""
        self.generation_s -= seconds
        self.wait_until = min(self.wait_until + seconds, self.due_at)


class ServeBackend:
    """A `GenerationBackend` behind a Serve handle."""

    def __init__(
        self,
        model: str,
        generator: DeploymentHandle[Any],
        max_hold_s: float,
        max_deadline_s: float,
        replicas: Replicas,
    ) -> None:
        """Set the limits: how long a request may wait for a replica, and then be generated.

        ``model`` is the name in the API, which is a label of metrics.
        """
        self._generator = generator
        self._max_hold_s = max_hold_s
        self._max_deadline_s = max_deadline_s
        self._replicas = replicas
        self._info: ModelInfo | None = None
        self._waiting = 0
        self._waiting_gauge = WAITING_FOR_REPLICA.labels(model)

    # ---- generating ------------------------------------------------------------------------------

    async def generate(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool = False,
        context: RequestContext = INITIAL,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events of one image.

        If its replica is lost, another one generates it: the same seed gives the same image and
        the same previews there, so those that were sent are left out. A request that is rejected
        while another replica starts waits for that replica, or for room in the first one.

        Raises:
            Overloaded: if it is rejected, and no starting replica can help in time.
            Unavailable: if no replica was ready in time, or several were lost.
            DeadlineExceeded: if generating took longer than the limit.
            DiffusionServeError: if the engine raised it.
        """
        loop = asyncio.get_running_loop()
        waited_s = 0.0 if context.sent_at is None else max(0.0, time.time() - context.sent_at)
        sent_at = loop.time() - waited_s
        due_at = sent_at + (params.deadline_s or math.inf)
        wait_until = min(sent_at + self._max_hold_s, due_at)
        patience = _Patience(wait_until, due_at, self._max_deadline_s)
        failure: DiffusionServeError = Unavailable(
            "the replicas that generated this request were lost; try again."
        )
        partial_images = 0  # sent so far
        lost = 0
        while lost < REPLICA_ATTEMPTS:
            began_at: float | None = None
            first_by = max(patience.wait_until, loop.time() + self._answer_s)
            attempt = self._attempt(params, encoding, progress, context, first_by, patience)
            try:
                async with aclosing(attempt) as events:
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
            except (_NotStarted, LoraSourceAway):
                raise  # another attempt would fail in the same way
            except Unavailable as error:
                lost += 1  # the replica is stopping
                failure = error
                if lost < REPLICA_ATTEMPTS:
                    await asyncio.sleep(STOPPING_S)  # until it has gone, it would be chosen again
            except Overloaded as error:
                rejected_at = loop.time()
                if not await self._wait_for_room(patience.wait_until, error.retry_after_s):
                    status = await self._replicas.refresh()
                    raise _adjusted_to_replicas(error, status, loop.time() - rejected_at) from None
                context = replace(context, is_retry=True)
            except TimeoutError:
                generated_s = self._max_deadline_s - patience.generation_s
                raise await self._no_replica(first_by - sent_at - generated_s) from None
            if began_at is not None:
                patience.generated(loop.time() - began_at)
        raise failure

    async def _attempt(
        self,
        params: GenerationParams,
        encoding: Encoding,
        progress: bool,
        context: RequestContext,
        first_by: float,
        patience: _Patience,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Send the request to one replica, and yield its events.

        Raises:
            TimeoutError: if the first event is not there at ``first_by``, on the loop's clock.
            DeadlineExceeded: if the last event comes too late.
        """
        generate: Any = self._generator.options(stream=True).generate
        response = generate.remote(params, encoding, progress, context)
        events: AsyncIterator[GenerationEvent] = aiter(response)
        ended = False
        try:
            async with asyncio.timeout_at(first_by) as limit:
                with self._watched(limit):
                    event = await _next(events)
            end_at = asyncio.get_running_loop().time() + patience.generation_s
            while event is not None:
                yield event
                try:
                    async with asyncio.timeout_at(end_at):
                        event = await _next(events)
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"the image was not done within {self._max_deadline_s:g} s; its request "
                        "was cancelled. Use fewer steps or a smaller size."
                    ) from None
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def _wait_for_room(self, until: float, room_in_s: float | None) -> bool:
        """Wait for a starting replica, or for room in another; return whether to try again.

        ``room_in_s`` is ``None`` if Serve's queue for the first replica is full: no wait helps.
        """
        if room_in_s is None:
            return False
        loop = asyncio.get_running_loop()
        room_at = loop.time() + room_in_s
        status = await self._replicas.refresh()
        in_time = loop.time() + (status.ready_in_s or 0.0) <= until
        if not (status.coming and in_time and self._waiting < MAX_WAITING):
            return False
        wanted = status.running + 1
        with self._counted_as_waiting():
            while status.running < wanted and loop.time() < room_at:
                if not status.coming or loop.time() > until:
                    return False
                await asyncio.sleep(REFRESH_EVERY_S)
                status = await self._replicas.refresh()
            return True

    @contextmanager
    def _counted_as_waiting(self) -> Iterator[None]:
        self._waiting += 1
        self._waiting_gauge.inc()
        try:
            yield
        finally:
            self._waiting -= 1
            self._waiting_gauge.dec()

    # ---- describing ------------------------------------------------------------------------------

    async def describe(self, deadline_s: float | None = None) -> ModelInfo:
        """Describe the model. The answer is kept: all replicas run the same model.

        Raises:
            Unavailable: if no replica is ready in time.
            Overloaded: if too many requests wait for the first replica.
        """
        if self._info is None:
            wait_s = min(self._max_hold_s, deadline_s or math.inf)
            self._info = await self._describe(max(wait_s, self._answer_s))
        return self._info

    async def check_ready(self) -> None:
        """Raise `Unavailable` or `Overloaded` if no replica can generate now."""
        await self._describe(HEALTH_TIMEOUT_S)

    async def state(self) -> ModelState:
        """Return the state of the replicas, as Serve's controller knows it."""
        return (await self._replicas.refresh()).state

    async def loras(self) -> tuple[LoraStatus, ...]:
        """List the LoRA adapters, as the running replicas know them, without starting one.

        Raises:
            LoraSourceAway: replicas run, and none could list them in time.
        """
        if not (await self._replicas.refresh()).running:
            return ()
        answers = await ask_all(self._generator, "loras", LoraList, LISTED_WITHIN_S)
        if answers.called and not answers.answered:
            raise LoraSourceAway("no replica could list its LoRA adapters; try again later.")
        return status_of(answers.answered)

    @property
    def known(self) -> ModelInfo | None:
        """The kept description of the model."""
        return self._info

    async def _describe(self, timeout_s: float) -> ModelInfo:
        response: Any = self._generator.describe.remote()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                with self._watched(limit), _translated_ray_errors():
                    info: ModelInfo = await response
            return info
        except asyncio.CancelledError:
            response.cancel()
            raise
        except TimeoutError:
            response.cancel()
            raise await self._no_replica(timeout_s) from None
        except (RayActorError, ObjectLostError):
            raise Unavailable("the replica was lost; try again.") from None
        except Overloaded as error:
            raise _adjusted_to_replicas(error, await self._replicas.refresh()) from None

    def _watched(self, limit: asyncio.Timeout) -> AbstractContextManager[None]:
        """Watch the replicas while waiting for one; end the wait at once if none will start."""

        def end() -> None:
            if not limit.expired():  # then the wait is ending already, and rejects another time
                limit.reschedule(0.0)

        return self._replicas.watched(end)

    @property
    def _answer_s(self) -> float:
        """Time for the first answer. A running engine rejects too short deadlines itself."""
        return min(self._max_hold_s, FIRST_ANSWER_WITHIN_S)

    async def _no_replica(self, waited_s: float) -> Unavailable:
        """Make the error for a wait in vain; the next replica's start sets its retry time."""
        status = await self._replicas.refresh()
        if status.given_up:
            return _NotStarted(NOT_STARTED)
        return Unavailable(
            f"no replica was ready within {waited_s:.3g} s; try again later.",
            retry_after_s=status.ready_in_s,
        )


async def _next(events: AsyncIterator[GenerationEvent]) -> GenerationEvent | None:
    """Return the next event; ``None`` after the last one."""
    with _translated_ray_errors():
        return await anext(events, None)


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
def _translated_ray_errors() -> Iterator[None]:
    """Convert Ray's errors to this project's, and unwrap errors that a replica raised."""
    try:
        yield
    except BackPressureError:
        raise Overloaded("too many requests are waiting; try again later.") from None
    except DeploymentUnavailableError:
        raise _NotStarted(NOT_STARTED) from None
    except RayTaskError as error:
        if isinstance(error.cause, DiffusionServeError):
            raise error.cause from None
        raise
