"""A stand-in for NVIDIA's library, which raises pynvml's own errors."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml

GIB = 2**30


@dataclass
class FakeGpu:
    name: str = "NVIDIA L4"
    total: int = 24 * GIB
    free: int = 24 * GIB
    mig: tuple[int, int] | None = (0, 0)
    """(now, after a reset); None where the GPU has no MIG."""
    instances: dict[int, "FakeGpu"] = field(default_factory=dict)
    """Instances by index; other indices are empty."""
    processes: int = 0
    mps: int = 0
    memory_told: bool = True


@dataclass
class FakeNvml:
    """The functions of pynvml that are called, for these GPUs."""

    gpus: list[FakeGpu] = field(default_factory=lambda: [FakeGpu()])
    driver: str = "580.95.05"
    cuda: int | None = 13000
    init_error: int | None = None
    handle_error: int | None = None
    open: int = 0
    """True between initialization and shutdown."""

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        if self.cuda is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        if self.handle_error is not None:
            raise pynvml.NVMLError(self.handle_error)
        return self.gpus[index]

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str:  # noqa: N802
        return handle.name

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu) -> SimpleNamespace:  # noqa: N802
        if not handle.memory_told:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=handle.total, free=handle.free)

    def nvmlDeviceGetMigMode(self, handle: FakeGpu) -> list[int]:  # noqa: N802
        if handle.mig is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return list(handle.mig)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: FakeGpu) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: FakeGpu, index: int) -> FakeGpu:  # noqa: N802
        if index not in handle.instances:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return handle.instances[index]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> list[object]:  # noqa: N802
        return [object()] * handle.processes

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: FakeGpu) -> list[object]:  # noqa: N802
        return [object()] * handle.mps
