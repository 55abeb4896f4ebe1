"""Redirects to this server as relative references, which hold behind every reverse proxy."""

from itertools import takewhile
from urllib.parse import quote, urlsplit, urlunsplit

from starlette.datastructures import URL, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SAFE = ":/%#?=@[]!$&'()*+,;"


class RelativeRedirects:
    """ASGI middleware that makes the ``Location`` of a redirect relative.

    Starlette writes scheme, host and path as the server sees them. A client behind a proxy sees
    others: the proxy may end TLS, replace the Host header or remove a prefix. Headers such as
    ``X-Forwarded-Prefix`` would tell, but every client can send them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Starlette quotes a redirect in the same way, and leaves the request's path as it is.
        requested = urlsplit(quote(str(URL(scope=scope)), safe=_SAFE))

        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                location = urlsplit(headers.get("location", ""))
                if location.path and location[:2] == requested[:2]:
                    path = relative_reference(requested.path, location.path)
                    headers["location"] = urlunsplit(
                        location._replace(scheme="", netloc="", path=path)
                    )
            await send(message)

        await self._app(scope, receive, pass_on)


def relative_reference(path: str, target: str) -> str:
    """Return the reference that leads from one absolute path to another.

    It begins with a dot, so that no segment can be taken for a scheme or a host.
    """
    *folders, _ = path.split("/")[1:]
    goal = target.split("/")[1:]
    pairs = zip(folders, goal[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    up = [".."] * (len(folders) - shared)
    return "/".join([*(up or ["."]), *goal[shared:]])
