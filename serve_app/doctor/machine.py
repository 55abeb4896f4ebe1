"""The checks of the machine, or the container, that this runs in."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml
from packaging.requirements import Requirement

from serve_app.config.environment import machine_environment
from serve_app.config.model_files import check_model_folder
from serve_app.config.models import ModelConfig
from serve_app.doctor import driver, gpus, weights
from serve_app.doctor.gpus import Gpu, Place
from serve_app.doctor.report import Finding, failed, gib, ok, warning
from serve_app.errors import ModelLoadError


@dataclass(frozen=True)
class Wanted:
    """What is to run here."""

    model: ModelConfig
    num_gpus: float
    """That a replica asks Ray for."""
    cpu: bool
    """No GPU is expected: a laptop, the head, the gateway."""


def this_place() -> Place:
    return Place(
        environment=machine_environment(),
        device_files=any(Path("/dev").glob("nvidia[0-9]*")),
        container=Path("/.dockerenv").exists()
        or Path("/run/.containerenv").exists()
        or "KUBERNETES_SERVICE_HOST" in machine_environment(),
    )


def look(wanted: Wanted, place: Place, nvml: Any = pynvml) -> Iterator[Finding]:
    """Every check, the cheap ones first; ``nvml`` stands for NVIDIA's library."""
    if wanted.cpu:
        yield ok("gpu", "none is expected (--cpu)")
    else:
        yield from _check_gpus(wanted, place, nvml)
    if wanted.cpu and wanted.num_gpus:
        yield ok("memory", f"{wanted.model.id} is for GPUs, which are elsewhere")
    else:
        if wanted.cpu:
            yield from _check_model(wanted, "memory", read_memory())
        yield check_disk(wanted.model)
    yield check_temporary_disk(Path(tempfile.gettempdir()))
    yield check_shared_memory(read_memory()[0], place)
    yield check_packages()
    yield check_ray_cluster(place)
    if place.container:
        yield check_probes(place)


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
    # Ray gives a replica any of them: the smallest must do.
    usable = [gpu.usable_bytes for gpu in found]
    known = [sizes for sizes in usable if sizes is not None]
    if wanted.num_gpus:
        yield from _check_model(wanted, "gpu memory", min(known, default=None))


def _check_replica(wanted: Wanted, found: list[Gpu]) -> Finding:
    devices = sum(len(gpu.instances) if gpu.mig else 1 for gpu in found)
    asks = f"a replica asks for {wanted.num_gpus:g} GPUs, here are {devices}"
    setting = "ray_actor_options.num_gpus of the deployment Generator"
    if wanted.num_gpus == 0:
        return warning(
            "replica",
            f"{asks}: it runs on the CPU",
            f"Set {setting} to 1 to use the GPU, or say --cpu.",
        )
    if wanted.num_gpus > devices:
        return failed(
            "replica",
            asks,
            f"Set {setting} to 1, which is all that an engine uses: on this machine Ray can place "
            "no replica.",
        )
    if wanted.num_gpus < 1:
        return warning(
            "replica",
            f"{asks}: several share one, and each holds the whole model",
            f"Set {setting} to 1: Ray counts shares of a GPU, and keeps nobody to them.",
        )
    return ok("replica", asks)


def _check_model(wanted: Wanted, check: str, memory: tuple[int, int] | None) -> Iterator[Finding]:
    """Whether the weights fit into ``memory``, (total, free) bytes; None if that is not known."""
    model = wanted.model
    try:
        check_model_folder(model)
        folder = weights.find_folder(model)
        parts = None if folder is None else weights.read_components(folder, model)
    except ModelLoadError as error:
        yield failed("model", str(error), "Mend the model or the configuration as it says.")
        return
    if parts is None:
        yield warning(
            check,
            f"what {model.source} needs is not known: its weights are not here",
            f"Fetch them (`hf download {model.source}`) and look again, or see how long they are "
            "on its page: in bfloat16 they take 2 bytes a parameter, and must leave room for "
            "pictures.",
        )
        return
    yield check_memory(check, model, parts, memory, on_gpu=not wanted.cpu)


_ROOM = 0.8
"""Of the free memory for weights; the rest is for pictures on their way and their decoding."""


