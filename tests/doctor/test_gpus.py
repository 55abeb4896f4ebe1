"""GPUs as NVML reports them: each fault has its own advice."""

import pynvml
import pytest

from serve_app.doctor.gpus import Gpu, Place, check_gpu, check_visible, explain, read
from serve_app.doctor.report import Finding
from tests.doctor.fakes import GIB, FakeGpu, FakeNvml

HOST = Place({}, device_files=True, container=False)
BARE_HOST = Place({}, device_files=False, container=False)
CONTAINER = Place({}, device_files=True, container=True)
BARE_CONTAINER = Place({}, device_files=False, container=True)
IN_KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
POD = Place(IN_KUBERNETES, device_files=False, container=True)


@pytest.mark.parametrize(
    ("error", "place", "found", "advice"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, BARE_HOST, "no NVIDIA driver", "Install the NVIDIA"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, BARE_CONTAINER, "no /dev/nvidia", "--gpus all"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, POD, "no /dev/nvidia", "{nvidia.com/gpu: 1}"),
        (
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            CONTAINER,
            "library is missing",
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        ),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, HOST, "library is missing", "ldconfig"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, BARE_HOST, "not loaded", "modprobe nvidia"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, BARE_CONTAINER, "not loaded", "--gpus all"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, POD, "not loaded", "{nvidia.com/gpu: 1}"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, HOST, "different versions", "reboot, or"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, CONTAINER, "different versions", "drain"),
        (pynvml.NVML_ERROR_NO_PERMISSION, HOST, "may not open", "ls -l /dev/nvidia*"),
        (pynvml.NVML_ERROR_UNKNOWN, CONTAINER, "lost its GPU", "daemon-reload"),
        (pynvml.NVML_ERROR_UNKNOWN, HOST, "Unknown Error", "NVRM"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, HOST, "GPU is lost", "Xid"),
        (pynvml.NVML_ERROR_RESET_REQUIRED, HOST, "requires restart", "Xid"),
        (pynvml.NVML_ERROR_TIMEOUT, BARE_HOST, "Timeout (there is no /dev/nvidia*)", "NVRM"),
    ],
)
def test_errors_of_nvml_are_explained(error: int, place: Place, found: str, advice: str) -> None:
    with pytest.raises(pynvml.NVMLError) as raised:
        read(FakeNvml(init_error=error))
    finding = explain(raised.value, place)
    assert finding.outcome == "failed"
    assert found in finding.found
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (None, False),
        ("all", False),  # the image's own
        ("void", False),
        ("GPU-8f2c1d0e", True),
        ("MIG-8f2c1d0e", True),
        ("0,1", True),
    ],
)
def test_a_pod_that_was_given_a_gpu_needs_the_runtime_and_not_another_limit(
    value: str | None, given: bool
) -> None:
    environment = IN_KUBERNETES | ({} if value is None else {"NVIDIA_VISIBLE_DEVICES": value})
    place = Place(environment, device_files=False, container=True)
    error = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    advice = explain(error, place).advice
    assert "runtimeClassName: nvidia" in advice
    assert "kubectl apply -f cluster/platform/runtimeclass.yaml" in advice
    assert ("nvidia.com/gpu: 1" not in advice) == given
    assert ("NVIDIA_VISIBLE_DEVICES" in advice) == given


def test_a_runtime_that_brought_the_driver_in_is_not_blamed() -> None:
    place = Place(
        IN_KUBERNETES | {"NVIDIA_VISIBLE_DEVICES": "GPU-1"}, device_files=True, container=True
    )
    finding = check_visible([], place)
    assert finding is not None
    assert "runtimeClassName" not in finding.advice


