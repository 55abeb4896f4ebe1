"""Reports of replicas as one text that Prometheus reads. Knows of no Ray."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder

from serve_app.metrics import Report, report

Gather = Callable[[], Awaitable[Sequence[Report]]]
"""Asks every replica of the application that can be asked."""


async def gather_own() -> Sequence[Report]:
    """Of a gateway that is alone."""
    return [report("gateway", "gateway")]


def merged(reports: Iterable[Report]) -> list[Metric]:
    """Each family once, its samples labelled with the replica that they came from."""
    families: dict[str, Metric] = {}
    for one in reports:
        for family in one.families:
            whole = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            # Another release, while replicas are replaced, may say something else by that name.
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
    """What prometheus_client's encoders want."""

    families: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        return self.families


def exposition(reports: Iterable[Report], accept: str) -> tuple[bytes, str]:
    """The text and its media type: OpenMetrics, with exemplars, for who accepts it."""
    encode, media_type = choose_encoder(accept)
    return encode(_Collected(merged(reports))), media_type
