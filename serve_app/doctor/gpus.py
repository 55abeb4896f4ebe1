"""The GPUs of this machine, as NVIDIA's management library (NVML) tells of them.

NVML needs the driver and no CUDA, and answers at once where torch would take seconds to say less.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pynvml

from serve_app.doctor.report import Finding, failed, gib, ok, warning


@dataclass(frozen=True)
class Place:
    """Where this runs, which decides what is to be done."""

    environment: Mapping[str, str]
    device_files: bool
    """Whether there is a /dev/nvidia0 or another."""
    container: bool

    @property
    def kubernetes(self) -> bool:
        return "KUBERNETES_SERVICE_HOST" in self.environment

    @property
    def allotted(self) -> str | None:
        """The GPUs that the device plugin named to the container's runtime; None if it did not.

        The images' own value is ``all``, and the plugin puts UUIDs or indices in its place.
        """
        named = self.environment.get("NVIDIA_VISIBLE_DEVICES", "")
        return named if re.match(r"GPU-|MIG-|\d", named) else None


@dataclass(frozen=True)
class MigInstance:
    """A part of a GPU that is a device of its own."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Gpu:
    """None stands for what this GPU or its driver does not tell."""

    index: int
    name: str
    total_bytes: int | None
    free_bytes: int | None
    mig: bool
    mig_pending: bool
    """What the mode becomes when the GPU is reset."""
    instances: tuple[MigInstance, ...]
    processes: int | None
    """With work on it; those of other containers are often not to be seen."""
    mps: bool
    """Whether some of them share it through CUDA's Multi-Process Service."""

    @property
    def usable_bytes(self) -> tuple[int, int] | None:
        """(total, free) of the largest part that one process can have."""
        if self.mig:
            parts = [(part.total_bytes, part.free_bytes) for part in self.instances]
            return max(parts, default=None)
        if self.total_bytes is None or self.free_bytes is None:
            return None
        return self.total_bytes, self.free_bytes


@dataclass(frozen=True)
class Driver:
    version: str
    """As 580.95.05."""
    cuda: tuple[int, int] | None
    """The CUDA that its library offers; more than the driver's own with the package cuda-compat."""


_UNTOLD = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_DATA,
)


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML says; None where it does not say that of this GPU."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _UNTOLD:
            return None
        raise


