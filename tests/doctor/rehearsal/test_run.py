"""A rehearsal against an API server with an operator, a scheduler and kubelets of the tests."""

from collections.abc import Callable

import pytest

from tests.doctor.fake_cluster import node
from tests.doctor.rehearsal.fake_operator import OperatorApi
from tests.doctor.rehearsal.rehearsals import STEPS, Run, service


def test_all_steps_pass_and_leave_nothing(api: OperatorApi, run: Callable[..., Run]) -> None:
    done = run()
    assert done.outcomes() == {"ok"}, done.all
    assert [one.check for one in done.all if one.check in STEPS] == list(STEPS)
    found = {check: finding.found for check, finding in done.findings.items()}
    assert "PNG, 64x64" in found["image"]
    assert "stays; then PNG" in found["Serve config"]
    assert "it has taken over" in found["upgrade"]
    assert "(delay: 60 s)" in found["upgrade"]
    assert "requests meanwhile, none failed" in found["upgrade"]
    assert "first pod template again; 2 pods" in found["roll back"]
    assert api.store == {}
    assert done.took_s < 300


def test_every_write_is_in_its_own_namespace(api: OperatorApi, run: Callable[..., Run]) -> None:
    done = run({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "images"}}, service())
    assert done.name.startswith("images-rehearsal-")
    assert api.writes
    for method, path in api.writes:
        inside = path.partition("/namespaces/")[2].partition("/")[0]
        assert inside == done.name or (method, path) == ("POST", "/api/v1/namespaces"), path


def test_each_line_has_its_time(run: Callable[..., Run]) -> None:
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
    assert "first pod template again; 2 pods" in done.findings["roll back"].found
    assert api.store == {}
    assert api.asked_of_pods == 0


def test_no_image_is_requested_from_kwoks_pods(api: OperatorApi, run: Callable[..., Run]) -> None:
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


# The end, whatever happens.


@pytest.mark.parametrize("at_s", [2.0, 9.0, 40.0])
def test_an_interrupt_deletes_all_created_objects(
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


def test_leftovers_are_reported_with_the_command(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.namespace_stays = True
    done = run()
    assert done.failed() == ["delete"]
    assert "did not end" in done.findings["delete"].found
    assert f"kubectl delete namespace {done.name}" in done.findings["delete"].advice


def test_a_second_interrupt_ends_the_deletion_and_names_the_rest(
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


def test_earlier_rehearsals_are_reported(api: OperatorApi, run: Callable[..., Run]) -> None:
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


def test_a_long_deletion_delay_is_reported_and_not_waited_for(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.gpus = 3
    done = run(service(rayClusterDeletionDelaySeconds=3600))
    assert done.failed() == []
    assert "sdxl-1 stays for 3600 s" in done.findings["upgrade"].found
    assert "first pod template again, as a third one" in done.findings["roll back"].found
    assert done.took_s < 120


def test_a_long_deletion_delay_can_leave_no_room_to_roll_back(run: Callable[..., Run]) -> None:
    done = run(service(rayClusterDeletionDelaySeconds=3600))
    assert done.failed() == ["roll back"]
    assert "has no room" in done.findings["roll back"].found
    assert done.took_s < 300


def test_without_keys_the_api_server_s_proxy_is_a_second_way(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.port_forwards = False
    open_to_all = service()
    [group] = open_to_all["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for part in ("env", "volumeMounts"):
        del group["template"]["spec"]["containers"][0][part]
    del group["template"]["spec"]["volumes"]
    done = run(open_to_all)
    assert done.outcomes() == {"ok"}, done.all
    assert api.asked_of_pods > 3


def test_a_node_autoscaler_is_waited_for(api: OperatorApi, run: Callable[..., Run]) -> None:
    api.gpus = 0
    api.scales_up = True

    def grow(now: float) -> None:
        api.gpus = 2 if now > 400 else 0

    done = run(at=grow)
    assert done.failed() == []
    assert done.took_s > 400


def test_an_incremental_upgrade_without_a_gateway_stands_still(
    api: OperatorApi, run: Callable[..., Run]
) -> None:
    api.incremental = True
    done = run(service(upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}))
    assert "upgrade" in done.failed()
    assert "Gateway sdxl-gateway is not programmed" in done.findings["upgrade"].found
    assert "GatewayClass" in done.findings["upgrade"].advice
    assert api.store == {}
