"""The table of what the engine adds to a step, from the runs of `tests.benchmarks.overhead`."""

from statistics import median

from tools.docs.markdown import table
from tools.docs.results import results


def overhead_table() -> str:
    """Show the time and the function calls of a step by the number of requests."""
    header = ["batch", "requests", "stock pipeline", "with the engine", "added: before, after"]
    header += ["calls: before, after"]
    lines = []
    for row in results("overhead-demo-cpu")["runs"][0]["rows"]:
        kind = row["batch"], row["requests"]
        cells = [f"{_median('after', *kind, name):.2f} ms" for name in ("stock_ms", "engine_ms")]
        for name, form in (("added_ms", "{:.2f} ms"), ("calls", "{:.0f}")):
            pair = [_median(label, *kind, name) for label in ("before", "after")]
            cells.append(", ".join(map(form.format, pair)))
        lines.append([*map(str, kind), *cells])
    return table(header, lines)


def _median(label: str, batch: int, requests: int, kind: str) -> float:
    """Return the median of the runs of one version."""
    runs = [run for run in results("overhead-demo-cpu")["runs"] if run["label"] == label]
    rows = [row for run in runs for row in run["rows"]]
    wanted = [row for row in rows if (row["batch"], row["requests"]) == (batch, requests)]
    return float(median(row[kind] for row in wanted))
