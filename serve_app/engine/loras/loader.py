"""Loading of adapters on demand, on threads of their own beside the engine's."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import torch

from serve_app.config.safetensors_header import read_header
from serve_app.engine.loras.source import AdapterFile, LoraSource
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.adapters import LoadedAdapter, load_adapter
from serve_app.errors import (
    DiffusionServeError,
    GenerationFailed,
    InvalidLora,
    LoraNotFound,
    ModelLoadError,
)
from serve_app.metrics.engine import LoraResult

logger = logging.getLogger(__name__)

FETCHES = 4
"""Files that are fetched at a time."""

Outcome = LoadedAdapter | DiffusionServeError


class LoraLoader:
    """Fetches files, and loads them for the networks of one pipeline."""

    def __init__(
        self,
        pipeline: Any,
        source: LoraSource,
        allow_partial: bool,
        metrics: EngineMetrics,
        on_end: Callable[[str, Outcome], None],
    ) -> None:
        """``on_end`` is called with the name of an adapter, on a thread of the loader."""
        self._pipeline = pipeline
        self._source = source
        self._allow_partial = allow_partial
        self._metrics = metrics
        self._on_end = on_end
        self._numbers = count()
        self._one_at_a_time = threading.Lock()
        self._threads = ThreadPoolExecutor(FETCHES, "lora")

    def load(self, file: AdapterFile) -> None:
        """Begin to load an adapter."""
        key = f"on_demand_{next(self._numbers)}"
        self._threads.submit(self._run, file, key)

    def _run(self, file: AdapterFile, key: str) -> None:
        started_at = time.perf_counter()
        outcome: Outcome | None = None
        kind: type[DiffusionServeError]
        # The outcome is made out of the handlers: an error that is raised or made in one keeps the
        # frames of the load, and with them its tensors.
        try:
            outcome = self._load(file, key)
        except ModelLoadError as error:
            kind, message = InvalidLora, error.message
        except DiffusionServeError as error:
            kind, message = type(error), error.message
        except Exception as error:
            logger.exception("LoRA adapter %s could not be loaded", file.name)
            kind, message = GenerationFailed, f"the LoRA adapter could not be loaded: {error!r}"
        if outcome is None:
            logger.warning("LoRA adapter %s: %s", file.name, message)
            outcome = kind(message, "lora")
        self._metrics.loaded_lora(_result_of(outcome), time.perf_counter() - started_at)
        self._on_end(file.name, outcome)

    def _load(self, file: AdapterFile, key: str) -> LoadedAdapter:
        what = f"LoRA adapter {file.name!r}"
        with self._source.fetched(file) as path:
            try:
                read_header(path)
                # Grad mode belongs to the thread.
                with self._one_at_a_time, torch.no_grad():
                    return load_adapter(self._pipeline, what, str(path), key, self._allow_partial)
            except ModelLoadError as error:
                # Clients need no path of this machine.
                error.message = error.message.replace(str(path), what)
                raise

    def close(self) -> None:
        """Begin no more loads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _result_of(outcome: Outcome) -> LoraResult:
    match outcome:
        case LoadedAdapter():
            return "loaded"
        case LoraNotFound():
            return "not_found"
        case InvalidLora():
            return "invalid"
        case _:
            return "failed"
