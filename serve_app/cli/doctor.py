"""``diffusion-serve doctor``: find what stops a machine or a cluster from serving."""

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.config.models import ModelConfig
from serve_app.config.serve_file import read_generators
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.doctor.report import Finding


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(help="Serve config file to check this machine for. Default: the demo model."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Expect no GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Check the cluster of the current kubeconfig instead."),
    ] = False,
    namespace: Annotated[
        str | None,
        typer.Option(
            help="With --cluster: namespace of the service. Default: the overlay's, the "
            "kubeconfig's, or the only one with a service of this project."
        ),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(
            allow_dash=True,
            help="Rendered manifest to check before it is applied; '-' reads stdin. With "
            "--cluster, the check compares its pods with the cluster's nodes. Default with "
            "--cluster: the objects in the namespace.",
        ),
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Test the overlay in a temporary namespace: apply, generate an image, change, "
            "upgrade, roll back, delete. Without this option nothing is changed.",
        ),
    ] = False,
) -> None:
    """Check whether this machine, a manifest or a cluster can serve, and advise what to do."""
    from serve_app.doctor.report import any_failed, table
    from serve_app.doctor.report import as_json as to_json

    try:
        if not cluster and namespace is not None:
            raise ConfigError("--namespace needs --cluster.")
        if (cluster or overlay is not None) and config is not None:
            raise ConfigError(
                "--config checks a machine: for a cluster, pass a manifest to --overlay."
            )
        if rehearse and (not cluster or overlay is None):
            raise ConfigError(
                "--rehearse needs --cluster and --overlay: `kubectl kustomize "
                "cluster/overlays/local | diffusion-serve doctor --cluster --overlay - --rehearse`."
            )
        if rehearse and overlay is not None:
            findings = _rehearse(namespace, overlay)
        elif cluster:
            findings = _look_at_cluster(namespace, overlay, cpu)
        elif overlay is not None:
            findings = _look_at_manifest(overlay)
        else:
            findings = _look_at_machine(config, cpu)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(to_json(findings), indent=1) if as_json else table(findings))
    if any_failed(findings):
        raise typer.Exit(1)


def _look_at_machine(config: Path | None, cpu: bool) -> list["Finding"]:
    from serve_app.doctor import machine

    if config is None:
        wanted = [machine.Wanted(ModelConfig(), num_gpus=0 if cpu else 1, cpu=cpu)]
    else:
        wanted = [
            machine.Wanted(
                one.config.model,
                num_gpus=1 if one.num_gpus is None else one.num_gpus,
                cpu=cpu,
                deployment=one.deployment,
                replicas=_least_replicas(one.autoscaling),
            )
            for one in read_generators(config)
        ]
    return list(machine.look(wanted, machine.this_place()))


def _least_replicas(autoscaling: Mapping[str, Any]) -> int:
    """Return the replicas that Serve keeps: 1 where the file sets none, or no number."""
    least = autoscaling.get("min_replicas")
    return least if isinstance(least, int) else 1


def _read_overlay(overlay: Path) -> list[dict[str, Any]]:
    from serve_app.doctor.cluster import read_overlay

    try:
        text = sys.stdin.read() if str(overlay) == "-" else overlay.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--overlay: {overlay} cannot be read: {error}.") from None
    return read_overlay(text, str(overlay))


def _look_at_manifest(overlay: Path) -> list["Finding"]:
    from serve_app.doctor import manifest

    return list(manifest.look(_read_overlay(overlay)))


def _look_at_cluster(namespace: str | None, overlay: Path | None, cpu: bool) -> list["Finding"]:
    from serve_app.doctor import cluster as checks
    from serve_app.doctor.kube import Cluster, Unreachable
    from serve_app.doctor.report import failed

    objects = None
    if overlay is not None:
        objects = _read_overlay(overlay)
        namespace = checks.choose_namespace(objects, str(overlay), namespace)
    try:
        with Cluster(namespace) as cluster:
            return list(checks.look(cluster, cpu, objects))
    except Unreachable as error:
        return [failed("cluster", error.found, error.advice)]


def _rehearse(namespace: str | None, overlay: Path) -> list["Finding"]:
    from serve_app.doctor import cluster as checks
    from serve_app.doctor.kube import NotReadable
    from serve_app.doctor.kube_write import WritableCluster
    from serve_app.doctor.rehearsal.manifest import prepare
    from serve_app.doctor.rehearsal.run import rehearse
    from serve_app.doctor.report import failed

    objects = _read_overlay(overlay)
    checks.choose_namespace(objects, str(overlay), namespace)
    # So that the end of a CI job deletes what it has created, like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with WritableCluster() as cluster:
            manifest = prepare(objects, str(overlay), cluster.lives_in_namespace)
            # Beside the result, which may be JSON.
            return rehearse(cluster, manifest, lambda line: typer.echo(line, err=True))
    except NotReadable as error:
        return [failed("cluster", error.found, error.advice)]
