"""Draws the dashboards where there is no Grafana, from the same queries of the same Prometheus.

``python -m monitoring.draw http://127.0.0.1:9090 build/images``. Needs matplotlib, from the
extra ``plan``.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import matplotlib

matplotlib.use("Agg")

import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from monitoring.dashboards import DASHBOARDS
from monitoring.panels import RATE, Dashboard, Panel, Query

COLUMNS = 3
POINTS = 120


@dataclass(frozen=True)
class Curve:
    """A series of a response, without NaN."""

    name: str
    points: list[tuple[float, float]]
    """(seconds since 1970, value)"""


@dataclass(frozen=True)
class Window:
    """A time range and its resolution, in seconds."""

    start_s: float
    end_s: float
    step_s: float
    rate_s: float
    """Range of rates: at least four scrapes."""


def filled_in(expr: str, window: Window) -> str:
    """Fill in Grafana's variables, for all models of all namespaces."""
    expr = expr.replace(RATE, f"{math.ceil(window.rate_s)}s")
    return expr.replace("$namespace", ".*").replace("$model", ".*")


def curves(prometheus: str, query: Query, window: Window) -> list[Curve]:
    """Query Prometheus. Raises `httpx.HTTPStatusError` for an invalid query."""
    answer = httpx.get(
        f"{prometheus}/api/v1/query_range",
        params={
            "query": filled_in(query.expr, window),
            "start": window.start_s,
            "end": window.end_s,
            "step": window.step_s,
        },
        timeout=30,
    ).raise_for_status()
    return list(_curves(answer.json()["data"]["result"], query.legend))


def _curves(series: list[dict[str, Any]], legend: str) -> Iterator[Curve]:
    for one in series:
        name = legend
        for label in re.findall(r"{{(\w+)}}", legend):
            name = name.replace(f"{{{{{label}}}}}", one["metric"].get(label, ""))
        points = [(float(at), float(value)) for at, value in one["values"]]
        if finite := [point for point in points if math.isfinite(point[1])]:
            # A label that a series lacks, such as a namespace, leaves spaces behind.
            yield Curve(re.sub(r" +(?=[ :,]|$)", "", name).strip(), finite)


def draw(prometheus: str, dashboard: Dashboard, window: Window, path: Path) -> None:
    """One page, as a PNG file."""
    rows = math.ceil(len(dashboard.panels) / COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(18, 3.6 * rows), layout="constrained", squeeze=False
    )
    figure.suptitle(f"{dashboard.name}: {dashboard.description}")
    marks = [
        curve for query in dashboard.annotations for curve in curves(prometheus, query, window)
    ]
    for panel, place in zip(dashboard.panels, axes.flat, strict=False):
        for mark in marks:
            at = mark.points[0][0] - window.start_s
            place.axvline(at, color="tab:orange", linestyle=":", label="_")
        found = [one for query in panel.queries for one in curves(prometheus, query, window)]
        _draw_panel(place, panel, found, window)
    for place in axes.flat[len(dashboard.panels) :]:
        place.remove()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def _draw_panel(axes: Axes, panel: Panel, found: list[Curve], window: Window) -> None:
    axes.set(title=panel.title, xlim=(0, window.end_s - window.start_s), xlabel="seconds")
    axes.set_ylabel("" if panel.unit == "short" else panel.unit)
    if not found:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray")
        return
    if panel.stacked:
        moments = sorted({at for curve in found for at, _ in curve.points})
        heights = [[dict(curve.points).get(at, 0.0) for at in moments] for curve in found]
        names = [curve.name for curve in found]
        axes.stackplot([at - window.start_s for at in moments], heights, labels=names, alpha=0.7)
    else:
        for curve in found:
            moments = [at - window.start_s for at, _ in curve.points]
            axes.plot(moments, [value for _, value in curve.points], ".-", label=curve.name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small", loc="upper left")


def main(
    prometheus: str,
    folder: Path,
    minutes: float = 15,
    rate_s: Annotated[float, typer.Option(help="Over which rates are taken.")] = 40,
) -> None:
    """Draw the last minutes of all dashboards into a folder."""
    end_s = time.time()
    window = Window(end_s - 60 * minutes, end_s, 60 * minutes / POINTS, rate_s)
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        draw(prometheus, dashboard, window, folder / f"{dashboard.name.lower()}.png")


if __name__ == "__main__":
    typer.run(main)
