"""Hooks into one call of a stock pipeline: its progress, its latents and its text encoding.

Every hook replaces an attribute of one request's copy of the pipeline, and nothing that is shared.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from serve_app.engine.model.prompt_cache import NotCacheable, PromptCache, content_key
from serve_app.protocol.params import AdapterSet

StepCallback = Callable[[int, int], None]
"""Callback with (steps done, total steps), after each denoising step."""

LatentsCallback = Callable[[Tensor], None]
"""Callback with the latents of each denoising step, before the step counts as done.

The latents are clean as the noise scheduler predicts them, or noisy if it predicts none."""

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


def cache_prompts(pipeline: DiffusionPipeline, cache: PromptCache, adapters: AdapterSet) -> None:
    """Return cached results from equal calls of ``encode_prompt``.

    The adapters are part of the key, because they may change the text encoders.
    """
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        try:
            key = (type(pipeline), content_key((adapters, args, kwargs)))
        except NotCacheable:  # tensors or images among the arguments
            return encode(*args, **kwargs)
        return cache.get(key, lambda: encode(*args, **kwargs))

    vars(pipeline)["encode_prompt"] = encode_prompt
