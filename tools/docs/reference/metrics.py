"""The metrics page: every metric and every label, from their declarations."""

from collections.abc import Iterator, Sequence
from types import ModuleType

from prometheus_client.metrics import MetricWrapperBase

from serve_app.metrics import application, engine, gateway
from serve_app.metrics.autoscaling import RAY_GAUGES
from serve_app.metrics.labels import LABELS
from serve_app.metrics.registry import APPLICATION
from tools.docs.markdown import code, table

PARTS: dict[str, ModuleType] = {"gateway": gateway, "engine": engine, "application": application}
"""The modules of declarations, by the name of the part that measures."""


def declared(part: str | None = None) -> list[MetricWrapperBase]:
    """Return the metrics of a part, or of all, in the order of declaration; Ray's are not here.

    A metric that two modules have belongs to the one that declares it.
    """
    found = [
        metric
        for name, module in PARTS.items()
        if part in (name, None)
        for metric in vars(module).values()
        if isinstance(metric, MetricWrapperBase)
    ]
    imported = set() if part in ("engine", None) else set(declared("engine"))
    return [metric for metric in dict.fromkeys(found) if metric not in imported]


def exported_name(metric: MetricWrapperBase) -> str:
    """Return the name of a metric in the answer to ``GET /metrics``."""
    [family] = metric.describe()
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def metrics_table(part: str) -> str:
    """Return a table of the metrics of one part: a key of `PARTS`, or ``autoscaling``."""
    rows = _ray_rows() if part == "autoscaling" else map(_row, declared(part))
    return table(("Metric", "Kind; labels", "Meaning"), rows)


def labels_table() -> str:
    """Return a table of the labels with their closed sets of values."""
    return table(("Label", "Values"), ((code(label), LABELS[label]) for label in LABELS))


def _row(metric: MetricWrapperBase) -> tuple[str, str, str]:
    [family] = metric.describe()
    labels = list(metric._labelnames)
    if family.type == "stateset":
        labels.append(family.name)
    if all(family.name != one.name for one in APPLICATION.collect()):
        labels.append("replica")
    kind = "gauge" if family.type in ("info", "stateset") else family.type
    return code(exported_name(metric)), f"{kind}; {_list(labels)}", family.documentation


def _ray_rows() -> Iterator[tuple[str, str, str]]:
    for gauge in RAY_GAUGES:
        yield code(f"ray_{gauge.name}"), f"gauge; {_list(gauge.labels)}", gauge.documentation


def _list(labels: Sequence[str]) -> str:
    return ", ".join(map(code, labels))
