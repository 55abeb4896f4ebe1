"""The certification on a GPU: its kernels depend on the batch size, which a CPU's hardly do."""

from collections.abc import Callable

import pytest
import torch

from serve_app.engine.startup.merging import rounding
from tests.engine.startup.test_merging import RIGHT, certificate_of, line_of
from tests.spoilt_pipelines import SPOILT, spoil

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore:.(FluxPosEmbed|upcast_vae). is deprecated:FutureWarning"),
]

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_families_are_batched(
    name: str, dtype: torch.dtype, report: Callable[[str], None]
) -> None:
    build, call_kwargs = RIGHT[name]
    certificate = certificate_of(build().to(DEVICE, dtype), call_kwargs)
    report(f"{torch.cuda.get_device_name()}, {line_of(name, dtype, certificate)}")
    assert certificate.sharing == "batched", certificate.note
    assert certificate.deviation is not None
    assert certificate.deviation.batching <= rounding(dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_families_are_not_batched(
    fault: str, family: str, dtype: torch.dtype, report: Callable[[str], None]
) -> None:
    build, call_kwargs = RIGHT[family]
    pipeline = spoil(build().to(DEVICE, dtype), SPOILT[fault])
    certificate = certificate_of(pipeline, call_kwargs)
    line = line_of(f"{family}, {fault}", dtype, certificate)
    report(f"{torch.cuda.get_device_name()}, {line}")
    assert certificate.sharing == "interleaved"
