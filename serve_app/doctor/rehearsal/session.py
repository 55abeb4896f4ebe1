"""What the steps of a rehearsal share: the cluster, what was seen so far, and how to wait.

Knows no order of steps; `run` does.
"""

from collections.abc import Callable
from typing import TypeVar

from serve_app.doctor import pending
from serve_app.doctor.kube_write import WritableCluster
from serve_app.doctor.rehearsal import image
from serve_app.doctor.rehearsal.manifest import Manifest
from serve_app.doctor.rehearsal.observer import Kubelet, Observer, Placement, Service, place
from serve_app.doctor.rehearsal.waiting import Waiter
from serve_app.doctor.report import Finding, failed, ok

T = TypeVar("T")

MADE_S = 60.0
"""For the operator to make a RayCluster: it needs 2 s, or a few after a restart."""

UNPLACED_S = 45.0
"""For pods to be made and bound. During an upgrade both RayClusters must fit: the time is less than
the 60 s after which KubeRay deletes one that was replaced."""

UNATTENDED_S = 10.0
"""For a kubelet to say that it has a pod that is being deleted."""

SCALE_UP_S = 900.0
"""For pods that a node autoscaler adds nodes for: GPU nodes take several minutes."""

KUBELET_S = 45.0
"""For a kubelet to take up a pod: it does so within seconds."""

READY_S = 1800.0
"""For images of several GB, the weights, and the measurements at start-up."""

FAKE_READY_S = 60.0
"""For a stand-in of Ray's dashboard to answer the operator, where nodes are fake."""

STUCK_S = 180.0
"""For a failure that may pass, such as a pull that is tried again."""

UNCHANGED_S = 20.0
"""To see that nothing happens: ten rounds of the operator."""

SENT_S = 60.0
"""For the operator to send a Serve config to the head."""

REQUEST_EVERY_S = 5.0
"""Between two requests during an upgrade."""


