"""What KubeRay's operator refuses, of a rendered overlay; the rules themselves are the doctor's."""

from collections.abc import Iterator

import yaml

from serve_app.doctor.operator_rules import refusals
from tests.cluster.manifests import Manifests


def the_operator_accepts(manifests: Manifests) -> Iterator[str]:
    """KubeRay's operator, with the feature gates that platform/ gives it."""
    operator = yaml.safe_load(
        (manifests.root / "cluster/platform/kuberay-operator.yaml").read_text()
    )
    gates = [one["name"] for one in operator.get("featureGates", []) if one["enabled"]]
    for refusal in refusals(manifests.service, gates):
        yield (
            f"RayService/diffusion-serve: {refusal.field} {refusal.found} "
            f"({manifests.writes_field(refusal.field)})"
        )
