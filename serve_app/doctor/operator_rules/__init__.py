"""Rules by which the operator of KubeRay 1.7.0 rejects a document that its CRD's schema accepts.

The operator checks a document only after it was applied: the RayService then has the condition
``InvalidRayServiceSpec``, and no cluster is created. Each rule is one function, in the order of the
operator's checks; pure, over plain mappings.
"""

from collections.abc import Collection, Iterator

from serve_app.doctor.kube import Object
from serve_app.doctor.operator_rules import fault_tolerance, ray_cluster, ray_service
from serve_app.doctor.operator_rules.rule import RayCluster, Refusal, mapping

__all__ = ["RULES", "Refusal", "refusals"]

RULES = (*ray_cluster.RULES, *fault_tolerance.RULES, *ray_service.RULES)


def refusals(document: Object, gates: Collection[str] = ()) -> Iterator[Refusal]:
    """Yield every reason to reject ``document``, a RayService or a RayCluster.

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
