"""The merged text of several reports, read by prometheus_client's parsers."""

import pickle
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from serve_app.gateway.exposition import exposition
from serve_app.metrics.export import Report, report

OPENMETRICS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;"
    "escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
"""The Accept header of Prometheus 3."""


def replica(name: str, times: int) -> Report:
    """Make the report of a replica's registry, pickled and unpickled."""
    registry = CollectorRegistry()
    Counter("images_total", "Some.", ["size"], registry=registry).labels("64").inc(times)
    histogram = Histogram("wait_seconds", 'A "wait".', buckets=(0.1, 1), registry=registry)
    histogram.observe(0.5, {"request_id": f"call-{name}"})
    Gauge("nothing", "No child yet.", ["size"], registry=registry)
    Enum("mode", "One of two.", states=["on", "off"], registry=registry).state("off")
    travelled: Report = pickle.loads(pickle.dumps(Report(name, list(registry.collect()))))
    for family in travelled.families:
        family.samples = [one for one in family.samples if not one.name.endswith("_created")]
    return travelled


def samples(families: Any) -> dict[tuple[str, str | None, str | None], float]:
    return {
        (sample.name, sample.labels.get("replica"), sample.labels.get("le")): sample.value
        for family in families
        for sample in family.samples
        if family.name != "mode"
    }


@pytest.mark.parametrize("count", [0, 1, 40])
def test_every_sample_names_its_replica(count: int) -> None:
    reports = [replica(f"r{index}", index) for index in range(count)]
    text, media_type = exposition(reports, "")
    assert media_type == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families)
    assert len(families) == (3 if count else 0)
    values = samples(families)
    assert [values["images_total", f"r{index}", None] for index in range(count)] == [
        *map(float, range(count))
    ]


def test_openmetrics_has_the_request_as_exemplar() -> None:
    text, media_type = exposition([replica("a", 1), replica("b", 2)], OPENMETRICS)
    assert media_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    families = list(openmetrics_families(text.decode()))
    exemplars = [
        (sample.labels["replica"], sample.exemplar.labels["request_id"], sample.exemplar.value)
        for family in families
        for sample in family.samples
        if sample.exemplar
    ]
    assert exemplars == [("a", "call-a", 0.5), ("b", "call-b", 0.5)]


def test_metrics_of_the_application_name_no_replica() -> None:
    text, _ = exposition([Report(None, replica("x", 3).families)], "")
    assert b'images_total{size="64"} 3.0' in text


def test_a_release_with_another_type_for_a_name_is_tolerated() -> None:
    registry = CollectorRegistry()
    Gauge("images", "Another kind.", registry=registry).set(7)
    Gauge("wait_seconds", "Another kind.", registry=registry).set(7)
    text, _ = exposition([replica("a", 1), Report("b", list(registry.collect()))], OPENMETRICS)
    names = {
        (family.name, sample.labels["replica"])
        for family in openmetrics_families(text.decode())
        for sample in family.samples
    }
    assert ("images", "b") not in names
    assert ("wait_seconds", "b") not in names


def test_both_formats_contain_all_declared_metrics() -> None:
    reports = [report("engine", "a"), report("gateway", "b")]
    plain, _ = exposition(reports, "text/plain")
    openmetrics, _ = exposition(reports, OPENMETRICS)
    one = {family.name for family in text_string_to_metric_families(plain.decode())}
    other = {family.name for family in openmetrics_families(openmetrics.decode())}
    assert "process_resident_memory_bytes" in one
    assert len(one) == len(other)
    assert b"_created" not in plain + openmetrics
