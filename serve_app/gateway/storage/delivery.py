"""How images reach the client: in the response, in base64, or by links to stored files.

The endpoints ask it before anything is generated, so that a request that cannot get its links
costs nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request

from serve_app.config.models import AppConfig
from serve_app.errors import InvalidRequest, StorageAway
from serve_app.gateway.image_request import ImageRequest
from serve_app.gateway.schemas import ImageLink, ImageSafety, ImagesAnswer, LinksResponse
from serve_app.gateway.service import ImageJob, in_base64
from serve_app.gateway.storage.names import ImageName
from serve_app.gateway.storage.sweep import sweep_always
from serve_app.protocol.images import EncodedImage

if TYPE_CHECKING:
    from serve_app.gateway.storage.store import ImageStore

Deliver = Callable[[ImageJob, Sequence[EncodedImage]], Awaitable[ImagesAnswer]]
"""Makes the response for generated images."""

FILES = "/v1/images/files/"
"""Path below which the gateway serves stored images."""


class Delivery:
    """Chooses for each request how its images are delivered."""

    def __init__(self, config: AppConfig) -> None:
        """Open the store, if the config names one.

        Raises:
            ConfigError: if there cannot be such a store.
        """
        self._config = config.gateway.storage
        self.store: ImageStore | None = None
        if self._config.url is not None:
            from serve_app.gateway.storage import store  # an optional dependency

            self.store = store.ImageStore(self._config)

    async def chosen(self, body: ImageRequest, request: Request, model: str) -> Deliver:
        """Return how to answer this request for the model of this id.

        Raises:
            InvalidRequest: if it asks for links that it cannot get.
            StorageAway: if it asks for links, and the store is away.
        """
        if not self._wants_links(body, model):
            return inline
        if self.store is None:
            raise InvalidRequest(
                "response_format 'url' is not available: this server stores no images. Use "
                "b64_json.",
                "response_format",
            )
        if body.stream:
            raise InvalidRequest(
                "response_format is 'url', and the events of a stream carry b64_json: leave one "
                "of the two out.",
                "response_format",
            )
        if self._config.when_away == "reject":
            await self.store.check()
        base = self._config.public_url or str(request.base_url).rstrip("/")
        return _Links(self.store, self._config.ttl_s, base + FILES).answer

    def _wants_links(self, body: ImageRequest, model: str) -> bool:
        if body.response_format is not None:
            return body.response_format == "url"
        name = body.model or model
        return not body.stream and any(
            fnmatchcase(name, wanted) for wanted in self._config.default_for
        )

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Remove expired images from a folder while the application runs."""
        folder = self._config.folder
        if folder is None:
            yield
            return
        sweeping = asyncio.create_task(sweep_always(folder))
        try:
            yield
        finally:
            sweeping.cancel()


async def inline(job: ImageJob, images: Sequence[EncodedImage]) -> ImagesAnswer:
    """Answer with the images themselves."""
    return in_base64(job, images)


class _Links:
    """Answers a request with links."""

    def __init__(self, store: "ImageStore", ttl_s: int, folder_url: str) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._folder_url = folder_url

    async def answer(self, job: ImageJob, images: Sequence[EncodedImage]) -> ImagesAnswer:
        """Store the images, all at once. If one cannot be stored, none is lost: see the warning."""
        if not self._store.seems_away:
            stored = [self._stored(job, image) for image in images]
            links = await asyncio.gather(*stored, return_exceptions=True)
            found = [link for link in links if isinstance(link, ImageLink)]
            if len(found) == len(images):
                return job.answer(LinksResponse, found, images)
            for failed in links:
                if not isinstance(failed, ImageLink | StorageAway):
                    raise failed
        warning = "response_format is b64_json, not url: the images could not be stored."
        return in_base64(job.warned([warning]), images)

    async def _stored(self, job: ImageJob, image: EncodedImage) -> ImageLink:
        name = ImageName.new(job.body.output_format, self._ttl_s)
        await self._store.put(name, image.data)
        return ImageLink(
            url=await self._store.presigned(name) or self._folder_url + name.text,
            seed=image.seed,
            safety=ImageSafety.of(image.safety),
        )
