"""Tables of results as Markdown, rendered from the files that the benchmarks wrote."""

import math
import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from tools.docs.markdown import table
from tools.docs.results import results

Row = dict[str, Any]

WAYS = {
    "one at a time": "stock pipeline, one request at a time",
    "whole batches": "stock pipeline, whole requests in batches",
    "engine, fifo": "diffusion-serve, `fifo`",
    "engine, former on_time": "diffusion-serve, the former `on_time`",
    "engine, on_time": "diffusion-serve, `on_time`",
}
"""Names of the ways in which ``tests.benchmarks.engine`` serves one trace of arrivals."""

SERVERS = {
    "lock": "stock pipeline, one request at a time",
    "batch": "stock pipeline, whole requests in batches",
    "ours": "diffusion-serve",
    "ours-fifo": "diffusion-serve, `fifo`",
}
"""Names of the servers that ``tests.benchmarks.peers`` compares."""

NETWORKS = ("denoiser", "text encoder and VAE")
"""Layers of ``tests.benchmarks.layers`` that are no overhead."""

NOT_NETWORKS = "all but the networks"

STARTS = {"first": "without a profile", "again": "with a profile"}

SIZES = {"none": "no sizes", "four": "four sizes"}
"""Entries of ``warmup_sizes_px``."""

OVERLOAD = (
    "goodput, images/s",
    "rejected at first",
    "queue time, p95",
    "longest queue time",
    "longest `Retry-After`",
    "admitted on retry",
    "of those in time",
)
"""Rows of the table of loads."""

LINE_LENGTH = 84

NO_BREAK = "\N{NO-BREAK SPACE}"

TIMES = "\N{MULTIPLICATION SIGN}"

EXACT_DB = 120.0
"""Peak signal-to-noise ratio from which two images are equal up to rounding."""


def percent(share: float, digits: int = 0) -> str:
    """Format a share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def in_time(share: float) -> str:
    """Format a share in time, rounded down: 94.95 % must not look like a met SLO of 95 %."""
    return f"{math.floor(1000 * share + 1e-9) / 10:.1f}{NO_BREAK}%"


def row(name: str, **values: object) -> Row:
    """Return the only row of ``tests/benchmarks/results/NAME.json`` with these values.

    Raises:
        LookupError: None or several rows have them.
    """
    found = rows_of(results(name)["rows"], values)
    if len(found) != 1:
        raise LookupError(f"{name}: {len(found)} rows have {values}; exactly one must.")
    return found[0]


def hardware(name: str) -> str:
    """Describe the machine and the versions of a result."""
    content = _with_source(results(name))[0]["hardware"]
    device = re.sub(r"\((R|TM)\)| Processor", "", content["device"])
    counts = f"{content['cores']} cores, {content['threads']} threads of torch"
    names = {"python": "Python", "torch": "torch", "diffusers": "diffusers", "ray": "Ray"}
    versions = [f"{shown} {content[key]}" for key, shown in names.items() if key in content]
    return ", ".join([device, re.sub(r"\b1 threads", "1 thread", counts), *versions])


def source(name: str) -> str:
    """State the hardware, the commands and the file of a result."""
    content = _with_source(results(name))
    lines = [f"Hardware: {hardware(name)}." if "hardware" in content[0] else "Simulated."]
    lines += [f"Results: `tests/benchmarks/results/{name}.json`.", "", "```sh"]
    return "\n".join([*lines, *(_wrapped(one["command"]) for one in content), "```"])


def cheapest(name: str, family: str) -> Row:
    """Return the policy of a family with the fewest GPU-hours that meets the simulation's SLO."""
    content = results(name)
    good = [row for row in content["rows"] if row["attainment"] >= content["slo"]]
    return min(rows_of(good, {"family": family}), key=lambda row: row["gpu_hours"])


def peers_table() -> str:
    """Compare the server with the simplest ones, by load; the range of the rounds in brackets."""
    rows = [
        [
            one["load"],
            SERVERS[one["server"]],
            _span(one["spans"]["images_per_s"]),
            *(f"{_span(one['spans'][metric])} s" for metric in ("p50_s", "p95_s")),
            f"{one['spans']['p95_over_p50']['median']:.1f}",
        ]
        for one in results("peers-demo-cpu")["summary"]
    ]
    return table(["clients", "server", "images/s", "p50", "p95", "p95 / p50"], rows)


