"""``diffusion-serve plan``: size a cluster in simulated time."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from tqdm import tqdm

from serve_app.config.serve_file import GeneratorSettings, choose_generator, read_generators
from serve_app.errors import ConfigError
from serve_app.planner.cluster import ClusterParams, Routing

if TYPE_CHECKING:
    from serve_app.planner.comparison import Scenario
    from serve_app.planner.inputs import Family
    from serve_app.planner.several_models import PlannedModel

_OF_MODEL = "[NAME=]VALUE"


def plan(
    config: Annotated[
        Path, typer.Option(help="Serve config file with the settings of engine and scaling.")
    ],
    costs: Annotated[
        list[str],
        typer.Option(
            metavar=_OF_MODEL,
            help="Step times: a file that an engine wrote to engine.profile_path, or a file of "
            "configs/costs/. NAME=FILE is for one of several models, FILE for all. The same holds "
            "for --trace, --rate, --mix, --mix-at-end and --calls-per-step.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in a config with several. Default: all of them together, which "
            "share the GPUs."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With several models: most GPUs of all together. A replica that finds none waits. "
            "Default: no limit.",
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar=_OF_MODEL,
            help="File of arrivals. Either CSV with the columns at_s, size and steps, or CSV with "
            "the columns hour and invocations, or a time in ms on each line. The last two need "
            "--mix.",
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar=_OF_MODEL, help="Constant arrival rate, in requests per second."),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="With --rate: length of the trace in minutes.")
    ] = 60.0,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            metavar=_OF_MODEL,
            help="Sizes and steps of requests: WIDTHxHEIGHT/STEPS:SHARE, separated by commas.",
        ),
    ] = None,
    mix_at_end: Annotated[
        list[str] | None,
        typer.Option(
            metavar=_OF_MODEL,
            help="Mix at the end of the trace. The mix changes gradually towards it.",
        ),
    ] = None,
    calls_per_step: Annotated[
        list[str] | None,
        typer.Option(
            metavar=_OF_MODEL,
            help="Denoiser calls of a request for each of its steps: 2 if guidance has calls of "
            "its own, and fewer with acceleration. Default: 1.",
        ),
    ] = None,
    stretch: Annotated[float, typer.Option(help="Factor for the times of the trace.")] = 1.0,
    share: Annotated[
        float,
        typer.Option(help="With --trace: random share of it to replay, over 0 and at most 1."),
    ] = 1.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policies to compare: 'work' (this project's), 'count' (Ray Serve's default), "
            "'fixed' or 'configured' (the config's own policy only). Default: work, count, fixed. "
            "Several models take 'configured' only."
        ),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most replicas of a model. Default: the config's.")
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
    """Choose the size of a cluster: replay arrivals in simulated time under many policies.

    Several models share the GPUs, and each is planned as configured.
    """
    from serve_app.planner import comparison, inputs, several_models

    options = {
        "--costs": costs,
        "--trace": trace or [],
        "--rate": rate or [],
        "--mix": mix or [],
        "--mix-at-end": mix_at_end or [],
        "--calls-per-step": calls_per_step or [],
    }

    def scenario(one: GeneratorSettings, seed: int) -> "Scenario":
        engine = one.config.engine
        own = inputs.model_inputs(one.config.model.id, known, options)
        step_times = inputs.read_costs(own.costs, engine.max_batch_size)
        step_times.calls_per_step = own.calls_per_step
        return comparison.Scenario(
            [
                inputs.arrivals(own, minutes * 60, stretch, share, number)
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

    try:
        if not (stretch > 0 and minutes > 0 and 0 < slo <= 1):
            raise ConfigError(
                "--stretch and --minutes must be over 0, and --slo over 0 and at most 1."
            )
        if not 0 < share <= 1 or (share < 1 and not trace):
            raise ConfigError("--share must be over 0 and at most 1, and needs --trace.")
        generators = read_generators(config)
        known = [one.config.model.id for one in generators]
        chosen = generators if model is None else [choose_generator(config, model)]
        names = [one.config.model.id for one in chosen]
        if len(chosen) > 1:
            _check_several(names, policy, repeats)
        elif gpus is not None:
            raise ConfigError("--gpus is for several models: limit one model with --max-replicas.")
        families = inputs.parse_families(policy or ["work", "count", "fixed"])
        scaling = [inputs.read_scaling(config, max_replicas, name) for name in names]
        for name in names:
            for note in inputs.not_simulated(config, name):
                typer.echo(f"warning: {config}: {note}", err=True)
        planned = [
            # A seed for each model: two models with one rate have different arrivals.
            several_models.PlannedModel(name, scenario(one, seed + number), bounds)
            for number, (name, one, bounds) in enumerate(zip(names, chosen, scaling, strict=True))
        ]
        if chart is not None and find_spec("matplotlib") is None:
            raise ConfigError("--chart needs matplotlib: pip install 'diffusion-serve[plan]'.")
        if len(planned) > 1:
            result = _share_gpus(planned, gpus, slo, price)
        else:
            result = _compare_policies(planned[0], families, slo, price)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    title = f"{result.title}, cold start {node_start_s + replica_start_s:g} s"
    typer.echo(title)
    typer.echo(result.text)
    try:
        if output is not None:
            command = shlex.join(["diffusion-serve", *sys.argv[1:]])
            content = {"command": command, "title": title, "slo": slo, "rows": result.rows_json}
            output.write_text(json.dumps(content, indent=1) + "\n")
        if chart is not None:
            result.draw(title, chart)
    except OSError as error:
        typer.echo(f"error: {error.filename} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(2) from None


class _Result(NamedTuple):
    title: str
    text: str
    rows_json: list[dict[str, object]]
    draw: Callable[[str, Path], None]
    """Draws a chart with a title, to a file."""


def _compare_policies(
    model: "PlannedModel",
    families: "Sequence[Family | Literal['configured']]",
    slo: float,
    price: float | None,
) -> _Result:
    from serve_app.planner import comparison

    scenario = model.scenario
    tried = list(comparison.candidates(model.scaling, families, scenario.mean_busy))
    with tqdm(total=len(tried), unit="policy", desc="simulating", disable=None) as bar:
        rows = comparison.compare(scenario, tried, lambda row: bar.update())

    def draw(title: str, path: Path) -> None:
        from serve_app.planner import chart

        chart.draw(rows, slo, title, path)

    first = scenario.traces[0]
    table = comparison.table(comparison.shown(rows, slo), price)
    return _Result(
        f"{len(first.at_s)} requests in {first.duration_s / 60:.0f} minutes, "
        f"{rows[0].work_hours:.2f} GPU-hours of work",
        f"{table}\n{comparison.verdict(rows, slo)}",
        comparison.as_json(rows),
        draw,
    )


def _share_gpus(
    models: "Sequence[PlannedModel]", gpus: int | None, slo: float, price: float | None
) -> _Result:
    from serve_app.planner import several_models

    rows = several_models.simulate_together(models, gpus)

    def draw(title: str, path: Path) -> None:
        from serve_app.planner import chart

        chart.draw_models(rows[:-1], gpus, title, path)

    minutes = max(one.scenario.traces[0].duration_s for one in models) / 60
    limit = "any number of" if gpus is None else f"at most {gpus}"
    return _Result(
        f"{rows[-1].requests} requests in {minutes:.0f} minutes, {limit} GPUs",
        f"{several_models.table(rows, price)}\n{several_models.verdict(rows, slo)}",
        several_models.as_json(rows),
        draw,
    )


def _check_several(names: Sequence[str], policy: Sequence[str] | None, repeats: int) -> None:
    """Raise `ConfigError` for options that plan one model only."""
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the config has two models of one name: {', '.join(map(repr, names))}. Give each an "
            "id of its own."
        )
    for option, is_wrong in (
        ("--policy", policy not in (None, [], ["configured"])),
        ("--repeats", repeats > 1),
    ):
        if is_wrong:
            raise ConfigError(
                f"{option} is for one model, and the config has {', '.join(map(repr, names))}: "
                "leave it out, or name one with --model."
            )
