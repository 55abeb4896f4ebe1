"""The endpoint of stored images. Their names are the permission to read them: it needs no key."""

from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve_app.errors import ImageNotFound
from serve_app.gateway.errors import documented
from serve_app.gateway.storage.delivery import FILES
from serve_app.gateway.storage.names import ImageName
from serve_app.gateway.storage.ranges import RangeBeyondEnd, requested_range
from serve_app.gateway.storage.store import ImageStore, cache_control
from serve_app.protocol.images import IMAGE_FORMATS

_FILE = {
    f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in IMAGE_FORMATS
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": _FILE},
    206: {"description": "The range of the header `Range`.", "content": _FILE},
    304: {"description": "The client has the file, as `If-None-Match` says."},
}


def add_files(api: FastAPI, store: ImageStore) -> None:
    """Serve the images of a store."""

    @api.head(FILES + "{name}", include_in_schema=False)
    @api.get(
        FILES + "{name}",
        response_class=Response,
        responses=_RESPONSES | documented(404, 416, 503),
        openapi_extra={"security": []},
        tags=["images"],
    )
    async def read_image_file(
        name: Annotated[str, Path(description="Last part of a link.")], request: Request
    ) -> Response:
        """Return a stored image, until its link expires.

        It needs no key: whoever has the link may read the image.
        """
        image = ImageName.parse(name)
        if image is None or image.is_expired:
            raise _not_found()
        headers = {
            "Accept-Ranges": "bytes",
            "Cache-Control": cache_control(image.remaining_s),
            "ETag": f'"{image.text}"',  # the file of a name never changes
            "X-Content-Type-Options": "nosniff",
        }
        held = _matches(request.headers.get("if-none-match", ""), headers["ETag"])
        if held or request.method == "HEAD":
            size = await store.size(image)
            if size is None:
                raise _not_found()
            if held:
                return Response(status_code=304, headers=headers)
            headers["Content-Length"] = str(size)
            return Response(headers=headers, media_type=image.media_type)
        data = await store.read(image)
        if data is None:
            raise _not_found()
        if request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
            try:
                part = requested_range(request.headers.get("range", ""), len(data))
            except RangeBeyondEnd:
                raise HTTPException(
                    416,
                    f"the range is beyond the end of the image, which has {len(data)} bytes.",
                    {"Content-Range": f"bytes */{len(data)}"},
                ) from None
            if part is not None:
                headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{len(data)}"
                content = data[part.start : part.stop]
                return Response(content, 206, headers, image.media_type)
        return Response(data, headers=headers, media_type=image.media_type)


def _not_found() -> ImageNotFound:
    """Return one error for expired and unknown images, which tells nobody what there was."""
    return ImageNotFound("no image here: its link has expired, or there never was one.")


def _matches(if_none_match: str, etag: str) -> bool:
    given = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in given or given == ["*"]
