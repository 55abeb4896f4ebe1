"""Series in the queries of dashboards and rules, and the exporters of those from elsewhere."""

import re

FOREIGN = {
    "DCGM_FI_DEV_FB_FREE": "dcgm-exporter",
    "DCGM_FI_DEV_FB_USED": "dcgm-exporter",
    "DCGM_FI_DEV_GPU_TEMP": "dcgm-exporter",
    "DCGM_FI_DEV_GPU_UTIL": "dcgm-exporter",
    "DCGM_FI_DEV_POWER_USAGE": "dcgm-exporter",
    "DCGM_FI_DEV_XID_ERRORS": "dcgm-exporter",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "dcgm-exporter",
    "diffusion_serve_device_memory_bytes": "replicas on a GPU",
    "kuberay_service_condition_ready": "the KubeRay operator",
    "ray_cluster_failed_nodes": "Ray's autoscaler, for a node that failed",
    "ray_cluster_pending_nodes": "Ray's autoscaler, for a node that is starting",
    "ray_serve_replica_shutdown_duration_ms_count": "Serve's controller, for a replica that ended",
}
"""Series that a demo on one machine without a GPU cannot have, with their exporters."""

_NO_SERIES = (
    r'"[^"]*"',  # texts
    r"{[^}]*}",  # label matchers
    r"\[[^\]]*\]",  # ranges
    r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
    r"\boffset\s+\w+",
    r"\b(and|or|unless|bool)\b",
    r"(?<![\w:])\w+(?=\s*\()",  # functions
)


def series_of(expr: str) -> set[str]:
    """Return the series in an expression of PromQL."""
    for pattern in _NO_SERIES:
        expr = re.sub(pattern, " ", expr)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", expr))
