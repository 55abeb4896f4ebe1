"""Trials of the noise schedulers at start-up: those that a request may choose, and their faults.

Each one generates in two steps, in each task. It must also keep the noise levels of the model: a
denoiser that knows the image shows them. diffusers says only which classes take the same config.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from serve_app.engine.batching.axis import tensors
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.device import is_out_of_memory
from serve_app.engine.model.call_hooks import SchedulerCallback
from serve_app.engine.model.noise_schedulers import NOISE_SCHEDULERS, new_noise_scheduler
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.prompt_cache import PromptCache
from serve_app.engine.model.sample_requests import probe, with_input
from serve_app.engine.startup.perfect_denoiser import (
    DenoiserCall,
    PerfectDenoiser,
    Shares,
    TrainedNoise,
)
from serve_app.engine.startup.runs import calls_of
from serve_app.protocol.noise_schedulers import OWN_SCHEDULER
from serve_app.protocol.params import GenerationParams, Task

logger = logging.getLogger(__name__)

STEPS = 20
"""Steps of a perfect denoiser. Fewer show faults that images with the usual steps do not have."""

STRENGTH = 0.6
"""Strength of a perfect denoiser: most of the first steps are left out, as in many edits."""

_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")

_LONGEST_REASON = 160
"""Characters of a reason. Libraries raise with whole paragraphs."""

_NOT_FINITE = "it gives values that are not finite"

_PROMPTS_BYTES = 2**26
"""Memory for the encoded prompt, which all trials share."""


@dataclass(frozen=True)
class SchedulerTrials:
    """Results of the trials."""

    faults: Mapping[str, Mapping[Task, str]]
    """Why a noise scheduler is not offered, by name and task. ``OWN_SCHEDULER`` is the model's."""
    lasting: bool = True
    """True if another start would find the same; False if a lack of memory decided."""

    def offered(self, names: tuple[str, ...], tasks: tuple[Task, ...]) -> tuple[str, ...]:
        """Return the names that are offered for at least one of the tasks."""
        return tuple(name for name in names if set(tasks) - self.faults.get(name, {}).keys())

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SchedulerTrials":
        """Read the faults from a profile.

        Raises:
            ValueError, TypeError, AttributeError: ``value`` does not hold faults.
        """
        for name, reasons in value.items():
            if name not in {*NOISE_SCHEDULERS, OWN_SCHEDULER}:
                raise ValueError(f"a noise scheduler {name!r}")
            if not set(reasons) <= set(get_args(Task)):
                raise ValueError(f"faults of {name} in {', '.join(reasons)}")
            if not all(isinstance(reason, str) for reason in reasons.values()):
                raise TypeError(f"a reason of {name} that is no text")
        return cls(value)


def try_noise_schedulers(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, tasks: tuple[Task, ...]
) -> SchedulerTrials:
    """Try each compatible noise scheduler in each task, and log each fault.

    Runs on the thread that owns the pipeline.
    """
    if not pipeline.noise_schedulers:  # nothing to choose from
        return SchedulerTrials({})
    trials = _Trials(pipeline, rendezvous)
    faults: dict[str, dict[Task, str]] = {}
    for name in (OWN_SCHEDULER, *pipeline.noise_schedulers):
        reasons = {
            task: reason for task in tasks if (reason := trials.fault(name, task)) is not None
        }
        if reasons:
            faults[name] = reasons
    _log(faults, tasks)
    return SchedulerTrials(faults, not trials.out_of_memory)


