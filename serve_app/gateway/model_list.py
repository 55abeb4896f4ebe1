"""The endpoints ``/v1/models`` and ``/v1/models/{model}``."""

import asyncio
import time
from typing import Annotated

from fastapi import FastAPI, Path, Request

from serve_app.errors import Overloaded, Unavailable
from serve_app.gateway.errors import documented
from serve_app.gateway.models import ServedModel, ServedModels
from serve_app.gateway.schemas import ModelList, ModelObject, ModelSummary, SeveralModels
from serve_app.protocol.backend import ModelState
from serve_app.protocol.params import ModelInfo

DESCRIBED_WITHIN_S = 2.0
"""Time for a running replica to describe its model. Without an answer, the summary is returned."""


def add_models(api: FastAPI, models: ServedModels) -> None:
    """Add the endpoints.

    A single model is described by a replica, for which a request waits. Of several, the summary is
    returned of those that no running replica has described yet: a list starts no model, and waits
    for none.
    """
    created = int(time.time())
    single = len(models) == 1
    answer: type[ModelList | SeveralModels] = ModelList if single else SeveralModels

    async def shown(model: ServedModel) -> ModelSummary:
        if single:
            info = await model.backend.describe()
            state = await model.backend.state()
            # A replica has described it.
            return described(info, "running" if state == "unknown" else state, created)
        state = await model.backend.state()
        info_or_none = await _known(model, state)
        if info_or_none is None:
            return summary(model, state, created)
        return described(info_or_none, state, created)

    @api.get(
        "/v1/models",
        response_model=answer,
        response_description="The served model, as a list of one."
        if single
        else "The served models, the default one first.",
        responses=documented(401, 403, 429, 503),
        tags=["models"],
    )
    async def list_models(request: Request) -> ModelList | SeveralModels:
        """List the models that the key may use. The first one serves requests that name none."""
        allowed = models.of(request.state.principal)
        return answer.model_validate({"data": await asyncio.gather(*map(shown, allowed))})

    # Model names from the hub have a slash.
    @api.get(
        "/v1/models/{model:path}",
        response_model=ModelObject if single else ModelObject | ModelSummary,
        response_description="The served model." if single else "The model.",
        responses=documented(401, 403, 404, 429, 503),
        tags=["models"],
    )
    async def retrieve_model(
        request: Request,
        model: Annotated[str, Path(description="Name of the model; it may contain slashes.")],
    ) -> ModelSummary:
        """Return the options and limits of a model."""
        return await shown(models.of(request.state.principal).find(model))


async def _known(model: ServedModel, state: ModelState) -> ModelInfo | None:
    """Return the description of a model, unless a replica would have to start for it."""
    if model.backend.known is None and state == "running":
        try:
            async with asyncio.timeout(DESCRIBED_WITHIN_S):
                return await model.backend.describe()
        except (Unavailable, Overloaded, TimeoutError):
            return None
    return model.backend.known


def summary(model: ServedModel, state: ModelState, created: int) -> ModelSummary:
    """Describe a model by its configuration alone."""
    limits = model.config.engine.limits
    return ModelSummary(
        id=model.id,
        created=created,
        state=state,
        max_pixels=limits.max_pixels,
        max_side=limits.max_side_px,
        max_steps=limits.max_steps,
        max_images=limits.max_images,
        max_prompt_chars=limits.max_prompt_chars,
        max_deadline_s=limits.max_deadline_s,
        max_loras=limits.max_loras,
    )


def described(info: ModelInfo, state: ModelState, created: int) -> ModelObject:
    """Describe a model by what a replica knows of it."""
    limits = info.limits
    return ModelObject(
        id=info.id,
        created=created,
        state=state,
        pipeline=info.pipeline,
        tasks=list(info.tasks),
        default_size=f"{info.default_width}x{info.default_height}",
        size_multiple=info.size_multiple,
        max_pixels=limits.max_pixels,
        max_side=limits.max_side_px,
        default_steps=info.default_steps,
        default_acceleration=info.default_acceleration,
        low_quality_acceleration=info.low_quality_acceleration,
        max_steps=limits.max_steps,
        quality_steps=info.quality_steps,
        max_images=limits.max_images,
        max_input_images=info.max_input_images,
        default_strengths=dict(info.default_strengths),
        max_prompt_chars=limits.max_prompt_chars,
        max_deadline_s=limits.max_deadline_s,
        takes_negative_prompt=info.takes_negative_prompt,
        schedulers=list(info.noise_schedulers),
        unavailable_schedulers={
            name: dict(reasons) for name, reasons in info.unavailable_noise_schedulers.items()
        },
        loras=list(info.loras),
        partial_loras=dict(info.partial_loras),
        loras_on_demand=info.loras_on_demand,
        max_loras=limits.max_loras,
        safety=info.safety,
        safety_checker=info.safety_checker,
        batching="on" if info.sharing == "batched" else "off",
        batching_difference=info.sharing_difference,
        batching_psnr_db=info.sharing_psnr_db,
        batching_note=info.sharing_note,
    )
