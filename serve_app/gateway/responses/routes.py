"""The endpoint ``/v1/responses``, and a clear answer to what is below it."""

from fastapi import FastAPI, Request
from starlette.responses import Response

from serve_app.config.models import AppConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.disconnects import while_connected
from serve_app.gateway.errors import documented
from serve_app.gateway.input_images import in_image_thread
from serve_app.gateway.models import ServedModels
from serve_app.gateway.openapi import event_stream
from serve_app.gateway.parsing import query_warnings, read_json
from serve_app.gateway.requests_log import record_of
from serve_app.gateway.responses.answers import EVENT_NAMES, EVENTS, Answer, ResponseObject
from serve_app.gateway.responses.description import request_body
from serve_app.gateway.responses.fields import ResponsesRequest
from serve_app.gateway.responses.translation import translate
from serve_app.gateway.service import ImageJob, ImageService
from serve_app.gateway.streaming import completed, stream

RESPONSES = "/v1/responses"

ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def add_responses(api: FastAPI, config: AppConfig, models: ServedModels) -> None:
    """Add the endpoints of this API."""

    async def answer(service: ImageService, job: ImageJob, begun: Answer) -> ResponseObject:
        return begun.complete(await completed(service, job))

    @api.post(
        RESPONSES,
        response_model=ResponseObject,
        responses=event_stream(EVENT_NAMES, EVENTS, "The response") | ERRORS,
        openapi_extra=request_body(models.limits),
        tags=["responses"],
    )
    async def create_response(request: Request) -> Response | ResponseObject:
        """Generate an image by OpenAI's Responses API, with the tool `image_generation`."""
        given = await read_json(request, ResponsesRequest, each_once=True)
        allowed = models.of(request.state.principal)
        model = allowed.choose(given.model, record_of(request.scope))
        translation = translate(given, config.gateway.unknown_fields)
        warnings = [*translation.warnings, *query_warnings(request)]
        if given.model is not None:
            warnings += allowed.names.check(given.model)
        service = model.service
        images: list[bytes] = []
        mask: bytes | None = None
        if translation.image_urls:
            images, mask = await in_image_thread(translation.files)
        with translation.renamed():
            job = await service.prepare(
                "image_edit" if images else "image_generation",
                translation.body,
                record_of(request.scope),
                request.state.principal,
                images,
                mask,
            )
        job = job.warned(warnings)
        begun = Answer(given, translation, job, model.id)
        if given.stream:
            return await stream(service, job, request.scope, begun)
        return await while_connected(request, answer(service, job, begun))

    methods = ["GET", "POST", "DELETE"]

    @api.api_route(f"{RESPONSES}/{{name}}", methods=methods, include_in_schema=False)
    @api.api_route(f"{RESPONSES}/{{name}}/{{rest:path}}", methods=methods, include_in_schema=False)
    async def find_response(name: str) -> None:
        """Return status 400: the server stores no responses."""
        raise InvalidRequest(
            f"{RESPONSES}/{name[:100]}: the server stores no responses. POST {RESPONSES} answers "
            "with the image."
        )
