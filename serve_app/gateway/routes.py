"""The endpoints. Knows the HTTP API and the request's parameters; of Ray only a `Painter`."""

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Protocol

from fastapi import Depends, FastAPI, Request
from pydantic import ValidationError

from serve_app import __version__
from serve_app.config import AppConfig
from serve_app.engine.encoding import EncodedImage, ImageFormat
from serve_app.engine.params import MAX_SEED, GenerationParams, ModelInfo
from serve_app.errors import InvalidRequest, ModelNotFound
from serve_app.gateway.body_limit import BodyLimit
from serve_app.gateway.errors import add_error_handlers, documented, from_validation
from serve_app.gateway.schemas import (
    Health,
    ImageData,
    ImageGenerationRequest,
    ImagesResponse,
    ModelList,
    ModelObject,
)


class Painter(Protocol):
    """What the gateway needs of the generator, wherever that runs.

    Cancelling a call cancels the work behind it.
    """

    async def paint(self, params: GenerationParams, image_format: ImageFormat) -> EncodedImage:
        """One picture. Raises `DiffusionServeError`."""
        ...

    async def describe(self) -> ModelInfo:
        """What the model can do. Raises `Unavailable` if the first replica is not ready in time."""
        ...

    async def check_ready(self) -> None:
        """Raise `Unavailable` unless a replica can paint now."""
        ...


async def _parse_body(request: Request) -> ImageGenerationRequest:
    # Not a FastAPI body parameter: that would refuse `curl -d`, which calls its JSON a form.
    try:
        return ImageGenerationRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error) from None


def _params(body: ImageGenerationRequest) -> list[GenerationParams]:
    """One set of parameters a picture; their seeds follow each other."""
    width, height = body.size_px()
    # Drawn here, so that a retry on another replica paints the same picture.
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    return [
        GenerationParams(
            prompt=body.prompt,
            seed=seed + index if seed < MAX_SEED - index else seed - index,
            negative_prompt=body.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            noise_scheduler=body.scheduler,
            lora=body.adapters(),
        )
        for index in range(body.n)
    ]


async def _paint_all(
    painter: Painter, requests: Sequence[GenerationParams], image_format: ImageFormat
) -> list[EncodedImage]:
    """All pictures or none: when one fails, or the client goes away, the others are dropped."""
    tasks = [asyncio.ensure_future(painter.paint(params, image_format)) for params in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _model_object(info: ModelInfo, created: int) -> ModelObject:
    return ModelObject(
        id=info.id,
        created=created,
        pipeline=info.pipeline,
        default_size=f"{info.default_width}x{info.default_height}",
        size_multiple=info.size_multiple,
        default_steps=info.default_steps,
        max_steps=info.limits.max_steps,
        schedulers=list(info.noise_schedulers),
        loras=list(info.loras),
        max_pixels=info.limits.max_pixels,
        batching="on" if info.sharing == "batched" else "off",
        batching_difference=info.sharing_difference,
        batching_note=info.sharing_note,
    )


def create_api(config: AppConfig, painter: Painter) -> FastAPI:
    """The ASGI application of one gateway replica."""
    limits = config.engine.limits
    started_at = int(time.time())
    api = FastAPI(title="diffusion-serve", version=__version__)
    api.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    add_error_handlers(api)

    @api.post(
        "/v1/images/generations",
        responses=documented([400, 404, 413, 500, 503]),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": ImageGenerationRequest.model_json_schema()}
                },
            }
        },
    )
    async def generate_images(
        body: Annotated[ImageGenerationRequest, Depends(_parse_body)],
    ) -> ImagesResponse:
        """Paint pictures that show the prompt."""
        if body.model is not None and body.model != config.model.id:
            raise ModelNotFound(
                f"no model {body.model[:100]!r} here; there is {config.model.id!r}.", "model"
            )
        if not 1 <= body.n <= limits.max_images:
            raise InvalidRequest(f"n must be from 1 to {limits.max_images}.", "n")
        info = await painter.describe()
        requests = [params.resolved(info) for params in _params(body)]
        images = await _paint_all(painter, requests, body.output_format)
        return ImagesResponse(
            created=int(time.time()),
            data=[
                ImageData(b64_json=base64.b64encode(image.data).decode(), seed=image.seed)
                for image in images
            ],
            size=f"{images[0].width}x{images[0].height}",
            output_format=body.output_format,
            warnings=list(dict.fromkeys(text for image in images for text in image.warnings)),
        )

    @api.get("/v1/models", responses=documented([503]))
    async def list_models() -> ModelList:
        """The model that is served, and what it takes."""
        info = await painter.describe()
        return ModelList(data=[_model_object(info, started_at)])

    @api.get("/health", responses=documented([503]))
    async def health() -> Health:
        """200 if a replica can paint now, else 503."""
        await painter.check_ready()
        return Health()

    return api
