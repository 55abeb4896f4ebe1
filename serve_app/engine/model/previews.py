"""Cheap previews: a linear map from latents to colours, fitted to the model's own decoder.

The decoder's average over one latent cell is close to a linear function of the cell's channels. So
a preview costs one small matrix product. The map is fitted at start-up, so no constants are needed,
which would hold for one latent space only.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from serve_app.engine.model.finite import marked, require_finite
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.sample_requests import with_input
from serve_app.protocol.params import GenerationParams

_PROMPTS = (
    "a red circle on a blue background",
    "a green field under a white sky, yellow flowers",
    "a black cat on an orange sofa",
)
_STEPS = 6


class PreviewMap:
    """Linear map from the latents of one image to colours, at the resolution of the latents."""

    def __init__(self, weights: Tensor) -> None:
        """Take weights ``[channels + 1, 3]``, with the constant part in the last row."""
        self._weights = weights

    @classmethod
    def fit(cls, pipeline: LoadedPipeline) -> "PreviewMap | None":
        """Fit the map to a few images; return ``None`` if the latents have an unknown layout.

        Raises:
            NotFinite: an image is not finite.
        """
        width, height = pipeline.default_size_px
        cells, colors = [], []
        for seed, prompt in enumerate(_PROMPTS):
            params = GenerationParams(
                prompt, seed, width=width, height=height, num_inference_steps=_STEPS
            )
            params = with_input(params, pipeline.tasks[0])
            seen: list[Tensor] = []
            pixels = pipeline.generate(params, on_latents=seen.append)
            require_finite(pixels, params, pipeline.dtype)
            grid = _grid(seen[-1], width, height) if seen else None
            if grid is None:
                return None
            pooled = functional.adaptive_avg_pool2d(pixels.float(), (grid.shape[1], grid.shape[2]))[
                0
            ]
            cells.append(_with_constant(grid))
            colors.append(pooled.flatten(1).T)
        # On the CPU: not every device has a solver, and the problem is small.
        solution = torch.linalg.lstsq(torch.cat(cells).cpu(), torch.cat(colors).cpu()).solution
        return cls(solution.to(pipeline.device))

    def to_json(self) -> list[list[float]]:
        """Return the weights, row by row."""
        rows: list[list[float]] = self._weights.tolist()
        return rows

    @classmethod
    def from_json(cls, value: list[list[float]], device: torch.device) -> "PreviewMap":
        """Read the result of `to_json`. Raises `ValueError` or `TypeError` for other values."""
        weights = torch.tensor(value, dtype=torch.float32)
        if weights.ndim != 2 or weights.shape[1] != 3:
            raise ValueError(f"preview weights of shape {list(weights.shape)}")
        return cls(weights.to(device))

    def __call__(self, latents: Tensor, width: int, height: int) -> Tensor | None:
        """Return ``[3, rows, columns]`` in [0, 1] or NaN, for an image of this size in pixels.

        Returns ``None`` if the latents have an unknown layout.
        """
        grid = _grid(latents, width, height)
        if grid is None:
            return None
        colors: Tensor = marked(_with_constant(grid) @ self._weights)
        return colors.clamp(0, 1).T.reshape(3, *grid.shape[1:])


def _grid(latents: Tensor, width: int, height: int) -> Tensor | None:
    """Return ``[channels, rows, columns]`` of the first image, or of a video's first frame."""
    first = latents[0]
    if first.ndim == 3:
        return first
    if first.ndim == 4:
        return first[:, 0]
    if first.ndim == 2:  # a row of tokens, each a patch of cells
        rows = round(math.sqrt(len(first) * height / width))
        if rows and len(first) % rows == 0:
            return first.T.reshape(-1, rows, len(first) // rows)
    return None


def _with_constant(grid: Tensor) -> Tensor:
    """Return the cells with a constant channel: ``[rows * columns, channels + 1]``."""
    cells = grid.float().flatten(1).T
    return torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)
