"""Checks of installed software: packages, the versions of a Ray cluster, programs for probes."""

import importlib.metadata
import json
import platform
import shutil
import socket
import subprocess
import sys

from packaging.requirements import Requirement

from serve_app.doctor.gpus import Place
from serve_app.doctor.report import Finding, failed, ok, warning


def check_packages(name: str = "diffusion-serve") -> Finding:
    """Compare the installed packages with this project's requirements."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return warning("packages", f"{name} is not installed", "Install it: `pip install .`")
    wrong = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if wrong:
        return failed(
            "packages",
            ", ".join(wrong),
            "Install it again: `pip install --constraint constraints.txt .`",
        )
    shown = ", ".join(f"{one} {importlib.metadata.version(one)}" for one in ("ray", "torch"))
    return ok("packages", f"Python {platform.python_version()}, {shown}")


def check_ray_cluster(place: Place, timeout_s: float = 60.0) -> Finding:
    """Compare the versions here with those of the cluster that RAY_ADDRESS names."""
    address = place.environment.get("RAY_ADDRESS")
    if address in (None, "", "local", "auto"):
        return ok("ray cluster", "nothing to compare: RAY_ADDRESS is not set")
    if "://" in address:
        return warning(
            "ray cluster",
            f"RAY_ADDRESS is {address}, which reports no versions",
            "Name the head's global control store, as HOST:6379.",
        )
    try:
        theirs = _versions_of(address, timeout_s)
    except OSError as error:
        return failed(
            "ray cluster",
            f"{address} (RAY_ADDRESS) does not answer: {error}",
            "Check that the head runs and accepts this machine (`ray status --address "
            f"{address}`), and that both use the same token; or unset RAY_ADDRESS.",
        )
    here = {
        "ray_version": importlib.metadata.version("ray"),
        "python_version": platform.python_version(),
    }
    found = f"{address}: Ray {theirs['ray_version']}, Python {theirs['python_version']}"
    if theirs != here:
        return failed(
            "ray cluster",
            f"{found}; here Ray {here['ray_version']}, Python {here['python_version']}",
            "Use the same image on all nodes: Ray rejects a node with another version of Ray or "
            "of Python, down to the last number.",
        )
    return ok("ray cluster", f"{found}, as here")


def _versions_of(address: str, timeout_s: float) -> dict[str, str]:
    """Return the versions that `head` reads at ``address``. Raises `OSError` without an answer."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise OSError("it is not HOST:PORT")
    # Ray itself would retry for half a minute.
    socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "serve_app.doctor.head", address],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer in {timeout_s:g} s") from None
    if done.returncode != 0:
        raise OSError((done.stderr.strip().splitlines() or ["it gave no reason"])[-1])
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def check_probes(place: Place) -> Finding:
    """Check the programs that KubeRay's probes run inside a container."""
    missing = [name for name in ("bash", "wget") if shutil.which(name) is None]
    if not missing:
        return ok("probes", "bash and wget are here, for KubeRay's probes")
    found = f"{' and '.join(missing)} missing: KubeRay's probes need them"
    advice = (
        f"Install {' and '.join(missing)} in the image. Otherwise no pod with this image becomes "
        "ready."
    )
    return (failed if place.kubernetes else warning)("probes", found, advice)
