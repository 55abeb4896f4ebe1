"""Rehearsals in which a request is rejected, or a step fails."""

from collections.abc import Callable

import pytest

from tests.doctor.fake_cluster import Object, operator
from tests.doctor.rehearsal.fake_operator import OperatorApi
from tests.doctor.rehearsal.rehearsals import Run, service

# What is refused.


def test_a_rejection_by_the_operator_is_shown(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.refusal = "idleTimeoutSeconds of worker group gpu needs autoscaler v2"
    done = run()
    assert done.failed() == ["RayCluster"]
    assert api.refusal in done.findings["RayCluster"].found
    assert "pods" not in done.findings
    assert done.findings["delete"].outcome == "ok"
    assert api.store == {}


def test_an_idle_operator_is_reported(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.makes_nothing = True
    done = run()
    assert done.failed() == ["RayCluster"]
    assert "within 60 s" in done.findings["RayCluster"].found
    assert "watchNamespace" in done.findings["RayCluster"].advice
    assert api.store == {}


def test_a_misspelt_field_is_rejected_and_shown(api: OperatorApi, run: Callable[..., Run]) -> None:
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


def test_an_upgrade_reports_missing_gpus(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.gpus = 1
    done = run()
    assert done.failed() == ["upgrade"]
    assert "sdxl-2 has no room" in done.findings["upgrade"].found
    assert "Insufficient nvidia.com/gpu" in done.findings["upgrade"].found
    assert "upgradeStrategy.type" in done.findings["upgrade"].advice
    assert done.findings["roll back"].outcome == "warning"
    assert "sdxl-1 continues to serve" in done.findings["roll back"].found
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
