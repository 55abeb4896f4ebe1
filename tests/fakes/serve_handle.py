"""A Serve handle and a controller with scripted answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve._private.common import DeploymentID

from serve_app.deployments.backend import ServeBackend
from serve_app.deployments.replicas import Replicas
from serve_app.protocol.params import INITIAL
from tests.fakes.serve_status import always, deployment_status, replica

DEPLOYMENT = DeploymentID(name="Generator", app_name="diffusion-serve")


class Response:
    """The result of a handle's ``remote``: awaitable, iterable and cancellable."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers
        self.cancelled = False
        self.context = INITIAL
        """Context of the request that it answers."""

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Iterator[Any]:
        return self._wait(self._answers[0]).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for answer in self._answers:
            yield await self._wait(answer)

    async def _wait(self, answer: Any) -> Any:
        if answer is None:
            await asyncio.Event().wait()
        for _ in range(3):
            await asyncio.sleep(0)  # no answer is immediate
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        return answer


status_of_one = always(deployment_status(replica("a")))
no_replicas = always(deployment_status(target=1))


def backend_of(
    *calls: Any,
    status: Any = status_of_one,
    max_hold_s: float = 120.0,
    max_deadline_s: float = 60.0,
    known: Replicas | None = None,
    model: str = "demo",
) -> tuple[ServeBackend, list[Response]]:
    """Make a backend whose handle gives these answers, one or several for each call.

    ``None`` is an answer that never comes, and a number one that takes so many seconds.
    """
    responses = [Response(*(call if isinstance(call, list) else [call])) for call in calls]
    pending = iter(responses)

    def answer(*args: Any) -> Response:
        response = next(pending)
        if args:
            response.context = args[-1]
        return response

    method = SimpleNamespace(remote=answer)
    handle: Any = SimpleNamespace(generate=method, describe=method, options=lambda stream: handle)
    replicas = known or Replicas(status)
    return ServeBackend(model, handle, max_hold_s, max_deadline_s, replicas), responses


def raised_by_replica(error: Exception) -> Exception:
    """Wrap an error as Ray passes it to the caller."""
    wrapped: Exception = RayTaskError("generate", "traceback", error).as_instanceof_cause()
    return wrapped


class Growing:
    """A deployment whose second replica runs once ``grown`` is set."""

    def __init__(self) -> None:
        self.target = 2
        self.start_time_s = time.time()
        self.grown = False
        self.calls = 0

    async def __call__(self) -> Any:
        self.calls += 1
        replicas = [replica("a")]
        if self.target > 1:
            state = "RUNNING" if self.grown else "STARTING"
            replicas.append(replica("b", state, self.start_time_s))
        return deployment_status(*replicas, target=self.target)
