"""Distances of two images."""

from torch import Tensor
from torch.nn import functional

_WINDOW_PX = 7
"""Side of the window of `ssim`."""

_C1, _C2 = 0.01**2, 0.03**2
"""Constants of the paper, for pixels in [0, 1]."""


def ssim(one: Tensor, two: Tensor) -> float:
    """Return the structural similarity of two images ``[3, height, width]`` in [0, 1].

    1 for equal images. Wang et al., "Image quality assessment: from error visibility to structural
    similarity", 2004, with a uniform window.
    """
    side = min(_WINDOW_PX, *one.shape[1:])

    def mean(image: Tensor) -> Tensor:
        return functional.avg_pool2d(image[None], side, stride=1)

    one, two = one.double(), two.double()
    mean_one, mean_two = mean(one), mean(two)
    varies_one = mean(one * one) - mean_one.square()
    varies_two = mean(two * two) - mean_two.square()
    together = mean(one * two) - mean_one * mean_two
    level = (2 * mean_one * mean_two + _C1) / (mean_one.square() + mean_two.square() + _C1)
    structure = (2 * together + _C2) / (varies_one + varies_two + _C2)
    return float((level * structure).mean())
