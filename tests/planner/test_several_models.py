import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from serve_app.autoscaling.policy import ScalingParams
from serve_app.cli import cli
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.planner.cluster import ClusterParams, SimulationOutcome
from serve_app.planner.nodes import NodePool, Usage
from serve_app.planner.scalers import ByWork, Scaler
from serve_app.planner.simulator import Simulator, run_together
from serve_app.planner.trace import Kind, Trace
from tests.planner.test_comparison import COSTS
from tests.planner.test_simulator import LARGE, SMALL, Scripted, model

MACHINES = {"node_start_s": 20.0, "replica_start_s": 10.0, "node_idle_s": 60.0}

Load = tuple[Sequence[tuple[float, Kind]], Scaler, int]
"""Arrivals of a model, its policy, and its replicas at the start."""


def share(
    loads: Sequence[Load], gpus: float = math.inf, **params: float
) -> tuple[list[SimulationOutcome], Usage]:
    cluster = ClusterParams(**MACHINES | params)  # type: ignore[arg-type]
    pool = NodePool(cluster, gpus)
    simulators = [
        Simulator(
            Trace([at for at, _ in arrivals], [kind for _, kind in arrivals]),
            *(model(), OnTime, scaler, cluster, replicas, pool),
        )
        for arrivals, scaler, replicas in loads
    ]
    return run_together(simulators), pool.usage


def from_zero() -> ByWork:
    return ByWork(ScalingParams(0, 1, hold_s=10.0))


@pytest.mark.parametrize(("second_at", "gpus"), [(1_000.0, 1), (5.0, 2)])
def test_models_that_never_overlap_need_one_gpu(second_at: float, gpus: int) -> None:
    loads: list[Load] = [([(at, SMALL)], from_zero(), 0) for at in (0.0, second_at)]
    outcomes, pool = share(loads)
    assert pool.most_nodes == gpus
    assert [outcome.on_time for outcome in outcomes] == [0, 0]  # a start takes 30 s
    outcomes, pool = share([(arrivals, from_zero(), 0) for arrivals, _, _ in loads], gpus=1)
    assert pool.most_nodes == 1
    assert (pool.waited_s > 0) == (gpus > 1)


def test_the_second_model_waits_as_long_as_the_first_is_there() -> None:
    """The first has the GPU until its last request ends, at 95 + 8.1 s."""
    first = [(0.0, SMALL), (95.0, LARGE)], Scripted((0.0, 1), (100.0, 0)), 1
    second = [(0.0, SMALL)], Scripted((0.0, 1)), 0
    (before, after), pool = share([first, second], gpus=1)
    assert before.waits_s == pytest.approx([1.1, 8.1])
    assert before.gpu_wait_s == 0
    # The first report is at 1 s. After the wait come 10 s of start, and 1.1 s of work.
    assert after.gpu_wait_s == pool.waited_s == pytest.approx(103.1 - 1.0)
    assert after.waits_s == pytest.approx([103.1 + 10 + 1.1])
    assert (before.gpu_s, after.gpu_s) == pytest.approx((103.1, 11.1))
    assert pool.gpu_s == pytest.approx(114.2)
    (_, alone), pool = share([first, second], gpus=2)
    assert alone.gpu_wait_s == pool.waited_s == 0
    assert alone.waits_s == pytest.approx([1 + 20 + 10 + 1.1])


def test_an_idle_node_goes_to_the_next_model_without_a_boot() -> None:
    """Until then, the model that used it last pays for it."""
    first = [(0.0, SMALL)], Scripted((0.0, 1), (50.0, 0)), 1
    second = [(80.0, SMALL)], Scripted((0.0, 0), (80.0, 1)), 0
    (before, after), pool = share([first, second])
    assert after.waits_s == pytest.approx([10 + 1.1])
    assert (before.gpu_s, after.gpu_s) == pytest.approx((80.0, 11.1))
    assert pool.most_nodes == 1


