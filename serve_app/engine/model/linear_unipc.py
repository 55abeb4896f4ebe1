"""UniPC with few operations on the device.

diffusers' UniPC computes its coefficients from scalars on the device: about 110 operations a step,
which take the host longer to launch than a small network takes to run. But a step is linear in the
latents and in the outputs of the network. So diffusers' own step, run once on unit vectors on the
CPU, gives its coefficients, and all requests with these noise levels share them.
"""

import copy
import functools
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from serve_app.engine.batching.transfers import to_device

_RUNS = 64
"""Sets of noise levels whose coefficients are kept: a few kilobytes each."""


def use_linear_unipc(noise_scheduler: Any) -> None:
    """Let a noise scheduler of diffusers' UniPC, and no other one, take its steps in this way."""
    config = noise_scheduler.config
    # These two are not linear.
    if type(noise_scheduler) is UniPCMultistepScheduler and not (
        config.thresholding or noise_scheduler.solver_p
    ):
        noise_scheduler.__class__ = LinearUniPC


class LinearUniPC(UniPCMultistepScheduler):  # type: ignore[misc]
    """diffusers' UniPC, whose steps are weighted sums."""

    model_outputs: list[Tensor | None]
    last_sample: Tensor | None
    _steps: dict[int, "_Step"]
    """Steps by their index, which requests with these noise levels share."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """Take a step as `UniPCMultistepScheduler.step` does, equal up to rounding."""
        if self.step_index is None:
            self._init_step_index(timestep)
            levels = self.sigmas.numpy().tobytes()
            self._steps = _steps_of(repr(sorted(self.config.items())), levels, self.step_index)
        if self.step_index not in self._steps:
            self._steps[self.step_index] = _Step(self)
        step = self._steps[self.step_index]
        kept = [output for output in self.model_outputs if output is not None]
        if self.last_sample is not None:
            kept.append(self.last_sample)
        given = torch.stack([*kept, sample, model_output])
        # Not as a product of matrices, which GPUs may round to ten bits.
        exact = given.to(torch.promote_types(given.dtype, torch.float32))
        weights = step.weights(exact)
        output, corrected, following = ((row * exact).sum(0).to(given.dtype) for row in weights)
        self.model_outputs = [*self.model_outputs[1:], output]
        self.last_sample = corrected
        self.this_order, self.lower_order_nums = step.this_order, step.lower_order_nums
        self._step_index = self.step_index + 1
        following = following.to(sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)


class _Step:
    """The coefficients of one step, and what diffusers counts."""

    def __init__(self, before: LinearUniPC) -> None:
        after = copy.copy(before)
        known = [output is not None for output in before.model_outputs]
        inputs = sum(known) + (before.last_sample is not None) + 2
        units = list(torch.eye(inputs, dtype=torch.float64)[:, None])
        *kept, sample, output = units
        outputs = iter(kept)
        after.model_outputs = [next(outputs) if one else None for one in known]
        after.last_sample = next(outputs, None)
        after.timestep_list = list(before.timestep_list)
        # Not the instance's own step, which may be replaced by one that watches.
        following = UniPCMultistepScheduler.step(after, output, 0, sample).prev_sample
        rows = [after.model_outputs[-1], after.last_sample, following]
        self._weights = torch.stack([row.flatten() for row in rows if row is not None])
        self._placed: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self.this_order: int = after.this_order
        self.lower_order_nums: int = after.lower_order_nums

    def weights(self, given: Tensor) -> Tensor:
        """Return the weights of the inputs in each result, to multiply with the inputs.

        ``given`` has the shape (inputs, ...); the result (results, inputs, 1, ...).
        """
        key = given.device, given.dtype, given.ndim
        if key not in self._placed:
            ones = (1,) * (given.ndim - 1)
            weights = self._weights.to(given.dtype).reshape(*self._weights.shape, *ones)
            placed = weights if given.is_cpu else to_device(weights, given.device)
            self._placed[key] = placed
        return self._placed[key]


@functools.lru_cache(_RUNS)
def _steps_of(config: str, levels: bytes, first: int) -> dict[int, _Step]:
    """Return the steps that were taken with a config and noise levels, from the first one on."""
    del config, levels, first  # they are the key
    return {}
