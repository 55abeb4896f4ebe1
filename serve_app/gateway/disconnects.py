"""Work that ends with its client's connection."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request

from serve_app.errors import Cancelled

Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work, and cancel it when the client goes away.

    Serve does so as well, except for clients that send x-request-disconnect-disabled.

    Raises:
        Cancelled: the client went away.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: Sequence[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(gone())]
    working = tasks[0]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client closed the connection.")
        result: Result = working.result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
