"""Names of metrics, and the table in the README. Other tests check the values."""

import re
from pathlib import Path

from serve_app.metrics.autoscaling import RAY_GAUGES
from serve_app.metrics.labels import LABELS
from serve_app.metrics.table import declared, table

README = Path(__file__).parents[2] / "README.md"


def test_metric_names_follow_prometheus_conventions() -> None:
    for metric in declared():
        [family] = metric.describe()
        assert re.fullmatch(r"diffusion_serve_[a-z_]+[a-z]", family.name)
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|milliseconds|mib|percent|total_total)\b", family.name)
        if family.type == "histogram" and family.name != "diffusion_serve_batch_size":
            assert family.name.endswith(("_seconds", "_ratio")), family.name


def test_every_label_is_described_and_every_description_is_used() -> None:
    used = {label for metric in declared() for label in metric._labelnames}
    used |= {label for gauge in RAY_GAUGES for label in gauge.labels}
    assert used | {"replica", "diffusion_serve_sharing"} == LABELS.keys()


def test_the_table_in_the_readme_is_current() -> None:
    """If it is not, replace it by the output of ``python -m serve_app.metrics``."""
    text = README.read_text(encoding="utf-8")
    section = text.split("\n## Metrics\n")[1].split("\n## ")[0]
    assert table() in section