def test_first_come_first_served() -> None:
    """The third asked after the second, and has the GPU after it; or at once if that gave up."""
    first = [(0.0, SMALL)], Scripted((0.0, 1), (100.0, 0)), 1
    third = [(0.0, SMALL)], Scripted((0.0, 0), (5.0, 1)), 0
    patient = [(0.0, SMALL)], Scripted((0.0, 1), (200.0, 0)), 0
    (_, second_one, third_one), pool = share([first, patient, third], gpus=1)
    assert second_one.waits_s == pytest.approx([100 + 10 + 1.1])
    assert third_one.waits_s == pytest.approx([200 + 10 + 1.1])
    assert (second_one.gpu_wait_s, third_one.gpu_wait_s) == pytest.approx((99.0, 195.0))
    assert pool.waited_s == pytest.approx(199.0)  # both at once count once
    gives_up = [], Scripted((0.0, 1), (50.0, 0)), 0
    (_, second_one, third_one), _ = share([first, gives_up, third], gpus=1)
    assert third_one.waits_s == pytest.approx([100 + 10 + 1.1])
    assert (second_one.gpu_wait_s, second_one.gpu_s) == (49.0, 0.0)


def test_one_model_on_a_pool_is_as_one_alone() -> None:
    arrivals = [(0.3 * number, SMALL) for number in range(400)]
    cluster = ClusterParams(**MACHINES, failures_per_hour=20.0)  # type: ignore[arg-type]
    trace = Trace([at for at, _ in arrivals], [kind for _, kind in arrivals])
    alone = Simulator(trace, model(), OnTime, ByWork(ScalingParams(1, 9)), cluster, 1).run()
    load: Load = arrivals, ByWork(ScalingParams(1, 9)), 1
    assert alone.lost_replicas
    assert share([load], failures_per_hour=20.0)[0] == [alone]


arrivals_of_a_model = st.lists(
    st.tuples(st.floats(0, 200), st.sampled_from([SMALL, LARGE])), max_size=20
).map(lambda arrivals: sorted(arrivals, key=lambda entry: entry[0]))


@settings(max_examples=50)
@given(
    st.lists(arrivals_of_a_model, min_size=2, max_size=3),
    st.integers(1, 3),
    st.sampled_from([0.0, 30.0]),
    st.sampled_from([0.0, 200.0]),
)
def test_every_request_ends_and_the_pool_never_grows_over_its_limit(
    traces: list[list[tuple[float, Kind]]],
    gpus: int,
    node_idle_s: float,
    failures_per_hour: float,
) -> None:
    params = ScalingParams(0, 4, cold_start_s=5.0, hold_s=5.0, target_drain_s=5.0)
    outcomes, pool = share(
        [(arrivals, ByWork(params), 0) for arrivals in traces],
        gpus,
        node_start_s=3.0,
        replica_start_s=2.0,
        node_idle_s=node_idle_s,
        failures_per_hour=failures_per_hour,
    )
    assert [len(outcome.waits_s) for outcome in outcomes] == [len(trace) for trace in traces]
    for samples in zip(*(outcome.samples for outcome in outcomes), strict=False):
        assert len({sample.at_s for sample in samples}) == 1
        assert sum(sample.running for sample in samples) <= gpus
    assert pool.most_nodes <= gpus
    assert pool.gpu_s == pytest.approx(sum(outcome.gpu_s for outcome in outcomes))
    waits_s = [outcome.gpu_wait_s for outcome in outcomes]
    assert max(waits_s) - 1e-6 <= pool.waited_s <= sum(waits_s) + 1e-6


# ---- the command ---------------------------------------------------------------------------------

CONFIG = """
applications:
  - import_path: serve_app.app:build
    args: {models: [{id: sdxl, path: /models/sdxl}, {id: flux, path: /models/flux}]}
    deployments:
      - name: Generator-sdxl
        autoscaling_config: &scaling
          min_replicas: 1
          max_replicas: 2
          upscale_delay_s: 0
          downscale_delay_s: 0
          policy: {policy_function: "serve_app.autoscaling.ray_policy:WorkPolicy"}
      - name: Generator-flux
        autoscaling_config: {<<: *scaling, min_replicas: 0, max_replicas: 1}
"""

STEADY = ("--mix", "512x512/20:1", "--minutes", 5, "--rate", "sdxl=1", "--rate", "flux=0.1")


def plan(
    tmp_path: Path, *arguments: object, costs: object = COSTS, config: str = CONFIG
) -> tuple[int, str]:
    path = tmp_path / "serve.yaml"
    path.write_text(config)
    command = ["plan", "--config", path, "--costs", costs, *arguments]
    result = CliRunner().invoke(cli, [str(argument) for argument in command])
    return result.exit_code, result.output


