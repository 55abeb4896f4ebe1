"""``diffusion-serve doctor``: find what stops a machine or a cluster from serving."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.config.models import ModelConfig
from serve_app.config.serve_file import read_num_gpus, read_serve_config
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.doctor.report import Finding


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
