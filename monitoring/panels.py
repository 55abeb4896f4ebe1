"""The model of a dashboard, and the parts that its queries share."""

from dataclasses import dataclass
from typing import Any, Literal

NAMESPACE = 'namespace=~"$namespace"'
"""Selector of the Kubernetes namespace. Without Kubernetes, series have no such label and match."""

MODEL = f'{NAMESPACE}, model=~"$model"'

RATE = "$__rate_interval"


def _on_gpus(labels: str = "") -> str:
    """Return a query: 1 per generator replica, with its GPU under dcgm-exporter's label."""
    info = f"diffusion_serve_engine_info{labels}"
    return f'max by (UUID, replica) (label_replace({info}, "UUID", "$1", "gpu", "(.+)"))'


APPLICATION = ("ray_io_cluster", "application", "deployment")
"""Labels that identify a deployment in Ray's series, besides the namespace."""

WHOSE = "{{application}} {{deployment}} {{ray_io_cluster}}"

# Ray's series have no model. The gateways' do not depend on one.
_OF_OTHER_MODELS = (
    f'diffusion_serve_scraped_replicas{{{NAMESPACE}, model!~"$model", deployment!="Gateway"}}'
)


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its curves."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A panel with its queries."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """A unit of Grafana: ``s``, ``bytes``, ``percentunit``, ``reqps``."""
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    description: str = ""


@dataclass(frozen=True)
class Dashboard:
    """A dashboard."""

    name: str
    description: str
    panels: tuple[Panel, ...]
    annotations: tuple[Query, ...] = ()
    """Queries whose samples are marked in all panels."""

    @property
    def queries(self) -> tuple[Query, ...]:
        """All queries of the dashboard."""
        shown = [query for panel in self.panels for query in panel.queries]
        return (*shown, *self.annotations)


def panel(title: str, *queries: tuple[str, str], **options: Any) -> Panel:
    return Panel(title, tuple(Query(*query) for query in queries), **options)


def sum_by(of: str, *labels: str) -> str:
    return f"sum by ({', '.join(labels)}) ({of})" if labels else f"sum({of})"


def total(gauge: str, *labels: str) -> str:
    return sum_by(f"diffusion_serve_{gauge}{{{MODEL}}}", *labels)


def rate(counter: str, *labels: str) -> str:
    return sum_by(f"rate(diffusion_serve_{counter}{{{MODEL}}}[{RATE}])", *labels)


def of_deployments(series: str) -> str:
    """Return Ray's series without the deployments of models that are not selected.

    While no gateway reports whose a deployment is, it is shown.
    """
    same = "on (namespace, ray_io_cluster, deployment)"
    return f"{series}{{{NAMESPACE}}} unless {same} {_OF_OTHER_MODELS}"


def serve_counts(counter: str) -> str:
    return sum_by(of_deployments(f"ray_serve_{counter}"), *APPLICATION)


def quantile(share: float, histogram: str, *labels: str) -> str:
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', 'le', *labels)})"


def policy(gauge: str, *labels: str) -> str:
    """Aggregate a gauge of the policy by deployment."""
    by = ", ".join((*APPLICATION, *labels))
    return f"max by ({by}) ({of_deployments(f'ray_diffusion_serve_autoscaling_{gauge}')})"


def of_gpu(field: str) -> str:
    """Return a query by replica that includes GPUs without one."""
    gpu = f"max by (UUID) ({field})"
    chosen, all_ = _on_gpus(f"{{{MODEL}}}"), _on_gpus()
    return f"{chosen} * on (UUID) group_left () {gpu} or {gpu} unless on (UUID) {all_}"
