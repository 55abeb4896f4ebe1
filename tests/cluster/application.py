"""The application of a rendered overlay, as Serve will run it."""

from dataclasses import dataclass
from decimal import Decimal

from serve_app.app import build
from serve_app.config.models import AppConfig, parse_app_config
from tests.cluster.manifests import Manifests


@dataclass(frozen=True)
class Deployed:
    """A deployment as Serve will run it: by the config file, else by the code."""

    name: str
    grace_s: float
    gpus: Decimal
    cpus: Decimal
    min_replicas: int
    max_replicas: int
    selector: dict[str, str]
    """Labels of the Ray nodes for its replicas."""


def application(manifests: Manifests) -> tuple[AppConfig, dict[str, Deployed]]:
    """Return the first application and its deployments, by name."""
    [written] = manifests.serve["applications"]
    gateway = build(written.get("args", {}))._bound_deployment
    generators = [
        argument._bound_deployment
        for argument in gateway.init_args
        if hasattr(argument, "_bound_deployment")
    ]
    overrides = {one["name"]: one for one in written.get("deployments", [])}
    deployed = {}
    for code in (gateway, *generators):
        given = overrides.get(code.name, {})
        actor = given.get("ray_actor_options") or code.ray_actor_options
        scaling = given.get("autoscaling_config") or {}
        fixed = given.get("num_replicas", 1)
        grace_s = given.get(
            "graceful_shutdown_timeout_s", code._deployment_config.graceful_shutdown_timeout_s
        )
        deployed[code.name] = Deployed(
            code.name,
            grace_s,
            Decimal(str(actor.get("num_gpus", 0))),
            Decimal(str(actor.get("num_cpus", 1))),
            scaling.get("min_replicas", fixed),
            scaling.get("max_replicas", fixed),
            actor.get("label_selector") or {},
        )
    return parse_app_config(written.get("args", {})), deployed


def config_file(manifests: Manifests) -> str:
    """Return the file of configs/ that it is a copy of."""
    text = manifests.service["spec"]["serveConfigV2"]
    configs = manifests.root / "configs"
    for file in configs.glob("*.yaml"):
        if file.read_text() == text:
            return f"configs/{file.name}"
    return "configs/"
