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

MODEL = 'model=~"$model"'

RATE = "$__rate_interval"

OF_REPLICA = (
    "max by (UUID, replica) "
    f'(label_replace(diffusion_serve_engine_info{{{MODEL}}}, "UUID", "$1", "gpu", "(.+)"))'
)
"""1 for each replica of the generator and its GPU, named as dcgm-exporter names it."""


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


def _quantile(share: float, histogram: str, *labels: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{histogram}_bucket', 'le', *labels)})"


def _policy(gauge: str, *labels: str) -> str:
    by = ", ".join(("deployment", *labels))
    return f"max by ({by}) (ray_diffusion_serve_autoscaling_{gauge})"


def _of_gpu(field: str) -> str:
    """By replica; a GPU that none is on is there as well."""
    gpu = f"max by (UUID) ({field})"
    return f"{OF_REPLICA} * on (UUID) group_left () {gpu} or on (UUID) {gpu}"


SERVICE = Dashboard(
    "Service",
    "What clients see: is it up, who waits how long, who is refused.",
    (
        _panel(
            "Replicas that run, of those wanted",
            (f'diffusion_serve_replicas{{{MODEL}, state="running"}}', "running"),
            (f"diffusion_serve_target_replicas{{{MODEL}}}", "wanted"),
            kind="stat",
        ),
        _panel(
            "In time, over an hour",
            (f"1 - model:diffusion_serve_missed:ratio_rate1h{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Of the pictures asked for: refused and failed ones are not in time.",
        ),
        _panel(
            "Load",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
            kind="stat",
            description="Work that arrives, of what the replicas that run get done.",
        ),
        _panel(
            "Requests ended, by outcome",
            (_rate("requests_total", "outcome"), "{{outcome}}"),
            unit="reqps",
            stacked=True,
        ),
        _panel(
            "Requests ended, by API key",
            (_rate("requests_total", "key"), "{{key}}"),
            unit="reqps",
            stacked=True,
        ),
        _panel(
            "Refused",
            (_rate("refusals_total", "reason"), "pictures by engines: {{reason}}"),
            ("sum(diffusion_serve_held_requests)", "held at gateways"),
            description="An engine's refusal is the client's only if no other takes the request.",
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
            "Late, refused or failed, of pictures asked for",
            *(
                (f"model:diffusion_serve_missed:ratio_rate{window}{{{MODEL}}}", window)
                for window in ("5m", "1h", "6h")
            ),
            unit="percentunit",
            description="The alerts look at these; 5 % may be, over 30 days.",
        ),
        _panel(
            "Deadlines",
            (_rate("deadlines_total", "outcome", "set_by"), "{{outcome}}, set by the {{set_by}}"),
            stacked=True,
        ),
        _panel(
            "Failed for reasons of the server's",
            (f"model:diffusion_serve_errors:ratio_rate5m{{{MODEL}}}", "{{model}}"),
            unit="percentunit",
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
            (_policy("wanted_replicas"), "wanted by the policy"),
            (f"diffusion_serve_target_replicas{{{MODEL}}}", "wanted by Serve"),
            (f'diffusion_serve_replicas{{{MODEL}, state="running"}}', "running"),
            (f'diffusion_serve_replicas{{{MODEL}, state="starting"}}', "starting"),
        ),
        _panel(
            "Replicas that the policy would need",
            (_policy("needed_replicas", "by"), "for {{by}}"),
            (_policy("forecast_replicas"), "busy when one asked for now is there"),
        ),
        _panel(
            "What decided",
            (f"{_policy('term', 'term')} == 1", "{{term}}"),
        ),
        _panel(
            "Work that arrives, and what gets done",
            (_total("arriving_work_ratio"), "arrives"),
            (_total("throughput_ratio"), "the replicas that run can do"),
            unit="s",
            description="Seconds of work a second, each request alone.",
        ),
        _panel(
            "Load, and with one replica more",
            (f"model:diffusion_serve_load:ratio{{{MODEL}}}", "now"),
            (
                f"model:diffusion_serve_load:ratio{{{MODEL}}} * on (model) "
                f'(diffusion_serve_replicas{{{MODEL}, state="running"}} '
                f'/ (diffusion_serve_replicas{{{MODEL}, state="running"}} + 1))',
                "with one more",
            ),
            unit="percentunit",
            description="Over 100 % pictures are refused. What one more brings below it, it sells.",
        ),
        _panel(
            "Work that waits",
            (_total("backlog_seconds", "priority"), "{{priority}}, of all replicas"),
            (_policy("waiting_seconds"), "that the policy sees"),
            unit="s",
        ),
        _panel(
            "Busy, over 30 s",
            (f"diffusion_serve_utilization_ratio{{{MODEL}}}", "{{replica}}"),
            unit="percentunit",
        ),
        _panel(
            "Start of a replica",
            (_policy("cold_start_seconds"), "until it paints, as the policy counts"),
            (
                f"max by (phase) (diffusion_serve_cold_start_seconds{{{MODEL}}})",
                "{{phase}}, of the slowest",
            ),
            unit="s",
        ),
        _panel(
            "Serve's word on each deployment",
            ("min by (deployment) (ray_serve_deployment_status)", "{{deployment}}"),
            description="1 failed, 2 unhealthy, 3 updating, 4 scaling up, 5 down, 6 healthy.",
        ),
        _panel(
            "Nodes",
            ("sum by (node_type) (ray_cluster_active_nodes)", "{{node_type}}, there"),
            ("sum by (node_type) (ray_cluster_pending_nodes)", "{{node_type}}, coming"),
            ("sum by (node_type) (ray_cluster_failed_nodes)", "{{node_type}}, failed"),
        ),
        _panel(
            "KubeRay's word on the service",
            ('sum by (name) (kuberay_service_condition_ready{condition="true"})', "{{name}}"),
            description="1: it has a gateway that answers.",
        ),
        _panel(
            "Replicas that did not tell their figures",
            (
                f'diffusion_serve_scraped_replicas{{{MODEL}, answer="silent"}}',
                "{{deployment}}, silent",
            ),
            (f"diffusion_serve_scrape_seconds{{{MODEL}}}", "seconds of a scrape"),
        ),
    ),
    annotations=(
        Query(
            f"{_policy('term', 'term')} == 1 and on (deployment) max by (deployment) "
            f"(changes(ray_diffusion_serve_autoscaling_wanted_replicas[{RATE}])) > 0",
            "{{deployment}}: by {{term}}",
        ),
    ),
)

GPU = Dashboard(
    "GPU",
    "What the devices do, and for which replica: one that has no replica is idle.",
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
                    "name": "model",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": "label_values(diffusion_serve_target_replicas, model)",
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