class Stop(Exception):
    """A failure after which the steps that follow would tell nothing."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding


class Session:
    """One rehearsal while it runs."""

    def __init__(self, cluster: WritableCluster, manifest: Manifest, waiter: Waiter) -> None:
        self.cluster = cluster
        self.manifest = manifest
        self.waiter = waiter
        self.observer = Observer(cluster, manifest.name, manifest.service)
        self.extra: list[Finding] = []
        """Findings beside the one of the step that runs; the step adds them."""
        self.kubelet: Kubelet | None = None
        """What runs the pods; set by the step `pods`."""
        self.serves = False
        """Whether the operator found the service ready; set by the step `ready`."""
        self.first = ""
        """The first RayCluster, and its spec as KubeRay compares it; set by `RayCluster`."""
        self.first_hash = ""
        self.answers: list[str] = []
        """Images that came since the counts were reset, and the requests that failed."""
        self.failures: list[str] = []
        self._asked_at_s = 0.0
        self._ending_since_s: dict[str, float] = {}

    def until(
        self,
        probe: Callable[[], T | None],
        timeout_s: float,
        between: Callable[[], object] = lambda: None,
    ) -> T | None:
        """See `Waiter.until`; removes ended pods meanwhile that no kubelet reports as ended."""

        def both() -> None:
            between()
            self.remove_unattended()

        return self.waiter.until(probe, timeout_s, both)

    def remove_unattended(self) -> None:
        """Remove pods that are being deleted and that no kubelet has ever taken up.

        The scheduler counts them, and their namespace stays, until a kubelet confirms their end.
        """
        for pod in self.observer.pods():
            metadata, status = pod["metadata"], pod.get("status") or {}
            if not metadata.get("deletionTimestamp") or status.get("startTime"):
                continue
            now_s = self.waiter.elapsed_s()
            if now_s - self._ending_since_s.setdefault(metadata["uid"], now_s) >= UNATTENDED_S:
                path = f"{self.observer.core}/pods/{metadata['name']}"
                self.cluster.delete(path, uid=metadata["uid"], grace_s=0)

    def placed(self, name: str, ray_cluster: str, patience_s: float) -> Placement:
        started_s = self.waiter.elapsed_s()
        last: Placement | None = None

        def probe() -> Placement | None:
            nonlocal last
            pods, events = self.observer.pods(), self.observer.events()
            last = place(pods, events, ray_cluster, self.manifest.service)
            if last.complete:
                return last
            self.waiter.progress(str(last))
            one = self.observer.ray_clusters().get(ray_cluster) or {}
            for condition in (one.get("status") or {}).get("conditions") or ():
                if (condition["type"], condition["status"]) == ("ReplicaFailure", "True"):
                    said = f"{condition.get('reason', '')} {condition.get('message', '')}"
                    raise Stop(
                        failed(
                            name,
                            f"RayCluster {ray_cluster}: its pods cannot be made: {said}",
                            "Correct the pod template, a quota, or an admission rule.",
                        )
                    )
            waited_s = self.waiter.elapsed_s() - started_s
            return last if waited_s >= patience_s and not last.scaling_up else None

        placement = self.until(probe, max(SCALE_UP_S, patience_s)) or last
        assert placement is not None
        return placement

    def wait_until_serving(
        self, name: str, ray_cluster: str, between: Callable[[], object] = lambda: None
    ) -> None:
        """Until ``ray_cluster`` has taken over and all applications run; raises `Stop`."""
        since_s: dict[str, float] = {}

        def probe() -> bool | None:
            service = self.observer.service()
            self.waiter.progress(str(service))
            if serving(service, ray_cluster):
                return True
            troubles = self._troubles(service)
            now_s = self.waiter.elapsed_s()
            for said in [said for said in since_s if said not in troubles]:
                del since_s[said]
            for said, advice in troubles.items():
                if now_s - since_s.setdefault(said, now_s) >= STUCK_S:
                    raise Stop(failed(name, said, advice))
            return None

        if self.until(probe, READY_S, between) is None:
            raise Stop(
                failed(
                    name,
                    f"not within {READY_S:.0f} s: {self.observer.service()}",
                    "Run `diffusion-serve doctor --cluster` on the service while it starts, and "
                    "look at the logs of the head and of a worker.",
                )
            )

    def _troubles(self, service: Service) -> dict[str, str]:
        """What keeps the service from being ready, each with its advice."""
        mend = "Correct the Serve config (`diffusion-serve check`) or what the message names."
        troubles = dict.fromkeys(service.messages, mend)
        if service.refusal:
            troubles[service.refusal] = "Correct what the operator refuses."
        if service.routed and service.pending and (said := self.observer.gateway_trouble()):
            troubles[said] = (
                "An incremental upgrade stands still at 0 % until a Gateway controller serves the "
                "GatewayClass of spec.upgradeStrategy.clusterUpgradeOptions: install it, or use "
                "NewCluster."
            )
        events = self.observer.events()
        for pod in self.observer.pods():
            finding = pending.why(pod, events)
            if finding is not None and finding.outcome == "failed":
                troubles[f"{finding.check}: {finding.found}"] = finding.advice
        return troubles

    def ask(self, name: str) -> Finding:
        try:
            return ok(name, self._ask_once())
        except image.CannotReach as error:
            return failed(
                name,
                str(error),
                "The pods are ready, so that the way through the API server is broken: it must "
                "reach the kubelets, and you need the right to create pods/portforward.",
            )
        except image.NoImage as error:
            return failed(
                name, f"no image: {error}", "Look at the logs of the worker pods' replicas."
            )

    def _ask_once(self) -> str:
        pods = self.observer.serving_pods(self.observer.service())
        if not pods:
            raise image.NoImage("the serve Service has no ready endpoint")
        pod = pods[len(self.answers) % len(pods)]
        started_s = self.waiter.elapsed_s()
        manifest = self.manifest
        kind = image.request(self.cluster, manifest.name, pod, manifest.port, manifest.key)
        self.answers.append(kind)
        return f"{kind} from pod {pod} in {self.waiter.elapsed_s() - started_s:.1f} s"

    def reset_counts(self) -> None:
        """Count answers and failures from now on."""
        self.answers.clear()
        self.failures.clear()

    def sample(self) -> None:
        """Ask for an image now and then, and remember the answers."""
        now_s = self.waiter.elapsed_s()
        if self.kubelet != "runs" or now_s - self._asked_at_s < REQUEST_EVERY_S:
            return
        self._asked_at_s = now_s
        try:
            self._ask_once()
        except (image.CannotReach, image.NoImage) as error:
            self.failures.append(f"at {now_s:.0f} s: {error}")
            self.waiter.tell(f"    a request failed: {error}")


def serving(service: Service, ray_cluster: str) -> Service | None:
    """``service`` if it is ready and ``ray_cluster``, or any if empty, has taken over."""
    settled = service.serves and not service.pending
    return service if settled and ray_cluster in ("", service.active) else None
