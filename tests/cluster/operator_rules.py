"""The doctor's rules of KubeRay's operator, on a rendered overlay."""

from collections.abc import Iterator

import yaml

from serve_app.doctor.operator_rules import refusals
from tests.cluster.manifests import Manifests


def the_operator_accepts(manifests: Manifests) -> Iterator[str]:
    """Check the operator's rules, with the feature gates of platform/."""
    operator = yaml.safe_load(
        (manifests.root / "cluster/platform/kuberay-operator.yaml").read_text()
    )
    gates = [one["name"] for one in operator.get("featureGates", []) if one["enabled"]]
    for refusal in refusals(manifests.service, gates):
        yield (
            f"RayService/diffusion-serve: {refusal.field} {refusal.found} "
            f"({manifests.writes_field(refusal.field)})"
        )
