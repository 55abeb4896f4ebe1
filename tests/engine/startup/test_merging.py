"""Right families are certified as batched, and spoilt ones are not, whatever the dtype.

The distances are relative L2 norms: between a row and the same row with other neighbours, and
between a call alone and merged.
"""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from serve_app.config.models import ModelConfig
from serve_app.engine.batching.axis import NotMergeable
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.rendezvous import Call, Rendezvous
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.certification import Certificate, certify
from serve_app.engine.startup.merging import Deviation, MergingCheck
from serve_app.engine.startup.runs import RecordedCall, Recording
from tests.more_pipelines import CERTIFIED
from tests.spoilt_pipelines import SPOILT, spoil
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, animatediff, pag

MAX_BATCH_SIZE = 16

Family = tuple[Callable[[], DiffusionPipeline], dict[str, Any]]

RIGHT: dict[str, Family] = {
    **{name: (build, CALL_KWARGS.get(name, {})) for name, build in FAMILIES.items()},
    **{name: (build, call_kwargs) for name, (build, call_kwargs, _) in CERTIFIED.items()},
    "animatediff": (animatediff, {"num_frames": 3}),
}

DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(torch.float16, marks=[pytest.mark.slow, pytest.mark.nightly]),
]

ON_CPU = torch.device("cpu")


def certificate_of(
    pipeline: DiffusionPipeline, call_kwargs: dict[str, Any], max_batch_size: int = MAX_BATCH_SIZE
) -> Certificate:
    """Certify a pipeline that is on its device and has its dtype."""
    model = ModelConfig.model_validate(
        {
            "id": "m",
            "device": pipeline.device.type,
            "default_size_px": (32, 32),
            "call_kwargs": call_kwargs,
        }
    )
    loaded = LoadedPipeline(pipeline, model)
    rendezvous = Rendezvous(loaded.sites)
    try:
        with torch.no_grad():
            return certify(loaded, rendezvous, max_batch_size)
    finally:
        rendezvous.close()


def line_of(name: str, dtype: torch.dtype, certificate: Certificate) -> str:
    """Return a line with the distances of a certificate."""
    found = certificate.deviation
    distances = (
        "not merged"
        if found is None
        else f"neighbours {found.neighbours:.1e}, alone or merged {found.batching:.1e}"
    )
    limit = f", {certificate.note}" if certificate.note else ""
    kind = str(dtype).removeprefix("torch.")
    return f"{name} in {kind}: {certificate.sharing}, {distances}{limit}"


