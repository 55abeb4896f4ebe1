"""The checks of the machine, or the container, that this runs in."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pynvml

from serve_app.config.deployment_names import GENERATOR
from serve_app.config.environment import machine_environment
from serve_app.config.model_files import check_model_folder
from serve_app.config.models import ModelConfig
from serve_app.config.needed_packages import check_model_packages
from serve_app.doctor import driver, gpus, weights
from serve_app.doctor.disk import check_disk, check_temporary_disk
from serve_app.doctor.gpus import Gpu, Place
from serve_app.doctor.memory import check_memory, check_shared_memory, read_memory
from serve_app.doctor.report import Finding, failed, ok, warning
from serve_app.doctor.software import check_packages, check_probes, check_ray_cluster
from serve_app.errors import ModelLoadError


@dataclass(frozen=True)
class Wanted:
    """The model and the deployment that are to run on this machine."""

    model: ModelConfig
    num_gpus: float
    """GPUs that a replica requests from Ray."""
    cpu: bool
    """True where no GPU is expected: a laptop, the head, the gateway."""
    deployment: str = GENERATOR
    """Name of the deployment."""
    replicas: int = 1
    """Replicas that Serve keeps even without requests; 0 if a request starts the first one."""


def this_place() -> Place:
    """Describe the machine or container that this process runs in."""
    return Place(
        environment=machine_environment(),
        device_files=any(Path("/dev").glob("nvidia[0-9]*")),
        container=Path("/.dockerenv").exists()
        or Path("/run/.containerenv").exists()
        or "KUBERNETES_SERVICE_HOST" in machine_environment(),
    )


def look(wanted: Sequence[Wanted], place: Place, nvml: Any = pynvml) -> Iterator[Finding]:
    """Run every check, the cheap ones first. Of several models, their own findings name them.

    The memory of a CPU is compared with each model alone.

    Args:
        wanted: the models that are to run here, at least one.
        place: the machine or container.
        nvml: NVIDIA's library, or a stand-in.
    """
    cpu = all(one.cpu for one in wanted)
    if cpu:
        yield ok("gpu", "no GPU is expected (--cpu)")
    else:
        yield from _check_gpus(wanted, place, nvml)
    here = [one for one in wanted if not (one.cpu and one.num_gpus)]
    for one in wanted:
        if one not in here:
            found = f"{one.model.id} runs on GPUs, which are elsewhere"
            yield _named(ok("memory", found), one, wanted)
        elif cpu:
            for finding in _check_model(one, "memory", read_memory()):
                yield _named(finding, one, wanted)
    if here:
        yield check_disk(*(one.model for one in here))
    yield check_temporary_disk(Path(tempfile.gettempdir()))
    yield check_shared_memory(read_memory()[0], place)
    yield check_packages()
    yield check_ray_cluster(place)
    if place.container:
        yield check_probes(place)


def _named(finding: Finding, one: Wanted, wanted: Sequence[Wanted]) -> Finding:
    """Name the model in its finding, unless there is no other one."""
    if len(wanted) == 1:
        return finding
    return replace(finding, check=f"{one.model.id}: {finding.check}")


def _check_gpus(wanted: Sequence[Wanted], place: Place, nvml: Any) -> Iterator[Finding]:
    try:
        installed, found = gpus.read(nvml)
    except pynvml.NVMLError as error:
        yield gpus.explain(error, place)
        return
    if (hidden := gpus.check_visible(found, place)) is not None:
        yield hidden
        return
    yield from (finding for gpu in found for finding in gpus.check_gpu(gpu))
    devices = sum(len(gpu.instances) if gpu.mig else 1 for gpu in found)
    for one in wanted:
        yield _named(_check_replica(one, devices), one, wanted)
    if len(wanted) > 1 or any(one.replicas > 1 for one in wanted):
        yield _check_replicas_together(wanted, devices, place)
    torch = driver.installed_torch()
    yield driver.check_torch(torch)
    if torch is not None and torch.cuda is not None:
        yield driver.check_driver(installed, torch.cuda)
        yield driver.try_kernel()
    for one in wanted:
        for finding in _check_gpu_memory(one, found):
            yield _named(finding, one, wanted)


def _check_gpu_memory(wanted: Wanted, found: list[Gpu]) -> Iterator[Finding]:
    # Ray may give a replica any GPU: the smallest must suffice.
    usable = [gpu.usable_bytes for gpu in found]
    known = [sizes for sizes in usable if sizes is not None]
    if wanted.num_gpus:
        yield from _check_model(wanted, "gpu memory", min(known, default=None))


def _check_replica(wanted: Wanted, devices: int) -> Finding:
    request = f"a replica requests {wanted.num_gpus:g} GPUs, this machine has {devices}"
    setting = f"ray_actor_options.num_gpus of the deployment {wanted.deployment}"
    if wanted.num_gpus == 0:
        return warning(
            "replica",
            f"{request}: it runs on the CPU",
            f"Set {setting} to 1 to use the GPU, or add --cpu.",
        )
    if wanted.num_gpus > devices:
        return failed(
            "replica",
            request,
            f"Set {setting} to 1, because an engine uses one. Ray can place no replica on "
            "this machine.",
        )
    if wanted.num_gpus < 1:
        return warning(
            "replica",
            f"{request}: several share one GPU, and each loads the whole model",
            f"Set {setting} to 1: Ray counts shares of a GPU, and enforces none.",
        )
    return ok("replica", request)


def _check_replicas_together(wanted: Sequence[Wanted], devices: int, place: Place) -> Finding:
    """Compare the GPUs of this machine with those of all replicas that Serve keeps."""
    kept = sum(one.num_gpus * one.replicas for one in wanted)
    at_once = sum(one.num_gpus * max(1, one.replicas) for one in wanted)
    here = f"this machine has {devices}"
    if kept > devices:
        found = f"the replicas request {kept:g} GPUs together, {here}"
        advice = (
            "Serve fewer models or replicas (min_replicas of their autoscaling_config, or 0 for "
            "models that start with a request), or add GPUs. Replicas without a GPU never start."
        )
        if place.environment.get("RAY_ADDRESS"):  # the others may be on its other machines
            return warning("replicas", found, advice)
        return failed("replicas", found, advice)
    if at_once > devices:
        return warning(
            "replicas",
            f"one replica of each model requests {at_once:g} GPUs together, {here}",
            "Add GPUs if all models must run at once. Otherwise a request waits until another "
            "model has ended for want of requests, and it may time out before.",
        )
    return ok("replicas", f"one replica of each model, or the least number, fits: {here}")


def _check_model(wanted: Wanted, check: str, memory: tuple[int, int] | None) -> Iterator[Finding]:
    """Check that the weights fit into ``memory``: (total, free) bytes, or None if unknown."""
    model = wanted.model
    try:
        check_model_folder(model)
        check_model_packages(model)
        parts = weights.read_components(model)
    except ModelLoadError as error:
        yield failed(
            "model", str(error), "Correct the model or the configuration as the message says."
        )
        return
    if parts is None:
        yield warning(
            check,
            f"the memory that {model.source} needs is unknown: its weights are not here",
            f"Fetch them (`hf download {model.source}`) and run the doctor again. Or read their "
            "size on the model's page: in bfloat16 they take 2 bytes a parameter. They must "
            "leave room for images.",
        )
        return
    yield check_memory(check, model, parts, memory, on_gpu=not wanted.cpu)
