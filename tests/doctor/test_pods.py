"""The checks of pods that do not run."""

from pathlib import Path

import pytest

from tests.doctor.cluster_checks import findings_of
from tests.doctor.fake_cluster import (
    FakeApi,
    Object,
    ended,
    event,
    pod,
    unscheduled,
    waiting,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("stuck", "outcome", "found", "advice"),
    [
        (pod("p"), "warning", "no scheduler", "schedulerName"),
        (
            pod("p", conditions=[{"type": "PodScheduled", "status": "True"}]),
            "warning",
            "on a node",
            "takes minutes",
        ),
        (waiting("p", "ImagePullBackOff", "denied"), "failed", "ImagePullBackOff: denied", "tag"),
        (waiting("p", "ErrImageNeverPull"), "failed", "ErrImageNeverPull", "minikube image load"),
        (
            waiting("p", "CreateContainerConfigError", 'secret "hf" not found'),
            "failed",
            "hf",
            "kubectl -n images create secret generic hf",
        ),
        (
            waiting(
                "p",
                "CreateContainerConfigError",
                "couldn't find key token in Secret images/redis",
            ),
            "failed",
            "key token",
            "Add it:\n  kubectl -n images create secret generic redis",
        ),
        (waiting("p", "CreateContainerConfigError", "odd"), "failed", "odd", "kubectl describe"),
        (waiting("p", "RunContainerError", "nvidia-container-cli"), "failed", "nvidia", "Toolkit"),
        (waiting("p", "CrashLoopBackOff", phase="Running"), "failed", "CrashLoopBackOff", "logs"),
        (waiting("p", "PodInitializing"), "warning", "no scheduler", ""),
        (
            ended("p", 137, "OOMKilled"),
            "failed",
            "container ray-head ended with code 137 (OOMKilled)",
            "memory limit",
        ),
        (ended("p", 137, "Error"), "failed", "code 137 (Error)", "memory limit"),
        (ended("p", 1, "Error"), "failed", "code 1 (Error)", "images logs POD -c ray-head`"),
        (ended("p", 1, "Error", phase="Running"), "failed", "code 1 (Error)", "shows the reason"),
        (
            pod("p", phase="Failed", reason="Evicted", message="low"),
            "failed",
            "Evicted: low",
            "disk",
        ),
    ],
)
def test_a_pod_that_does_not_run_is_explained(
    api: FakeApi, kubeconfig: Path, stuck: Object, outcome: str, found: str, advice: str
) -> None:
    api.put("pods", stuck, pod("runs", phase="Running"), pod("done", phase="Succeeded"))
    finding = findings_of(kubeconfig)["pod p"]
    assert finding.outcome == outcome
    assert found in finding.found
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("code", "reason", "memory"), [(137, "OOMKilled", True), (1, "Error", False)]
)
def test_a_crash_loop_shows_its_exit_code(
    api: FakeApi, kubeconfig: Path, code: int, reason: str, memory: bool
) -> None:
    looping = waiting("p", "CrashLoopBackOff", phase="Running")
    [container] = looping["status"]["containerStatuses"]
    container["lastState"] = {"terminated": {"exitCode": code, "reason": reason}}
    api.put("pods", looping)
    finding = findings_of(kubeconfig)["pod p"]
    assert f"container main ended with code {code} ({reason})" in finding.found
    assert ("memory limit" in finding.advice) == memory


def test_alike_pods_have_one_row(api: FakeApi, kubeconfig: Path) -> None:
    container = {"name": "w", "resources": {"limits": {"cpu": "16"}}}
    stuck = [unscheduled(name, "2 Insufficient cpu.", containers=[container]) for name in "abc"]
    api.put("pods", *stuck)
    findings = findings_of(kubeconfig)
    assert findings["pod a and 2 more"].outcome == "failed"
    assert "pods" not in findings


def test_succeeded_and_terminating_pods_are_no_failure(api: FakeApi, kubeconfig: Path) -> None:
    leaving = ended("p", 143, "Error")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00+00:00"
    api.put("pods", leaving, ended("q", 0, "Completed", phase="Running"))
    finding = findings_of(kubeconfig)["pods"]
    assert finding.found == "none of 2 in namespace images is pending or has failed"