def peers_targets_table() -> str:
    """Show which targets the server meets beside the simplest ones."""
    rows = [
        [one["text"], f"{one['measured']:.3g}", "met" if one["met"] else "missed"]
        for one in results("peers-demo-cpu")["aims"]
        if one["measured"] is not None
    ]
    return table(["target", "measured", ""], rows)


def _span(found: Row) -> str:
    """Format a median and the range of the rounds."""
    return f"{found['median']:.2f} ({found['least']:.2f} to {found['greatest']:.2f})"


def engine_table(load: float | None = None) -> str:
    """Compare the engine with the stock pipeline, on traces of arrivals of all loads or one."""
    content = results("engine-demo-cpu")["rows"]
    loads = dict.fromkeys(one["load"] for one in content) if load is None else [load]
    rows = [
        [
            f"{one['load']:g}",
            WAYS[one["way"]],
            f"{one['images_per_s']:.2f}",
            f"{one['p50_s']:.2f} s",
            f"{one['p95_s']:.2f} s",
            f"{one['short_p95_s']:.2f} s",
            percent(one["slo"]),
        ]
        for share in loads
        for way in WAYS
        for one in rows_of(content, {"load": share, "way": way})
    ]
    return table(["load", "", "images/s", "p50", "p95", "p95 of short ones", "in time"], rows)


def engine_details_table() -> str:
    """Show how full the engine's batches are, and how close to the bare network calls it is."""
    rows = [
        [
            f"{one['load']:g}",
            WAYS[one["way"]],
            f"{one['mean_batch_size']:.2f}",
            f"{row('engine-demo-cpu', way=one['way'], load=one['load'])['efficiency']:.2f}",
            percent(one["forecast_error"]),
        ]
        for one in results("engine-demo-cpu")["engine"]
    ]
    return table(["load", "", "mean batch", "efficiency", "error of the predicted duration"], rows)


def mix_table() -> str:
    """Show the kinds of requests of ``tests.benchmarks.engine``."""
    rows = [
        [
            f"{kind['width']}x{kind['height']}",
            str(kind["steps"]),
            percent(kind["share"]),
            f"{kind['solo_s']:.2f} s",
        ]
        for kind in results("engine-demo-cpu")["kinds"]
    ]
    return table(["size", "steps", "share", "solo time"], rows)


def scheduler_table() -> str:
    """Show the time of one scheduling decision."""
    rows = [
        [
            f"`{one['policy']}`",
            *(f"{one[kind]:.0f} µs" for kind in ("median_us", "p99_us", "after_change_median_us")),
        ]
        for one in results("scheduler")["rows"]
    ]
    return table(["policy", "median", "p99", "median after a change"], rows)


def speed_table() -> str:
    """Compare each speed option with the model without options."""
    return table(
        ["option", "batch of 1", "batch of 8", "PSNR", "denoiser"],
        [_speed_cells(one) for one in results("speed-demo-cpu")["rows"]],
    )


def _speed_cells(one: Row) -> list[str]:
    option = one["option"]
    if option == "none":
        times = [f"{1000 * one['call_s'][batch]:.1f} ms" for batch in ("1", "8")]
        return [option, *times, "", f"{one['denoiser_mib']:.1f} MiB"]
    names = [name if ":" in name else f"{name}: true" for name in option.split(", ")]
    setting = ", ".join(f"`speed.{name}`" for name in names)
    setting = setting.replace("speed.bfloat16: true", "dtype: bfloat16")
    if one["call_s"] is None:
        return [setting, "not measured", "not measured", "", ""]
    ratios = [f"{TIMES} {one['ratio'][batch]:.2f}" for batch in ("1", "8")]
    psnr = "exact" if one["psnr_db"] >= EXACT_DB else f"{one['psnr_db']:.0f} dB"
    return [setting, *ratios, psnr, f"{one['denoiser_mib']:.1f} MiB"]


def cold_start_table() -> str:
    """Show the duration of a start by phase, with and without a profile."""
    rows = results("cold-start-demo-cpu")["rows"]
    header = ["", *(f"{SIZES[one['sizes']]}, {STARTS[one['start']]}" for one in rows)]
    phases = [
        [phase, *(f"{one['phases_s'][phase]:.1f} s" for one in rows)]
        for phase in rows[0]["phases_s"]
    ]
    total = ["total", *(f"{one['total_s']:.1f} s" for one in rows)]
    span = [f"{one['total_from_s']:.1f} to {one['total_to_s']:.1f} s" for one in rows]
    return table(header, [*phases, total, ["quickest to slowest", *span]])


