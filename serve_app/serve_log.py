"""Our log lines among Serve's: in its files and on its console, with replica and request id."""

import logging


def log_through_serve() -> None:
    """Called once in each replica and proxy: Serve leaves loggers not its own to the root's."""
    ours = logging.getLogger("serve_app")
    ours.setLevel(logging.INFO)
    ours.parent = logging.getLogger("ray.serve")
