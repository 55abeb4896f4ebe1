import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from serve_app.autoscaling.policy import ScalingParams
from serve_app.cli import cli
from serve_app.errors import ConfigError
from serve_app.planner.comparison import (
    Row,
    cheapest,
    front,
)
from serve_app.planner.inputs import parse_families, read_costs, read_scaling

ROOT = Path(__file__).parents[2]
COSTS = ROOT / "configs" / "costs" / "sdxl-h100.json"
CONFIG = ROOT / "configs" / "sdxl.yaml"


def plan(*arguments: object) -> tuple[int, str]:
    command = ["plan", "--config", CONFIG, "--costs", COSTS, *arguments]
    result = CliRunner().invoke(cli, [str(argument) for argument in command])
    return result.exit_code, result.output


def row(family: str, attainment: float, gpu_hours: float) -> Row:
    label = f"{family} {attainment} {gpu_hours}"
    return Row(family, label, attainment, 0.0, gpu_hours, 1.0, 1.0, 2.0, 3, 1, 0, ())  # type: ignore[arg-type]


def test_a_trace_is_planned_printed_drawn_and_written(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("\n".join(str(500 * number) for number in range(400)))
    chart, output = tmp_path / "plan.png", tmp_path / "plan.json"
    code, said = plan(
        *("--trace", trace, "--mix", "512x512/20:3,1024x1024/25:1", "--max-replicas", 20),
        *("--policy", "configured", "--policy", "fixed", "--price", 2.5),
        *("--chart", chart, "--output", output),
    )
    assert code == 0, said
    assert "400 requests in 3 minutes" in said
    assert "by work, as configured" in said
    assert "cost" in said
    with Image.open(chart) as image:
        assert image.format == "PNG"
        assert image.width > 1_000
    written = json.loads(output.read_text())
    rows = {entry["label"]: entry for entry in written["rows"]}
    ours = rows["by work, as configured"]
    assert 0 < ours["attainment"] <= 1
    assert ours["gpu_hours"] >= ours["work_hours"]
    fixed = [entry for entry in written["rows"] if entry["family"] == "fixed"]
    assert len(fixed) > 3
    assert fixed[-1]["attainment"] >= fixed[0]["attainment"]


def test_a_steady_rate_needs_no_trace() -> None:
    code, said = plan("--rate", 2, "--minutes", 3, "--mix", "512x512/20:1", "--policy", "fixed")
    assert code == 0, said
    assert "requests in 3 minutes" in said


def test_fewer_calls_are_less_work(tmp_path: Path) -> None:
    steady = ["--rate", 2, "--minutes", 3, "--mix", "512x512/20:1", "--policy", "fixed"]
    work = []
    for calls_per_step in (1, 0.5):
        output = tmp_path / "plan.json"
        code, said = plan(*steady, "--calls-per-step", calls_per_step, "--output", output)
        assert code == 0, said
        work.append(json.loads(output.read_text())["rows"][0]["work_hours"])
    assert 0.5 < work[1] / work[0] < 0.6  # encoding and decoding stay


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "either --trace or --rate"),
        (["--rate", 1], "give the kinds of requests with --mix"),
        (["--rate", 0, "--mix", "512x512/20:1"], "must be over 0"),
        (["--rate", 1, "--mix", "512x512/20:1", "--calls-per-step", 0], "--calls-per-step must"),
        (["--rate", 1, "--mix", "512x512/20:1", "--policy", "luck"], "--policy is 'luck'"),
        (["--rate", 1, "--mix", "512"], "the mix has '512'"),
        (["--trace", "/no/such/trace"], "cannot be read"),
        (["--rate", 1, "--mix", "512x512/20:1", "--share", 0.5], "--share"),
        (["--rate", 1, "--mix", "512x512/20:1", "--routing", "luck"], "luck"),
    ],
)
def test_wrong_arguments_are_reported(arguments: list[object], reason: str) -> None:
    code, said = plan(*arguments)
    assert code == 2
    assert reason in said


def test_a_mix_does_not_override_the_kinds_of_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("at_s,size,steps\n0,512x512,20\n1,512x512,20\n")
    for option in ("--mix", "--mix-at-end"):
        code, said = plan("--trace", trace, option, "1024x1024/25:1", "--policy", "fixed")
        assert code == 2
        assert "leave out --mix and --mix-at-end" in said


def test_one_request_is_planned(tmp_path: Path) -> None:
    """Both percentiles are its own time."""
    trace = tmp_path / "trace.csv"
    trace.write_text("at_s,size,steps\n0,1024x1024,25\n")
    output = tmp_path / "plan.json"
    code, said = plan("--trace", trace, "--policy", "configured", "--output", output)
    assert code == 0, said
    [ours] = json.loads(output.read_text())["rows"]
    assert ours["p50_s"] == ours["p95_s"] == pytest.approx(3_600 * ours["work_hours"])


