"""A live view of one deployment in the terminal, from its ``GET /metrics``.

Depends on the names in `serve_app.metrics` and on no other part of the server, so that it starts at
once and runs wherever the port can be reached. `server` fetches, `series` parses and computes
increases, `snapshot` keeps the last seconds, `screen` draws, `watch` repeats it.
"""

from serve_app.top.server import Server
from serve_app.top.watch import watch

__all__ = ["Server", "watch"]
