"""The series of a scrape: parsing, sums, quantiles, and the increase between two scrapes."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from serve_app.errors import ConfigError
from serve_app.metrics.application import TARGET_REPLICAS

PROCESS_MEMORY = "process_resident_memory_bytes"

Labels = frozenset[tuple[str, str]]


@functools.cache
def sample_name(metric: MetricWrapperBase, part: str = "") -> str:
    """Return the name of a metric's samples; ``part`` is a histogram's ``_sum``, ``_count`` or
    ``_bucket``."""
    [family] = metric.describe()
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, part)


class Series:
    """The values of one scrape. Contains no NaN, which a stopped engine reports."""

    def __init__(self, series: Mapping[str, Mapping[Labels, float]]) -> None:
        """``series``: values by sample name, then by labels."""
        self.series = series

    def where(
        self, metric: MetricWrapperBase | str, part: str = "", /, **labels: str
    ) -> Iterator[tuple[dict[str, str], float]]:
        """Yield the series with these labels."""
        name = metric if isinstance(metric, str) else sample_name(metric, part)
        for key, value in self.series.get(name, {}).items():
            if labels.items() <= key:
                yield dict(key), value

    def total(
        self, metric: MetricWrapperBase | str, part: str = "", /, **labels: str
    ) -> float | None:
        """Return the sum of the series with these labels; None without any."""
        values = [value for _, value in self.where(metric, part, **labels)]
        return math.fsum(values) if values else None

    def by(
        self, label: str, metric: MetricWrapperBase | str, part: str = "", /, **labels: str
    ) -> dict[str, float]:
        """Return the sum for each value of a label."""
        sums: dict[str, float] = {}
        for found, value in self.where(metric, part, **labels):
            sums[found.get(label, "")] = sums.get(found.get(label, ""), 0.0) + value
        return sums

    def of_model(self, model: str) -> "Series":
        """Return the series of one model, and those that belong to none.

        Raises:
            ConfigError: if the server has no such model.
        """
        known = self.by("model", TARGET_REPLICAS)
        if model not in known:
            raise ConfigError(
                f"the server has no model {model!r}: it has {', '.join(map(repr, known))}."
            )
        return Series(
            {
                name: {
                    key: it for key, it in values.items() if dict(key).get("model", model) == model
                }
                for name, values in self.series.items()
            }
        )

    def quantile(self, q: float, metric: MetricWrapperBase, /, **labels: str) -> float | None:
        """Return a quantile over all histograms with these labels; None without observations."""
        buckets = self.by("le", metric, "_bucket", **labels)
        return histogram_quantile(q, ((float(le), count) for le, count in buckets.items()))


def histogram_quantile(q: float, buckets: Iterable[tuple[float, float]]) -> float | None:
    """Compute PromQL's function of that name from ``(upper bound, cumulative count)``.

    Values are spread evenly within a bucket. Above the last finite bound, the result is that bound.
    """
    bounds: list[float] = []
    counts: list[float] = []
    for bound, count in sorted(buckets):
        bounds.append(bound)
        counts.append(max(count, counts[-1] if counts else 0.0))
    if len(bounds) < 2 or bounds[-1] != math.inf or counts[-1] <= 0:
        return None
    rank = q * counts[-1]
    at = next(index for index, count in enumerate(counts) if count >= rank)
    if at == len(bounds) - 1:
        return bounds[-2]
    if at == 0 and bounds[0] <= 0:
        return bounds[0]
    start, below = (bounds[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    inside = counts[at] - below
    return start + (bounds[at] - start) * (rank - below) / inside if inside else None


WANTED = ("diffusion_serve_", PROCESS_MEMORY)
"""Prefixes of the lines that are parsed."""


def parse(text: str) -> Series:
    """Parse a response in Prometheus' text format. Raises `ConfigError` for any other text."""
    lines = [line for line in text.split("\n") if line.startswith(WANTED)]
    series: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                float(sample.labels.get("le", "0"))
                if math.isfinite(sample.value):
                    labels = frozenset((name, plain(it)) for name, it in sample.labels.items())
                    series.setdefault(sample.name, {})[labels] = float(sample.value)
    except (ValueError, IndexError, OverflowError) as error:
        why = plain(str(error)[:200])
        raise ConfigError(f"/metrics is not in Prometheus' format: {why}") from None
    parsed = Series(series)
    if parsed.total(TARGET_REPLICAS) is None:
        raise ConfigError(
            "/metrics has no metrics of diffusion-serve: it belongs to another server."
        )
    return parsed


CUMULATIVE = ("_total", "_bucket", "_count", "_sum")


def increases(before: Series, now: Series) -> Series:
    """Compute the increase of every cumulative series between two scrapes.

    A replica that is missing from the first scrape counts from the second one on. All series of a
    restarted replica, whose counters fell, count from 0, and so does a new series of a known
    replica.
    """
    known: set[str | None] = set()
    anew: set[str | None] = set()
    for name, values in before.series.items():
        for labels, value in values.items():
            replica = dict(labels).get("replica")
            known.add(replica)
            if name.endswith(CUMULATIVE) and now.series.get(name, {}).get(labels, value) < value:
                anew.add(replica)
    rose: dict[str, dict[Labels, float]] = {}
    for name, values in now.series.items():
        if not name.endswith(CUMULATIVE):
            continue
        earlier = before.series.get(name, {})
        for labels, value in values.items():
            replica = dict(labels).get("replica")
            if replica in known:
                since = 0.0 if replica in anew else earlier.get(labels, 0.0)
                rose.setdefault(name, {})[labels] = value - since
    return Series(rose)


def added(several: Iterable[Series]) -> Series:
    """Add several scrapes, series by series."""
    sums: dict[str, dict[Labels, float]] = {}
    for scrape in several:
        for name, values in scrape.series.items():
            sum_of = sums.setdefault(name, {})
            for labels, value in values.items():
                sum_of[labels] = sum_of.get(labels, 0.0) + value
    return Series(sums)


def plain(text: str) -> str:
    """Replace control characters, which a terminal would interpret."""
    return "".join(character if character.isprintable() else "?" for character in text)