def test_counts_by_the_hour_are_planned(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(",hour,invocations\n0,0,100000\n1,1,200000\n")
    code, said = plan(
        *("--trace", trace, "--share", 0.01, "--stretch", 0.1, "--mix", "512x512/20:1"),
        *("--policy", "configured"),
    )
    assert code == 0, said
    assert "3000 requests in 12 minutes" in said


@pytest.mark.slow
def test_routing_can_be_compared() -> None:
    """More replicas compared make more requests in time; by work it is another outcome."""
    common = ("--rate", 4, "--minutes", 10, "--mix", "512x512/20:1,1536x1536/35:1")
    found = []
    for routing, choices in (("count", 1), ("count", 8), ("work", 8)):
        options = ("--routing", routing, "--choices", choices, "--max-backlog-s", "inf")
        code, said = plan(*common, *options, "--policy", "fixed")
        assert code == 0, said
        [in_time] = re.findall(r"^16 replicas, fixed +([\d.]+)%", said, re.MULTILINE)
        found.append(float(in_time))
    assert found[0] < found[1]
    assert len(set(found)) == 3


def test_settings_that_are_not_simulated_are_reported(tmp_path: Path) -> None:
    shipped, path = CONFIG.read_text(), tmp_path / "serve.yaml"
    policy = shipped[shipped.index("          policy:\n") :]

    def said(text: str) -> tuple[int, str]:
        path.write_text(text)
        steady = ("--rate", "1", "--minutes", "1", "--mix", "512x512/20:1")
        command = ["plan", "--config", str(path), "--costs", str(COSTS), *steady]
        result = CliRunner().invoke(cli, [*command, "--policy", "configured"])
        return result.exit_code, result.stderr

    assert said(shipped) == (0, "")
    code, text = said(shipped.replace("serve_app.autoscaling.ray_policy:WorkPolicy", "mine:Policy"))
    assert code == 0
    assert "it scales Generator by mine:Policy" in text
    code, text = said(shipped.replace(policy, ""))
    assert code == 0
    assert "it scales Generator by Ray Serve's default policy" in text
    late = "          upscale_delay_s: 0\n"
    code, text = said(shipped.replace(late, late + "          upscaling_factor: 0.5\n"))
    assert code == 0
    assert "autoscaling_config.upscaling_factor is not simulated" in text
    code, text = said(shipped.replace("num_gpus: 1", "num_gpus: 2"))
    assert code == 0
    assert "ray_actor_options.num_gpus of Generator is 2. The planner counts one GPU" in text
    code, text = said(shipped.replace(late, ""))
    assert code == 2
    assert "autoscaling_config.upscale_delay_s is 30.0, Serve's default" in text


def test_the_shipped_step_times_name_their_source() -> None:
    costs = read_costs(COSTS, 8)
    assert costs.predict_call((1024, 1024)) == pytest.approx(0.0811, abs=1e-3)
    assert "not measured" in json.loads(COSTS.read_text())["source"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"sizes": [{"size": [64, 64]}]}', '{"sizes": []}',
     '{"sizes": [{"size": [64, 64], "cap": 1, "call_s": [[1, 0]], "encode_s": 0, "decode_s": 0}]}'],
)  # fmt: skip
def test_a_file_without_step_times_is_rejected(tmp_path: Path, content: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_costs(path, 8)


def test_scaling_is_read_from_the_config(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"

    def write(generator: str) -> None:
        path.write_text(
            "applications: [{import_path: 'serve_app.app:build', deployments: [{name: Generator, "
            f"{generator}}}]}}]"
        )

    policy = (
        "policy: {policy_function: 'serve_app.autoscaling.ray_policy:WorkPolicy', policy_kwargs: "
    )
    at_once = "upscale_delay_s: 0, downscale_delay_s: 0"
    bounds = "min_replicas: 0, max_replicas: 7"
    write(f"autoscaling_config: {{{bounds}, {at_once}, {policy} {{hold_s: 5}}}}}}")
    assert read_scaling(path, None) == ScalingParams(0, 7, hold_s=5.0)
    assert read_scaling(path, 20) == ScalingParams(0, 20, hold_s=5.0)
    write("num_replicas: 3")
    assert read_scaling(path, None) == ScalingParams(3, 3)
    write("ray_actor_options: {num_gpus: 1}")
    assert read_scaling(path, None) == ScalingParams(1, 1)
    write(f"autoscaling_config: {{{at_once}, {policy} {{luck: 1}}}}}}")
    with pytest.raises(ConfigError, match="luck"):
        read_scaling(path, None)
    write("autoscaling_config: {min_replicas: 4, max_replicas: 2}")
    with pytest.raises(ConfigError, match="min_replicas is 4 and max_replicas 2"):
        read_scaling(path, None)


def test_the_cheapest_and_the_front() -> None:
    rows = [row("work", 0.9, 1), row("work", 0.96, 2), row("work", 0.95, 3), row("work", 0.99, 4)]
    best = cheapest(rows, "work", 0.95)
    assert best is not None
    assert best.gpu_hours == 2
    assert cheapest(rows, "count", 0.5) is None
    assert [one.gpu_hours for one in front(rows, "work")] == [1, 2, 4]


def test_families_are_known() -> None:
    assert parse_families(["work", "configured"]) == ["work", "configured"]
