"""The endpoints. They reach the generator only through a `GenerationBackend`."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from serve_app import __version__
from serve_app.config.models import AppConfig
from serve_app.errors import Cancelled, ModelNotFound
from serve_app.gateway import page
from serve_app.gateway.api_docs import create_documented
from serve_app.gateway.auth import KeyGuard, KeyRing
from serve_app.gateway.body_limit import BodyLimit
from serve_app.gateway.errors import add_error_handlers, documented
from serve_app.gateway.exposition import Gather, exposition, gather_own
from serve_app.gateway.openapi import complete, described, edit_body, generation_body, streamed
from serve_app.gateway.parsing import query_warnings, read_edit, read_generation
from serve_app.gateway.relative_redirects import RelativeRedirects
from serve_app.gateway.requests_log import RequestLog, record_of
from serve_app.gateway.schemas import Health, ImagesResponse, ModelList, ModelObject
from serve_app.gateway.service import ImageService
from serve_app.gateway.streaming import stream
from serve_app.protocol.backend import GenerationBackend
from serve_app.protocol.params import ModelInfo

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"

GENERATION_ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)

OPEN = ("", "/", "/page/", "/health", "/ready", "/docs", "/openapi.json", "/static-offline-docs/")
"""Paths that need no key: health, the API's description and the page, to which "" leads."""


def create_api(
    config: AppConfig,
    backend: GenerationBackend,
    keys: KeyRing,
    gather: Gather = gather_own,
    traced: Callable[[ASGIApp], ASGIApp] | None = None,
) -> FastAPI:
    """Make the ASGI application of one gateway replica.

    Args:
        config: the whole configuration.
        backend: generates the images.
        keys: authenticate requests.
        gather: returns the reports for ``/metrics``.
        traced: middleware that traces requests, if they are traced.
    """
    limits = config.engine.limits
    started_at = int(time.time())
    service = ImageService(config, backend)
    api = create_documented("diffusion-serve", __version__, described(config))

    def max_body_bytes(path: str) -> int:
        return limits.max_upload_bytes if path == EDITS else limits.max_body_bytes

    # The last one added sees a request first: without a valid key, no body is read.
    api.add_middleware(RelativeRedirects)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    api.add_middleware(KeyGuard, keys=keys, open_paths=OPEN)
    if traced is not None:
        api.add_middleware(traced)
    api.add_middleware(
        RequestLog,
        model=config.model.id,
        paths=(GENERATIONS, EDITS),
        log_prompts=config.gateway.log_prompts,
        principals=keys.principals,
    )
    add_error_handlers(api)
    complete(api, with_keys=bool(keys))

    @api.post(
        GENERATIONS,
        response_model=ImagesResponse,
        responses=streamed("image_generation") | GENERATION_ERRORS,
        openapi_extra=generation_body(limits),
        tags=["images"],
    )
    async def generate_images(request: Request) -> Response | ImagesResponse:
        """Generate images from a prompt."""
        body = await read_generation(request)
        scope = request.scope
        job = await service.prepare(
            "image_generation", body, record_of(scope), request.state.principal
        )
        job = job.warned(query_warnings(request))
        if body.stream:
            return await stream(service, job, scope)
        return await _while_connected(request, service.generate_all(job))

    @api.post(
        EDITS,
        response_model=ImagesResponse,
        responses=streamed("image_edit") | GENERATION_ERRORS,
        openapi_extra=edit_body(limits),
        tags=["images"],
    )
    async def edit_images(request: Request) -> Response | ImagesResponse:
        """Generate images from a prompt and an input image.

        With a mask, only its transparent parts change.
        """
        form = await read_edit(request)
        scope = request.scope
        job = await service.prepare(
            "image_edit",
            form.fields,
            record_of(scope),
            request.state.principal,
            form.image,
            form.mask,
        )
        job = job.warned(query_warnings(request))
        if form.fields.stream:
            return await stream(service, job, scope)
        return await _while_connected(request, service.generate_all(job))

    @api.get(
        "/v1/models",
        response_description="The served model, as a list of one.",
        responses=documented(401, 403, 429, 503),
        tags=["models"],
    )
    async def list_models() -> ModelList:
        """List the models. There is one, the served model."""
        info = await backend.describe()
        return ModelList(data=[_model_object(info, started_at)])

    # Model names from the hub have a slash.
    @api.get(
        "/v1/models/{model:path}",
        response_description="The served model.",
        responses=documented(401, 403, 404, 429, 503),
        tags=["models"],
    )
    async def retrieve_model(
        model: Annotated[str, Path(description="Name of the model; it may contain slashes.")],
    ) -> ModelObject:
        """Return the options and limits of a model."""
        if model != config.model.id:
            raise ModelNotFound(f"no model {model[:100]!r} here; there is {config.model.id!r}.")
        return _model_object(await backend.describe(), started_at)

    @api.head("/health", include_in_schema=False)
    @api.get("/health", response_description="The gateway runs.", tags=["health"])
    async def health() -> Health:
        """Check liveness: status 200 as long as the gateway runs."""
        return Health()

    @api.head("/ready", include_in_schema=False)
    @api.get(
        "/ready",
        response_description="A replica can generate.",
        responses=documented(503),
        tags=["health"],
    )
    async def ready() -> Health:
        """Check readiness: status 200 if a replica can generate, otherwise 503."""
        await backend.check_ready()
        return Health()

    @api.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """Return the metrics of the whole application, for Prometheus."""
        accept = request.headers.get("accept", "")
        text, media_type = await asyncio.to_thread(exposition, await gather(), accept)
        return Response(text, headers={"Content-Type": media_type})

    if config.gateway.page:
        content, policy = page.render()

        @api.head("/", include_in_schema=False)
        @api.get("/", include_in_schema=False)
        async def show_page() -> HTMLResponse:
            """Return the page to try the model on, unless ``gateway.page`` is false."""
            return HTMLResponse(content, headers={"Content-Security-Policy": policy})

        scripts = page.scripts()

        @api.head("/page/{name}", include_in_schema=False)
        @api.get("/page/{name}", include_in_schema=False)
        async def show_script(name: str) -> Response:
            """Return a script of the page."""
            if name not in scripts:
                raise HTTPException(404)
            return Response(
                scripts[name],
                headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"},
                media_type="text/javascript",
            )

    return api


