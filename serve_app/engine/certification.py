"""At start-up: learn where the batch axis is, and prove that batching paints the same pictures.

A pipeline that fails here is still served, one call at a time. Never a wrong picture, never a
silent slow path.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.batch import BatchSpec, NotMergeable
from serve_app.engine.params import GenerationParams
from serve_app.engine.pipeline import LoadedPipeline
from serve_app.engine.rendezvous import Call, Job, Rendezvous

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference of a pixel in [0, 1] that rounding explains over a few steps."""


@dataclass(frozen=True)
class Certificate:
    """Whether calls may be merged and, if so, how."""

    specs: dict[str, BatchSpec]
    """By site; empty if batching is off."""
    difference: float | None
    """Largest difference between alone and together, in [0, 1] pixels; none if never rendered."""
    note: str
    """Why batching is off; empty when it is on."""

    @property
    def batching(self) -> bool:
        return bool(self.specs)


def certify(pipeline: LoadedPipeline, rendezvous: Rendezvous) -> Certificate:
    """Render a few steps for one picture, for two, and for two requests together.

    Runs on the calling thread, which must be the one that will own the pipeline. Errors of the
    pipeline itself are raised: a model that cannot paint alone cannot be served.
    """
    width, height = pipeline.default_size_px
    # The same words in another order, so that both take the same number of tokens.
    first = GenerationParams(
        "a cat sees a dog", 1, width=width, height=height, num_inference_steps=2
    )
    second = GenerationParams(
        "a dog sees a cat",
        2,
        width=width,
        height=height,
        num_inference_steps=3,
        guidance_scale=3.0,
    )
    recorded_one = _record(pipeline, rendezvous, first, images=1)
    recorded_two = _record(pipeline, rendezvous, first, images=2)
    specs: dict[str, BatchSpec] = {}
    try:
        for site in dict.fromkeys(call.site for call, _ in recorded_one):
            one = next(pair for pair in recorded_one if pair[0].site == site)
            two = next((pair for pair in recorded_two if pair[0].site == site), None)
            if two is None:
                raise NotMergeable(f"{site} is not called for two pictures")
            specs[site] = BatchSpec.learn(rendezvous.signature_of(site), one, two)
    except NotMergeable as reason:
        return Certificate({}, None, f"no common batch axis: {reason}")
    requests = (first, second)
    alone = [_together(pipeline, rendezvous, specs, [params])[0][0] for params in requests]
    try:
        together, merged = _together(pipeline, rendezvous, specs, requests)
    except Exception as error:
        return Certificate({}, None, f"a merged call failed: {type(error).__name__}: {error}")
    if not merged:
        return Certificate({}, None, "no two calls of different requests fit together")
    difference = max(
        float((a.float() - b.float()).abs().max()) for a, b in zip(alone, together, strict=True)
    )
    tolerance = TOLERANCE.get(pipeline.dtype, 1e-4)
    if not difference <= tolerance:  # not a number is a failure too
        note = f"batched pictures differ by {difference:.2g}, more than {tolerance:.2g}"
        return Certificate({}, difference, note)
    return Certificate(specs, difference, "")


def _finished(job: Job[Tensor]) -> Tensor:
    if job.error is not None:
        raise job.error
    return job.result


def _record(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, params: GenerationParams, images: int
) -> list[tuple[Call, Any]]:
    """Paint alone; every call of a denoiser with its output."""
    job = Job(lambda: pipeline.paint(params, images=images))
    job.start()
    recorded = []
    while job.call is not None:
        call = job.call
        output = rendezvous.forward(call)
        recorded.append((call, output))
        job.resume(output)
    _finished(job)
    return recorded


def _together(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    requests: Sequence[GenerationParams],
) -> tuple[list[Tensor], int]:
    """Paint side by side, merging wherever two calls fit; the pictures, and how often they did."""
    jobs = [Job(functools.partial(pipeline.paint, params)) for params in requests]
    merged = 0
    try:
        for job in jobs:
            job.start()
        while parked := [job for job in jobs if job.call is not None]:
            calls = [job.call for job in parked if job.call is not None]
            prepared = [specs[call.site].prepare(call) for call in calls]
            fitting = [index for index, call in enumerate(prepared) if call.key == prepared[0].key]
            merged += len(fitting) > 1
            spec = specs[calls[0].site]
            batch = [prepared[index] for index in fitting]
            outputs = spec.split(rendezvous.forward(spec.merge(batch)), batch)
            for index, output in zip(fitting, outputs, strict=True):
                parked[index].resume(output)
        return [_finished(job) for job in jobs], merged
    finally:
        for job in jobs:
            job.kill()
