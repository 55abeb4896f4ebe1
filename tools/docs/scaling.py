"""Tables of scaling policies, simulated and real, from the files of their benchmarks."""

from tools.docs.markdown import table
from tools.docs.results import results
from tools.docs.tables import NO_BREAK, Row, cheapest, in_time, row, rows_of

PLANS = {
    "plan-4to32": "4 to 32 requests/s, stretched 6 times",
    "plan-4to32-drift": "the same, from small images to large",
    "plan-1to8": "1 to 8 requests/s, stretched 8 times",
    "plan-1to8-15s": "the same, cold start 15 s",
    "plan-4to32-idle": "the first, idle nodes kept for 60 s",
}
"""Simulated scenarios by the names of their files."""

POLICIES = (
    "the work itself",
    "by work",
    "cheapest by work",
    "best by count",
    "by count, as shipped",
    "best fixed size",
)
"""Rows of the table of scenarios."""


def plan_table() -> str:
    """Compare the GPU-hours of scaling policies in five simulated scenarios."""
    columns = []
    for name in PLANS:
        work = row(name, label="by work, as configured")
        shipped = row(name, label="by count, as shipped")
        best = [cheapest(name, family) for family in ("work", "count", "fixed")]
        compared = (work, best[0], best[1], shipped, best[2])
        cells = [
            f"{one['gpu_hours']:.2f}{NO_BREAK}({in_time(one['attainment'])})" for one in compared
        ]
        columns.append([f"{work['work_hours']:.2f}", *cells])
    return table(["", *PLANS.values()], zip(POLICIES, *columns, strict=True))


def routing_table() -> str:
    """Compare routing rules by the requests in time."""
    rows = [
        [
            f"the one with {'fewer requests' if run['routing'] == 'count' else 'less work'}",
            str(run["choices"]),
            *(
                in_time(rows_of(run["rows"], {"label": label})[0]["attainment"])
                for label in ("9 replicas, fixed", "by work, as configured")
            ),
        ]
        for run in results("plan-4to32-routing")["runs"]
    ]
    header = ["a request goes to", "replicas drawn", "nine replicas", "by work, as configured"]
    return table(header, rows)


def autoscaling_table() -> str:
    """Compare the real autoscaler with the simulated one, by run."""
    names = ("running", "target", "nodes")
    rows = []
    for run in results("autoscaling-fake-nodes")["runs"]:
        agreed = run["agreement"]
        means = [" / ".join(f"{mean:.2f}" for mean in agreed[f"{name}_mean"]) for name in names]
        apart = [f"{agreed[f'{name}_mean_absolute_difference']:.2f}" for name in names]
        pairs = zip(means, apart, strict=True)
        rows.append([run["command"].split()[-1], *(cell for pair in pairs for cell in pair)])
    header = ["seed", "running, real / simulated", "apart", "wanted", "apart", "nodes", "apart"]
    return table(header, rows)


def steadiness_table() -> str:
    """Show how often the policy changes the number of replicas under a steady load."""
    rows = [
        [
            f"{one['busy']:g}",
            f"{one['changes_per_hour']:g}",
            f"{one['without_margin_per_hour']:g}",
        ]
        for one in results("steadiness")["rows"]
    ]
    return table(["busy replicas", "changes an hour", "without the margin"], rows)


def few_gpus_table() -> str:
    """Show how long each request of a rotation waits for a GPU and a start, by `hold_s`."""
    runs = results("models-on-few-gpus")["runs"]
    header = ["", "model"]
    for run in runs:
        header += [f"wait for a GPU, `hold_s` {run['hold_s']:g}", "start", "answer after"]
    rows = [
        [str(number), requests[0]["model"], *(cell for one in requests for cell in _times(one))]
        for number, requests in enumerate(zip(*(run["requests"] for run in runs), strict=True), 1)
    ]
    return table(header, rows)


def _times(request: Row) -> list[str]:
    answer_s = request["answered_s"] - request["sent_s"]
    return [f"{value:.1f} s" for value in (request["waited_s"], request["started_s"], answer_s)]
