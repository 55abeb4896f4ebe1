"""One call of all running replicas of a deployment."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.deployments.ray_compat import call_all_replicas

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Answers(Generic[T]):
    """What the replicas answered."""

    answered: list[T]
    called: int
    """Number of replicas that were called."""


async def ask_all(
    deployment: DeploymentHandle[Any], method: str, kind: type[T], within_s: float
) -> Answers[T]:
    """Call a method of every running replica, each with its own time limit.

    Replicas that fail, or do not answer in time, are left out. ``kind`` is the type of an answer.
    """
    try:
        async with asyncio.timeout(within_s):
            results = await call_all_replicas(deployment, method)
    except (RayServeException, TimeoutError):
        return Answers([], 0)  # it has no replica
    answers = await asyncio.gather(*(_answer(one, method, kind, within_s) for one in results))
    return Answers([one for one in answers if one is not None], len(answers))


async def _answer(result: Any, method: str, kind: type[T], within_s: float) -> T | None:
    try:
        async with asyncio.timeout(within_s):
            answer = await result.get_async()
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("a replica does not answer: %s: %r", method, error)
        result.cancel()
        return None
    assert isinstance(answer, kind)
    return answer