def test_models_are_planned_printed_drawn_and_written(tmp_path: Path) -> None:
    trace = tmp_path / "trace=1.csv"  # the name of the model ends at the first '='
    trace.write_text("at_s,size,steps\n" + "100,1024x1024,25\n" * 3)
    chart, output = tmp_path / "plan.png", tmp_path / "plan.json"
    code, said = plan(
        tmp_path,
        *("--rate", "sdxl=0.5", "--mix", "sdxl=512x512/20:1", "--minutes", 5),
        *("--trace", f"flux={trace}", "--calls-per-step", "flux=2", "--gpus", 2, "--price", 3),
        *("--chart", chart, "--output", output),
    )
    assert code == 0, said
    lines = [line for line in said.splitlines() if not line.startswith("warning")]
    assert "at most 2 GPUs" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["sdxl", "flux", "all models"]
    assert lines[1].split()[-1] == "cost"
    assert "flux has 0.0% in time, under 95%" in lines  # a start takes 90 s
    with Image.open(chart) as image:
        assert image.format == "PNG"
        assert image.width > 1_000
    sdxl, flux, pool = json.loads(output.read_text())["rows"]
    assert flux["requests"] == 3
    assert pool["requests"] == sdxl["requests"] + 3
    assert (flux["most"], pool["most"]) == (1, 2)
    assert pool["gpu_hours"] == pytest.approx(sdxl["gpu_hours"] + flux["gpu_hours"])
    assert pool["mean_replicas"] == pytest.approx(sdxl["mean_replicas"] + flux["mean_replicas"])
    assert sdxl["attainment"] > 0.95


def test_models_with_one_rate_have_different_arrivals(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    code, said = plan(
        tmp_path, "--mix", "512x512/20:1", "--minutes", 5, "--rate", 0.5, "--output", output
    )
    assert code == 0, said
    assert "any number of GPUs" in said
    sdxl, flux, _ = json.loads(output.read_text())["rows"]
    assert sdxl["requests"] != flux["requests"]
    assert flux["requests"] == pytest.approx(150, abs=50)


def test_the_model_that_is_named_is_planned_alone(tmp_path: Path) -> None:
    code, said = plan(tmp_path, *STEADY, "--model", "flux", "--policy", "configured")
    assert code == 0, said
    assert "by work, as configured" in said
    assert "flux" not in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--trace", "sd3=trace.csv"],
            "--trace sd3=trace.csv is for a model 'sd3'; the config has",
        ),
        (["--rate", "flux=2"], "--rate has two values for flux"),
        (["--rate", "1", "--rate", "2"], "--rate has two values for all models"),
        (["--trace", "flux=trace.csv"], "model 'flux': give either --trace or --rate"),
        (["--calls-per-step", "flux=many"], "--calls-per-step must be over 0; it is 'many'"),
        (["--gpus", 0], "--gpus"),
        (["--gpus", 1], "--gpus is 1, but 2 are needed: the min_replicas"),
        (["--policy", "work"], "--policy is for one model, and the config has 'sdxl', 'flux'"),
        (["--repeats", 2], "--repeats is for one model"),
        (["--gpus", 2, "--model", "flux"], "--gpus is for several models"),
    ],
)
def test_wrong_arguments_are_reported(tmp_path: Path, arguments: list[object], reason: str) -> None:
    code, said = plan(tmp_path, *STEADY, *arguments)
    assert code == 2
    assert reason in said


def test_a_model_without_step_times_is_reported(tmp_path: Path) -> None:
    code, said = plan(tmp_path, *STEADY, costs=f"sdxl={COSTS}")
    assert code == 2
    assert "model 'flux' has no step times: add --costs flux=FILE" in said


def test_a_model_without_a_load_is_reported(tmp_path: Path) -> None:
    code, said = plan(tmp_path, "--mix", "512x512/20:1", "--rate", "sdxl=1")
    assert code == 2
    assert "model 'flux': give either --trace or --rate" in said


def test_two_models_of_one_name_are_reported(tmp_path: Path) -> None:
    """Two applications may have them."""
    _, application = CONFIG.split("applications:\n")
    second = application.replace("&scaling", "&same").replace("*scaling", "*same")
    code, said = plan(tmp_path, *STEADY, config=CONFIG + second)
    assert code == 2
    assert "two models of one name: 'sdxl', 'flux', 'sdxl', 'flux'" in said
