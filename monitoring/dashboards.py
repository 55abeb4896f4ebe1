"""The four Grafana dashboards, written on demand: ``python -m monitoring.dashboards FOLDER``.

*Service*: what clients see. *Engine*: what replicas do with their time. *Scaling*: how many
replicas there are, and why. *GPU*: what the devices do, joined with the replicas on them. A panel
is a title and its queries; what Grafana wants to know beside these is filled in here.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NAMESPACE = 'namespace=~"$namespace"'
"""Of Kubernetes; where there is none, nothing has the label, and nothing is asked for."""

MODEL = f'{NAMESPACE}, model=~"$model"'

RATE = "$__rate_interval"


def _on_gpus(labels: str = "") -> str:
    """1 for each replica of the generator and its GPU, named as dcgm-exporter names it."""
    info = f"diffusion_serve_engine_info{labels}"
    return f'max by (UUID, replica) (label_replace({info}, "UUID", "$1", "gpu", "(.+)"))'


APPLICATION = ("ray_io_cluster", "application", "deployment")
"""What Ray's series of a deployment are told apart by, besides the namespace."""

WHOSE = "{{application}} {{ray_io_cluster}}"


@dataclass(frozen=True)
class Query:
    """One expression in PromQL and what its curves are called."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A picture of some queries."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """One of Grafana's: ``s``, ``bytes``, ``percentunit``, ``reqps``."""
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    description: str = ""


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    name: str
    description: str
    panels: tuple[Panel, ...]
    annotations: tuple[Query, ...] = ()
    """Each sample of them is a mark in all panels."""

    @property
    def queries(self) -> tuple[Query, ...]:
        """All of them."""
        shown = [query for panel in self.panels for query in panel.queries]
        return (*shown, *self.annotations)


def _panel(title: str, *queries: tuple[str, str], **options: Any) -> Panel:
    return Panel(title, tuple(Query(*query) for query in queries), **options)


def _sum(of: str, *labels: str) -> str:
    return f"sum by ({', '.join(labels)}) ({of})" if labels else f"sum({of})"


def _total(gauge: str, *labels: str) -> str:
    return _sum(f"diffusion_serve_{gauge}{{{MODEL}}}", *labels)


def _rate(counter: str, *labels: str) -> str:
    return _sum(f"rate(diffusion_serve_{counter}{{{MODEL}}}[{RATE}])", *labels)


def _serve_counts(counter: str) -> str:
    return _sum(f"ray_serve_{counter}{{{NAMESPACE}}}", *APPLICATION)