def check_memory(
    check: str,
    model: ModelConfig,
    parts: list[weights.Component],
    memory: tuple[int, int] | None,
    on_gpu: bool,
) -> Finding:
    """Weights against memory. That they fit says that the model starts, not how large a batch."""
    needed = weights.needed_bytes(parts, model, on_gpu)
    found = f"{model.id}'s weights take {gib(needed)}"
    if memory is None:
        return warning(check, f"{found}; how much there is, is not told", "Compare them yourself.")
    total, free = memory
    found += f", {gib(free)} of {gib(total)} are free"
    if needed > total:
        return failed(check, found, f"They cannot fit. {_smaller(model, parts, total, on_gpu)}")
    if needed > free:
        return failed(
            check,
            found,
            "Others hold what is missing: end them. "
            + ("`nvidia-smi` lists them." if on_gpu else "`top -o %MEM` lists them."),
        )
    if needed > _ROOM * free:
        return warning(
            check,
            found,
            f"Little is left for pictures: keep engine.max_batch_size and limits.max_pixels low. "
            f"{_smaller(model, parts, int(_ROOM * free), on_gpu)}",
        )
    return ok(check, found)


def _smaller(
    model: ModelConfig, parts: list[weights.Component], limit_bytes: int, on_gpu: bool
) -> str:
    """What of the configuration would make the weights fit."""
    if not on_gpu:
        return "Take a machine with more memory, raise the container's limit, or a smaller model."
    options = []
    changes: tuple[dict[str, str], ...] = (
        {},  # but for the dtype
        {"offload": "model"},
        {"quantize": "int8"},
        {"offload": "model", "quantize": "int8"},
    )
    for speed in changes:
        other = model.model_copy(
            update={
                "dtype": "bfloat16" if model.dtype == "float32" else model.dtype,
                "speed": model.speed.model_copy(update=speed),
            }
        )
        if other == model:
            continue
        needed = weights.needed_bytes(parts, other, on_gpu)
        if needed <= limit_bytes:
            names = [f"model.speed.{name}: {value}" for name, value in speed.items()]
            if other.dtype != model.dtype:
                names.insert(0, f"model.dtype: {other.dtype}")
            options.append(f"{' and '.join(names)} ({gib(needed)})")
    larger = "a GPU with more memory"
    return f"Take {larger}, or set " + ", or ".join(options) + "." if options else f"Take {larger}."


_NEEDED_DISK_BYTES = 10 * 2**30
"""For a model whose size is not known: about the smallest full-size one, SDXL in fp16, with room
for its download."""


def check_disk(model: ModelConfig) -> Finding:
    """Room for the weights where they are going to be downloaded."""
    if model.is_folder:
        return ok("disk", f"the weights are in {model.source}, nothing is downloaded")
    folder = weights.cache_folder()
    try:
        there = weights.find_folder(model)
    except ModelLoadError:  # the row `model` says why
        there = None
    if there is not None:
        return ok("disk", f"the weights are in the cache, {folder}")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder} has {gib(free)} free, for {model.source}"
    if not os.access(existing, os.W_OK):
        return failed(
            "disk",
            f"{existing} may not be written, and {model.source} is to be downloaded there",
            f"Point HF_HOME to a folder that user {os.getuid()} may write; on Kubernetes set "
            "securityContext.fsGroup of the pod, with Docker chown the volume.",
        )
    if free < _NEEDED_DISK_BYTES:
        return failed(
            "disk",
            f"{found}; even a small model needs {gib(_NEEDED_DISK_BYTES)}",
            "Free space there (`hf cache ls` lists what is cached), or point HF_HOME to a larger "
            "disk; on Kubernetes mount a volume there, as the component `model-cache` does.",
        )
    return ok("disk", f"{found}, whose size is not known before it is here")


_RAY_FULL = 0.95
"""Ray's local_fs_capacity_threshold: fuller than that, it spills no objects."""


