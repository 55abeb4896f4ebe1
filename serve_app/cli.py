"""The command line: ``diffusion-serve``."""

import json
import re
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
import yaml
from tqdm import tqdm

from serve_app import __version__
from serve_app.config import (
    API_KEY_VARIABLE,
    EngineConfig,
    ModelConfig,
    api_key_in_environment,
    check_model_folder,
    foreign_policy,
    is_path,
    keys_in_environment,
    policy_kwargs,
    read_autoscaling,
    read_num_gpus,
    read_serve_config,
)
from serve_app.errors import ConfigError, DiffusionServeError, InvalidRequest

Routing = Literal["count", "work"]
"""As the simulator has it."""

if TYPE_CHECKING:
    from serve_app.doctor.report import Finding

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

FORMATS: dict[str, Literal["png", "jpeg", "webp"]] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffusion-serve {__version__}")
        raise typer.Exit


@cli.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Text-to-image models in production, batched step by step."""


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    if match := re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text):
        return int(match[1]), int(match[2])
    raise InvalidRequest(f"--size must be WIDTHxHEIGHT in pixels, such as 512x512; got {text!r}.")


def _model(name: str) -> ModelConfig:
    """``demo``, a folder, or a repository of the hub."""
    if name != "demo" and Path(name).expanduser().is_dir():
        return ModelConfig(
            id=Path(name).name or "model", path=str(Path(name).expanduser().resolve())
        )
    return ModelConfig(id=name, path=name if is_path(name) else None)


@cli.command()
def check(
    config: Annotated[Path, typer.Argument(help="A Serve config file, such as configs/demo.yaml.")],
) -> None:
    """Look for mistakes in a config file, in a second, before Ray is started with it."""
    # Late, so that --help does not wait for what serves HTTP.
    from serve_app.autoscaling.params import read_scaling_params
    from serve_app.gateway.auth import KeyRing

    try:
        for autoscaling in read_autoscaling(config, "Generator"):
            read_scaling_params(policy_kwargs(autoscaling))
            if other := foreign_policy(autoscaling):
                typer.echo(
                    f"warning: {config}: Generator is scaled by {other}, which is not checked.",
                    err=True,
                )
        for application in read_serve_config(config):
            check_model_folder(application.model)
            KeyRing(application.gateway.keys_file, keys_in_environment())
    except ConfigError as error:
        typer.echo(f"error: {config}: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{config}: ok")


@cli.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Option(help="A Serve config file: what is to run here. The demo, if none."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="No GPU is expected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Look at the cluster of the current kubeconfig instead."),
    ] = False,
    namespace: Annotated[
        str | None,
        typer.Option(
            help="Of the service. The overlay's, the kubeconfig's or the one that has it, if none."
        ),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(
            allow_dash=True,
            help="A rendered manifest that is to be applied ('-': from stdin), to compare with the "
            "cluster's nodes. What the namespace holds, if none.",
        ),
    ] = None,
) -> None:
    """Look for what stands between this machine, or a cluster, and a picture."""
    from serve_app.doctor.report import any_failed, table
    from serve_app.doctor.report import as_json as to_json

    try:
        if not cluster and (namespace is not None or overlay is not None):
            raise ConfigError("--namespace and --overlay go with --cluster.")
        if cluster and config is not None:
            raise ConfigError("--config is for a machine; give the manifest to --overlay.")
        findings = (
            _look_at_cluster(namespace, overlay, cpu) if cluster else _look_at_machine(config, cpu)
        )
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(to_json(findings), indent=1) if as_json else table(findings))
    if any_failed(findings):
        raise typer.Exit(1)


def _look_at_machine(config: Path | None, cpu: bool) -> list["Finding"]:
    from serve_app.doctor import machine

    if config is None:
        wanted = machine.Wanted(ModelConfig(), num_gpus=0 if cpu else 1, cpu=cpu)
    else:
        [num_gpus, *_] = read_num_gpus(config, "Generator")
        model = read_serve_config(config)[0].model
        wanted = machine.Wanted(model, num_gpus=1 if num_gpus is None else num_gpus, cpu=cpu)
    return list(machine.look(wanted, machine.this_place()))


def _look_at_cluster(namespace: str | None, overlay: Path | None, cpu: bool) -> list["Finding"]:
    from serve_app.doctor import cluster as checks
    from serve_app.doctor.kube import Cluster, Unreachable
    from serve_app.doctor.report import failed

    objects = None
    if overlay is not None:
        try:
            text = sys.stdin.read() if str(overlay) == "-" else overlay.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--overlay: {overlay} cannot be read: {error}.") from None
        objects = checks.read_overlay(text, str(overlay))
        namespace = checks.choose_namespace(objects, str(overlay), namespace)
    try:
        with Cluster(namespace) as cluster:
            return list(checks.look(cluster, cpu, objects))
    except Unreachable as error:
        return [failed("cluster", error.found, error.advice)]


@cli.command()
def key(
    name: Annotated[str, typer.Argument(help="Of whoever uses it, for logs and metrics.")],
    requests_per_minute: Annotated[int | None, typer.Option(help="At most so many.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="At most so many at a time.")] = None,
    priority: Annotated[
        str | None, typer.Option(help="'interactive', or 'batch': when no interactive one can run.")
    ] = None,
) -> None:
    """Make an API key. The entry goes to stdout, for the file of keys; the key to stderr, once."""
    from serve_app.gateway.auth import digest, parse_keys

    secret = f"sk-{secrets.token_urlsafe(32)}"
    fields = {
        "requests_per_minute": requests_per_minute,
        "max_concurrent": max_concurrent,
        "priority": priority,
    }
    given = {field: value for field, value in fields.items() if value is not None}
    entry = yaml.safe_dump(
        [{"name": name, "sha256": digest(secret)} | given], sort_keys=False, allow_unicode=True
    )
    try:
        parse_keys(entry, "this entry")
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(entry, nl=False)
    typer.echo(f"The key, which is written nowhere else: {secret}", err=True)


@cli.command()
def plan(
    config: Annotated[Path, typer.Option(help="A Serve config file: engine and scaling.")],
    costs: Annotated[
        Path,
        typer.Option(help="Step times: what an engine wrote to engine.profile_path, or alike."),
    ],
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Arrivals: CSV with at_s, size, steps; or with hour, invocations; or a time in ms "
            "a line. The last two need --mix."
        ),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Or so many requests a second.")] = None,
    minutes: Annotated[float, typer.Option(help="For so long, with --rate.")] = 60.0,
    mix: Annotated[
        str | None,
        typer.Option(help="What requests ask for: WIDTHxHEIGHT/STEPS:SHARE, with commas."),
    ] = None,
    mix_at_end: Annotated[
        str | None, typer.Option(help="The mix drifts to this one over the trace.")
    ] = None,
    stretch: Annotated[float, typer.Option(help="Times of the trace are multiplied by it.")] = 1.0,
    share: Annotated[
        float, typer.Option(help="So much of the trace is taken, drawn: over 0, up to 1.")
    ] = 1.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="work (this project's), count (Ray Serve's default) or fixed; all, if none. "
            "'configured' tries what the config says, and nothing else."
        ),
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Instead of the config's.")] = None,
    node_start_s: Annotated[float, typer.Option(help="From asking for a GPU node to it.")] = 60.0,
    replica_start_s: Annotated[float, typer.Option(help="From there until it paints.")] = 30.0,
    node_idle_s: Annotated[float, typer.Option(help="A node without a replica is kept.")] = 60.0,
    max_backlog_s: Annotated[
        float | None,
        typer.Option(help="Instead of the config's engine.max_backlog_s; inf refuses nobody."),
    ] = None,
    failures_per_hour: Annotated[float, typer.Option(help="Of one replica with its node.")] = 0.0,
    routing: Annotated[
        Routing,
        typer.Option(help="A request goes to the replica with fewer requests, or with less work."),
    ] = "count",
    choices: Annotated[
        int, typer.Option(min=1, help="Of so many that are drawn; Serve's own router draws two.")
    ] = 8,
    slo: Annotated[float, typer.Option(help="Share of requests that must be in time.")] = 0.95,
    price: Annotated[float | None, typer.Option(help="Of a GPU for an hour.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="So often, with other draws of what requests ask for.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same outcome.")] = 1,
    chart: Annotated[Path | None, typer.Option(help="Draw it: a .png file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write all figures: a .json file.")] = None,
) -> None:
    """Size a cluster before it is bought: replay arrivals in simulated time."""
    from serve_app.planner import comparison as planner
    from serve_app.planner import inputs
    from serve_app.planner.cluster import ClusterParams

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
            content = {"title": title, "slo": slo, "rows": planner.as_json(rows)}
            output.write_text(json.dumps(content, indent=1) + "\n")
        if draw is not None and chart is not None:
            draw(rows, slo, title, chart)
    except OSError as error:
        typer.echo(f"error: {error.filename} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(2) from None


@cli.command()
def infer(
    prompt: Annotated[str, typer.Option(help="What the picture shows.")],
    output: Annotated[Path, typer.Option(help="A .png, .jpg or .webp file.")] = Path("image.png"),
    model: Annotated[
        str, typer.Option(help="'demo', a folder, or a Hugging Face repository.")
    ] = "demo",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it must not show.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely it follows.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Noise scheduler, such as euler, dpm++ or ddim.")
    ] = None,
) -> None:
    """Paint one picture, without a server and without Ray."""
    try:
        image_format = FORMATS.get(output.suffix.lower())
        if image_format is None:
            raise InvalidRequest(f"--output must end in {', '.join(FORMATS)}; got {output}.")
        if not output.absolute().parent.is_dir():
            raise InvalidRequest(f"--output: the folder {output.absolute().parent} does not exist.")
        width, height = _size(size)
        config = _model(model)
        check_model_folder(config)
        # Late, so that --help and mistakes are answered without waiting for torch.
        from serve_app.engine.engine import Engine
        from serve_app.protocol.events import Event, Progress
        from serve_app.protocol.images import Encoding
        from serve_app.protocol.params import GenerationParams

        params = GenerationParams(
            prompt=prompt,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            noise_scheduler=scheduler,
        )
        # One picture shares nothing with another, so there is nothing to certify.
        alone = EngineConfig(max_running=1)
        with Engine.load(config, alone) as engine, tqdm(unit="step", desc="painting") as bar:

            def on_event(event: Event) -> None:
                if isinstance(event, Progress):
                    bar.total = event.total_steps
                    bar.update(event.step - bar.n)

            started_at = time.perf_counter()
            result = engine.generate(params, on_event)
            took_s = time.perf_counter() - started_at
        data = Encoding(image_format).encode(result.image)
    except DiffusionServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        output.write_bytes(data)
    except OSError as error:
        typer.echo(f"error: {output} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(
        f"{output}: {result.image.width}x{result.image.height}, seed {params.seed}, {took_s:.1f} s"
    )


@cli.command()
def top(
    url: Annotated[str, typer.Argument(help="Of the server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(help=f"An API key; better in {API_KEY_VARIABLE}.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds from frame to frame.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame, of --every seconds, and end.")
    ] = False,
) -> None:
    """Watch a deployment in the terminal, by its /metrics. Ctrl-C ends it."""
    try:
        from rich.console import Console

        from serve_app.top import Server, watch

        server = Server.at(url, key or api_key_in_environment() or None)
        watch(server, Console(markup=False, emoji=False, highlight=False), every, once)
    except DiffusionServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:  # as it is meant to end
        pass
