"""The API on a port of this machine, for browsers and proxies."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from tests.serve_process import free_port
from tests.waiting import wait_until


@contextmanager
def served(api: FastAPI, root_path: str = "") -> Iterator[str]:
    """Serve the API in a thread until the block ends; return its URL."""
    port = free_port()
    settings = uvicorn.Config(api, port=port, root_path=root_path, log_level="warning")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, name="gateway")
    thread.start()
    try:
        wait_until(lambda: server.started, what="the gateway")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