class _Trials:
    """The trials of one start."""

    def __init__(self, pipeline: LoadedPipeline, rendezvous: Rendezvous) -> None:
        self.out_of_memory = False
        self._pipeline = pipeline
        self._rendezvous = rendezvous
        self._own = pipeline.stock.scheduler
        self._prompts = PromptCache(_PROMPTS_BYTES)
        self._outputs: dict[Any, Any] = {}
        self._own_runs: dict[Task, PerfectDenoiser] = {}
        self._incomparable = ""
        try:
            self._trained = TrainedNoise(self._own)
            run = self._run_perfect(OWN_SCHEDULER, pipeline.tasks[0])
            if fault := self._noise_fault(run, run, pipeline.tasks[0]):
                self._incomparable = (
                    f"the model's own noise scheduler follows another rule: {fault}"
                )
        except Exception as error:
            self._incomparable = self._failure(error)

    def fault(self, name: str, task: Task) -> str | None:
        """Return why a noise scheduler must not be used for a task; ``None`` if it may be."""
        if self._incomparable:
            # Nothing shows that the others keep to the model's noise levels, so none is offered.
            return None if name == OWN_SCHEDULER else self._incomparable
        try:
            if name == OWN_SCHEDULER:
                own = self._own_runs[task] = self._run_perfect(name, task)
                return self._noise_fault(own, own, task)  # the certification runs it for real
            noise_scheduler = new_noise_scheduler(name, self._pipeline.stock)
            if (fault := self._betas_fault(noise_scheduler)) is not None:
                return fault
            run = self._run_perfect(name, task)
            fault = self._noise_fault(run, self._own_runs.get(task, run), task)
            if fault is None:
                return self._run_real(name, task)
            if noise_scheduler.config.get("clip_sample") and not self._own.config.get(
                "clip_sample"
            ):
                return "it cuts latents off (clip_sample), which the model's own does not"
            return fault
        except Exception as error:
            return self._failure(error)

    def _failure(self, error: Exception) -> str:
        self.out_of_memory |= is_out_of_memory(error)
        return _short(f"{type(error).__name__}: {error}")

    def _betas_fault(self, noise_scheduler: Any) -> str | None:
        if self._trained.betas_difference(noise_scheduler) <= 0.01:
            return None
        # The config keeps keys that its class does not know.
        known = inspect.signature(type(noise_scheduler).__init__).parameters
        changed = [
            key
            for key in _BETAS
            if (value := self._own.config.get(key)) not in (None, False)
            and (key not in known or noise_scheduler.config.get(key) != value)
        ]
        return f"it does not keep the model's {', '.join(changed) or 'betas'}"

    def _run_perfect(self, name: str, task: Task) -> PerfectDenoiser:
        """Generate with a perfect denoiser. Calls networks once for a shape."""
        denoiser = PerfectDenoiser(self._trained)
        self._denoise(self._request(name, task, STEPS, STRENGTH), denoiser.watch, self._output)
        if not denoiser.calls:
            raise RuntimeError("the pipeline does not call the noise scheduler's step")
        return denoiser

    def _denoise(
        self,
        request: GenerationParams,
        watch: SchedulerCallback,
        output: Callable[[Call], Any],
    ) -> None:
        """Generate up to the decoding, which knows no noise scheduler."""
        denoised = False

        def on_step(done: int, total: int) -> None:
            nonlocal denoised
            denoised = done >= total

        generate = functools.partial(
            self._pipeline.generate,
            request,
            on_step,
            prompt_cache=self._prompts,
            on_noise_scheduler=watch,
        )
        job = Job(generate)
        with calls_of(self._pipeline, job) as calls:
            for call in calls:
                if call.site in self._pipeline.denoisers:
                    job.resume(output(call))
                elif denoised:
                    break
                else:
                    job.resume(self._rendezvous.forward(call))

    def _output(self, call: Call) -> Any:
        """Return some output of the right shape: the perfect denoiser replaces its values."""
        inputs = [*tensors(call.args), *tensors(call.kwargs)]
        shapes = (call.site, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if shapes not in self._outputs:
            self._outputs[shapes] = self._rendezvous.forward(call)
        return self._outputs[shapes]

    def _noise_fault(self, run: PerfectDenoiser, own: PerfectDenoiser, task: Task) -> str | None:
        first, *others = run.calls
        slack = run.slack
        start = first.held.difference(first.trained)
        if self._starts_from_noise(task):
            # Noise has nothing of an image, though the first timestep may leave room for it.
            most = min(own.calls[0].held.difference(own.calls[0].trained), 2 * slack) + slack
            if start > most:
                return _share_fault(first)
            slack += start  # the other calls carry it on
        else:
            asked = max(own.calls[0].timestep, STRENGTH * self._trained.timesteps)
            if first.timestep > asked + 0.1 * self._trained.timesteps:
                return (
                    f"it starts at timestep {first.timestep:.0f} for a strength of {STRENGTH:g}, "
                    f"not near {asked:.0f}"
                )
        for call in others if self._starts_from_noise(task) else run.calls:
            if call.held.difference(call.trained) > slack:
                return _share_fault(call)
        if run.end.difference(Shares(1.0, 0.0)) > run.slack:
            if not math.isfinite(run.end.image + run.end.noise):
                return _NOT_FINITE
            return (
                f"its last latents have {run.end.image:.2f} of the image and {run.end.noise:.2f} "
                "of noise, even with a perfect denoiser"
            )
        return None

    def _starts_from_noise(self, task: Task) -> bool:
        """Return True if the first latents are noise, without a share of an input image."""
        pipeline = self._pipeline
        return task == pipeline.tasks[0] and task not in pipeline.default_strengths

    def _run_real(self, name: str, task: Task) -> str | None:
        """Generate with the real denoiser in two steps, or the fewest."""
        steps = max(2, self._pipeline.fewest_steps[name])
        # Of one step more, this strength leaves out the first.
        request = self._request(name, task, steps + (task != "text-to-image"), 0.9)
        latents: list[Tensor] = []

        def watch(noise_scheduler: Any) -> None:
            step = noise_scheduler.step

            @functools.wraps(step)  # pipelines inspect the signature
            def stepped(*args: Any, **kwargs: Any) -> Any:
                output = step(*args, **kwargs)
                latents.append(output[0])
                return output

            vars(noise_scheduler)["step"] = stepped

        self._denoise(request, watch, self._rendezvous.forward)
        if all(bool(torch.isfinite(step).all()) for step in latents):
            return None
        return _NOT_FINITE

    def _request(self, name: str, task: Task, steps: int, strength: float) -> GenerationParams:
        request = replace(
            probe(self._pipeline.default_size_px),
            num_inference_steps=steps,
            noise_scheduler=None if name == OWN_SCHEDULER else name,
        )
        return with_input(request, task, strength)


def _share_fault(call: DenoiserCall) -> str:
    if not math.isfinite(call.held.image + call.held.noise):
        return _NOT_FINITE
    return (
        f"at timestep {call.timestep:.0f} the latents have {call.held.image:.2f} of the image and "
        f"{call.held.noise:.2f} of noise, not {call.trained.image:.2f} and {call.trained.noise:.2f}"
    )


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 2]} …"


def _log(faults: Mapping[str, Mapping[Task, str]], tasks: tuple[Task, ...]) -> None:
    for name, reasons in faults.items():
        for reason in dict.fromkeys(reasons.values()):
            where = [task for task in tasks if reasons.get(task) == reason]
            if name == OWN_SCHEDULER:
                logger.warning(
                    "requests for %s must choose a scheduler, as the model's own is wrong: %s",
                    ", ".join(where),
                    reason,
                )
                continue
            places = "" if len(where) == len(tasks) else f" for {', '.join(where)}"
            logger.info("scheduler %s is not offered%s: %s", name, places, reason)
