"""Caches inside a network as peers of extrapolated calls: FirstBlockCache and TaylorSeer."""

from collections.abc import Iterator

from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.step_caches import (
    CacheConfig,
    first_block_cache,
    taylor_seer,
    with_cache,
)
from serve_app.tuning.front import Measurement, Row

FIRST_BLOCK_THRESHOLDS = (0.05, 0.1, 0.2)
"""Thresholds of FirstBlockCache to try."""

TAYLOR_INTERVALS = (2, 3, 5)
"""Calls from one that TaylorSeer computes to the next, to try."""


def cache_rows(measurement: Measurement, pipeline: LoadedPipeline) -> tuple[list[Row], list[str]]:
    """Measure each cache, and return a sentence on each one that is left out.

    The engine must have ended.
    """
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for name, setting, config in _caches():
        cached = with_cache(pipeline, config)
        if cached is None:
            notes[f"{name} is left out: {pipeline.class_name} does not support it."] = None
            continue
        try:
            rows.append(measurement.solo(f"{name}, {setting:g}", cached.generate))
        except Exception as error:  # noqa: BLE001 - a peer must not cost the results of the others
            notes[f"{name} is left out at {setting:g}: it failed with {error!r}."] = None
    return rows, list(notes)


def _caches() -> Iterator[tuple[str, float, CacheConfig]]:
    for threshold in FIRST_BLOCK_THRESHOLDS:
        yield "FirstBlockCache", threshold, first_block_cache(threshold)
    for interval in TAYLOR_INTERVALS:
        yield "TaylorSeer", interval, taylor_seer(interval)