def streaming_table() -> str:
    """Compare streams with a plain JSON response."""
    rows = [
        [
            one["way"],
            f"{one['total_ms']:.0f} ms",
            "" if one["first_event_ms"] is None else f"{one['first_event_ms']:.0f} ms",
            "" if one["first_event_ms"] is None else f"{one['first_event_worst_ms']:.0f} ms",
            f"{one['events']:.0f}",
            f"{one['cost_ms_per_step']:.2f} ms",
        ]
        for one in results("sse-demo-cpu")["rows"]
    ]
    header = ["response", "total", "first event", "slowest first event", "events", "cost of a step"]
    return table(header, rows)


def layers_ms(label: str, requests: int, kind: str) -> dict[str, float]:
    """Return the medians of several runs of `tests.benchmarks.layers`.

    ``kind`` is 'layers_ms', by layer of the engine, or 'http_ms', by part of a request over HTTP.
    """
    runs = [run for run in results("layers-demo-cpu")["runs"] if run["label"] == label]
    rows = [row for run in runs for row in run["rows"] if row["requests"] == requests]
    parts = [row[kind] for row in rows]
    found = {name: median(part.get(name, 0.0) for part in parts) for name in parts[0]}
    if kind == "layers_ms":
        found["in all, without timers"] = median(row["engine_ms"] for row in rows)
        found["stock pipeline, list of prompts"] = median(row["floor_ms"] for row in rows)
        found[NOT_NETWORKS] = sum(found[name] for name in parts[0] if name not in NETWORKS)
    return found


def layers_table(kind: str) -> str:
    """Show where the time of one request goes, and of eight together, before and after."""
    sides = [(requests, label) for requests in (1, 8) for label in ("before", "after")]
    columns = [layers_ms(label, requests, kind) for requests, label in sides]
    names = sorted(columns[-1], key=lambda name: -columns[-1][name])
    rows = [[name, *(f"{column.get(name, 0.0):.1f} ms" for column in columns)] for name in names]
    header = ["", "one, before", "one, after", "eight, before", "eight, after"]
    return table(header, rows)


def overload_table() -> str:
    """Show goodput, rejections and retries by load; several rounds are separated by commas."""
    content = results("overload-demo-cpu")
    loads = [rows_of(content["rows"], {"load": float(load)}) for load in content["goodput_per_s"]]
    header = ["load", *(f"{rounds[0]['load']:.1f}" for rounds in loads)]
    return table(header, zip(OVERLOAD, *map(_overload_cells, loads), strict=True))


def _overload_cells(rounds: Sequence[Row]) -> list[str]:
    reserved = sum(one["reservations"] for one in rounds)
    kept = sum(round(one["reservations_kept"] * one["reservations"]) for one in rounds)
    return [
        ", ".join(f"{one['goodput_per_s']:.2f}" for one in rounds),
        ", ".join(percent(one["rejected"]) for one in rounds),
        f"{max(one['queue_p95_s'] for one in rounds):.2f} s",
        f"{max(one['queue_max_s'] for one in rounds):.2f} s",
        f"{max(one['retry_after_max_s'] for one in rounds):.0f} s",
        f"{kept:,} of {reserved:,}",
        ", ".join(percent(one["reservations_in_time"]) for one in rounds),
    ]


def observability_table() -> str:
    """Show the throughput with metrics and traces, against that with neither."""
    content = results("observability-demo-cpu")["rows"]
    ways = [one for one in dict.fromkeys(one["way"] for one in content) if one != "nothing"]
    rows = []
    for load in dict.fromkeys(one["load"] for one in content):
        cells = [row("observability-demo-cpu", load=load, way=way) for way in ways]
        rows.append(
            [
                load,
                *(
                    f"{percent(one['throughput'], 1)} "
                    f"({100 * one['between'][0]:.1f} to {100 * one['between'][1]:.1f})"
                    for one in cells
                ),
            ]
        )
    return table(["images", *ways], rows)


def _wrapped(command: str) -> str:
    """Break a long command before its options."""
    lines: list[str] = []
    for part in re.split(r" (?=--)", command):
        if lines and len(f"{lines[-1]} {part}") <= LINE_LENGTH:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return " \\\n    ".join(lines)


def _with_source(content: Any) -> list[Row]:
    """Return the parts of a result that state their command: itself, or its runs."""
    return [content] if "command" in content else list(content["runs"])


def rows_of(rows: Iterable[Row], values: dict[str, object]) -> list[Row]:
    return [one for one in rows if all(one[key] == value for key, value in values.items())]
