"""The table of what the engine adds to a step, from the runs of `tests.benchmarks.overhead`."""

from statistics import median

from tools.docs.markdown import table
from tools.docs.results import results


def overhead_table() -> str:
    """Show the time and the function calls of a step by the number of requests."""
    header = ["batch", "requests", "stock pipeline", "with the engine", "added, before"]
    header += ["added, after", "calls, before", "calls, after"]
    lines = []
    for row in results("overhead-demo-cpu")["runs"][0]["rows"]:
        kind = row["batch"], row["requests"]
        times = [
            _median("after", *kind, "stock_ms"),
            _median("after", *kind, "engine_ms"),
            _median("before", *kind, "added_ms"),
            _median("after", *kind, "added_ms"),
        ]
        calls = [_median(label, *kind, "calls") for label in ("before", "after")]
        cells = [f"{ms:.2f} ms" for ms in times] + [f"{one:.0f}" for one in calls]
        lines.append([*map(str, kind), *cells])
    return table(header, lines)


def _median(label: str, batch: int, requests: int, kind: str) -> float:
    """Return the median of the runs of one version."""
    runs = [run for run in results("overhead-demo-cpu")["runs"] if run["label"] == label]
    rows = [row for run in runs for row in run["rows"]]
    wanted = [row for row in rows if (row["batch"], row["requests"]) == (batch, requests)]
    return float(median(row[kind] for row in wanted))
