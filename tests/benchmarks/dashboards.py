"""Draw the dashboards of two minutes of mixed load: ``python -m tests.benchmarks.dashboards``.

The program starts ``serve run`` on the demo with one or two replicas, a Prometheus, and clients
with all kinds of requests. Then it counts the dashboard queries with data and the alerts that were
pending or fired, and draws the dashboards. tests/monitoring checks the same in less time.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from monitoring.dashboards import DASHBOARDS
from monitoring.draw import Window, curves, draw
from monitoring.rules import alerts
from tests.benchmarks.engine import hardware
from tests.monitoring.load import MixedLoad, demo_of_two
from tests.monitoring.prometheus import start_prometheus
from tests.monitoring.series import FOREIGN, series_of
from tests.serve_process import free_port, start_serve

RATE_S = 15.0


def main(
    seconds: float = 120,
    folder: Annotated[Path, typer.Option(help="Folder for the drawings.")] = Path("build/drawings"),
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the results."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    running = start_serve(demo_of_two(port))
    try:
        running.wait_until_ready(url)
        with start_prometheus(url, running) as prometheus:
            start_s = time.time()
            with MixedLoad(url) as load:
                time.sleep(seconds)
                pending = prometheus.get("alerts")["alerts"]
            window = Window(start_s, time.time(), seconds / 120, RATE_S)
            with_data, without = 0, []
            queries = [query for dashboard in DASHBOARDS for query in dashboard.queries]
            for query in queries:
                if curves(prometheus.url, query, window):
                    with_data += 1
                else:
                    without.append(query.expr)
            found = prometheus.get(
                "query_range",
                query="max by (alertname, alertstate) (ALERTS)",
                start=window.start_s,
                end=window.end_s,
                step=1,
            )["result"]
            folder.mkdir(parents=True, exist_ok=True)
            for dashboard in DASHBOARDS:
                path = folder / f"{dashboard.name.lower()}.png"
                draw(prometheus.url, dashboard, window, path)
    finally:
        running.stop()
    foreign = [expr for expr in without if series_of(expr) & FOREIGN.keys()]
    results = {
        "seconds": round(window.end_s - window.start_s),
        "answers": dict(load.outcomes),
        "queries": len(queries),
        "with_data": with_data,
        "of_series_that_others_export": len(foreign),
        "without_data": [expr for expr in without if expr not in foreign],
        "alerts": len(alerts()),
        "alerts_pending_at_some_time": _names(found, "pending"),
        "alerts_pending_at_the_end": sorted(one["labels"]["alertname"] for one in pending),
        "alerts_fired": _names(found, "firing"),
    }
    print(json.dumps(results, indent=2))
    if output is not None:
        content = {
            "command": "python -m tests.benchmarks.dashboards",
            "hardware": hardware(torch.device("cpu")),
            "results": results,
        }
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _names(found: list[dict[str, Any]], state: str) -> list[str]:
    labels = [one["metric"] for one in found]
    return sorted(one["alertname"] for one in labels if one["alertstate"] == state)


if __name__ == "__main__":
    typer.run(main)