async def _while_connected(
    request: Request, work: Coroutine[Any, Any, ImagesResponse]
) -> ImagesResponse:
    """Do the work, and cancel it when the client goes away.

    Serve does so as well, except for clients that send x-request-disconnect-disabled.
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
        result: ImagesResponse = working.result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _model_object(info: ModelInfo, created: int) -> ModelObject:
    limits = info.limits
    return ModelObject(
        id=info.id,
        created=created,
        pipeline=info.pipeline,
        tasks=list(info.tasks),
        default_size=f"{info.default_width}x{info.default_height}",
        size_multiple=info.size_multiple,
        max_pixels=limits.max_pixels,
        max_side=limits.max_side_px,
        default_steps=info.default_steps,
        max_steps=limits.max_steps,
        quality_steps=info.quality_steps,
        max_images=limits.max_images,
        max_prompt_chars=limits.max_prompt_chars,
        max_deadline_s=limits.max_deadline_s,
        takes_negative_prompt=info.takes_negative_prompt,
        schedulers=list(info.noise_schedulers),
        unavailable_schedulers={
            name: dict(reasons) for name, reasons in info.unavailable_noise_schedulers.items()
        },
        loras=list(info.loras),
        partial_loras=dict(info.partial_loras),
        max_loras=limits.max_loras,
        safety=info.safety,
        safety_checker=info.safety_checker,
        batching="on" if info.sharing == "batched" else "off",
        batching_difference=info.sharing_difference,
        batching_psnr_db=info.sharing_psnr_db,
        batching_note=info.sharing_note,
    )
