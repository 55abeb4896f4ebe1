"""Hooks into one call of a stock pipeline: its progress, its latents and its text encoding.

Every hook replaces an attribute or the class of one request's copy of the pipeline, and nothing
that is shared.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from serve_app.engine.model.prompt_cache import NotCacheable, PromptCache, content_key
from serve_app.protocol.params import AdapterSet

StepCallback = Callable[[int, int], None]
"""Callback with (steps done, total steps), after each denoising step."""

LatentsCallback = Callable[[Tensor], None]
"""Callback with the latents of each denoising step, before the step counts as done.

The latents are clean as the noise scheduler predicts them, or noisy if it predicts none."""

TimestepCallback = Callable[[float, Sequence[float]], None]
"""Callback with the timestep of each step of a noise scheduler, and all of its timesteps."""

SchedulerCallback = Callable[[Any], None]
"""Callback with the noise scheduler of a request, before the call. It may replace its methods."""


class _StepBar:
    """Replacement of a pipeline's progress bar, which every family advances once per step."""

    def __init__(self, on_step: StepCallback, iterable: Iterable[Any] | None, total: int) -> None:
        self._on_step = on_step
        self._iterable = iterable
        self._total = total
        self._done = 0

    def __enter__(self) -> "_StepBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self._done += n
        self._on_step(self._done, self._total)


def known_device(kind: type[DiffusionPipeline], device: torch.device) -> type[DiffusionPipeline]:
    """Return a subclass for the copies of a pipeline whose networks stay on ``device``.

    diffusers looks for the device anew in each call, at every module of every network: a
    millisecond for a small model, and eight for one with thousands of modules.
    """
    # A property cannot be replaced in the copy itself.
    body = {"_execution_device": device, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body)


def report_steps(pipeline: DiffusionPipeline, on_step: StepCallback | None) -> None:
    """Report each step to ``on_step`` instead of a progress bar."""

    def progress_bar(iterable: Any = None, total: int | None = None) -> _StepBar:
        length = len(iterable) if total is None else total
        return _StepBar(on_step or (lambda done, total: None), iterable, length)

    vars(pipeline)["progress_bar"] = progress_bar


def report_latents(noise_scheduler: Any, on_latents: LatentsCallback) -> None:
    """Pass the latents of each step of this noise scheduler to ``on_latents``."""
    step = noise_scheduler.step

    @functools.wraps(step)  # pipelines inspect the signature
    def reported(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = step(*args, return_dict=True, **kwargs)
        clean = getattr(output, "pred_original_sample", None)
        on_latents(output.prev_sample if clean is None else clean)
        return output if return_dict else output.to_tuple()

    vars(noise_scheduler)["step"] = reported


def report_timesteps(noise_scheduler: Any, on_timestep: TimestepCallback) -> None:
    """Report each step of this noise scheduler, and of its copies, once it is made."""
    # Not a method: a copy of the noise scheduler would copy what the method belongs to.
    vars(noise_scheduler)["_on_timestep"] = lambda *step: on_timestep(*step)
    noise_scheduler.__class__ = _with_reports(cast(Any, type(noise_scheduler)))


@functools.cache
def _with_reports(kind: Any) -> Any:
    # A class, because a method of one noise scheduler would step it for its copies.
    step = kind.step

    @functools.wraps(step)  # pipelines inspect the signature
    def reported(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(self, *args, **kwargs)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        vars(self)["_on_timestep"](float(timestep), self.timesteps.tolist())
        return output

    body = {"step": reported, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body)


def keep_timesteps_on_cpu(noise_scheduler: Any) -> None:
    """Let this noise scheduler keep its timesteps on the CPU, whatever device a pipeline names.

    Most noise schedulers look up what belongs to a timestep in tables on the CPU, and pipelines
    compare it with numbers: on a device, each of these waits for everything before it.
    """
    noise_scheduler.__class__ = _with_timesteps_on_cpu(cast(Any, type(noise_scheduler)))


@functools.cache
def _with_timesteps_on_cpu(kind: Any) -> Any:
    # A class, because some pipelines copy their noise scheduler.
    set_timesteps = kind.set_timesteps
    signature = inspect.signature(set_timesteps)

    @functools.wraps(set_timesteps)  # pipelines inspect the signature
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if "device" in signature.parameters:
            given.arguments["device"] = torch.device("cpu")
        return set_timesteps(*given.args, **given.kwargs)

    body = {"set_timesteps": on_cpu, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body)


def cache_prompts(pipeline: DiffusionPipeline, cache: PromptCache, adapters: AdapterSet) -> None:
    """Return cached results from equal calls of ``encode_prompt``.

    The adapters are part of the key, because they may change the text encoders.
    """
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        try:
            key = (type(pipeline), content_key((adapters, args, kwargs)))
        except NotCacheable:  # tensors among the arguments
            return encode(*args, **kwargs)
        return cache.get(key, lambda: encode(*args, **kwargs))

    vars(pipeline)["encode_prompt"] = encode_prompt
