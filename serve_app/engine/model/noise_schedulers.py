"""The noise schedulers that a request may choose."""

import contextlib
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

NOISE_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler_karras": diffusers.EulerDiscreteScheduler,
    "dpm++_karras": diffusers.DPMSolverMultistepScheduler,
}
"""Classes by the names in the API. A model offers those that its own scheduler may become."""

SPACINGS: dict[str, dict[str, bool]] = {
    "karras": {
        "use_karras_sigmas": True,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    },
}
"""Changes of the config by the ending of a name. diffusers accepts one spacing at a time."""


def compatible_noise_schedulers(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """Return the names of the noise schedulers that can replace the model's own."""
    compatible = getattr(pipeline.scheduler, "compatibles", [])
    return tuple(name for name, kind in NOISE_SCHEDULERS.items() if kind in compatible)


def new_noise_scheduler(name: str, pipeline: DiffusionPipeline) -> Any:
    """Return a noise scheduler of this name with the config of the pipeline's own.

    A name may end in a spacing of the noise levels, which replaces that of the config.
    """
    _, _, ending = name.partition("_")
    changes = SPACINGS.get(ending, {})
    return NOISE_SCHEDULERS[name].from_config(pipeline.scheduler.config, **changes)


def fewest_steps(name: str, pipeline: DiffusionPipeline) -> int:
    """Return the fewest steps that a noise scheduler of this name accepts.

    One that cannot be made from the pipeline's own counts as 1: the trials at start-up find it.
    """
    with contextlib.suppress(Exception):
        return fewest_steps_of(new_noise_scheduler(name, pipeline))
    return 1


def fewest_steps_of(noise_scheduler: Any) -> int:
    """Return the fewest steps that a noise scheduler accepts. Changes its timesteps.

    Schedulers that begin with several evaluations raise for fewer.
    """
    with contextlib.suppress(Exception):
        for steps in range(1, 10):
            with contextlib.suppress(ValueError):
                noise_scheduler.set_timesteps(steps)
                return steps
    return 1  # it needs more arguments than the steps, and only its pipeline knows them