_PLACED = pod("p", conditions=[{"type": "PodScheduled", "status": "True"}])
_NO_SECRET = 'MountVolume.SetUp failed for volume "keys" : secret "api-keys" not found'


@pytest.mark.parametrize(
    ("message", "outcome", "advice"),
    [
        (_NO_SECRET, "failed", "kubectl -n images create secret generic api-keys --from-file"),
        (
            'MountVolume.SetUp failed for volume "c" : references non-existent secret key: k',
            "failed",
            "docs/operate/kubernetes.md",
        ),
        ('no runtime for "nvidia" is configured', "failed", "nvidia-ctk runtime configure"),
        ('Multi-Attach error for volume "pvc-1"', "failed", "ReadWriteMany"),
        ("failed to sync configmap cache: timed out", "warning", "tries again"),
    ],
)
def test_a_nodes_events_explain_its_pod(
    api: FakeApi, kubeconfig: Path, message: str, outcome: str, advice: str
) -> None:
    api.put("pods", _PLACED)
    api.put(
        "events",
        event("p", "FailedMount", message, minute=2),
        event("p", "FailedScheduling", "3 Insufficient memory.", minute=1),
        event("q", "FailedMount", "of another", minute=3),
    )
    finding = findings_of(kubeconfig)["pod p"]
    assert finding.outcome == outcome
    assert finding.found == f"pending: {message}"
    assert advice in finding.advice


def test_the_cause_is_reported_and_not_its_consequences(api: FakeApi, kubeconfig: Path) -> None:
    api.put("pods", _PLACED)
    of_it = event("p", "FailedMount", "Unable to attach or mount volumes: timed out", minute=9)
    api.put("events", of_it, event("p", "FailedMount", _NO_SECRET, minute=2))
    assert "api-keys" in findings_of(kubeconfig)["pod p"].found


@pytest.mark.parametrize(
    "events",
    [
        [
            event("p", "Pulling", "Pulling image", minute=3, type_="Normal"),
            event("p", "FailedMount", _NO_SECRET, minute=2),
        ],
        [event("p", "FailedScheduling", "3 Insufficient memory.", minute=1)],
    ],
)
def test_earlier_obstacles_of_a_pod_do_not_count(
    api: FakeApi, kubeconfig: Path, events: list[Object]
) -> None:
    api.put("pods", _PLACED)
    api.put("events", *events)
    finding = findings_of(kubeconfig)["pod p"]
    assert finding.outcome == "warning"
    assert "takes minutes" in finding.advice


def test_forbidden_events_hide_no_pod(api: FakeApi, kubeconfig: Path) -> None:
    api.put("pods", _PLACED)
    api.refusals = {"events": 403}
    findings = findings_of(kubeconfig)
    assert "kubectl auth can-i list events -n images" in findings["events"].found
    assert findings["pod p"].outcome == "warning"


def test_pods_that_kuberay_has_replaced_are_reported(api: FakeApi, kubeconfig: Path) -> None:
    """Use events in the words of KubeRay 1.7 and of the API types' String()."""

    def deleted(name: str, state: str, minute: int) -> Object:
        message = (
            f"Deleted worker Pod images/{name}; Pod status: Failed; Pod restart policy: Never; "
            f"Ray container terminated status: {state}"
        )
        return event("sdxl-1", "DeletedWorkerPod", message, minute, "RayCluster", "Normal")

    state = (
        "&ContainerStateTerminated{ExitCode:137,Signal:0,Reason:OOMKilled,Message:,"
        "StartedAt:2026-01-01 00:00:00 +0000 UTC,FinishedAt:2026-01-01 00:01:00 +0000 UTC,"
        "ContainerID:containerd://0,}"
    )
    by_the_autoscaler = event(
        "sdxl-1", "DeletedWorkerPod", "Deleted pod images/w0", 9, "RayCluster", "Normal"
    )
    api.put("events", by_the_autoscaler)
    assert "replaced pods" not in findings_of(kubeconfig)
    api.put("events", deleted("w2", state, 2), deleted("w1", "nil", 1), by_the_autoscaler)
    finding = findings_of(kubeconfig)["replaced pods"]
    assert finding.outcome == "warning"
    assert finding.found.startswith("2 that ended within")
    assert finding.found.endswith("the last: w2, Failed, exit code 137 (OOMKilled)")
