"""The four Grafana dashboards, written on demand: ``python -m monitoring.dashboards FOLDER``.

*Service*: what clients see. *Engine*: what replicas do with their time. *Scaling*: the number of
replicas and its reasons. *GPU*: what the devices do, joined with their replicas. A panel has a
title and queries; this module adds all else that Grafana needs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from monitoring.clients_and_engines import ENGINE, SERVICE
from monitoring.panels import NAMESPACE, Dashboard, Panel
from monitoring.replicas_and_gpus import GPU, SCALING

DASHBOARDS = (SERVICE, ENGINE, SCALING, GPU)

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """Convert to Grafana's import format, three panels in a row."""
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
                    # One at a time: a sum of staging and production has no use.
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
    """Write one file for each dashboard."""
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        path = folder / f"{dashboard.name.lower()}.json"
        path.write_text(json.dumps(grafana(dashboard), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
