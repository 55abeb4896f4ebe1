"""The endpoints below /sdapi/v1."""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from serve_app.config.limits import LimitsConfig
from serve_app.config.models import AppConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.data_urls import file_of
from serve_app.gateway.disconnects import while_connected
from serve_app.gateway.errors import documented
from serve_app.gateway.input_images import in_image_thread, read_white_mask
from serve_app.gateway.models import ServedModel, ServedModels
from serve_app.gateway.parsing import read_json
from serve_app.gateway.requests_log import record_of
from serve_app.gateway.sdapi import answers
from serve_app.gateway.sdapi.answers import (
    Embeddings,
    FileItem,
    Item,
    LoraItem,
    Memory,
    ModelItem,
    SamplerItem,
    SchedulerItem,
    UpscalerItem,
)
from serve_app.gateway.sdapi.fields import (
    CHECKPOINT,
    ImageToImageRequest,
    SdapiRequest,
    TextToImageRequest,
    check_settings,
)
from serve_app.gateway.sdapi.running import RunningRequests
from serve_app.gateway.sdapi.translation import renamed, translate
from serve_app.protocol.params import ModelInfo

PREFIX = "/sdapi/v1"
TEXT_TO_IMAGE = f"{PREFIX}/txt2img"
IMAGE_TO_IMAGE = f"{PREFIX}/img2img"

NO_MEMORY = {"error": "the gateway does not measure memory; see /metrics"}


