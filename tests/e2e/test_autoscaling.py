"""GPU nodes start for work and end without it, on Ray's own autoscaler with fake nodes."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest

from tests.e2e.cluster import Watch, generate, scaling_config, start_cluster
from tests.serve_process import free_port

pytestmark = pytest.mark.serve

PARAMS = {"target_drain_s": 3, "smoothing_s": 5, "hold_s": 3, "cold_start_s": 5}
"""Scaling parameters for a load of seconds; the defaults are for one of minutes."""

BURST = 8
STEPS = 200


def test_nodes_start_and_end_with_the_work(report: Callable[[str], None]) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = scaling_config(port, PARAMS)
    started_at = monotonic()
    with (
        start_cluster(nodes=2) as cluster,
        ThreadPoolExecutor(2 * BURST) as pool,
        Watch(cluster) as watch,
    ):
        cluster.deploy(config)
        watch.wait(lambda seen: seen.status == "RUNNING", 60, "the gateway")
        assert (watch.now.nodes, watch.now.running, watch.now.target) == (0, 0, 0)

        # Up: requests wait while there is no replica, and none of them fails.
        begun_at = monotonic()
        burst = [pool.submit(generate, url, seed, STEPS) for seed in range(BURST)]
        first_at = watch.wait(lambda seen: seen.running == 1, 90, "a first replica")
        both_at = watch.wait(lambda seen: seen.running == 2, 90, "a second replica")
        assert watch.now.nodes == 2
        answers = [request.result() for request in burst]

        # Down to one by a new config, with work on both: running requests complete.
        late = [pool.submit(generate, url, seed, STEPS) for seed in range(4)]
        generator = config["applications"][0]["deployments"][0]
        generator["autoscaling_config"]["max_replicas"] = 1
        cluster.deploy(config)
        one_at = watch.wait(lambda seen: seen.running == 1, 60, "the second replica to leave")
        tail = [request.result() for request in late]
        assert max(answer.ended_at for answer in tail) > one_at, (
            "no request was running at that time"
        )

        # Down to none by the policy, and then the nodes end too.
        ended_at = max(answer.ended_at for answer in tail)
        idle_at = watch.wait(lambda seen: seen.target == 0, 60, "the last replica to leave")
        empty_at = watch.wait(lambda seen: seen.nodes == 0, 60, "the nodes to go")
        metrics = cluster.metrics()
        lines = [
            line.split(" -- ")[-1]
            for line in cluster.logs("serve/controller_*.log").splitlines()
            if "diffusion-serve/Generator: " in line
        ]
    assert max(seen.nodes for _, seen in watch.snapshots) == 2
    # The controller's log has each decision once.
    assert any(" 2 replicas, by max" in line or " 2 replicas, by backlog" in line for line in lines)
    assert len(lines) < 20, lines
    labels = r'application="diffusion-serve",.*deployment="Generator"'
    for name in ("desired_replicas", "waiting_seconds", "cold_start_seconds", "forecast_replicas"):
        assert re.search(f"^ray_diffusion_serve_autoscaling_{name}{{.*{labels}", metrics, re.M), (
            name
        )
    assert re.search(r'autoscaling_term{.*term="arrivals".* 1\.0$', metrics, re.M)
    rejections = sum(answer.rejections for answer in [*answers, *tail])
    report(
        f"fake GPU nodes: from zero to a first replica {first_at - begun_at:.0f} s, to a second "
        f"{both_at - begun_at:.0f} s; from the last image to no replica {idle_at - ended_at:.0f} "
        f"s, to no node {empty_at - ended_at:.0f} s; {rejections} rejections; "
        f"{monotonic() - started_at:.0f} s in all"
    )
