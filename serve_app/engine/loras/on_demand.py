"""The adapters on demand of one engine: a catalog of files, a cache in memory and a loader."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.loras.cache import LoraCache
from serve_app.engine.loras.catalog import LoraCatalog
from serve_app.engine.loras.loader import LoraLoader, Outcome
from serve_app.engine.loras.source import AdapterFile, LoraSource, new_source
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.adapters import check_takes_loras, prepare_loads
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import DiffusionServeError, InvalidRequest
from serve_app.protocol.loras import LoraInfo
from serve_app.protocol.params import AdapterSet

LOOKUPS = 8
"""Questions that the source answers at a time."""


class LorasOnDemand:
    """Connects the three. The engine's thread uses `cache`, all threads the methods."""

    cache: LoraCache
    lookups: ThreadPoolExecutor
    """Threads for `find`, which waits for the source."""
    listing: ThreadPoolExecutor
    """The thread for `list`, which may take longer."""

    def __init__(
        self,
        pipeline: LoadedPipeline,
        source: LoraSource,
        model: ModelConfig,
        config: EngineConfig,
        metrics: EngineMetrics,
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[int, DiffusionServeError], None],
    ) -> None:
        """Connect them to an engine.

        Args:
            pipeline: the engine's.
            source: what has the adapters.
            model: settings of the model.
            config: settings of the engine.
            metrics: the engine's.
            post: has a function run on the engine's thread.
            fail: fails the request of this number; for the engine's thread.

        Raises:
            ModelLoadError: the pipeline takes no adapters.
        """
        check_takes_loras(pipeline.stock, "model.lora_source")
        prepare_loads()
        self._fail = fail
        self._post = post
        self._at_start = pipeline.adapters.names
        max_bytes = config.loaded_loras_mib * 2**20
        self._catalog = LoraCatalog(source, self._at_start, max_bytes)
        self.lookups = ThreadPoolExecutor(LOOKUPS, "lora-lookup")
        self.listing = ThreadPoolExecutor(1, "lora-list")
        self._loader = LoraLoader(
            pipeline.stock, source, model.partial_loras, metrics, self._load_ended
        )
        self.cache = LoraCache(
            pipeline.adapters, self._loader.load, config.max_loaded_loras, max_bytes, metrics
        )

    def find(self, adapters: AdapterSet) -> tuple[AdapterFile, ...]:
        """Return the files of the adapters on demand among these. May wait for the source.

        Raises:
            LoraNotFound: the source does not have one.
            InvalidLora: a file cannot be used, or they need too much memory together.
            LoraSourceAway: the source does not answer.
        """
        return self._catalog.find(adapters)

    def list(self) -> tuple[LoraInfo, ...]:
        """List the adapters of the source. Waits for it.

        Raises:
            LoraSourceAway: the source does not answer.
        """
        loaded = self.cache.loaded
        names = loaded.union(self._catalog.names()) - set(self._at_start)
        return tuple(LoraInfo(name, name in loaded, on_demand=True) for name in sorted(names))

    def _load_ended(self, name: str, outcome: Outcome) -> None:
        if isinstance(outcome, InvalidRequest):
            self._catalog.failed(name, outcome)

        def take() -> None:
            for request in self.cache.ended(name, outcome):
                assert isinstance(outcome, DiffusionServeError)
                # An error for each: one that is raised twice keeps the frames of both requests.
                self._fail(request, type(outcome)(outcome.message, outcome.param))

        self._post(take)

    def close(self) -> None:
        """Begin no more loads."""
        self._loader.close()


def new_on_demand(
    pipeline: LoadedPipeline,
    model: ModelConfig,
    config: EngineConfig,
    metrics: EngineMetrics,
    post: Callable[[Callable[[], None]], None],
    fail: Callable[[int, DiffusionServeError], None],
) -> LorasOnDemand | None:
    """Return the adapters on demand of an engine; ``None`` if the model has no source of them.

    Raises:
        ModelLoadError: the pipeline takes no adapters.
        ConfigError: the source cannot be used.
    """
    source = new_source(model)
    if source is None:
        return None
    return LorasOnDemand(pipeline, source, model, config, metrics, post, fail)
