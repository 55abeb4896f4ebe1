"""Draws the planner's results. Needs matplotlib, an extra of this package."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from serve_app.planner.cluster import Sample
from serve_app.planner.comparison import NAMES, Row, cheapest, front
from serve_app.planner.several_models import ModelRow

COLORS = {"work": "tab:blue", "count": "tab:orange", "fixed": "tab:gray"}


def draw(rows: Sequence[Row], slo_share: float, title: str, path: Path) -> None:
    """Draw load, replicas and backlog over time, and attainment by GPU-hours, as a PNG file."""
    with_curve = [row for row in rows if row.label.endswith(("as configured", "as shipped"))]
    best = cheapest(rows, "count", slo_share)
    if best is not None and best not in with_curve:
        with_curve.append(best)
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    figure.suptitle(title)
    _draw_replicas(axes[0][0], with_curve or rows[:1])
    _draw_backlog(axes[1][0], with_curve or rows[:1])
    _draw_front(axes[0][1], rows, slo_share)
    _draw_bars(axes[1][1], with_curve or rows[:1])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_models(rows: Sequence[ModelRow], gpus: int | None, title: str, path: Path) -> None:
    """Draw the replicas of several models over time, stacked, as a PNG file.

    ``rows``: those of the models, without that of the pool. ``gpus``: the size of the pool.
    """
    figure, axes = plt.subplots(figsize=(13, 5), layout="constrained")
    figure.suptitle(title)
    minutes = [sample.at_s / 60 for sample in rows[0].curve]
    axes.stackplot(
        minutes,
        [[sample.running for sample in row.curve] for row in rows],
        labels=[row.label for row in rows],
        step="post",
        alpha=0.7,
    )
    if gpus is not None:
        axes.axhline(gpus, color="0.3", linestyle=":", label="GPUs of the pool")
    axes.set(xlabel="minutes", ylabel="replicas", title="Replicas that run", ylim=(0, None))
    axes.margins(x=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_replicas(axes: Axes, rows: Sequence[Row]) -> None:
    curve = rows[0].curve
    minutes = [sample.at_s / 60 for sample in curve]
    offered = [sample.offered for sample in curve]
    axes.fill_between(minutes, offered, color="0.85", label="arriving work")
    _draw_curves(axes, rows, lambda sample: sample.running)
    axes.set(ylabel="replicas", title="Replicas that run")


def _draw_backlog(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_curves(axes, rows, lambda sample: sample.backlog_s)
    axes.set_yscale("symlog", linthresh=10)
    axes.set(ylabel="seconds of work", title="Backlog", ylim=(0, None))


def _draw_curves(axes: Axes, rows: Sequence[Row], of: Callable[[Sample], float]) -> None:
    """Draw one value of all samples over time."""
    for row, style in zip(rows, ("-", "--", "-.", ":"), strict=False):
        axes.plot(
            [sample.at_s / 60 for sample in row.curve],
            [of(sample) for sample in row.curve],
            style,
            color=COLORS[row.family],
            label=row.label,
        )
    axes.set(xlabel="minutes", ylim=(0, None))
    axes.legend(fontsize="small")


def _draw_front(axes: Axes, rows: Sequence[Row], slo_share: float) -> None:
    for family, name in NAMES.items():
        ours = [row for row in rows if row.family == family]
        if not ours:
            continue
        color = COLORS[family]
        axes.scatter(
            [row.gpu_hours for row in ours],
            [100 * row.attainment for row in ours],
            s=12,
            color=color,
            alpha=0.5,
        )
        best = front(rows, family)
        axes.plot(
            [row.gpu_hours for row in best],
            [100 * row.attainment for row in best],
            color=color,
            label=name,
        )
    axes.axhline(100 * slo_share, color="0.5", linestyle=":")
    axes.axvline(rows[0].work_hours, color="0.5", linestyle=":", label="the work itself")
    axes.set(xlabel="GPU-hours", ylabel="% in time", title="In time against GPU-hours")
    axes.set_ylim(max(0.0, 100 * slo_share - 40), 101)
    axes.legend(fontsize="small")


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    bars = axes.barh(
        [row.label.replace(", ", ",\n") for row in rows],
        [row.gpu_hours for row in rows],
        color=[COLORS[row.family] for row in rows],
    )
    axes.bar_label(bars, [f"{row.attainment:.1%} in time" for row in rows], padding=3)
    axes.axvline(rows[0].work_hours, color="0.5", linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel="GPU-hours", title="What it costs")
    axes.set_xlim(0, 1.35 * max(row.gpu_hours for row in rows))
