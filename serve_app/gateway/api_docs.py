"""The API's description and its page at ``/docs``, whose addresses are all relative.

So they hold at the root, below Serve's ``route_prefix``, and behind a proxy that removes a prefix,
of which the server does not know.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi_offline import FastAPIOffline
from starlette.types import Lifespan

_FILES = "static-offline-docs"


def create_documented(
    title: str, version: str, description: str, lifespan: Lifespan[Any]
) -> FastAPI:
    """Make an application with ``/openapi.json``, ``/docs`` and the files that it needs."""
    api = FastAPIOffline(
        title=title,
        version=version,
        description=description,
        lifespan=lifespan,
        servers=[{"url": ".", "description": "The folder of this description."}],
        root_path_in_servers=False,
        static_url=f"/{_FILES}",
        docs_url=None,
        redoc_url=None,
    )
    content = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=title,
        swagger_js_url=f"{_FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{_FILES}/swagger-ui.css",
        swagger_favicon_url=f"{_FILES}/favicon.png",
    ).body

    @api.head("/docs", include_in_schema=False)
    @api.get("/docs", include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        """Return a page that shows the description and sends requests."""
        return HTMLResponse(content)

    return api
