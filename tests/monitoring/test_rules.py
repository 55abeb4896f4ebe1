"""Each alert fires when it should and is quiet when it should not, says promtool; and each one is
written about."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.dashboards import DASHBOARDS
from monitoring.panels import RATE
from monitoring.replicas_and_gpus import GPU
from monitoring.rules import SOURCE, alerts, rules
from serve_app.errors import Overloaded
from serve_app.metrics.autoscaling import RAY_GAUGES
from serve_app.metrics.labels import UNSERVED
from tests.monitoring.series import FOREIGN, series_of
from tools.docs.reference.metrics import declared

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
UNIT_TESTS = Path(__file__).parent / "alerts"
RUNBOOK = ROOT / "docs" / "operate" / "runbook.md"
DASHBOARDS_PAGE = RUNBOOK.parent / "dashboards.md"

ALERTS = alerts()


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The rules as Prometheus reads them."""
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rules()))
    return path


def test_rules_and_the_local_configuration_are_valid(plain: Path, tmp_path: Path) -> None:
    promtool("check", "rules", plain)
    for folder in ("build", "monitoring"):
        (tmp_path / folder).mkdir()
    shutil.copy(plain, tmp_path / "build")
    config = tmp_path / "monitoring" / "prometheus.yaml"
    shutil.copy(ROOT / "monitoring" / "prometheus.yaml", config)
    assert f"{len(_rule_expressions())} rules found" in promtool("check", "config", config)


@pytest.mark.parametrize("alert", ALERTS)
def test_alerts_fire_in_their_scenarios_only(alert: str, plain: Path) -> None:
    """``alerts/ALERT.yaml`` has at least a case in which it fires and one in which it does not."""
    source = UNIT_TESTS / f"{alert}.yaml"
    cases = yaml.safe_load(source.read_text())["tests"]
    fires = {bool(check.get("exp_alerts")) for case in cases for check in case["alert_rule_test"]}
    assert fires == {True, False}
    assert {check["alertname"] for case in cases for check in case["alert_rule_test"]} == {alert}
    promtool("test", "rules", shutil.copy(source, plain.parent))


def test_every_scenario_belongs_to_an_alert() -> None:
    assert {path.stem for path in UNIT_TESTS.iterdir()} == ALERTS.keys()


def test_the_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    text = RUNBOOK.read_text()
    sections = re.findall(r"^## (DiffusionServe\w+)$", text, re.M)
    assert sections == list(ALERTS)
    for name, alert in ALERTS.items():
        assert alert["annotations"]["runbook"] == f"docs/operate/runbook.md#{name.lower()}"
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("critical", "warning")
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for part in ("**Means.**", "**Check.**", "**Do.**"):
            assert part in section, f"{name} has no {part}"


def test_the_documents_list_each_alert_with_its_severity() -> None:
    row = r"^\| \[(\w+)\]\(runbook\.md#\w+\) \| (\w+) \|"
    listed = re.findall(row, DASHBOARDS_PAGE.read_text(), re.M)
    severities = {name: alert["labels"]["severity"] for name, alert in ALERTS.items()}
    assert [(f"DiffusionServe{name}", severity) for name, severity in listed] == list(
        severities.items()
    )


@pytest.mark.parametrize("page", ["runbook", "dashboards", "metrics", "troubleshooting"])
def test_panels_that_the_documents_name_exist(page: str) -> None:
    """They are written as *Dashboard*, "Title", and nothing else is in double quotes."""
    titles = {f'*{one.name}*, "{panel.title}"' for one in DASHBOARDS for panel in one.panels}
    text = (RUNBOOK.parent / f"{page}.md").read_text()
    prose = " ".join(re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S).split())
    named = re.findall(r'(?:\*\w+\*, )?"[^"]*"', prose)
    assert named or page == "metrics"
    assert set(named) <= titles


def test_failures_are_the_outcomes_that_the_server_causes() -> None:
    named = [set(found.split("|")) for found in re.findall(r'outcome=~"(.*?)"', SOURCE.read_text())]
    assert named == [set(UNSERVED)] * 2 + [set(UNSERVED) - {Overloaded.code}]


def _rule_expressions() -> list[str]:
    return [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]


