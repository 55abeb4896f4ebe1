"""The endpoints. They reach the generator only through a `GenerationBackend`."""

import asyncio
from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from serve_app import __version__
from serve_app.config.models import AppConfig
from serve_app.gateway import page
from serve_app.gateway.api_docs import create_documented
from serve_app.gateway.auth import KeyGuard, KeyRing
from serve_app.gateway.body_limit import BodyLimit
from serve_app.gateway.disconnects import while_connected
from serve_app.gateway.errors import add_error_handlers, documented
from serve_app.gateway.exposition import Gather, exposition, gather_own
from serve_app.gateway.lora_list import add_loras
from serve_app.gateway.model_list import add_models
from serve_app.gateway.models import ServedModels
from serve_app.gateway.openapi import (
    EVENTS,
    complete,
    described,
    edit_body,
    generation_body,
    streamed,
)
from serve_app.gateway.parsing import query_warnings, read_edit, read_generation
from serve_app.gateway.relative_redirects import RelativeRedirects
from serve_app.gateway.requests_log import RequestLog, record_of
from serve_app.gateway.responses.answers import EVENTS as RESPONSE_EVENTS
from serve_app.gateway.responses.routes import RESPONSES, add_responses
from serve_app.gateway.schemas import (
    Health,
    ImagesAnswer,
    ImagesResponse,
    LinksResponse,
)
from serve_app.gateway.sdapi.routes import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, add_sdapi
from serve_app.gateway.service import ImageJob, ImageService
from serve_app.gateway.storage.delivery import FILES, Deliver, Delivery
from serve_app.gateway.streaming import stream
from serve_app.protocol.backend import GenerationBackend

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"

GENERATION_ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)

OPEN = ("", "/", "/page/", "/health", "/ready", "/docs", "/openapi.json", "/static-offline-docs/")
"""Paths that need no key: health, the API's description and the page, to which "" leads."""

EXPOSED_HEADERS = ("Retry-After", "x-request-id")
"""Headers of responses that web pages of other origins may read."""


def create_api(
    config: AppConfig,
    backends: GenerationBackend | Sequence[GenerationBackend],
    keys: KeyRing,
    gather: Gather = gather_own,
    traced: Callable[[ASGIApp], ASGIApp] | None = None,
) -> FastAPI:
    """Make the ASGI application of one gateway replica.

    Args:
        config: the whole configuration.
        backends: generate the images: one backend for each model, in the config's order.
        keys: authenticate requests.
        gather: returns the reports for ``/metrics``.
        traced: middleware that traces requests, if they are traced.
    """
    models = ServedModels.create(config, backends)
    limits = models.limits
    delivery = Delivery(config)
    answer = ImagesResponse if delivery.store is None else ImagesResponse | LinksResponse
    api = create_documented("diffusion-serve", __version__, described(config), delivery.lifespan)

    sdapi = (TEXT_TO_IMAGE, IMAGE_TO_IMAGE) if config.gateway.sdapi else ()

    def max_body_bytes(path: str) -> int:
        uploads = path in (EDITS, IMAGE_TO_IMAGE, RESPONSES)
        return limits.max_upload_bytes if uploads else limits.max_body_bytes

    origins = config.gateway.cors_origins
    open_paths = OPEN if delivery.store is None else (*OPEN, FILES)
    # The last one added sees a request first: without a valid key, no body is read.
    api.add_middleware(RelativeRedirects)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    api.add_middleware(KeyGuard, keys=keys, open_paths=open_paths, origins=origins)
    if traced is not None:
        api.add_middleware(traced)
    api.add_middleware(
        RequestLog,
        models=config.ids,
        paths=(GENERATIONS, EDITS, RESPONSES, *sdapi),
        log_prompts=config.gateway.log_prompts,
        principals=[(known.name, known.priority) for known in keys.principals],
    )
    if origins:
        # The outermost: a browser asks first, without a key, and reads no error without headers.
        api.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
    add_error_handlers(api)
    complete(api, with_keys=bool(keys), events=(*EVENTS.values(), *RESPONSE_EVENTS))

    async def respond(
        request: Request, service: ImageService, job: ImageJob, deliver: Deliver
    ) -> ImagesAnswer:
        async def work() -> ImagesAnswer:
            return await deliver(job, await service.images(job))

        return await while_connected(request, work())

    @api.post(
        GENERATIONS,
        response_model=answer,
        responses=streamed("image_generation") | GENERATION_ERRORS,
        openapi_extra=generation_body(limits),
        tags=["images"],
    )
    async def generate_images(request: Request) -> Response | ImagesAnswer:
        """Generate images from a prompt."""
        body, ignored = await read_generation(request, config.gateway.unknown_fields)
        scope = request.scope
        model = models.of(request.state.principal).choose(body.model, record_of(scope))
        service = model.service
        deliver = await delivery.chosen(body, request, model.id)
        job = await service.prepare(
            "image_generation", body, record_of(scope), request.state.principal
        )
        job = job.warned([*ignored, *query_warnings(request)])
        if body.stream:
            return await stream(service, job, scope)
        return await respond(request, service, job, deliver)

    @api.post(
        EDITS,
        response_model=answer,
        responses=streamed("image_edit") | GENERATION_ERRORS,
        openapi_extra=edit_body(limits),
        tags=["images"],
    )
    async def edit_images(request: Request) -> Response | ImagesAnswer:
        """Generate images from a prompt and an input image.

        With a mask, only its transparent parts change.
        """
        edit = await read_edit(request, config.gateway.unknown_fields)
        scope = request.scope
        model = models.of(request.state.principal).choose(edit.fields.model, record_of(scope))
        service = model.service
        deliver = await delivery.chosen(edit.fields, request, model.id)
        job = await service.prepare(
            "image_edit",
            edit.fields,
            record_of(scope),
            request.state.principal,
            edit.images,
            edit.mask,
        )
        job = job.warned([*edit.warnings, *query_warnings(request)])
        if edit.fields.stream:
            return await stream(service, job, scope)
        return await respond(request, service, job, deliver)

    add_models(api, models)
    add_loras(api, models)

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
        """Check readiness: status 200 if a replica can generate, otherwise 503.

        With several models, one that can generate is enough, or that a request can start from zero.
        """
        await models.check_ready()
        return Health()

    if delivery.store is not None:
        from serve_app.gateway.storage.files import add_files  # an optional dependency

        add_files(api, delivery.store)

    @api.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """Return the metrics of the whole application, for Prometheus."""
        accept = request.headers.get("accept", "")
        text, media_type = await asyncio.to_thread(exposition, await gather(), accept)
        return Response(text, headers={"Content-Type": media_type})

    add_responses(api, config, models)
    if config.gateway.sdapi:
        add_sdapi(api, config, models)

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
