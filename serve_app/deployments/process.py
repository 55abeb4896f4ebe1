"""The process of a replica: its threads, its garbage, its memory and its end."""

import ctypes
import gc
import logging
import os
import platform
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.engine.engine import Engine

FAREWELL_S = 1.0
"""Time from the end of a failed engine to the end of its process: its requests are told to move."""

SWITCH_INTERVAL_S = 0.0002
"""Longest time for which a thread keeps the interpreter while another one waits for it."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""

_NO_LIMIT = 2**31 - 1
"""The largest value that mallopt(3) takes, in bytes."""


def share_the_interpreter() -> None:
    """Make threads of this process take turns at the interpreter more often than by default.

    The engine's thread lets go of it in each operation of torch, hundreds of times a step. While
    the event loop handles a message, each return takes up to one interval, by default 5 ms.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def keep_freed_memory() -> None:
    """Make the C library keep the memory that torch frees on a CPU, as torch itself does on a GPU.

    Each step allocates the tensors that the one before freed. In between, glibc returns the largest
    ones to the kernel, which clears every page of theirs again: 5 % of a step's time with the demo
    model. The process stays as large as it was at its largest. Other C libraries are not changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, _NO_LIMIT)
    libc.mallopt(_MMAP_THRESHOLD, _NO_LIMIT)


def freeze_garbage_collector() -> None:
    """Exempt the objects of the start from later garbage collections; call it once it has ended.

    They are more than half a million and they stay. The first full collection would visit them all
    in the middle of some request: the engine's thread would stop for a third of a second.
    """
    gc.collect()
    gc.freeze()


def exit_when_lost(engine: "Engine") -> None:
    """Wait for the end of the engine, and end this process if the engine failed or is stuck.

    Serve would call the health check of a living process three times, ten seconds apart, before it
    sends no more requests here. They would all come here, as nothing runs here, and fail. Then it
    would wait for the stuck thread, for as long as the longest request may take. The routers avoid
    a process that has ended at once, and Serve replaces it after its next health check.
    """
    if engine.wait_for_loss():
        time.sleep(FAREWELL_S)
        logging.shutdown()
        os._exit(1)  # no other way ends a process with a thread that is stuck in the driver
