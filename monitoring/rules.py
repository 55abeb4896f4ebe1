"""The recording rules and alerts, from the PrometheusRule of cluster/components/monitoring.

``python -m monitoring.rules`` prints them as the file that a Prometheus without the operator reads.
"""

from pathlib import Path
from typing import Any

import yaml

SOURCE = Path(__file__).parents[1] / "cluster/components/monitoring/prometheusrule.yaml"


def rules() -> dict[str, Any]:
    """Return ``{"groups": [...]}``."""
    resource: dict[str, Any] = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    spec: dict[str, Any] = resource["spec"]
    return spec


def alerts() -> dict[str, dict[str, Any]]:
    """Return the alerts by name."""
    return {
        rule["alert"]: rule
        for group in rules()["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }


if __name__ == "__main__":
    print(yaml.safe_dump(rules(), sort_keys=False))  # noqa: T201  what it is run for
