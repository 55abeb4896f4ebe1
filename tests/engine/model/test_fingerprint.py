"""Fingerprints of components: every number in the weights counts."""

import pytest
import torch
from torch import Tensor, nn

from serve_app.engine.model.fingerprint import of_component, row_digests


def test_a_component_without_a_fingerprint_never_matches(caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        config = 7

    assert of_component(Odd()) != of_component(Odd())
    assert "Odd has no fingerprint" in caplog.text


class _Holder(nn.Module):
    """A network with a single tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 3, 3, 3), (0, 2)])
def test_every_number_counts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(shape).to(dtype)

    def digest(tensor: Tensor) -> str:
        return of_component(_Holder(tensor))

    assert digest(zeros) == digest(zeros.clone())
    for index in range(zeros.numel()):
        other = torch.zeros(zeros.numel())
        other[index] = 1
        assert digest(other.to(dtype).reshape(shape)) != digest(zeros)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_cpu_digests_rows_as_torch_does(dtype: torch.dtype) -> None:
    """A GPU uses `torch.hash_tensor`."""
    for columns in (3, 8):
        rows = torch.zeros(2, columns, dtype=dtype)
        rows[0, 0] = 5
        assert torch.equal(row_digests(rows), torch.hash_tensor(rows, dim=1).view(torch.int64))
