"""The endpoint ``/v1/loras``."""

import asyncio
from typing import Annotated

from fastapi import FastAPI, Query, Request

from serve_app.gateway.errors import documented
from serve_app.gateway.models import ServedModel, ServedModels
from serve_app.gateway.schemas import LoraObject, LoraObjects


def add_loras(api: FastAPI, models: ServedModels) -> None:
    """Add the endpoint. It asks the replicas that run, and starts none."""

    @api.get(
        "/v1/loras",
        response_description="The adapters, by model.",
        responses=documented(401, 403, 404, 429, 503),
        tags=["models"],
    )
    async def list_loras(
        request: Request,
        model: Annotated[
            str | None, Query(description="Name of one model. Default: all of them.")
        ] = None,
    ) -> LoraObjects:
        """List the LoRA adapters that requests may name, of the key's models that are running."""
        allowed = models.of(request.state.principal)
        chosen = list(allowed) if model is None else [allowed.find(model)]
        found = await asyncio.gather(*map(_adapters, chosen))
        return LoraObjects(data=[adapter for adapters in found for adapter in adapters])


async def _adapters(model: ServedModel) -> list[LoraObject]:
    return [
        LoraObject(id=one.name, model=model.id, on_demand=one.on_demand, replicas=one.replicas)
        for one in await model.backend.loras()
    ]
