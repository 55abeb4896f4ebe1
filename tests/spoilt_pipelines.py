"""Pipelines whose denoisers let the rows of a batch mix, each in another way.

Every spoilt denoiser generates images alone, so only a certification can find the fault.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from serve_app.config.model_index import DENOISERS

Arguments = dict[str, Any]
Spoilt = Callable[[Callable[..., Any], Arguments, int], Any]
"""A replacement of ``forward``: gets it, its arguments, and the rows of a request with guidance."""


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output of a denoiser with other values."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return type(output)(sample=change(output.sample))


def mean_mixed_in(share: float) -> Spoilt:
    """Add a share of the mean over the batch to every row."""

    def forward(own: Callable[..., Any], arguments: Arguments, _: int) -> Any:
        return _changed(own(**arguments), lambda rows: rows + share * rows.mean(0, keepdim=True))

    return forward


def norm_over_the_batch(own: Callable[..., Any], arguments: Arguments, _: int) -> Any:
    """Scale all rows by the standard deviation of the batch."""
    return _changed(own(**arguments), lambda rows: (rows - rows.mean()) / rows.std())


def first_prompt_for_all(own: Callable[..., Any], arguments: Arguments, rows: int) -> Any:
    """Use the prompt of the first request for every request."""
    prompts = arguments["encoder_hidden_states"]
    repeats = -(-prompts.shape[0] // rows)
    first = prompts[:rows].repeat(repeats, *(1 for _ in prompts.shape[1:]))[: prompts.shape[0]]
    return own(**arguments | {"encoder_hidden_states": first})


def first_timestep_for_all(own: Callable[..., Any], arguments: Arguments, _: int) -> Any:
    """Use the timestep of the first row for every row."""
    timestep = arguments["timestep"]
    if timestep.ndim:
        timestep = timestep[:1].expand(timestep.shape)
    return own(**arguments | {"timestep": timestep})


def role_by_position(own: Callable[..., Any], arguments: Arguments, _: int) -> Any:
    """Treat the second half of the batch in another way, as guidance inside a network does."""

    def change(rows: Tensor) -> Tensor:
        half = rows.shape[0] // 2
        return torch.cat([rows[:half], 1.06 * rows[half:]])

    return _changed(own(**arguments), change)


def overflow_in_large_batches(own: Callable[..., Any], arguments: Arguments, rows: int) -> Any:
    """Return wrong rows from the ninth request on, as a kernel with small indices does."""

    def change(output: Tensor) -> Tensor:
        return torch.cat([output[: 8 * rows], 0.9 * output[8 * rows :]])

    return _changed(own(**arguments), change)


SPOILT: dict[str, Spoilt] = {
    "mean mixed in": mean_mixed_in(1.0),
    "0.01 of the mean mixed in": mean_mixed_in(0.01),
    "0.0001 of the mean mixed in": mean_mixed_in(0.0001),
    "norm over the batch": norm_over_the_batch,
    "first prompt for all": first_prompt_for_all,
    "first timestep for all": first_timestep_for_all,
    "role by position": role_by_position,
    "overflow in large batches": overflow_in_large_batches,
}
"""Faults of a denoiser, by what they do."""


def spoil(pipeline: DiffusionPipeline, spoilt: Spoilt) -> DiffusionPipeline:
    """Replace the ``forward`` of the pipeline's denoisers, before the pipeline is loaded."""
    for name in DENOISERS:
        if (network := pipeline.components.get(name)) is not None:
            network.forward = _replaced(network.forward, spoilt)
    return pipeline


def _replaced(own: Callable[..., Any], spoilt: Spoilt) -> Callable[..., Any]:
    signature = inspect.signature(own)
    rows = 0  # of the first call, which is of a single request

    @functools.wraps(own)  # pipelines inspect the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        arguments = signature.bind(*args, **kwargs).arguments
        rows = rows or len(next(iter(arguments.values())))
        return spoilt(own, arguments, rows)

    return forward
