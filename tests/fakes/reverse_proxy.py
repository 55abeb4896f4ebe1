"""A real reverse proxy that removes a prefix from paths, as an ingress does."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.fakes.http_server import QuietHandler, serving

_OWN_HEADERS = {"connection", "content-encoding", "content-length", "transfer-encoding"}
"""Headers of one connection, and those of a body that httpx has already decoded."""


@contextmanager
def stripping_proxy(prefix: str, upstream: str) -> Iterator[str]:
    """Serve ``upstream`` below ``prefix``; yield the proxy's URL, without the prefix.

    Like many ingresses, it sends ``/`` upstream for the bare prefix, replaces the Host header and
    leaves redirects as they are.
    """

    class Handler(QuietHandler):
        def forward(self) -> None:
            path = self.path.removeprefix(prefix)
            if path == self.path or (path and path[0] not in "/?"):
                self.respond(404, b"not below the prefix", "text/plain")
                return
            url = upstream + (path if path.startswith("/") else f"/{path}")
            headers = {name: value for name, value in self.headers.items() if name != "Host"}
            answer = httpx.request(
                self.command, url, content=self.body(), headers=headers, timeout=240
            )
            self.send_response(answer.status_code)
            for name, value in answer.headers.multi_items():
                if name not in _OWN_HEADERS:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = forward  # noqa: N815
        do_POST = forward  # noqa: N815

    with serving(Handler) as url:
        yield url