def test_every_series_of_rules_and_dashboards_has_an_exporter() -> None:
    ours = {f"ray_{gauge.name}" for gauge in RAY_GAUGES}
    for metric in declared():
        [family] = metric.describe()
        suffixes = {
            "counter": ("_total",),
            "info": ("_info",),
            "histogram": ("_bucket", "_sum", "_count"),
        }.get(family.type, ("",))
        ours |= {family.name + suffix for suffix in suffixes}
    recorded = {
        rule["record"] for group in rules()["groups"] for rule in group["rules"] if "record" in rule
    }
    others = {
        "up",
        "process_resident_memory_bytes",
        "ray_cluster_active_nodes",
        "ray_serve_deployment_replica_healthy",
        "ray_serve_deployment_status",
        "ray_serve_replica_startup_latency_ms_count",
        *FOREIGN,
    }
    shown = [query.expr for dashboard in DASHBOARDS for query in dashboard.queries]
    named = set().union(*map(series_of, [*shown, *_rule_expressions()]))
    assert named <= ours | recorded | others
    assert FOREIGN.keys() <= named, "no query uses them any more"


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (".*", [{"labels": '{UUID="GPU-4", replica="d"}', "value": 0.4}]),
        ("sdxl", []),
    ],
)
def test_gpus_are_joined_with_the_replicas_on_them(
    tmp_path: Path, model: str, others: list[dict[str, Any]]
) -> None:
    """Two replicas may share one; an idle GPU is shown as well, and one of another model is not."""
    [expr] = [query.expr for panel in GPU.panels for query in panel.queries if "UTIL" in query.expr]
    info = 'diffusion_serve_engine_info{model="%s", gpu="GPU-%s", replica="%s"}'
    checks = {
        "input_series": [
            *(
                {"series": info % whose, "values": "1x5"}
                for whose in (
                    ("sdxl", "1", "a"),
                    ("sdxl", "1", "b"),
                    ("sdxl", "2", "c"),
                    ("flux", "4", "d"),
                )
            ),
            *(
                {
                    "series": f'DCGM_FI_DEV_GPU_UTIL{{UUID="GPU-{n}", gpu="{n}"}}',
                    "values": f"{n}0x5",
                }
                for n in (1, 2, 3, 4)
            ),
        ],
        "promql_expr_test": [
            {
                "expr": expr.replace("$namespace", ".*")
                .replace("$model", model)
                .replace(RATE, "1m"),
                "eval_time": "3m",
                "exp_samples": [
                    {"labels": '{UUID="GPU-1", replica="a"}', "value": 0.1},
                    {"labels": '{UUID="GPU-1", replica="b"}', "value": 0.1},
                    {"labels": '{UUID="GPU-2", replica="c"}', "value": 0.2},
                    *others,
                    {"labels": '{UUID="GPU-3"}', "value": 0.3},
                ],
            }
        ],
    }
    path = tmp_path / "join.yaml"
    path.write_text(yaml.safe_dump({"tests": [checks]}))
    promtool("test", "rules", path)


QUICK = "Generator-quick"

SEVERAL = {
    'diffusion_serve_gateway_info{model="demo", replica="gw"}': 1,
    'diffusion_serve_gateway_info{model="quick", replica="gw"}': 1,
    'process_resident_memory_bytes{replica="gw"}': 7,
    **{
        f'diffusion_serve_scraped_replicas{{{of}, answer="{answer}"}}': 0
        for of in (
            'model="demo", deployment="Gateway"',
            'model="demo", deployment="Generator-demo"',
            f'model="quick", deployment="{QUICK}"',
        )
        for answer in ("answered", "silent")
    },
    **{
        f'ray_serve_deployment_status{{application="a", deployment="{name}"}}': 6
        for name in ("Gateway", "Generator-demo", QUICK)
    },
    **{
        f'diffusion_serve_requests_waiting_for_replica{{model="{model}", replica="gw"}}': number
        for model, number in (("demo", 2), ("quick", 3))
    },
}
"""Series of an application with two models, and a value of each."""


@pytest.mark.parametrize(
    ("title", "model", "samples"),
    [
        ("Process memory", ".*", {'{replica="gw"}': 7}),
        (
            "Deployment status",
            "quick",
            {f'{{application="a", deployment="{name}"}}': 6 for name in ("Gateway", QUICK)},
        ),
        (
            "Deployment status",
            ".*",
            {
                f'{{application="a", deployment="{name}"}}': 6
                for name in ("Gateway", "Generator-demo", QUICK)
            },
        ),
        ("Rejected images, and waiting requests", "quick", {'{model="quick"}': 3}),
        (
            "Rejected images, and waiting requests",
            ".*",
            {'{model="demo"}': 2, '{model="quick"}': 3},
        ),
    ],
)
def test_dashboards_tell_models_apart(
    tmp_path: Path, title: str, model: str, samples: dict[str, float]
) -> None:
    [panel] = [panel for one in DASHBOARDS for panel in one.panels if panel.title == title]
    check = {
        "expr": panel.queries[-1].expr.replace("$namespace", ".*").replace("$model", model),
        "eval_time": "3m",
        "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
    }
    series = [{"series": name, "values": f"{value}x5"} for name, value in SEVERAL.items()]
    path = tmp_path / "several.yaml"
    path.write_text(
        yaml.safe_dump({"tests": [{"input_series": series, "promql_expr_test": [check]}]})
    )
    promtool("test", "rules", path)
