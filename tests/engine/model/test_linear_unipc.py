"""UniPC as weighted sums: the latents of diffusers' own, with few operations."""

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.engine.model.linear_unipc import LinearUniPC, use_linear_unipc

CONFIGS: list[dict[str, Any]] = [
    {},
    {"solver_order": 1},
    {"solver_order": 3},
    {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"use_karras_sigmas": True},
    {"disable_corrector": [0, 1]},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
]


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def denoise(noise_scheduler: Any, seed: int, first: int = 0, dtype: Any = torch.float32) -> Tensor:
    """Return the latents after a run of 12 steps with outputs that depend on the latents."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 3, 5, generator=generator)
    noise_scheduler.set_timesteps(12)
    latents = (latents * noise_scheduler.init_noise_sigma).to(dtype)
    noise_scheduler.set_begin_index(first)
    for timestep in noise_scheduler.timesteps[first:]:
        noise = torch.randn(latents.shape, generator=generator)
        output = (0.7 * torch.tanh(latents.float()) + 0.1 * noise).to(dtype)
        latents = noise_scheduler.step(output, timestep, latents, return_dict=False)[0]
        assert latents.dtype == dtype
    return latents


def linear(noise_scheduler: UniPCMultistepScheduler) -> Any:
    made = copy.deepcopy(noise_scheduler)
    use_linear_unipc(made)
    assert type(made) is LinearUniPC
    return made


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("first", [0, 5])
def test_a_run_ends_in_the_latents_of_diffusers(config: dict[str, Any], first: int) -> None:
    stock = UniPCMultistepScheduler(**config)
    ours = linear(stock)
    for seed in (0, 1):  # the second run takes the coefficients of the first one
        expected = denoise(stock, seed, first)
        torch.testing.assert_close(denoise(ours, seed, first), expected, rtol=1e-4, atol=1e-5)


def test_runs_in_bfloat16_are_as_near_to_the_exact_one_as_those_of_diffusers() -> None:
    stock = UniPCMultistepScheduler()
    exact = denoise(stock, 0)
    theirs = (denoise(stock, 0, dtype=torch.bfloat16).float() - exact).norm()
    ours = (denoise(linear(stock), 0, dtype=torch.bfloat16).float() - exact).norm()
    assert ours <= 1.5 * theirs


def test_a_scheduler_with_other_steps_gets_other_coefficients() -> None:
    stock = UniPCMultistepScheduler()
    ours = linear(stock)
    denoise(ours, 0)
    karras = UniPCMultistepScheduler(use_karras_sigmas=True)
    torch.testing.assert_close(denoise(linear(karras), 0), denoise(karras, 0))
    torch.testing.assert_close(denoise(linear(stock), 0), denoise(stock, 0))


def test_a_step_takes_few_operations() -> None:
    counts = []
    for noise_scheduler in (UniPCMultistepScheduler(), linear(UniPCMultistepScheduler())):
        denoise(noise_scheduler, 0)
        with Operations() as operations:
            denoise(noise_scheduler, 0)
        counts.append(operations.count)
    assert counts[1] < counts[0] / 3, counts


@pytest.mark.parametrize(
    "noise_scheduler",
    [
        UniPCMultistepScheduler(thresholding=True),
        UniPCMultistepScheduler(solver_p=DDIMScheduler()),
        DDIMScheduler(),
    ],
    ids=["thresholding", "solver_p", "ddim"],
)
def test_schedulers_whose_steps_are_not_linear_stay_as_they_are(noise_scheduler: Any) -> None:
    kind = type(noise_scheduler)
    use_linear_unipc(noise_scheduler)
    assert type(noise_scheduler) is kind
