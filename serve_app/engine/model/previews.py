"""Cheap previews: a linear map from latents to colours, fitted to the model's own decoder.

The decoder's average over one latent cell is close to a linear function of that cell's channels, so
that a preview costs one small matrix product. Fitting it when the engine starts needs no constants
that would hold for one latent space only.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from serve_app.engine.model.loader import LoadedPipeline
from serve_app.protocol.params import GenerationParams

_PROMPTS = (
    "a red circle on a blue background",
    "a green field under a white sky, yellow flowers",
    "a black cat on an orange sofa",
)
_STEPS = 6


class PreviewMap:
    """Latents of one picture to colours at their own, low resolution."""

    def __init__(self, weights: Tensor) -> None:
        """``weights``: ``[channels + 1, 3]``, the last row for the constant part."""
        self._weights = weights

    @classmethod
    def fit(cls, pipeline: LoadedPipeline) -> "PreviewMap | None":
        """Least squares over a few pictures; none if the latents are in no grid that it knows."""
        width, height = pipeline.default_size_px
        cells, colors = [], []
        for seed, prompt in enumerate(_PROMPTS):
            params = GenerationParams(
                prompt, seed, width=width, height=height, num_inference_steps=_STEPS
            )
            seen: list[Tensor] = []
            pixels = pipeline.generate(params, on_latents=seen.append)
            grid = _grid(seen[-1], width, height) if seen else None
            if grid is None:
                return None
            pooled = functional.adaptive_avg_pool2d(pixels.float(), (grid.shape[1], grid.shape[2]))[
                0
            ]
            cells.append(_with_constant(grid))
            colors.append(pooled.flatten(1).T)
        # On the CPU: not every device has a solver, and there is little to solve.
        solution = torch.linalg.lstsq(torch.cat(cells).cpu(), torch.cat(colors).cpu()).solution
        return cls(solution.to(pipeline.device))

    def to_json(self) -> list[list[float]]:
        """The weights, row by row."""
        rows: list[list[float]] = self._weights.tolist()
        return rows

    @classmethod
    def from_json(cls, value: list[list[float]], device: torch.device) -> "PreviewMap":
        """What `to_json` gave. Raises `ValueError` or `TypeError` if it did not."""
        weights = torch.tensor(value, dtype=torch.float32)
        if weights.ndim != 2 or weights.shape[1] != 3:
            raise ValueError(f"preview weights of shape {list(weights.shape)}")
        return cls(weights.to(device))

    def __call__(self, latents: Tensor, width: int, height: int) -> Tensor | None:
        """``[3, rows, columns]`` in [0, 1], for latents of a picture of this size in pixels."""
        grid = _grid(latents, width, height)
        if grid is None:
            return None
        colors = (_with_constant(grid) @ self._weights).clamp(0, 1)
        return colors.T.reshape(3, *grid.shape[1:])


def _grid(latents: Tensor, width: int, height: int) -> Tensor | None:
    """``[channels, rows, columns]`` of the first picture, or of the first frame of a video."""
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
    """``[rows * columns, channels + 1]``."""
    cells = grid.float().flatten(1).T
    return torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)