class OptionsUpdate(BaseModel):
    """The body of ``POST /sdapi/v1/options``: settings by name."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: str | None = Field(
        None, description="Must be the served model, or the first of several."
    )


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: described | {"model": answers.SdapiError}
        for status, described in documented(*statuses).items()
    }


def _body(model: type[BaseModel], limits: LimitsConfig | None = None) -> dict[str, Any]:
    schema = model.model_json_schema()
    if limits is not None:
        properties = schema["properties"]
        properties["prompt"]["maxLength"] = limits.max_prompt_chars
        for name, most in (
            ("steps", limits.max_steps),
            ("width", limits.max_side_px),
            ("height", limits.max_side_px),
        ):
            properties[name]["anyOf"][0]["maximum"] = most
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


GENERATION_ERRORS = _errors(400, 401, 403, 404, 408, 413, 415, 429, 499, 500, 503, 504)
LIST_ERRORS = _errors(401, 403, 404, 429, 503)
KEY_ERRORS = _errors(401, 403, 429)

LISTS: tuple[tuple[str, str, Any, Callable[[ModelInfo], Any]], ...] = (
    ("/samplers", "Samplers of the model.", list[SamplerItem], answers.samplers),
    ("/schedulers", "Spacings of noise levels.", list[SchedulerItem], answers.schedulers),
)
"""Paths of lists that follow the model: the description, the type and the content."""

CHECKPOINTS = "The served models, the default one first."

FIXED: tuple[tuple[str, str, Any, Any], ...] = (
    ("/upscalers", "The upscaler that does nothing.", list[UpscalerItem], [UpscalerItem()]),
    ("/latent-upscale-modes", "An empty list.", list[Item], []),
    ("/sd-vae", "An empty list: the model has its own.", list[FileItem], []),
    ("/sd-modules", "An empty list: the model has its own.", list[FileItem], []),
    ("/embeddings", "No embeddings.", Embeddings, Embeddings()),
    ("/memory", "Reasons why there are no numbers.", Memory, Memory(ram=NO_MEMORY, cuda=NO_MEMORY)),
)
"""Paths of answers that are always the same: the description, the type and the content."""


def add_sdapi(api: FastAPI, config: AppConfig, models: ServedModels) -> None:
    """Add the endpoints of this API."""
    router = APIRouter(prefix=PREFIX, tags=["sdapi"])
    limits = models.limits
    running = RunningRequests()

    async def generate(
        request: Request,
        chosen: ServedModel,
        given: SdapiRequest,
        images: Sequence[bytes] = (),
        mask: bytes | None = None,
    ) -> answers.GenerationAnswer:
        record = record_of(request.scope)
        inverted = isinstance(given, ImageToImageRequest) and given.inpainting_mask_invert

        async def work() -> answers.GenerationAnswer:
            model = await chosen.backend.describe()
            translated = translate(given, model)
            warnings = (*translated.warnings, *check_checkpoint(request, given.override_settings))
            with renamed():
                job = await chosen.service.prepare(
                    "image_edit" if images else "image_generation",
                    translated.body,
                    record,
                    request.state.principal,
                    images,
                    mask,
                    functools.partial(read_white_mask, inverted=inverted),
                )
                # After the checks of the other API, where only streams have progress.
                body = job.body.model_copy(update={"progress": True})
                job = replace(job, body=body, embeds=False).warned(warnings)
                response = await chosen.service.generate_all(job)
            return await asyncio.to_thread(answers.generated, given, job.images, response, model)

        return await while_connected(request, running.run(record, work))

    def allowed(request: Request) -> ServedModels:
        return models.of(request.state.principal)

    def check_checkpoint(request: Request, settings: Mapping[str, Any]) -> tuple[str, ...]:
        name = settings.get(CHECKPOINT)
        with renamed():
            return allowed(request).names.check(str(name)) if name else ()

    def choose(request: Request, given: SdapiRequest) -> ServedModel:
        name = given.override_settings.get(CHECKPOINT)
        with renamed():
            return allowed(request).choose(str(name) if name else None, record_of(request.scope))

    @router.post(
        "/txt2img",
        response_description="The images.",
        responses=GENERATION_ERRORS,
        openapi_extra=_body(TextToImageRequest, limits),
    )
    async def text_to_image(request: Request) -> answers.GenerationAnswer:
        """Generate images from a prompt."""
        given = await read_json(request, TextToImageRequest)
        return await generate(request, choose(request, given), given)

    @router.post(
        "/img2img",
        response_description="The images.",
        responses=GENERATION_ERRORS,
        openapi_extra=_body(ImageToImageRequest, limits),
    )
    async def image_to_image(request: Request) -> answers.GenerationAnswer:
        """Generate images from a prompt and an input image. With a mask, its white part changes."""
        given = await read_json(request, ImageToImageRequest)
        chosen = choose(request, given)

        def files() -> tuple[bytes, bytes | None]:
            image = file_of(given.init_images[0], "init_images")
            return image, None if given.mask is None else file_of(given.mask, "mask")

        image, mask = await in_image_thread(files)
        return await generate(request, chosen, given, [image], mask)

    @router.get("/options", response_description="Settings.", responses=LIST_ERRORS)
    async def options(request: Request) -> answers.Options:
        """Return the settings that clients read."""
        return answers.Options(sd_model_checkpoint=allowed(request).default.id)

    @router.get(
        "/sd-models",
        response_description=CHECKPOINTS,
        responses=LIST_ERRORS,
        name="sd-models",
        summary=CHECKPOINTS,
    )
    async def checkpoints(request: Request) -> list[ModelItem]:
        if len(models) == 1:
            await models.default.backend.describe()  # clients wait for it here
        return answers.models(one.id for one in allowed(request))

    @router.post(
        "/options",
        response_description="Null: nothing is to be set.",
        responses=_errors(400, 401, 403, 404, 408, 413, 415, 429),
        openapi_extra=_body(OptionsUpdate),
    )
    async def set_options(request: Request) -> None:
        """Accept the settings that hold anyway. No setting changes."""
        given = await read_json(request, OptionsUpdate)
        checkpoint = given.sd_model_checkpoint
        check_checkpoint(request, {CHECKPOINT: checkpoint})
        found = allowed(request)
        if checkpoint and found.find(checkpoint) is not found.default:
            raise InvalidRequest(
                f"{CHECKPOINT} is {checkpoint[:100]!r}, and no setting is kept here. Name the "
                f"model in override_settings.{CHECKPOINT} of each request; those without it go to "
                f"{found.default.id!r}.",
                CHECKPOINT,
            )
        check_settings(given.model_extra or {})

    @router.get("/progress", response_description="Progress.", responses=KEY_ERRORS)
    async def progress(request: Request) -> answers.ProgressAnswer:
        """Return the progress of this key's requests of this API, on this gateway replica."""
        return answers.progress(running.overview(request.state.principal.name))

    @router.post("/interrupt", response_description="Nothing.", responses=KEY_ERRORS)
    async def interrupt(request: Request) -> dict[str, str]:
        """Cancel this key's requests of this API, on this gateway replica."""
        running.interrupt(request.state.principal.name)
        return {}

    async def described(listed: Callable[[ModelInfo], Any], request: Request) -> Any:
        return listed(await allowed(request).default.backend.describe())

    async def fixed(content: Any, _: Request) -> Any:
        return content

    @router.get("/loras", response_description="LoRA adapters of the model.", responses=LIST_ERRORS)
    async def loras(request: Request) -> list[LoraItem]:
        """List the LoRA adapters, those on demand too."""
        backend = allowed(request).default.backend
        model = await backend.describe()
        listed = await backend.loras() if model.loras_on_demand else ()
        return answers.loras([one.name for one in listed] or model.loras)

    lists = [(*row, described, LIST_ERRORS) for row in LISTS]
    constants = [(*row, fixed, KEY_ERRORS) for row in FIXED]
    for path, what, kind, source, answer, errors in (*lists, *constants):
        router.add_api_route(
            path,
            functools.partial(answer, source),
            response_model=kind,
            response_description=what,
            responses=errors,
            name=path[1:],
            summary=what,
        )
    api.include_router(router)
