"""Reasons for which the operator of KubeRay 1.7.0 refuses a document that its CRD's schema takes.

The operator checks such a document only after it was applied: the RayService then has the condition
``InvalidRayServiceSpec``, and no cluster is made. One function a rule, in the order in which the
operator checks; pure, over plain mappings.
"""

from collections.abc import Collection, Iterator

from serve_app.doctor.kube import Object
from serve_app.doctor.operator_rules import fault_tolerance, ray_cluster, ray_service
from serve_app.doctor.operator_rules.rule import RayCluster, Refusal, mapping

__all__ = ["RULES", "Refusal", "refusals"]

RULES = (*ray_cluster.RULES, *fault_tolerance.RULES, *ray_service.RULES)


def refusals(document: Object, gates: Collection[str] = ()) -> Iterator[Refusal]:
    """Every reason to refuse ``document``, a RayService or a RayCluster.

    ``gates`` names the feature gates that are on beyond the operator's defaults.
    """
    metadata, spec = mapping(document.get("metadata")), mapping(document.get("spec"))
    is_service = document.get("kind") == "RayService"
    cluster = RayCluster(
        mapping(spec.get("rayClusterConfig")) if is_service else spec,
        "spec.rayClusterConfig" if is_service else "spec",
        mapping(metadata.get("annotations")),
        frozenset(gates),
    )
    for rule in (*ray_cluster.RULES, *fault_tolerance.RULES):
        yield from rule(cluster)
    if is_service:
        for service_rule in ray_service.RULES:
            yield from service_rule(document)
