"""``diffusion-serve plan``: size a cluster in simulated time."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from serve_app.config.serve_file import read_serve_config
from serve_app.errors import ConfigError
from serve_app.planner.cluster import ClusterParams, Routing


def plan(
    config: Annotated[Path, typer.Option(help="A Serve config file: engine and scaling.")],
    costs: Annotated[
        Path,
        typer.Option(
            help="Step times: a file that an engine wrote to engine.profile_path, or alike."
        ),
    ],
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Arrivals: CSV with at_s, size, steps; or with hour, invocations; or a time in ms "
            "a line. The last two need --mix."
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Constant arrival rate, in requests per second.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Length of the trace in minutes, with --rate.")
    ] = 60.0,
    mix: Annotated[
        str | None,
        typer.Option(help="Sizes and steps of requests: WIDTHxHEIGHT/STEPS:SHARE, with commas."),
    ] = None,
    mix_at_end: Annotated[
        str | None, typer.Option(help="The mix drifts to this one until the end of the trace.")
    ] = None,
    stretch: Annotated[float, typer.Option(help="Factor for the times of the trace.")] = 1.0,
    share: Annotated[
        float, typer.Option(help="Random share of the trace to replay: over 0, up to 1.")
    ] = 1.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="work (this project's), count (Ray Serve's default) or fixed; all by default. "
            "'configured' tries the config's own policy only."
        ),
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Replaces the config's.")] = None,
    node_start_s: Annotated[
        float, typer.Option(help="Seconds until a requested GPU node is up.")
    ] = 60.0,
    replica_start_s: Annotated[
        float, typer.Option(help="Seconds from a node to a ready replica.")
    ] = 30.0,
    node_idle_s: Annotated[
        float, typer.Option(help="Seconds that a node without a replica stays.")
    ] = 60.0,
    max_backlog_s: Annotated[
        float | None,
        typer.Option(help="Replaces the config's engine.max_backlog_s; inf rejects no request."),
    ] = None,
    failures_per_hour: Annotated[
        float, typer.Option(help="Failures of one replica with its node.")
    ] = 0.0,
    routing: Annotated[
        Routing,
        typer.Option(help="Route a request to the replica with fewer requests, or with less work."),
    ] = "count",
    choices: Annotated[
        int,
        typer.Option(min=1, help="Replicas drawn for each choice; Serve's own router draws two."),
    ] = 8,
    slo: Annotated[
        float, typer.Option(help="Share of requests that must meet their deadlines.")
    ] = 0.95,
    price: Annotated[float | None, typer.Option(help="Price of a GPU for an hour.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of runs, each with other draws of sizes and steps.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 1,
    chart: Annotated[Path | None, typer.Option(help="Draw the result: a .png file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write all results: a .json file.")] = None,
) -> None:
    """Size a cluster before it is bought: replay arrivals in simulated time."""
    from serve_app.planner import comparison as planner
    from serve_app.planner import inputs

    try:
        if (trace is None) == (rate is None):
            raise ConfigError("give either --trace or --rate.")
        if not (stretch > 0 and (rate is None or rate > 0) and minutes > 0 and 0 < slo <= 1):
            raise ConfigError("--stretch, --rate and --minutes must be over 0, --slo up to 1.")
        if not 0 < share <= 1 or (share < 1 and trace is None):
            raise ConfigError("--share must be over 0 and up to 1, and goes with --trace.")
        families = inputs.parse_families(policy or ["work", "count", "fixed"])
        application = read_serve_config(config)[0]
        engine = application.engine
        scaling = inputs.read_scaling(config, max_replicas)
        for note in inputs.not_simulated(config):
            typer.echo(f"warning: {config}: {note}", err=True)
        scenario = planner.Scenario(
            [
                inputs.arrivals(trace, rate, minutes * 60, mix, mix_at_end, stretch, share, number)
                for number in range(seed, seed + repeats)
            ],
            inputs.read_costs(costs, engine.max_batch_size),
            engine.scheduling,
            ClusterParams(
                node_start_s=node_start_s,
                replica_start_s=replica_start_s,
                node_idle_s=node_idle_s,
                failures_per_hour=failures_per_hour,
                routing=routing,
                choices=choices,
                slo_scale=engine.slo_scale,
                max_running=engine.max_running,
                max_backlog_s=engine.max_backlog_s if max_backlog_s is None else max_backlog_s,
                seed=seed,
            ),
        )
        draw = None if chart is None else planner.drawing()
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    tried = list(planner.candidates(scaling, families, scenario.mean_busy))
    with tqdm(total=len(tried), unit="policy", desc="simulating", disable=None) as bar:
        rows = planner.compare(scenario, tried, lambda row: bar.update())
    first, cold_start_s = scenario.traces[0], node_start_s + replica_start_s
    title = (
        f"{len(first.at_s)} requests in {first.duration_s / 60:.0f} minutes, "
        f"{rows[0].work_hours:.2f} GPU-hours of work, cold start {cold_start_s:g} s"
    )
    typer.echo(title)
    typer.echo(planner.table(planner.shown(rows, slo), price))
    typer.echo(planner.verdict(rows, slo))
    try:
        if output is not None:
            command = shlex.join(["diffusion-serve", *sys.argv[1:]])
            rows_json = planner.as_json(rows)
            content = {"command": command, "title": title, "slo": slo, "rows": rows_json}
            output.write_text(json.dumps(content, indent=1) + "\n")
        if draw is not None and chart is not None:
            draw(rows, slo, title, chart)
    except OSError as error:
        typer.echo(f"error: {error.filename} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(2) from None