def _quantile(share: float, histogram: str, *labels: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{histogram}_bucket', 'le', *labels)})"


def _policy(gauge: str, *labels: str) -> str:
    """Of each application: Ray's series do not know models."""
    by = ", ".join((*APPLICATION, *labels))
    return f"max by ({by}) (ray_diffusion_serve_autoscaling_{gauge}{{{NAMESPACE}}})"


def _of_gpu(field: str) -> str:
    """By replica; a GPU that nobody's is on is there as well."""
    gpu = f"max by (UUID) ({field})"
    chosen, all_ = _on_gpus(f"{{{MODEL}}}"), _on_gpus()
    return f"{chosen} * on (UUID) group_left () {gpu} or {gpu} unless on (UUID) {all_}"


SERVICE = Dashboard(
    "Service",
    "What clients see: is it up, who waits how long, who is refused.",
    (
        _panel(
            "Replicas that run, of those wanted",
            (f"model:diffusion_serve_running:sum{{{MODEL}}}", "{{model}}: running"),
            (f"model:diffusion_serve_wanted:sum{{{MODEL}}}", "{{model}}: wanted"),
            kind="stat",
        ),
        _panel(
            "In time, over an hour",
            (f"1 - model:diffusion_serve_missed:ratio_rate1h{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Of interactive pictures that were painted, and interactive requests that "
            "were refused or failed, each time that they came: the share painted in time.",
        ),
        _panel(
            "Load",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Interactive work that arrives, of what the replicas that run get done.",
        ),
        _panel(
            "Requests ended, by outcome",
            (f"{_rate('requests_total', 'outcome')} > 0", "{{outcome}}"),
            unit="reqps",
            stacked=True,
        ),
        _panel(
            "Requests not completed, by Ray cluster",
            (
                "sum by (ray_io_cluster, outcome) (rate(diffusion_serve_requests_total"
                f'{{{MODEL}, outcome!="completed"}}[{RATE}])) > 0',
                "{{ray_io_cluster}} {{outcome}}",
            ),
            unit="reqps",
            stacked=True,
            description="Two clusters serve while an upgrade moves traffic from one to the other.",
        ),
        _panel(
            "Requests ended, by API key",
            (f"{_rate('requests_total', 'key')} > 0", "{{key}}"),
            unit="reqps",
            stacked=True,
        ),
        _panel(
            "Requests open",
            (_total("open_requests", "priority"), "{{priority}}"),
            stacked=True,
            description="From arrival to end, wherever they wait: with no replica as well.",
        ),
        _panel(
            "Refused",
            (_rate("refusals_total", "reason"), "pictures: {{reason}}"),
            (
                "sum(diffusion_serve_held_requests * on (replica) group_left () "
                f"max by (replica) (diffusion_serve_gateway_info{{{MODEL}}}))",
                "held at gateways",
            ),
            description="By engines, and by Serve's queue before them (`queue`). An engine's "
            "refusal is the client's only if no other takes the request.",
        ),
        _panel(
            "What clients wait",
            (_quantile(0.5, "request_seconds"), "half wait less than"),
            (_quantile(0.95, "request_seconds"), "95 % wait less than"),
            (_quantile(0.99, "request_seconds"), "99 % wait less than"),
            unit="s",
        ),
        _panel(
            "Where the time goes, mean of a request",
            (
                f"{_rate('request_part_seconds_sum', 'part')} / on () group_left () "
                f"{_rate('request_seconds_count')}",
                "{{part}}",
            ),
            unit="s",
            stacked=True,
        ),
        _panel(
            "To the first preview",
            (_quantile(0.5, "first_partial_seconds"), "half wait less than"),
            (_quantile(0.95, "first_partial_seconds"), "95 % wait less than"),
            unit="s",
        ),
        _panel(
            "Late, refused or failed, of what was tried",
            *(
                (f"model:diffusion_serve_missed:ratio_rate{window}{{{MODEL}}}", window)
                for window in ("5m", "1h", "6h")
            ),
            unit="percentunit",
            description="Tried: an interactive picture that was painted, or an interactive request "
            "that was refused or failed. The alerts look at these; 5 % may be, over 30 days.",
        ),
        _panel(
            "Deadlines",
            (_rate("deadlines_total", "outcome", "set_by"), "{{outcome}}, set by the {{set_by}}"),
            stacked=True,
        ),
        _panel(
            "Failed for reasons of the server's",
            (
                f"model:diffusion_serve_errors:ratio_rate5m{{{MODEL}}}",
                "{{model}} {{ray_io_cluster}}",
            ),
            unit="percentunit",
            description="Of interactive requests.",
        ),
    ),
)

ENGINE = Dashboard(
    "Engine",
    "What each replica does with its time.",
    (
        _panel(
            "Pictures in a denoiser call",
            (
                f"{_rate('batch_size_sum', 'replica')} / {_rate('batch_size_count', 'replica')}",
                "{{replica}}",
            ),
        ),
        _panel(
            "Time of a step, by size",
            (_quantile(0.5, "step_seconds", "size"), "{{size}}: half"),
            (_quantile(0.95, "step_seconds", "size"), "{{size}}: 95 %"),
            unit="s",
        ),
        _panel(
            "Work done in a busy second",
            (f"diffusion_serve_throughput_ratio{{{MODEL}}}", "{{replica}}"),
            unit="s",
            description="Counted as each request would take alone: over 1 is what batches gain.",
        ),
        _panel(
            "Backlog",
            (_total("backlog_seconds", "replica", "priority"), "{{replica}}, {{priority}}"),
            unit="s",
        ),
        _panel(
            "Requests in engines",
            (_total("engine_requests", "state"), "{{state}}"),
            stacked=True,
        ),
        _panel(
            "Devices at work, by activity",
            (_rate("device_seconds_total", "activity"), "{{activity}}"),
            stacked=True,
            description="In replicas: 1 is one that does nothing else.",
        ),
        _panel("Pictures a second, by size", (_rate("images_total", "size"), "{{size}}")),
        _panel("Pixels a second", (_rate("pixels_total"), "pixels"), unit="short"),
        _panel(
            "How far predictions are off",
            (_quantile(0.5, "forecast_error_ratio"), "half are off by less than"),
            (_quantile(0.95, "forecast_error_ratio"), "95 % are off by less than"),
            unit="percentunit",
        ),
        _panel(
            "Requests there, and no network runs",
            (_rate("engine_stall_seconds_sum", "replica"), "{{replica}}"),
            unit="percentunit",
            description="Share of the time, of pauses over 0.1 s.",
        ),
        _panel(
            "Cancelled: until the place is free",
            (_quantile(0.95, "cancellation_seconds"), "95 % take less than"),
            unit="s",
        ),
        _panel(
            "Previews, LoRA switches, out of memory",
            (_rate("previews_total"), "previews"),
            (_rate("lora_switches_total"), "LoRA switches"),
            (_rate("out_of_memory_total"), "out of memory"),
        ),
        _panel(
            "Replicas, by how requests share the pipeline",
            (_total("sharing", "diffusion_serve_sharing"), "{{diffusion_serve_sharing}}"),
            stacked=True,
        ),
        _panel(
            "Batched against alone, at start-up",
            (f"diffusion_serve_sharing_difference{{{MODEL}}}", "{{replica}}"),
            description="Largest difference of a pixel in [0, 1].",
        ),
        _panel(
            "Memory of replicas and gateways",
            (
                "process_resident_memory_bytes * on (replica) group_left () "
                f"(diffusion_serve_engine_info{{{MODEL}}} "
                f"or diffusion_serve_gateway_info{{{MODEL}}})",
                "{{replica}}",
            ),
            unit="bytes",
        ),
    ),
)

SCALING = Dashboard(
    "Scaling",
    "How many replicas there are, why, and what one more would buy.",
    (
        _panel(
            "Replicas",
            (_policy("wanted_replicas"), f"{WHOSE}: wanted by the policy"),
            (
                f"sum by (ray_io_cluster, model) (diffusion_serve_target_replicas{{{MODEL}}})",
                "{{model}} {{ray_io_cluster}}: wanted by Serve",
            ),
            (
                "sum by (ray_io_cluster, model, state) "
                f'(diffusion_serve_replicas{{{MODEL}, state=~"running|starting"}})',
                "{{model}} {{ray_io_cluster}}: {{state}}",
            ),
        ),
        _panel(
            "Replicas that the policy would need",
            (_policy("needed_replicas", "by"), f"{WHOSE}: for {{{{by}}}}"),
            (_policy("forecast_replicas"), f"{WHOSE}: busy when one asked for now is there"),
        ),
        _panel(
            "What decided",
            (f"{_policy('term', 'term')} == 1", f"{WHOSE}: {{{{term}}}}"),
        ),
        _panel(
            "Work that arrives, and what gets done",
            (_total("arriving_work_ratio"), "arrives"),
            (_total("throughput_ratio"), "the replicas that run can do"),
            unit="s",
            description="Seconds of work a second, each request alone.",
        ),
        _panel(
            "Load, and shared with one replica more",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "{{model}}: now"),
            (
                f"model:diffusion_serve_load:ratio{{{MODEL}}} * model:diffusion_serve_running:sum "
                "/ (model:diffusion_serve_running:sum + 1)",
                "{{model}}: if one more did as much as each of them",
            ),
            unit="percentunit",
            description="Over 100 % more arrives than gets done at present: batches grow, and get "
            "more done, as far as they can, and what is over that is refused. With one more they "
            "are smaller again, so that it buys somewhat less than is drawn.",
        ),
        _panel(
            "Work that waits",
            (_total("backlog_seconds", "priority"), "{{priority}}, of all replicas"),
            (_policy("waiting_seconds"), f"{WHOSE}: that the policy sees"),
            unit="s",
        ),
        _panel(
            "Busy, over 30 s",
            (f"diffusion_serve_utilization_ratio{{{MODEL}}}", "{{replica}}"),
            unit="percentunit",
        ),
        _panel(
            "Start of a replica",
            (_policy("cold_start_seconds"), f"{WHOSE}: until it paints, as the policy counts"),
            (
                f"max by (phase) (diffusion_serve_cold_start_seconds{{{MODEL}}})",
                "{{phase}}, of the slowest",
            ),
            unit="s",
        ),
        _panel(
            "Serve's word on each deployment",
            (
                f"min by ({', '.join(APPLICATION)}) (ray_serve_deployment_status{{{NAMESPACE}}})",
                f"{WHOSE} {{{{deployment}}}}",
            ),
            description="1 failed, 2 unhealthy, 3 updating, 4 scaling up, 5 down, 6 healthy.",
        ),
        _panel(
            "Replicas that got ready, and that ended",
            (
                _serve_counts("replica_startup_latency_ms_count"),
                f"{WHOSE} {{{{deployment}}}}: ready",
            ),
            (
                _serve_counts("replica_shutdown_duration_ms_count"),
                f"{WHOSE} {{{{deployment}}}}: ended",
            ),
            description="Since Serve's controller began; those whose start failed have ended.",
        ),
        _panel(
            "Nodes",
            *(
                (
                    f"sum by (node_type) (ray_cluster_{state}_nodes{{{NAMESPACE}}})",
                    f"{{{{node_type}}}}, {words}",
                )
                for state, words in (
                    ("active", "there"),
                    ("pending", "coming"),
                    ("failed", "failed"),
                )
            ),
        ),
        _panel(
            "KubeRay's word on the service",
            (
                f'sum by (name) (kuberay_service_condition_ready{{{NAMESPACE}, condition="true"}})',
                "{{name}}",
            ),
            description="1: it has a gateway that answers.",
        ),
        _panel(
            "Replicas that did not tell their figures",
            (
                f'diffusion_serve_scraped_replicas{{{MODEL}, answer="silent"}}',
                "{{deployment}} {{ray_io_cluster}}, silent",
            ),
            (
                f"diffusion_serve_scrape_seconds{{{MODEL}}}",
                "{{ray_io_cluster}} seconds of a scrape",
            ),
        ),
    ),
    annotations=(
        Query(
            f"{_policy('term', 'term')} == 1 and on ({', '.join(APPLICATION)}) "
            f"max by ({', '.join(APPLICATION)}) (changes("
            f"ray_diffusion_serve_autoscaling_wanted_replicas{{{NAMESPACE}}}[{RATE}])) > 0",
            f"{WHOSE}: by {{{{term}}}}",
        ),
    ),
)

GPU = Dashboard(
    "GPU",
    "What the devices do, and for which replica: one without a name has none, of any model.",
    (
        _panel(
            "A kernel runs",
            (_of_gpu("DCGM_FI_DEV_GPU_UTIL / 100"), "{{replica}} {{UUID}}"),
            unit="percentunit",
        ),
        _panel(
            "Tensor cores at work",
            (_of_gpu("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"), "{{replica}} {{UUID}}"),
            unit="percentunit",
        ),
        _panel(
            "Power",
            (_of_gpu("DCGM_FI_DEV_POWER_USAGE"), "{{replica}} {{UUID}}"),
            unit="watt",
        ),
        _panel(
            "Memory used, of the device",
            (
                _of_gpu("DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)"),
                "{{replica}} {{UUID}}",
            ),
            unit="percentunit",
        ),
        _panel(
            "Memory as the replica sees it",
            (_total("device_memory_bytes", "replica", "kind"), "{{replica}} {{kind}}"),
            unit="bytes",
        ),
        _panel(
            "Temperature",
            (_of_gpu("DCGM_FI_DEV_GPU_TEMP"), "{{replica}} {{UUID}}"),
            unit="celsius",
        ),
        _panel(
            "Last Xid",
            (_of_gpu("DCGM_FI_DEV_XID_ERRORS"), "{{replica}} {{UUID}}"),
            description="0 is good. docs/runbook.md says which codes mean what.",
        ),
        _panel(
            "Network calls that found too little memory",
            (_rate("out_of_memory_total", "replica"), "{{replica}}"),
        ),
        _panel(
            "Seconds that networks ran, a second",
            (_rate("device_seconds_total", "replica"), "{{replica}}"),
            unit="percentunit",
            description="By the engine's clock: far from 100 % under load, it waits for the host.",
        ),
    ),
)

DASHBOARDS = (SERVICE, ENGINE, SCALING, GPU)

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana imports it, three panels in a row."""
    return {
        "uid": f"diffusion-serve-{dashboard.name.lower()}",
        "title": f"diffusion-serve / {dashboard.name}",
        "description": dashboard.description,
        "tags": ["diffusion-serve"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["diffusion-serve"], "title": "diffusion-serve"}],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    # One at a time: nobody wants the sum of staging and production.
                    "name": "namespace",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": "label_values(diffusion_serve_target_replicas, namespace)",
                    "refresh": 2,
                },
                {
                    "name": "model",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": f"label_values(diffusion_serve_target_replicas{{{NAMESPACE}}}, model)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "Scaling decisions",
                    "datasource": SOURCE,
                    "enable": True,
                    "iconColor": "orange",
                    "expr": one.expr,
                    "titleFormat": one.legend,
                }
                for one in dashboard.annotations
            ]
        },
        "panels": [_grafana_panel(panel, index) for index, panel in enumerate(dashboard.panels)],
    }


def _grafana_panel(panel: Panel, index: int) -> dict[str, Any]:
    row, column = divmod(index, 3)
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom |= {"fillOpacity": 50, "stacking": {"mode": "normal"}}
    return {
        "id": index + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": {"x": 8 * column, "y": 8 * row, "w": 8, "h": 8},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                **({"custom": custom} if panel.kind == "timeseries" else {}),
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list"}} if panel.kind == "timeseries" else {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def write(folder: Path) -> None:
    """One file for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        path = folder / f"{dashboard.name.lower()}.json"
        path.write_text(json.dumps(grafana(dashboard), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