def read(nvml: Any) -> tuple[Driver, list[Gpu]]:
    """The driver, and all GPUs that this process may see.

    ``nvml`` is `pynvml`, or what stands in for it. Raises `pynvml.NVMLError` where NVML does not
    work at all or a GPU does not answer.
    """
    nvml.nvmlInit()
    try:
        cuda = _ask(nvml.nvmlSystemGetCudaDriverVersion_v2)
        driver = Driver(
            nvml.nvmlSystemGetDriverVersion(),
            None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
        )
        return driver, [_read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    mig, mig_pending = _ask(nvml.nvmlDeviceGetMigMode, handle) or (0, 0)
    processes = _ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    return Gpu(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=None if memory is None else memory.total,
        free_bytes=None if memory is None else memory.free,
        mig=bool(mig),
        mig_pending=bool(mig_pending),
        instances=tuple(_read_instances(nvml, handle)) if mig else (),
        processes=None if processes is None else len(processes),
        mps=bool(_ask(nvml.nvmlDeviceGetMPSComputeRunningProcesses, handle)),
    )


def _read_instances(nvml: Any, handle: Any) -> Iterator[MigInstance]:
    for index in range(_ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError as error:
            # Gaps between instances, and those of others.
            if error.value in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NO_PERMISSION):
                continue
            raise
        memory = nvml.nvmlDeviceGetMemoryInfo(instance)
        yield MigInstance(nvml.nvmlDeviceGetName(instance), memory.total, memory.free)


_ON_PURPOSE = "If no GPU is wanted here, say so with --cpu."


_RUNTIME = (
    "NVIDIA's runtime is not the default of this node's containerd, so that the pod must name it "
    "(for the workers: the component `runtime-class`), with its RuntimeClass:\n"
    "  kubectl apply -f cluster/platform/runtimeclass.yaml\n"
    "  spec: {runtimeClassName: nvidia}"
)


def _give_it_one(place: Place) -> str:
    if place.kubernetes and place.allotted is not None and not place.device_files:
        return (
            f"The container is to have {place.allotted} (NVIDIA_VISIBLE_DEVICES, which the device "
            f"plugin sets), and its runtime has not brought it in. {_RUNTIME}"
        )
    if place.kubernetes:
        advice = (
            "Give the container a GPU, and look at the nodes with `diffusion-serve doctor "
            f"--cluster`. {_ON_PURPOSE}\n"
            "  resources: {limits: {nvidia.com/gpu: 1}}"
        )
        return advice if place.device_files else f"{advice}\nIf it asks for one: {_RUNTIME}"
    if place.container:
        return (
            "Start the container with `docker run --gpus all`. The host needs the NVIDIA driver "
            f"and the NVIDIA Container Toolkit (`nvidia-smi` and `nvidia-ctk` there). {_ON_PURPOSE}"
        )
    return (
        "Install the NVIDIA driver, reboot, and look whether `nvidia-smi` lists the GPU; `lspci` "
        f"shows whether the machine has one. {_ON_PURPOSE}"
    )


def explain(error: pynvml.NVMLError, place: Place) -> Finding:
    """Why NVML does not work, as far as its error and the device files tell."""
    devices = "/dev/nvidia* is there" if place.device_files else "there is no /dev/nvidia*"
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND and not place.device_files:
        return failed(
            "gpu", f"no NVIDIA driver: no libnvidia-ml.so.1, {devices}", _give_it_one(place)
        )
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return failed(
            "gpu",
            f"the driver's library is missing: no libnvidia-ml.so.1, though {devices}",
            "The container has the GPU's device and not the driver's libraries: start it with "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility (it is "
            f"{place.environment.get('NVIDIA_DRIVER_CAPABILITIES')!r}) through the NVIDIA "
            "Container Toolkit, not with a bare --device."
            if place.container
            else "Install the driver's libraries of the same version (the package with "
            "libnvidia-ml.so.1), and run ldconfig.",
        )
    if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return failed(
            "gpu",
            f"the NVIDIA kernel module is not loaded or not to be reached: {devices}",
            _give_it_one(place)
            if place.container or place.kubernetes
            else "Load it with `sudo modprobe nvidia`. If that fails, `dmesg` says why: a module "
            "that was not built for this kernel, or not signed for Secure Boot. " + _ON_PURPOSE,
        )
    if error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return failed(
            "gpu",
            "the driver's library and its kernel module are of different versions",
            "The driver was updated while the old module was loaded: "
            + (
                "drain the node and reboot it, then start the container anew."
                if place.container
                else "reboot, or unload all nvidia modules and load them again."
            ),
        )
    if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
        return failed(
            "gpu",
            "this user may not open /dev/nvidia*",
            "Look at `ls -l /dev/nvidia*` and `id`: the user, or one of its groups, must be able "
            "to read and write them.",
        )
    if error.value == pynvml.NVML_ERROR_UNKNOWN and place.container:
        return failed(
            "gpu",
            "NVML: Unknown Error; the container has lost its GPU",
            "Delete the container or pod and start it anew. It comes from `systemctl "
            "daemon-reload` on the host, which takes from running containers what Docker did not "
            "give them itself; with CDI, as the GPU Operator has it from 25.10 on, it does not.",
        )
    if error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED):
        return failed(
            "gpu",
            f"a GPU does not answer: {error}",
            "Look for Xid errors in the host's `dmesg`, take the machine out of service (`kubectl "
            "drain`), and reboot it; if that comes again, the card is broken.",
        )
    return failed(
        "gpu",
        f"NVML does not work: {error} ({devices})",
        "Run `nvidia-smi` here and on the host, and look for NVRM in the host's `dmesg`. "
        + _ON_PURPOSE,
    )


def check_visible(gpus: list[Gpu], place: Place) -> Finding | None:
    """What hides all GPUs, if something does."""
    if not gpus:
        wanted = place.environment.get("NVIDIA_VISIBLE_DEVICES")
        return failed(
            "gpu",
            "the driver works and shows no GPU"
            + ("" if wanted is None else f"; NVIDIA_VISIBLE_DEVICES is {wanted!r}"),
            _give_it_one(place),
        )
    visible = place.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return failed(
            "gpu",
            f"{len(gpus)} here, and CUDA_VISIBLE_DEVICES={visible!r} hides them from torch",
            f"Unset CUDA_VISIBLE_DEVICES, or name GPUs in it, as CUDA_VISIBLE_DEVICES=0. "
            f"{_ON_PURPOSE}",
        )
    return None


def check_gpu(gpu: Gpu) -> Iterator[Finding]:
    """Its name and memory, MIG, and whether others use it."""
    check = f"gpu {gpu.index}"
    if gpu.total_bytes is None or gpu.free_bytes is None:
        yield ok(check, f"{gpu.name}, memory not told")
    else:
        yield ok(check, f"{gpu.name}, {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free")
    yield _check_mig(gpu)
    yield _check_sharing(gpu)


def _check_mig(gpu: Gpu) -> Finding:
    check = f"gpu {gpu.index} MIG"
    if gpu.mig != gpu.mig_pending:
        return warning(
            check,
            f"{'on' if gpu.mig else 'off'}, and {'on' if gpu.mig_pending else 'off'} after the "
            "next reset of the GPU",
            "Take it out of service and reset it (`nvidia-smi --gpu-reset`), or take the change "
            f"back: `sudo nvidia-smi -i {gpu.index} -mig {int(gpu.mig)}`.",
        )
    if not gpu.mig:
        return ok(check, "off")
    if not gpu.instances:
        return failed(
            check,
            "on, without an instance: CUDA finds no device",
            f"Make instances (`sudo nvidia-smi mig -i {gpu.index} -lgip` lists the profiles, `-cgi "
            "PROFILE -C` makes one), or switch MIG off: "
            f"`sudo nvidia-smi -i {gpu.index} -mig 0`. A container or pod must be given an "
            "instance; with the device plugin's strategy 'mixed' it is "
            "nvidia.com/mig-PROFILE, not nvidia.com/gpu.",
        )
    sizes = ", ".join(f"{part.name} ({gib(part.free_bytes)} free)" for part in gpu.instances)
    return warning(
        check,
        f"on, {len(gpu.instances)} to be seen: {sizes}",
        "A replica gets one instance, with that much memory and compute, and never two: CUDA uses "
        "the first, or the one that CUDA_VISIBLE_DEVICES=MIG-UUID names. On Kubernetes ask for it "
        "as the component `mig` does.",
    )


_IN_USE_BYTES = 2**30
"""More than a driver with an idle context takes for itself."""


def _check_sharing(gpu: Gpu) -> Finding:
    check = f"gpu {gpu.index} sharing"
    used = 0
    if gpu.total_bytes is not None and gpu.free_bytes is not None and not gpu.mig:
        used = gpu.total_bytes - gpu.free_bytes
    advice = (
        "Give each replica a GPU of its own: time-slicing and MPS do not keep one process's "
        "memory from another, and who comes last runs out of it. `nvidia-smi` on the host lists "
        "all processes; on Kubernetes look at the node's label nvidia.com/gpu.sharing-strategy."
    )
    if gpu.mps:
        return warning(check, "processes share it through CUDA's Multi-Process Service", advice)
    if gpu.processes:
        return warning(
            check, f"{gpu.processes} other processes compute on it, {gib(used)} in use", advice
        )
    if used > _IN_USE_BYTES:
        return warning(check, f"{gib(used)} in use by nobody who can be seen from here", advice)
    return ok(check, "nobody else uses it")
