"""Reports of replicas, merged into one text for Prometheus."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder

from serve_app.metrics.export import Report, report

Gather = Callable[[], Awaitable[Sequence[Report]]]
"""Function that gathers a report from every replica of the application."""


async def gather_own() -> Sequence[Report]:
    """Report the metrics of a gateway without peers."""
    return [report("gateway", "gateway")]


def merged(reports: Iterable[Report]) -> list[Metric]:
    """Merge reports: each family once, its samples labelled with their replica."""
    families: dict[str, Metric] = {}
    for one in reports:
        for family in one.families:
            whole = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            # During an update, another release may use the name for another type.
            if whole.type != family.type:
                continue
            for sample in family.samples:
                labels = sample.labels
                if one.replica is not None:
                    labels = {**labels, "replica": one.replica}
                whole.samples.append(sample._replace(labels=labels))
    return [family for family in families.values() if family.samples]


@dataclass(frozen=True)
class _Collected:
    """The interface that prometheus_client's encoders need."""

    families: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        return self.families


def exposition(reports: Iterable[Report], accept: str) -> tuple[bytes, str]:
    """Return the text and its media type: OpenMetrics, with exemplars, if ``accept`` has it."""
    encode, media_type = choose_encoder(accept)
    return encode(_Collected(merged(reports))), media_type
