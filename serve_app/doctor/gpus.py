"""The GPUs of this machine, as NVIDIA's management library (NVML) reports them.

NVML needs the driver and no CUDA, and answers at once; torch takes seconds and reports less.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pynvml

from serve_app.doctor.report import Finding, failed, gib, ok, warning


@dataclass(frozen=True)
class Place:
    """The environment of this process, which decides the advice."""

    environment: Mapping[str, str]
    device_files: bool
    """True if /dev/nvidia0 or another exists."""
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
    """One GPU. None stands for a value that it or its driver does not report."""

    index: int
    name: str
    total_bytes: int | None
    free_bytes: int | None
    mig: bool
    mig_pending: bool
    """MIG mode after the next reset of the GPU."""
    instances: tuple[MigInstance, ...]
    processes: int | None
    """Count of processes with work on it; those of other containers are often invisible."""
    mps: bool
    """True if some of them share it through CUDA's Multi-Process Service."""

    @property
    def usable_bytes(self) -> tuple[int, int] | None:
        """(total, free) bytes of the largest part that one process can use."""
        if self.mig:
            parts = [(part.total_bytes, part.free_bytes) for part in self.instances]
            return max(parts, default=None)
        if self.total_bytes is None or self.free_bytes is None:
            return None
        return self.total_bytes, self.free_bytes


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver."""

    version: str
    """Version such as 580.95.05."""
    cuda: tuple[int, int] | None
    """CUDA version that its library offers; newer than the driver's own with cuda-compat."""


_NOT_REPORTED = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_DATA,
)


