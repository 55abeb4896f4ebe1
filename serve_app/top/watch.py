"""Scrapes and draws until the user stops it."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live

from serve_app.errors import ConfigError, InvalidKey, Unavailable
from serve_app.top.screen import frame
from serve_app.top.series import Series
from serve_app.top.server import Server
from serve_app.top.snapshot import History


def watch(
    server: Server, console: Console, every_s: float, once: bool, model: str | None = None
) -> None:
    """Display frames until Ctrl-C, of all models or of one.

    Errors of `Server.scrape`, and the `ConfigError` for an unknown model, are raised before the
    first frame and displayed afterwards.
    """

    def scrape() -> Series:
        return server.scrape() if model is None else server.scrape().of_model(model)

    history = History()
    snapshot, clock = history.add(time.monotonic(), scrape()), _clock()
    if once:
        time.sleep(every_s)
        snapshot = history.add(time.monotonic(), scrape())
        console.print(frame(server, snapshot, _clock(), console))
        return
    notice = ""
    with _shown(console) as show:
        while True:
            height = console.height if console.is_alt_screen else None
            show(frame(server, snapshot, clock, console, height, notice))
            time.sleep(every_s)
            try:
                snapshot, clock = history.add(time.monotonic(), scrape()), _clock()
                notice = ""
            except (Unavailable, InvalidKey, ConfigError) as error:
                history.clear()
                notice = f"{_clock()}: {error} The data below are from {clock}. Retrying."


def _clock() -> str:
    return time.strftime("%H:%M:%S")


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """Show frames in place in a terminal; otherwise as text, one below the other."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda drawn: console.print(drawn, "")
        return
    # SIGTERM restores the terminal as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda drawn: live.update(drawn, refresh=True)