@pytest.mark.filterwarnings("ignore:.(FluxPosEmbed|upcast_vae). is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_families_are_batched(
    name: str, dtype: torch.dtype, report: Callable[[str], None]
) -> None:
    build, call_kwargs = RIGHT[name]
    certificate = certificate_of(build().to(dtype), call_kwargs)
    report(line_of(name, dtype, certificate))
    assert certificate.sharing == "batched", certificate.note
    assert certificate.deviation is not None
    assert certificate.deviation.neighbours == 0
    assert certificate.batch_size == MAX_BATCH_SIZE
    # Its mask covers text and image, so its prompts cannot be padded at their end.
    assert bool(certificate.note) == (name == "bria-fibo")


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
# float16 is slow on a CPU: the smaller of the two families shows each fault in it.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("stable-diffusion", torch.float32),
        pytest.param(
            "stable-diffusion", torch.bfloat16, marks=[pytest.mark.slow, pytest.mark.nightly]
        ),
        ("flux", torch.float32),
        pytest.param("flux", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("flux", torch.float16, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_families_are_not_batched(
    fault: str, family: str, dtype: torch.dtype, report: Callable[[str], None]
) -> None:
    build, call_kwargs = RIGHT[family]
    certificate = certificate_of(spoil(build().to(dtype), SPOILT[fault]), call_kwargs)
    report(line_of(f"{family}, {fault}", dtype, certificate))
    assert certificate.sharing == "interleaved"
    assert certificate.note


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbed_attention_is_sequential(
    dtype: torch.dtype, report: Callable[[str], None]
) -> None:
    certificate = certificate_of(pag().to(dtype), {})
    report(line_of("pag", dtype, certificate))
    assert certificate.sharing == "sequential"


def _noisy(share: float) -> Callable[..., Any]:
    """Return a ``forward`` whose kernels add up in another order at each call."""
    order = torch.Generator().manual_seed(0)  # no request seeds the order of kernels

    def forward(own: Callable[..., Any], arguments: dict[str, Any], _: int) -> Any:
        (output,) = own(**arguments)
        noise = 1e-6 * torch.randn(output.shape, generator=order)
        return (output * (1 + noise) + share * output.mean(0, keepdim=True),)

    return forward


@pytest.mark.parametrize(("share", "sharing"), [(0.0, "batched"), (0.01, "interleaved")])
def test_kernels_that_are_not_deterministic_may_be_batched(share: float, sharing: str) -> None:
    """Two runs of the same call differ, so rows may differ as much, and no more."""
    pipeline = spoil(FAMILIES["stable-diffusion"](), _noisy(share))
    certificate = certificate_of(pipeline, {})
    assert certificate.sharing == sharing, certificate.note
    assert certificate.deviation is not None
    assert certificate.deviation.repetition > 0


def test_memory_limits_the_certified_batch_size() -> None:
    def forward(own: Callable[..., Any], arguments: dict[str, Any], rows: int) -> Any:
        if arguments["sample"].shape[0] > 8 * rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(**arguments)

    certificate = certificate_of(spoil(FAMILIES["stable-diffusion"](), forward), {})
    assert certificate.sharing == "batched"
    assert certificate.batch_size == 8


def test_calls_that_were_never_compared_are_not_certified() -> None:
    """Here requests share a timestep only if they differ in rows: no two of them are alike."""

    def mixing(sample: Tensor, timestep: Tensor) -> Tensor:
        output = sample.cumsum(1) + timestep
        return output + 5e-4 * output.mean(0, keepdim=True) * (len(sample) > 2)

    class Direct:
        def forward(self, call: Call) -> Tensor:
            return mixing(*call.args, **call.kwargs)

    def recorded(rows: int, timestep: float) -> RecordedCall:
        call = Call("unet", (torch.randn(rows, 4), torch.tensor([timestep])), {})
        return RecordedCall(call, mixing(*call.args))

    one, two = recorded(2, 1.0), recorded(4, 1.0)
    spec = BatchSpec.learn(mixing, (one.call, one.output), (two.call, two.output))
    image = torch.zeros(3, 8, 8)
    recordings = [
        Recording(tuple(recorded(rows, timestep) for timestep in timesteps), image)
        for rows, timesteps in ((2, (9.0, 4.0)), (2, (8.0, 6.0, 3.0)), (1, (9.0, 4.0)))
    ]
    check = MergingCheck(cast("Rendezvous", Direct()), {"unet": spec})
    with pytest.raises(NotMergeable, match="differ in their rows"):
        check.compare(recordings, 8)
    alike = [recordings[0], Recording((recorded(2, 9.0),), image)]
    assert check.compare(alike, 2).reason(1e-3).startswith("a row depends on its neighbours")


def test_a_network_that_counts_in_thirds_is_not_batched() -> None:
    def forward(own: Callable[..., Any], arguments: dict[str, Any], rows: int) -> Any:
        (output,) = own(**arguments)
        third = output.shape[0] // 3
        if output.shape[0] % 3 or third < rows:
            return (output,)
        return (torch.cat([output[:third] * 1.1, output[third:]]),)

    certificate = certificate_of(spoil(FAMILIES["stable-diffusion"](), forward), {})
    assert certificate.sharing == "interleaved"


@pytest.mark.parametrize(
    ("deviation", "reason"),
    [
        (Deviation(), ""),
        (Deviation(batching=9e-4), ""),
        (Deviation(batching=2e-3), "a merged call differs"),
        (Deviation(neighbours=1e-9), "a row depends on its neighbours"),
        (Deviation(repetition=1e-9), ""),
        (Deviation(neighbours=float("nan")), "a row depends on its neighbours"),
        (Deviation(batching=float("nan")), "a merged call differs"),
    ],
)
def test_the_criterion(deviation: Deviation, reason: str) -> None:
    assert deviation.reason(1e-3).startswith(reason)
    assert bool(deviation.reason(1e-3)) == bool(reason)


@pytest.mark.parametrize("nan_first", [True, False])
def test_the_larger_of_two_deviations_keeps_nan(nan_first: bool) -> None:
    nan, number = Deviation(batching=float("nan")), Deviation(batching=1.0)
    found = nan | number if nan_first else number | nan
    assert found.batching != found.batching
