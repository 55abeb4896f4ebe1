"""Runs a rehearsal from its first step to its last; the namespace is deleted whatever happens."""

from collections.abc import Callable
from dataclasses import replace

from serve_app.doctor.kube import NotReadable
from serve_app.doctor.kube_write import WritableCluster
from serve_app.doctor.rehearsal import changes, cleanup, image, start
from serve_app.doctor.rehearsal.manifest import Manifest
from serve_app.doctor.rehearsal.session import Session, Stop
from serve_app.doctor.rehearsal.waiting import Clock, SystemClock, Waiter
from serve_app.doctor.report import Finding, failed

RehearsalStep = Callable[[Session], Finding]
"""One step: it acts on the cluster and returns its finding, or raises `Stop`."""

_STEPS: tuple[tuple[str, str, RehearsalStep], ...] = (
    ("preflight", "CRDs, operator, earlier rehearsals", start.preflight),
    ("apply", "the overlay, into a namespace of its own", start.apply),
    ("RayCluster", "the operator makes one", start.ray_cluster),
    ("pods", "made, bound to nodes, taken up by kubelets", start.pods),
    ("ready", "the applications run, and requests have somewhere to go", start.ready),
    ("image", f"one, by POST {image.PATH}", start.image),
    ("Serve config", "changed in place", changes.in_place),
    ("upgrade", "a changed pod template", changes.upgrade),
    ("roll back", "the first pod template again", changes.roll_back),
)
_COUNT = len(_STEPS) + 1


def rehearse(
    cluster: WritableCluster,
    manifest: Manifest,
    emit: Callable[[str], None],
    clock: Clock | None = None,
) -> list[Finding]:
    """Run every step and return its findings; ``emit`` receives each line as it happens.

    The namespace is deleted on Ctrl-C and on errors as well. A second Ctrl-C ends the deletion, and
    the last finding names the rest.
    """
    run = _Run(Session(cluster, manifest, Waiter(clock or SystemClock(), emit)))
    return run.all_steps()


class _Run:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._findings: list[Finding] = []

    def all_steps(self) -> list[Finding]:
        name = ""
        try:
            for number, (name, does, step) in enumerate(_STEPS, start=1):
                if not self._step(number, name, does, step):
                    break
        except KeyboardInterrupt:
            self._add(
                failed(name, "interrupted", "Run the rehearsal again for the steps that follow.")
            )
        finally:
            self._step(_COUNT, "delete", "all that was created", cleanup.delete)
        return self._findings

    def _step(self, number: int, name: str, does: str, step: RehearsalStep) -> bool:
        """Run one step; return whether the next one makes sense."""
        waiter = self._session.waiter
        waiter.emit(f"{number}/{_COUNT} {name}: {does}")
        started_s = waiter.elapsed_s()
        goes_on = True
        try:
            finding = step(self._session)
        except Stop as stop:
            finding, goes_on = stop.finding, False
        except NotReadable as error:
            finding, goes_on = failed(name, error.found, error.advice), False
        finally:
            for extra in self._session.extra:
                self._add(extra)
            self._session.extra.clear()
        took_s = waiter.elapsed_s() - started_s
        self._add(replace(finding, found=f"{finding.found} ({took_s:.0f} s)"))
        return goes_on

    def _add(self, finding: Finding) -> None:
        self._findings.append(finding)
        self._session.waiter.emit(f"  {finding.outcome}: {finding.check}: {finding.found}")
