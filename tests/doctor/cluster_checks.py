"""Runs the checks of a cluster for the tests."""

from pathlib import Path

from serve_app.doctor.cluster import look
from serve_app.doctor.kube import Cluster
from serve_app.doctor.report import Finding
from tests.doctor.fake_cluster import Object


def findings_of(
    kubeconfig: Path,
    namespace: str | None = None,
    cpu: bool = False,
    overlay: list[Object] | None = None,
) -> dict[str, Finding]:
    """Run every check and return the findings by check."""
    with Cluster(namespace, kubeconfig) as cluster:
        findings = list(look(cluster, cpu, overlay))
    assert len({finding.check for finding in findings}) == len(findings)
    return {finding.check: finding for finding in findings}


def command_lines(commands: str) -> list[str]:
    """Return the commands, one per line, without indentation and line breaks."""
    return [" ".join(line.split()) for line in commands.replace("\\\n", " ").splitlines()]
