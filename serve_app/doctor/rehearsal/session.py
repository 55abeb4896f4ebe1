"""The shared state of a rehearsal's steps: the cluster, the results so far, and waiting.

`run` has the order of the steps.
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
"""Limit for the operator to create a RayCluster: it needs 2 s, or a few after a restart."""

UNPLACED_S = 45.0
"""Limit for pods to be created and bound. During an upgrade both RayClusters must fit: it is less
than the 60 s after which KubeRay deletes a replaced one."""

UNATTENDED_S = 10.0
"""Limit for a kubelet to report a pod that is in deletion."""

SCALE_UP_S = 900.0
"""Limit for pods that wait for new nodes: GPU nodes take several minutes."""

KUBELET_S = 45.0
"""Limit for a kubelet to accept a pod: it does so within seconds."""

READY_S = 1800.0
"""Limit for images of several GB, the weights, and the measurements at start-up."""

FAKE_READY_S = 60.0
"""Limit for a stand-in of Ray's dashboard to answer the operator, where nodes are fake."""

STUCK_S = 180.0
"""Patience with a failure that may pass, such as a pull that is retried."""

UNCHANGED_S = 20.0
"""Time in which nothing may happen: ten rounds of the operator."""

SENT_S = 60.0
"""Limit for the operator to send a Serve config to the head."""

REQUEST_EVERY_S = 5.0
"""Pause between two requests during an upgrade."""


class Stop(Exception):
    """A failure after which the remaining steps make no sense."""

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
        """Findings beside that of the running step, which adds them."""
        self.kubelet: Kubelet | None = None
        """The kubelet that runs the pods; set by the step `pods`."""
        self.serves = False
        """True if the operator reported the service as ready; set by the step `ready`."""
        self.first = ""
        """The first RayCluster, and its spec as KubeRay compares it; set by `RayCluster`."""
        self.first_hash = ""
        self.answers: list[str] = []
        """Images since the counts were reset, and the requests that failed."""
        self.failures: list[str] = []
        self._asked_at_s = 0.0
        self._ending_since_s: dict[str, float] = {}

    def until(
        self,
        probe: Callable[[], T | None],
        timeout_s: float,
        between: Callable[[], object] = lambda: None,
    ) -> T | None:
        """Wait as `Waiter.until` does; remove pods whose end no kubelet reports meanwhile."""

        def both() -> None:
            between()
            self.remove_unattended()

        return self.waiter.until(probe, timeout_s, both)

    def remove_unattended(self) -> None:
        """Remove pods in deletion that no kubelet has ever accepted.

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
                    details = f"{condition.get('reason', '')} {condition.get('message', '')}"
                    raise Stop(
                        failed(
                            name,
                            f"RayCluster {ray_cluster}: its pods cannot be created: {details}",
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
        """Wait until ``ray_cluster`` serves and all applications run. Raises `Stop`."""
        since_s: dict[str, float] = {}

        def probe() -> bool | None:
            service = self.observer.service()
            self.waiter.progress(str(service))
            if serving(service, ray_cluster):
                return True
            troubles = self._troubles(service)
            now_s = self.waiter.elapsed_s()
            for details in [details for details in since_s if details not in troubles]:
                del since_s[details]
            for details, advice in troubles.items():
                if now_s - since_s.setdefault(details, now_s) >= STUCK_S:
                    raise Stop(failed(name, details, advice))
            return None

        if self.until(probe, READY_S, between) is None:
            raise Stop(
                failed(
                    name,
                    f"not within {READY_S:.0f} s: {self.observer.service()}",
                    "Run `diffusion-serve doctor --cluster` on the service while it starts, and "
                    "check the logs of the head and of a worker.",
                )
            )

    def _troubles(self, service: Service) -> dict[str, str]:
        """Return the reasons why the service is not ready, each with its advice."""
        advice = "Correct the Serve config (`diffusion-serve check`) or what the message names."
        troubles = dict.fromkeys(service.messages, advice)
        if service.refusal:
            troubles[service.refusal] = "Correct what the operator rejects."
        if service.routed and service.pending and (details := self.observer.gateway_trouble()):
            troubles[details] = (
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

    def request_image(self, name: str) -> Finding:
        try:
            return ok(name, self._ask_once())
        except image.CannotReach as error:
            return failed(
                name,
                str(error),
                "The pods are ready, so the way through the API server is broken. It must reach "
                "the kubelets, and you need the right to create pods/portforward.",
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
        """Request an image now and then, and count the answers."""
        now_s = self.waiter.elapsed_s()
        if self.kubelet != "runs" or now_s - self._asked_at_s < REQUEST_EVERY_S:
            return
        self._asked_at_s = now_s
        try:
            self._ask_once()
        except (image.CannotReach, image.NoImage) as error:
            self.failures.append(f"at {now_s:.0f} s: {error}")
            self.waiter.emit(f"    a request failed: {error}")


def serving(service: Service, ray_cluster: str) -> Service | None:
    """Return ``service`` if it is ready on ``ray_cluster``, or on any if that is empty."""
    settled = service.serves and not service.pending
    return service if settled and ray_cluster in ("", service.active) else None