def check_temporary_disk(folder: Path) -> Finding:
    """Room for Ray's session and logs."""
    usage = shutil.disk_usage(folder)
    # As `df` has it: what is reserved for root is not there.
    used = 1 - usage.free / max(usage.used + usage.free, 1)
    found = f"{folder} is {used:.0%} full, {gib(usage.free)} free"
    if used > _RAY_FULL:
        return failed(
            "disk for Ray",
            found,
            f"Free space there, or start Ray with --temp-dir on another disk: over {_RAY_FULL:.0%} "
            "it warns each minute and cannot put objects aside; logs and sockets are there, too.",
        )
    return ok("disk for Ray", found)


def check_shared_memory(
    memory_bytes: int, place: Place, folder: Path = Path("/dev/shm")
) -> Finding:
    """Room for Ray's object store, as `resolve_object_store_memory` in Ray 2.60 sizes it."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    store = int(min(0.3 * memory_bytes, 200e9, max(10e9, 0.95 * free)))
    found = f"{folder} has {gib(free)}, Ray's object store wants {gib(store)}"
    if free >= store:
        return ok("shared memory", found)
    if place.kubernetes:
        advice = (
            "KubeRay mounts it in Ray's pods. In other pods mount a volume there:\n"
            "  volumes: [{name: shm, emptyDir: {medium: Memory}}]\n"
            "  volumeMounts: [{name: shm, mountPath: /dev/shm}]"
        )
    elif place.container:
        advice = (
            f"Start the container with `docker run --shm-size={-(-store * 11 // 10 // 2**30)}g`."
        )
    else:
        advice = "`sudo mount -o remount,size=50% /dev/shm`, or delete files there."
    return warning("shared memory", f"{found}: it will use the disk instead", advice)


def check_packages(name: str = "diffusion-serve") -> Finding:
    """Whether what is installed is what this project asks for."""
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
    """Versions here against those of the cluster that RAY_ADDRESS names."""
    address = place.environment.get("RAY_ADDRESS")
    if address in (None, "", "local", "auto"):
        return ok("ray cluster", "none is named by RAY_ADDRESS")
    if "://" in address:
        return warning(
            "ray cluster",
            f"RAY_ADDRESS is {address}, where versions cannot be compared",
            "Name the head's global control store, as HOST:6379.",
        )
    try:
        theirs = _versions_of(address, timeout_s)
    except OSError as error:
        return failed(
            "ray cluster",
            f"{address} (RAY_ADDRESS) does not answer: {error}",
            "Look whether the head runs and lets this machine in (`ray status --address "
            f"{address}`), and whether both use the same token; or unset RAY_ADDRESS.",
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
            "Use the same image on all nodes: Ray lets nobody join with another version of Ray or "
            "of Python, down to the last number.",
        )
    return ok("ray cluster", f"{found}, as here")


def _versions_of(address: str, timeout_s: float) -> dict[str, str]:
    """What `head` says of the cluster at ``address``; `OSError` if it does not answer."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise OSError("it is no HOST:PORT")
    # Ray would try for half a minute.
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
        raise OSError((done.stderr.strip().splitlines() or ["it is not said why"])[-1])
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def check_probes(place: Place) -> Finding:
    """What KubeRay's probes run inside a container."""
    missing = [name for name in ("bash", "wget") if shutil.which(name) is None]
    if not missing:
        return ok("probes", "bash and wget are here, for KubeRay's probes")
    found = f"{' and '.join(missing)} missing: KubeRay's probes need them"
    advice = f"Install {' and '.join(missing)} in the image, or no pod of it becomes ready."
    return (failed if place.kubernetes else warning)("probes", found, advice)


_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Of both versions: limit, use, and in what the use consists of, cached files that make way."""


def read_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, free) bytes of the machine, or of what the container may use of it."""
    memory = psutil.virtual_memory()
    for limit_file, use_file, stat_file, cached in _CGROUP_FILES:
        limit_path = cgroup / limit_file
        if limit_path.is_file() and (text := limit_path.read_text().strip()).isdecimal():
            limit = int(text)
            lines = (cgroup / stat_file).read_text().splitlines()
            stat = dict(line.split() for line in lines)
            used = int((cgroup / use_file).read_text()) - int(stat.get(cached, 0))
            return min(memory.total, limit), min(memory.available, max(limit - used, 0))
    return memory.total, memory.available
