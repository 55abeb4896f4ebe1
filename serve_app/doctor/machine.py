"""The checks of the machine, or the container, that this runs in."""

import tempfile
from collections.abc import Iterator
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


def this_place() -> Place:
    """Describe the machine or container that this process runs in."""
    return Place(
        environment=machine_environment(),
        device_files=any(Path("/dev").glob("nvidia[0-9]*")),
        container=Path("/.dockerenv").exists()
        or Path("/run/.containerenv").exists()
        or "KUBERNETES_SERVICE_HOST" in machine_environment(),
    )


def look(wanted: Wanted, place: Place, nvml: Any = pynvml) -> Iterator[Finding]:
    """Run every check, the cheap ones first. ``nvml`` is NVIDIA's library, or a stand-in."""
    if wanted.cpu:
        yield ok("gpu", "no GPU is expected (--cpu)")
    else:
        yield from _check_gpus(wanted, place, nvml)
    yield from _check_memory_and_disk(wanted)
    yield check_temporary_disk(Path(tempfile.gettempdir()))
    yield check_shared_memory(read_memory()[0], place)
    yield check_packages()
    yield check_ray_cluster(place)
    if place.container:
        yield check_probes(place)


def look_at_another(wanted: Wanted, place: Place, nvml: Any = pynvml) -> Iterator[Finding]:
    """Run the checks that depend on the model, after `look` for another one of the same config.

    Each finding names the model. The memory of a CPU is compared with each model alone.
    """
    found: list[Finding] = []
    if not wanted.cpu:
        try:
            _, there = gpus.read(nvml)
        except pynvml.NVMLError:
            return  # `look` explains it
        if gpus.check_visible(there, place) is not None:
            return
        found = [_check_replica(wanted, there), *_check_gpu_memory(wanted, there)]
    for finding in (*found, *_check_memory_and_disk(wanted)):
        yield replace(finding, check=f"{wanted.model.id}: {finding.check}")


def _check_memory_and_disk(wanted: Wanted) -> Iterator[Finding]:
    if wanted.cpu and wanted.num_gpus:
        yield ok("memory", f"{wanted.model.id} runs on GPUs, which are elsewhere")
        return
    if wanted.cpu:
        yield from _check_model(wanted, "memory", read_memory())
    yield check_disk(wanted.model)


def _check_gpus(wanted: Wanted, place: Place, nvml: Any) -> Iterator[Finding]:
    try:
        installed, found = gpus.read(nvml)
    except pynvml.NVMLError as error:
        yield gpus.explain(error, place)
        return
    if (hidden := gpus.check_visible(found, place)) is not None:
        yield hidden
        return
    yield from (finding for gpu in found for finding in gpus.check_gpu(gpu))
    yield _check_replica(wanted, found)
    torch = driver.installed_torch()
    yield driver.check_torch(torch)
    if torch is not None and torch.cuda is not None:
        yield driver.check_driver(installed, torch.cuda)
        yield driver.try_kernel()
    yield from _check_gpu_memory(wanted, found)


def _check_gpu_memory(wanted: Wanted, found: list[Gpu]) -> Iterator[Finding]:
    # Ray may give a replica any GPU: the smallest must suffice.
    usable = [gpu.usable_bytes for gpu in found]
    known = [sizes for sizes in usable if sizes is not None]
    if wanted.num_gpus:
        yield from _check_model(wanted, "gpu memory", min(known, default=None))


def _check_replica(wanted: Wanted, found: list[Gpu]) -> Finding:
    devices = sum(len(gpu.instances) if gpu.mig else 1 for gpu in found)
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
