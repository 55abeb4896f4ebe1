"""The metrics of one replica, in the form in which they travel to the gateway that is scraped."""

from dataclasses import dataclass
from typing import Literal

from prometheus_client import Metric

from serve_app.metrics import application, engine, gateway  # noqa: F401  they fill the registries
from serve_app.metrics.registry import APPLICATION, ENGINE, GATEWAY

Source = Literal["engine", "gateway", "application"]
"""Name of a registry. Serve pickles the classes that use it, and no registry can be pickled."""


@dataclass(frozen=True)
class Report:
    """The metrics of one replica."""

    replica: str | None
    """Replica that measured them; None for metrics of the application."""
    families: list[Metric]


def report(source: Source, replica: str | None) -> Report:
    """Collect the current values.

    Leaves out the creation time of each series: it would double the lines, and nothing reads it.
    """
    registries = {"engine": ENGINE, "gateway": GATEWAY, "application": APPLICATION}
    families = []
    for family in registries[source].collect():
        family.samples = [one for one in family.samples if not one.name.endswith("_created")]
        families.append(family)
    return Report(replica, families)