def test_a_gpu_that_does_not_answer_is_an_error_and_nvml_is_closed() -> None:
    nvml = FakeNvml(handle_error=pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        read(nvml)
    assert nvml.open == 0


def test_the_real_library_is_missing_here_or_works() -> None:
    """Whatever this machine has: an answer, or an error that is explained."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(pynvml.NVMLError) as raised:
            read(pynvml)
        assert explain(raised.value, BARE_HOST).outcome == "failed"
    else:
        assert read(pynvml)[0].version


def _only(nvml: FakeNvml) -> Gpu:
    _, [gpu] = read(nvml)
    return gpu


def _findings(gpu: FakeGpu) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_gpu(_only(FakeNvml([gpu])))}


def test_a_free_gpu_is_fine() -> None:
    driver, _ = read(FakeNvml())
    assert (driver.version, driver.cuda) == ("580.95.05", (13, 0))
    findings = _findings(FakeGpu())
    assert {finding.outcome for finding in findings.values()} == {"ok"}
    assert findings["gpu 0"].found == "NVIDIA L4, 24.0 GiB of 24.0 GiB free"


def test_values_that_nvml_does_not_report_are_no_failure() -> None:
    driver, [gpu] = read(FakeNvml([FakeGpu(mig=None, memory_told=False)], cuda=None))
    assert driver.cuda is None
    assert gpu.usable_bytes is None
    assert [finding.outcome for finding in check_gpu(gpu)] == ["ok", "ok", "ok"]


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (FakeGpu(processes=2, free=4 * GIB), "2 other processes compute on it, 20.0 GiB in use"),
        (FakeGpu(free=4 * GIB), "20.0 GiB in use by processes that are not visible here"),
        (FakeGpu(mps=1, processes=1), "Multi-Process Service"),
    ],
)
def test_a_gpu_in_use_by_other_processes_is_a_warning(gpu: FakeGpu, words: str) -> None:
    finding = _findings(gpu)["gpu 0 sharing"]
    assert finding.outcome == "warning"
    assert words in finding.found
    assert "a GPU of its own" in finding.advice


def test_mig_without_instances_leaves_nothing_to_compute_on() -> None:
    gpu = FakeGpu("NVIDIA A100", mig=(1, 1))
    finding = _findings(gpu)["gpu 0 MIG"]
    assert finding.outcome == "failed"
    assert "nvidia-smi mig -i 0" in finding.advice
    assert _only(FakeNvml([gpu])).usable_bytes is None


def test_mig_with_instances_offers_the_largest_of_them() -> None:
    small, large = (
        FakeGpu("MIG 1g.10gb", 10 * GIB, 10 * GIB),
        FakeGpu("MIG 3g.40gb", 40 * GIB, 39 * GIB),
    )
    gpu = FakeGpu("NVIDIA A100", mig=(1, 1), free=0, instances={0: small, 4: large})
    findings = _findings(gpu)
    assert findings["gpu 0 MIG"].outcome == "warning"
    assert "MIG 1g.10gb (10.0 GiB free), MIG 3g.40gb (39.0 GiB free)" in findings["gpu 0 MIG"].found
    assert "one instance" in findings["gpu 0 MIG"].advice
    assert findings["gpu 0 sharing"].outcome == "ok"  # what is used, its instances use
    assert _only(FakeNvml([gpu])).usable_bytes == (40 * GIB, 39 * GIB)


@pytest.mark.parametrize(("mode", "words"), [((0, 1), "off, and on"), ((1, 0), "on, and off")])
def test_a_pending_mig_mode_is_reported(mode: tuple[int, int], words: str) -> None:
    finding = _findings(FakeGpu(mig=mode))["gpu 0 MIG"]
    assert finding.outcome == "warning"
    assert words in finding.found
    assert f"-mig {mode[0]}" in finding.advice


def test_a_driver_that_shows_no_gpu_fails() -> None:
    place = Place({"NVIDIA_VISIBLE_DEVICES": "void"}, device_files=True, container=True)
    finding = check_visible([], place)
    assert finding is not None
    assert "NVIDIA_VISIBLE_DEVICES is 'void'" in finding.found
    assert "--gpus all" in finding.advice
    assert check_visible(read(FakeNvml())[1], HOST) is None


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_from_torch_fail(value: str) -> None:
    place = Place({"CUDA_VISIBLE_DEVICES": value}, device_files=True, container=False)
    finding = check_visible(read(FakeNvml())[1], place)
    assert finding is not None
    assert finding.outcome == "failed"
    assert "Unset CUDA_VISIBLE_DEVICES" in finding.advice
