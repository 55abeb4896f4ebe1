"""The table of metrics and labels in the README."""

from collections.abc import Sequence

from prometheus_client.metrics import MetricWrapperBase

from serve_app.metrics import application, engine, gateway
from serve_app.metrics.autoscaling import RAY_GAUGES
from serve_app.metrics.labels import LABELS
from serve_app.metrics.registry import APPLICATION


def declared() -> list[MetricWrapperBase]:
    """Return every metric but Ray's, in the order of declaration."""
    values = [one for module in (gateway, engine, application) for one in vars(module).values()]
    return list(dict.fromkeys(one for one in values if isinstance(one, MetricWrapperBase)))


def _row(name: str, kind: str, labels: Sequence[str], documentation: str) -> str:
    words = ", ".join(f"`{label}`" for label in labels)
    return f"| `{name}` | {kind} | {words} | {documentation} |"


def table() -> str:
    """Describe every metric and label in Markdown."""
    rows = ["| metric | kind | labels | what it is |", "| --- | --- | --- | --- |"]
    shared = tuple(APPLICATION.collect())
    for metric in declared():
        [family] = metric.describe()
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        kind = "gauge" if family.type in ("info", "stateset") else family.type
        labels = list(metric._labelnames)
        if family.type == "stateset":
            labels.append(family.name)
        if all(family.name != one.name for one in shared):
            labels.append("replica")
        rows.append(_row(family.name + suffix, kind, labels, family.documentation))
    rows += [
        _row(f"ray_{gauge.name}", "gauge", gauge.labels, gauge.documentation)
        for gauge in RAY_GAUGES
    ]
    rows += ["", "| label | values |", "| --- | --- |"]
    rows += [f"| `{label}` | {values} |" for label, values in LABELS.items()]
    return "\n".join(rows)
