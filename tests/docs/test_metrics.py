"""Names of metrics, and the page that lists them. Other tests check the values."""

import re

from serve_app.metrics.autoscaling import RAY_GAUGES
from serve_app.metrics.labels import LABELS
from tests.docs.pages import rendered
from tools.docs.reference.metrics import declared, exported_name


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


def test_the_page_has_every_metric_and_every_label_once() -> None:
    page = rendered("reference/metrics")
    names = [exported_name(metric) for metric in declared()]
    names += [f"ray_{gauge.name}" for gauge in RAY_GAUGES]
    for name in [*names, *LABELS]:
        assert page.count(f"\n| `{name}` |") == 1 + (name in LABELS and name in names), name
    for metric in declared():
        [family] = metric.describe()
        row = next(line for line in page.splitlines() if f"| `{exported_name(metric)}` |" in line)
        assert family.documentation in row
        assert all(f"`{label}`" in row for label in metric._labelnames)
