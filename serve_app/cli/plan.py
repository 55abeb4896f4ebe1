"""``diffusion-serve plan``: size a cluster in simulated time."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from serve_app.config.serve_file import choose_generator
from serve_app.errors import ConfigError
from serve_app.planner.cluster import ClusterParams, Routing


def plan(
    config: Annotated[
        Path, typer.Option(help="Serve config file with the settings of engine and scaling.")
    ],
    costs: Annotated[
        Path,
        typer.Option(
            help="Step times: a file that an engine wrote to engine.profile_path, or a file of "
            "configs/costs/."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Name of the model in a config with several. Default: the first."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="File of arrivals. Either CSV with the columns at_s, size and steps, or CSV with "
            "the columns hour and invocations, or a time in ms on each line. The last two need "
            "--mix."
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Constant arrival rate, in requests per second.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="With --rate: length of the trace in minutes.")
    ] = 60.0,
    mix: Annotated[
        str | None,
        typer.Option(
            help="Sizes and steps of requests: WIDTHxHEIGHT/STEPS:SHARE, separated by commas."
        ),
    ] = None,
    mix_at_end: Annotated[
        str | None,
        typer.Option(help="Mix at the end of the trace. The mix changes gradually towards it."),
    ] = None,
    calls_per_step: Annotated[
        float,
        typer.Option(
            help="Denoiser calls of a request for each of its steps: 2 if guidance has calls of "
            "its own, and fewer with acceleration."
        ),
    ] = 1.0,
    stretch: Annotated[float, typer.Option(help="Factor for the times of the trace.")] = 1.0,
    share: Annotated[
        float,
        typer.Option(help="With --trace: random share of it to replay, over 0 and at most 1."),
    ] = 1.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policies to compare: 'work' (this project's), 'count' (Ray Serve's default), "
            "'fixed' or 'configured' (the config's own policy only). Default: work, count, fixed."
        ),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most replicas. Default: the config's.")
    ] = None,
    node_start_s: Annotated[
        float, typer.Option(help="Seconds until a requested GPU node is ready.")
    ] = 60.0,
    replica_start_s: Annotated[
        float, typer.Option(help="Seconds from a ready node to a ready replica.")
    ] = 30.0,
    node_idle_s: Annotated[
        float, typer.Option(help="Seconds until a node without a replica is removed.")
    ] = 60.0,
    max_backlog_s: Annotated[
        float | None,
        typer.Option(
            help="engine.max_backlog_s of the simulation; inf rejects no request. Default: the "
            "config's."
        ),
    ] = None,
    failures_per_hour: Annotated[
        float, typer.Option(help="Failures of one replica, with its node, in an hour.")
    ] = 0.0,
    routing: Annotated[
        Routing,
        typer.Option(
            help="Route a request to the replica with the fewest requests ('count') or with the "
            "least work ('work')."
        ),
    ] = "count",
    choices: Annotated[
        int,
        typer.Option(
            min=1, help="Replicas that the router compares. Serve's own router compares two."
        ),
    ] = 8,
    slo: Annotated[
        float,
        typer.Option(
            help="Share of requests that must meet their deadlines, over 0 and at most 1."
        ),
    ] = 0.95,
    price: Annotated[float | None, typer.Option(help="Price of a GPU for an hour.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of runs, each with other random sizes and steps.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed: the same seed gives the same result.")] = 1,
    chart: Annotated[
        Path | None, typer.Option(help="Write a chart of the result to this .png file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write all results to this .json file.")
    ] = None,
) -> None:
    """Choose the size of a cluster: replay arrivals in simulated time under many policies."""
    from serve_app.planner import comparison as planner
    from serve_app.planner import inputs

    try:
        if (trace is None) == (rate is None):
            raise ConfigError("give either --trace or --rate, and not both.")
        if not (stretch > 0 and (rate is None or rate > 0) and minutes > 0 and 0 < slo <= 1):
            raise ConfigError(
                "--stretch, --rate and --minutes must be over 0, and --slo over 0 and at most 1."
            )
        if not 0 < share <= 1 or (share < 1 and trace is None):
            raise ConfigError("--share must be over 0 and at most 1, and needs --trace.")
        families = inputs.parse_families(policy or ["work", "count", "fixed"])
        engine = choose_generator(config, model).config.engine
        scaling = inputs.read_scaling(config, max_replicas, model)
        for note in inputs.not_simulated(config, model):
            typer.echo(f"warning: {config}: {note}", err=True)
        step_times = inputs.read_costs(costs, engine.max_batch_size)
        if not calls_per_step > 0:
            raise ConfigError(f"--calls-per-step must be over 0; it is {calls_per_step:g}.")
        step_times.calls_per_step = calls_per_step
        scenario = planner.Scenario(
            [
                inputs.arrivals(trace, rate, minutes * 60, mix, mix_at_end, stretch, share, number)
                for number in range(seed, seed + repeats)
            ],
            step_times,
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
