"""A rehearsal against an API server with an operator, a scheduler and kubelets of the tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve_app.config import KEYS_PATH_VARIABLE
from serve_app.doctor.kube_write import WritableCluster
from serve_app.doctor.rehearsal.manifest import prepare
from serve_app.doctor.rehearsal.run import rehearse
from serve_app.doctor.report import Finding
from tests.doctor.fake_cluster import Object, node, operator
from tests.doctor.fake_operator import FakeClock, OperatorApi

STEPS = (
    "preflight", "apply", "RayCluster", "pods", "ready", "image", "Serve config", "upgrade",
    "roll back", "delete",
)  # fmt: skip
SERVE_CONFIG = """
applications:
  - name: diffusion-serve
    import_path: serve_app.app:build
    deployments:
      - name: Generator
"""


@pytest.fixture
def api() -> Iterator[OperatorApi]:
    with OperatorApi().serving() as api:
        assert isinstance(api, OperatorApi)
        yield api


def service(**spec: object) -> Object:
    """A RayService of one head and one worker with a GPU, whose API keys lie in a Secret."""
    worker = {
        "containers": [
            {
                "name": "w",
                "resources": {"limits": {"nvidia.com/gpu": 1}},
                "env": [{"name": KEYS_PATH_VARIABLE, "value": "/keys/keys.yaml"}],
                "volumeMounts": [{"name": "keys", "mountPath": "/keys"}],
            }
        ],
        "volumes": [{"name": "keys", "secret": {"secretName": "api-keys"}}],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "sdxl", "namespace": "images"},
        "spec": {
            "serveConfigV2": SERVE_CONFIG,
            "rayClusterConfig": {
                "headGroupSpec": {"template": {"spec": {"containers": [{"name": "h"}]}}},
                "workerGroupSpecs": [
                    {"groupName": "gpu", "minReplicas": 1, "template": {"spec": worker}}
                ],
            },
        }
        | spec,
    }


class Run:
    """One rehearsal: its findings by check, its lines, and what it left."""

    def __init__(
        self, api: OperatorApi, folder: Path, *overlay: Object, at: Callable[[float], None]
    ) -> None:
        self.lines: list[str] = []
        with WritableCluster(None, api.kubeconfig(folder)) as cluster:
            manifest = prepare(overlay or (service(),), "overlay", cluster.lives_in_namespace)
            clock = FakeClock(api.advance, at)
            self.all = rehearse(cluster, manifest, self.lines.append, clock)
        self.findings: dict[str, Finding] = {one.check: one for one in self.all}
        assert len(self.findings) == len(self.all)
        self.took_s = clock.now()
        self.name = manifest.name

    def failed(self) -> list[str]:
        return [one.check for one in self.all if one.outcome == "failed"]


@pytest.fixture
def run(api: OperatorApi, tmp_path: Path) -> Callable[..., Run]:
    def start(*overlay: Object, at: Callable[[float], None] = lambda _: None) -> Run:
        return Run(api, tmp_path, *overlay, at=at)

    return start


def _outcomes(run: Run) -> set[str]:
    return {one.outcome for one in run.all}


def test_all_steps_pass_and_leave_nothing(api: OperatorApi, run: Callable[..., Run]) -> None:
    done = run()
    assert _outcomes(done) == {"ok"}, done.all
    assert [one.check for one in done.all if one.check in STEPS] == list(STEPS)
    found = {check: finding.found for check, finding in done.findings.items()}
    assert "PNG, 64x64" in found["image"]
    assert "stays; then PNG" in found["Serve config"]
    assert "it has taken over" in found["upgrade"]
    assert "(delay: 60 s)" in found["upgrade"]
    assert "requests meanwhile, none failed" in found["upgrade"]
    assert "first pod template again, as a third one" in found["roll back"]
    assert api.store == {}
    assert done.took_s < 300


def test_every_write_is_in_its_own_namespace(api: OperatorApi, run: Callable[..., Run]) -> None:
    done = run({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "images"}}, service())
    assert done.name.startswith("images-rehearsal-")
    assert api.writes
    for method, path in api.writes:
        inside = path.partition("/namespaces/")[2].partition("/")[0]
        assert inside == done.name or (method, path) == ("POST", "/api/v1/namespaces"), path


def test_each_line_says_when_it_happened(run: Callable[..., Run]) -> None:
    done = run()
    times = [float(line.split(" s ")[0]) for line in done.lines]
    assert times == sorted(times)
    titles = [line for line in done.lines if "/10 " in line]
    assert len(titles) == 10


# Where pods do not run.


def test_without_kubelets_the_control_plane_alone_is_checked(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.kubelet = "none"
    done = run()
    assert done.failed() == []
    assert "no kubelet takes them up" in done.findings["kubelet"].found
    assert "left out" in done.findings["image"].found
    assert "no other was made" in done.findings["Serve config"].found
    assert "RayCluster sdxl-2; 2 pods" in done.findings["upgrade"].found
    assert "as a third one" in done.findings["roll back"].found
    assert api.store == {}
    assert api.asked_of_pods == 0


def test_kwok_marks_pods_as_running_and_no_image_is_asked_for(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.kubelet = "kwok"
    done = run()
    assert done.failed() == []
    assert "its nodes are fake" in done.findings["kubelet"].found
    assert "dashboard" in done.findings["upgrade"].found
    assert "was not replaced" in done.findings["roll back"].found
    assert api.asked_of_pods == 0
    assert api.store == {}


def test_a_node_without_a_container_runtime_is_fake(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.put("nodes", node("gpu-1", gpus=8))
    assert "its nodes are fake" in run().findings["kubelet"].found
    assert api.asked_of_pods == 0


# What is refused.


def test_the_operator_s_refusal_is_shown(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.refusal = "idleTimeoutSeconds of worker group gpu needs autoscaler v2"
    done = run()
    assert done.failed() == ["RayCluster"]
    assert api.refusal in done.findings["RayCluster"].found
    assert "pods" not in done.findings
    assert done.findings["delete"].outcome == "ok"
    assert api.store == {}


def test_an_operator_that_does_nothing_is_told(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.makes_nothing = True
    done = run()
    assert done.failed() == ["RayCluster"]
    assert "within 60 s" in done.findings["RayCluster"].found
    assert "watchNamespace" in done.findings["RayCluster"].advice
    assert api.store == {}


def test_a_misspelt_field_is_refused_and_shown(api: OperatorApi, run: Callable[..., Run]) -> None:
    done = run(service(upgradeStrateggy={"type": "None"}))
    assert done.failed() == ["apply"]
    assert 'unknown field "spec.upgradeStrateggy"' in done.findings["apply"].found
    assert api.store == {}


def test_a_kind_that_is_not_served_fails_and_the_rest_goes_on(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    policy = {
        "apiVersion": "gateway.envoyproxy.io/v1alpha1",
        "kind": "ClientTrafficPolicy",
        "metadata": {"name": "sdxl", "namespace": "images"},
    }
    done = run(policy, service())
    assert done.failed() == ["apply"]
    assert "serves no ClientTrafficPolicy" in done.findings["apply"].found
    assert done.findings["roll back"].outcome == "ok"
    assert api.store == {}


def test_a_missing_right_is_named(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.forbidden = {("POST", "namespaces")}
    done = run()
    assert done.failed() == ["apply"]
    assert "may not create" in done.findings["apply"].found
    assert 'User "jane" cannot create resource "namespaces"' in done.findings["apply"].found
    assert "--user=jane" in done.findings["apply"].advice
    assert "nothing was created" in done.findings["delete"].found


def test_nothing_is_created_without_an_operator(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.put("deployments.apps", operator(available=0))
    done = run()
    assert done.failed() == ["KubeRay operator", "preflight"]
    assert api.writes == []


# What goes wrong on the way.


def test_a_worker_without_room_ends_with_the_scheduler_s_words(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.gpus = 0
    done = run()
    assert done.failed() == ["pods"]
    assert "Insufficient nvidia.com/gpu" in done.findings["pods"].found
    assert done.took_s < 120
    assert api.store == {}


def test_an_upgrade_says_that_gpus_are_short(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.gpus = 1
    done = run()
    assert done.failed() == ["upgrade"]
    assert "sdxl-2 has no room" in done.findings["upgrade"].found
    assert "Insufficient nvidia.com/gpu" in done.findings["upgrade"].found
    assert "upgradeStrategy.type" in done.findings["upgrade"].advice
    assert done.findings["roll back"].outcome == "warning"
    assert "sdxl-1 goes on serving" in done.findings["roll back"].found
    assert api.store == {}


def test_another_cluster_for_a_serve_config_is_a_failure(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.replaces_in_place = True
    done = run()
    assert done.failed() == ["Serve config"]
    assert "another RayCluster" in done.findings["Serve config"].found
    assert "upgrade" not in done.findings
    assert api.store == {}


def test_a_service_that_never_runs_is_a_failure_in_bounded_time(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.dashboard = False
    done = run()
    assert done.failed() == ["ready"]
    assert "not within 1800 s" in done.findings["ready"].found
    assert done.took_s < 2000
    assert api.store == {}


def test_a_port_that_cannot_be_reached_is_a_failure(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.port_refuses = True
    done = run()
    assert "image" in done.failed()
    assert "port 8000 of pod sdxl-1-gpu" in done.findings["image"].found
    assert "pods/portforward" in done.findings["image"].advice


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (503, {"error": {"message": "no replica"}}, "answered 503"),
        (200, {"data": [{"b64_json": "bm8gaW1hZ2U="}]}, "with no image"),
        (200, {"data": []}, "with no image"),
    ],
)
def test_an_answer_without_an_image_is_a_failure(
    api: OperatorApi, run: Callable[..., Run], status: int, answer: Object, words: str
) -> None:
    api.answer_of_pod = lambda _: (status, answer)
    done = run()
    assert "image" in done.failed()
    assert words in done.findings["image"].found


def test_a_request_that_fails_during_the_upgrade_fails_it(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    good = api.answer_of_pod
    api.answer_of_pod = lambda before: (502, {}) if before == 4 else good(before)
    done = run()
    assert done.failed() == ["upgrade"]
    assert "1 of" in done.findings["upgrade"].found
    assert "answered 502" in done.findings["upgrade"].found


# The end, whatever happens.


@pytest.mark.parametrize("at_s", [2.0, 9.0, 40.0])
def test_an_interrupt_deletes_what_was_created(
    api: OperatorApi, run: Callable[..., Run], at_s: float
) -> None:
    pending = [at_s]

    def interrupt(now: float) -> None:
        if pending and now >= pending[0]:
            pending.clear()
            raise KeyboardInterrupt

    done = run(at=interrupt)
    assert len(done.failed()) == 1
    assert "interrupted" in done.findings[done.failed()[0]].found
    assert done.findings["delete"].outcome == "ok"
    assert api.store == {}


def test_what_is_left_is_told_with_the_command(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.namespace_stays = True
    done = run()
    assert done.failed() == ["delete"]
    assert "did not end" in done.findings["delete"].found
    assert f"kubectl delete namespace {done.name}" in done.findings["delete"].advice


def test_a_second_interrupt_ends_the_deletion_and_says_what_is_left(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    def interrupt(now: float) -> None:
        if now >= 10.0:
            raise KeyboardInterrupt

    done = run(at=interrupt)
    assert done.findings["delete"].outcome == "failed"
    assert "interrupted" in done.findings["delete"].found
    assert f"kubectl delete namespace {done.name}" in done.findings["delete"].advice


def test_a_slow_finalizer_is_waited_for(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.finalizer_s = 320.0
    done = run()
    assert done.failed() == []
    assert api.store == {}
    assert api.deleted[-1] == f"/api/v1/namespaces/{done.name}"


def test_earlier_rehearsals_are_told(api: OperatorApi, run: Callable[..., Run]) -> None:
    labels = {"app.kubernetes.io/managed-by": "diffusion-serve-rehearsal"}
    api.store["/api/v1/namespaces/old"] = {"metadata": {"name": "old", "labels": labels}}
    done = run()
    assert done.findings["earlier rehearsals"].outcome == "warning"
    assert "kubectl delete namespace old" in done.findings["earlier rehearsals"].advice
    assert list(api.store) == ["/api/v1/namespaces/old"]


def test_a_short_outage_of_the_api_server_is_waited_out(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    def away(now: float) -> None:
        api.away = 10.0 < now < 30.0

    done = run(at=away)
    assert done.failed() == [], done.all
    assert any("answers 503" in line for line in done.lines)
    assert api.store == {}


def test_upgrade_strategy_none_is_left_out(run: Callable[..., Run]) -> None:
    done = run(service(upgradeStrategy={"type": "None"}))
    assert done.failed() == []
    assert "upgradeStrategy None" in done.findings["upgrade"].found


def test_a_long_deletion_delay_is_reported_and_not_waited_for(run: Callable[..., Run]) -> None:
    done = run(service(rayClusterDeletionDelaySeconds=3600))
    assert "sdxl-1 stays for 3600 s" in done.findings["upgrade"].found
    assert done.took_s < 300