def _query(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call NVML; return None for a value that it does not report for this GPU."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _NOT_REPORTED:
            return None
        raise


def read(nvml: Any) -> tuple[Driver, list[Gpu]]:
    """Read the driver and all GPUs that are visible to this process.

    ``nvml`` is `pynvml`, or a stand-in. Raises `pynvml.NVMLError` where NVML does not
    work at all or a GPU does not answer.
    """
    nvml.nvmlInit()
    try:
        cuda = _query(nvml.nvmlSystemGetCudaDriverVersion_v2)
        driver = Driver(
            nvml.nvmlSystemGetDriverVersion(),
            None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
        )
        return driver, [_read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _query(nvml.nvmlDeviceGetMemoryInfo, handle)
    mig, mig_pending = _query(nvml.nvmlDeviceGetMigMode, handle) or (0, 0)
    processes = _query(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    return Gpu(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=None if memory is None else memory.total,
        free_bytes=None if memory is None else memory.free,
        mig=bool(mig),
        mig_pending=bool(mig_pending),
        instances=tuple(_read_instances(nvml, handle)) if mig else (),
        processes=None if processes is None else len(processes),
        mps=bool(_query(nvml.nvmlDeviceGetMPSComputeRunningProcesses, handle)),
    )


def _read_instances(nvml: Any, handle: Any) -> Iterator[MigInstance]:
    for index in range(_query(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError as error:
            # Gaps between instances, and other users' instances.
            if error.value in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NO_PERMISSION):
                continue
            raise
        memory = nvml.nvmlDeviceGetMemoryInfo(instance)
        yield MigInstance(nvml.nvmlDeviceGetName(instance), memory.total, memory.free)


_CPU_ONLY = "If this machine needs no GPU, add --cpu."


_RUNTIME = (
    "NVIDIA's runtime is not the default of this node's containerd. The pod must name it by a "
    "RuntimeClass, which the component `runtime-class` does for workers:\n"
    "  kubectl apply -f cluster/platform/runtimeclass.yaml\n"
    "  spec: {runtimeClassName: nvidia}"
)


def _advice_on_missing(place: Place) -> str:
    if place.kubernetes and place.allotted is not None and not place.device_files:
        return (
            f"The device plugin assigned {place.allotted} to the container "
            f"(NVIDIA_VISIBLE_DEVICES), and its runtime has not added it. {_RUNTIME}"
        )
    if place.kubernetes:
        advice = (
            "Give the container a GPU, and check the nodes with `diffusion-serve doctor "
            f"--cluster`. {_CPU_ONLY}\n"
            "  resources: {limits: {nvidia.com/gpu: 1}}"
        )
        return advice if place.device_files else f"{advice}\nIf it requests one: {_RUNTIME}"
    if place.container:
        return (
            "Start the container with `docker run --gpus all`. The host needs the NVIDIA driver "
            f"and the NVIDIA Container Toolkit (`nvidia-smi` and `nvidia-ctk` there). {_CPU_ONLY}"
        )
    return (
        "Install the NVIDIA driver, reboot, and check that `nvidia-smi` lists the GPU; `lspci` "
        f"shows whether the machine has one. {_CPU_ONLY}"
    )


def explain(error: pynvml.NVMLError, place: Place) -> Finding:
    """Explain why NVML does not work, from its error and the device files."""
    devices = "/dev/nvidia* is there" if place.device_files else "there is no /dev/nvidia*"
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND and not place.device_files:
        return failed(
            "gpu", f"no NVIDIA driver: no libnvidia-ml.so.1, {devices}", _advice_on_missing(place)
        )
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return failed(
            "gpu",
            f"the driver's library is missing: no libnvidia-ml.so.1, though {devices}",
            "The container has the GPU's device and not the driver's libraries. Start it through "
            "the NVIDIA Container Toolkit, not with a bare --device. Set "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility (it is "
            f"{place.environment.get('NVIDIA_DRIVER_CAPABILITIES')!r})."
            if place.container
            else "Install the driver's libraries of the same version (the package with "
            "libnvidia-ml.so.1), and run ldconfig.",
        )
    if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return failed(
            "gpu",
            f"the NVIDIA kernel module is not loaded or cannot be reached: {devices}",
            _advice_on_missing(place)
            if place.container or place.kubernetes
            else "Load it with `sudo modprobe nvidia`. If that fails, `dmesg` gives the reason: a "
            "module that was not built for this kernel, or not signed for Secure Boot. "
            + _CPU_ONLY,
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
            "Check `ls -l /dev/nvidia*` and `id`: the user, or one of its groups, must be able "
            "to read and write them.",
        )
    if error.value == pynvml.NVML_ERROR_UNKNOWN and place.container:
        return failed(
            "gpu",
            "NVML: Unknown Error; the container has lost its GPU",
            "Delete the container or pod and start it again. The cause is `systemctl "
            "daemon-reload` on the host. It removes devices that Docker did not add itself from "
            "running containers. CDI avoids it, the GPU Operator's default from 25.10 on.",
        )
    if error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED):
        return failed(
            "gpu",
            f"a GPU does not answer: {error}",
            "Look for Xid errors in the host's `dmesg`. Take the machine out of service (`kubectl "
            "drain`), and reboot it. If it happens again, the GPU is broken.",
        )
    return failed(
        "gpu",
        f"NVML does not work: {error} ({devices})",
        "Run `nvidia-smi` here and on the host, and look for NVRM in the host's `dmesg`. "
        + _CPU_ONLY,
    )


def check_visible(gpus: list[Gpu], place: Place) -> Finding | None:
    """Return a finding if no GPU is visible, or all are hidden from torch."""
    if not gpus:
        wanted = place.environment.get("NVIDIA_VISIBLE_DEVICES")
        return failed(
            "gpu",
            "the driver works and shows no GPU"
            + ("" if wanted is None else f"; NVIDIA_VISIBLE_DEVICES is {wanted!r}"),
            _advice_on_missing(place),
        )
    visible = place.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return failed(
            "gpu",
            f"{len(gpus)} here, and CUDA_VISIBLE_DEVICES={visible!r} hides them from torch",
            f"Unset CUDA_VISIBLE_DEVICES, or name GPUs in it, as CUDA_VISIBLE_DEVICES=0. "
            f"{_CPU_ONLY}",
        )
    return None


def check_gpu(gpu: Gpu) -> Iterator[Finding]:
    """Check a GPU's memory, its MIG mode and other processes on it."""
    check = f"gpu {gpu.index}"
    if gpu.total_bytes is None or gpu.free_bytes is None:
        yield ok(check, f"{gpu.name}, memory unknown")
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
            "Take it out of service and reset it (`nvidia-smi --gpu-reset`), or undo the change: "
            f"`sudo nvidia-smi -i {gpu.index} -mig {int(gpu.mig)}`.",
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
        f"on, {len(gpu.instances)} visible: {sizes}",
        "A replica gets one instance, with that much memory and compute, and never two: CUDA uses "
        "the first, or the one that CUDA_VISIBLE_DEVICES=MIG-UUID names. On Kubernetes request it "
        "as the component `mig` does.",
    )


_IN_USE_BYTES = 2**30
"""Memory above that of a driver with an idle context."""


def _check_sharing(gpu: Gpu) -> Finding:
    check = f"gpu {gpu.index} sharing"
    used = 0
    if gpu.total_bytes is not None and gpu.free_bytes is not None and not gpu.mig:
        used = gpu.total_bytes - gpu.free_bytes
    advice = (
        "Give each replica a GPU of its own. Time-slicing and MPS do not reserve memory for a "
        "process, so the last one runs out of it. `nvidia-smi` on the host lists all processes. "
        "On Kubernetes check the node's label nvidia.com/gpu.sharing-strategy."
    )
    if gpu.mps:
        return warning(check, "processes share it through CUDA's Multi-Process Service", advice)
    if gpu.processes:
        return warning(
            check, f"{gpu.processes} other processes compute on it, {gib(used)} in use", advice
        )
    if used > _IN_USE_BYTES:
        return warning(check, f"{gib(used)} in use by processes that are not visible here", advice)
    return ok(check, "no other process uses it")
