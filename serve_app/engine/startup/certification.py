"""At start-up: learn where the batch axis is, and prove that sharing paints the same pictures.

A pipeline whose calls must not be merged is still served, its requests taking turns at every step;
one whose requests must not even do that, one request after another. Never a wrong picture, never a
silent slow path.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from serve_app.engine.batching.batch import BatchSpec, NotMergeable, tensors
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.protocol.params import GenerationParams, Sharing, Task, probe

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference of a pixel in [0, 1] that rounding explains over a few steps.

On a CPU a few millionths are usual; a GPU's convolutions round float32 to TF32.
"""


@dataclass(frozen=True)
class Certificate:
    """How requests may share the pipeline."""

    sharing: Sharing
    specs: dict[str, BatchSpec]
    """By site, how calls are merged; empty unless batched."""
    difference: float | None
    """Largest difference between alone and together, in [0, 1] pixels; none if never rendered."""
    note: str
    """Why they share no more than that; empty when batched."""
    tasks: tuple[Task, ...]
    """For which that holds; the others are not offered."""
    lasting: bool = True
    """Whether another start would find the same; not where only memory ran out."""

    def to_json(self) -> dict[str, Any]:
        """For a file. Raises `NotWritable`."""
        return {
            "sharing": self.sharing,
            "specs": {site: spec.to_json() for site, spec in self.specs.items()},
            "difference": self.difference,
            "note": self.note,
            "tasks": self.tasks,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], rendezvous: Rendezvous) -> "Certificate":
        """What `to_json` gave, of the same pipeline.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: if it did not come from there.
        """
        if value["sharing"] not in get_args(Sharing) or not set(value["tasks"]) <= set(
            get_args(Task)
        ):
            raise ValueError(f"{value['sharing']!r} for {value['tasks']!r}")
        if not isinstance(value["difference"], float | None):
            raise TypeError(f"a difference of {value['difference']!r}")
        specs = {
            site: BatchSpec.from_json(rendezvous.signature_of(site), spec)
            for site, spec in value["specs"].items()
        }
        return cls(
            value["sharing"], specs, value["difference"], value["note"], tuple(value["tasks"])
        )


def certify(pipeline: LoadedPipeline, rendezvous: Rendezvous) -> Certificate:
    """Render a few steps for one picture, for two, and for two requests together.

    Runs on the calling thread, which must be the one that will own the pipeline. Errors of the
    pipeline itself are raised: a model that cannot paint alone cannot be served.
    """
    first = probe(pipeline.default_size_px)
    # The same words in another order, so that both take the same number of tokens. Not the same
    # number of steps: what the first to end undoes, the other still needs.
    second = replace(
        first, prompt="a dog sees a cat", seed=2, num_inference_steps=8, guidance_scale=3.0
    )
    one, first_alone = _record(pipeline, rendezvous, first, images=1)
    _, second_alone = _record(pipeline, rendezvous, second, images=1)

    tolerance = TOLERANCE.get(pipeline.dtype, TOLERANCE[torch.float32])

    def compare(specs: dict[str, BatchSpec]) -> float:
        together = _together(pipeline, rendezvous, specs, (first, second), must_merge=bool(specs))
        return _checked((first_alone, second_alone), together, tolerance)

    difference, lasting = None, True
    try:
        two, _ = _record(pipeline, rendezvous, first, images=2)
        specs = _learn(rendezvous, one, two)
        difference = compare(specs)
        tasks, lasting = _certify_tasks(pipeline, rendezvous, specs, (first, second), tolerance)
        return Certificate("batched", specs, difference, "", tasks, lasting)
    except NotMergeable as reason:
        note = f"calls cannot be merged: {reason}"
    except _Different as error:
        difference, note = error.difference, f"batched pictures {error}"
    except Exception as error:
        note = f"a call for two pictures failed: {type(error).__name__}: {error}"
        lasting = not isinstance(error, torch.OutOfMemoryError)
    try:
        compare({})
    except _Different as error:
        note += f"; pictures painted in turns {error}"
    except Exception as error:
        note += f"; painting in turns failed: {type(error).__name__}: {error}"
        lasting = lasting and not isinstance(error, torch.OutOfMemoryError)
    else:
        tasks, found = _certify_tasks(pipeline, rendezvous, {}, (first, second), tolerance)
        return Certificate("interleaved", {}, difference, note, tasks, lasting and found)
    return Certificate("alone", {}, difference, note, pipeline.tasks, lasting)


def contradiction(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, specs: dict[str, BatchSpec]
) -> str | None:
    """Why specs of an earlier start are wrong after all; none if they seem right.

    Paints one picture in two steps, and asks each denoiser once more for twice the same: cheap,
    and it warms up what a certification would. That the pictures come out the same for requests
    that differ is not seen here; that follows from the fingerprint.
    """
    tolerance = TOLERANCE.get(pipeline.dtype, TOLERANCE[torch.float32])
    job = Job(functools.partial(pipeline.generate, probe(pipeline.default_size_px)))
    unseen = dict(specs)
    try:
        job.start()
        while (call := job.call) is not None:
            output = rendezvous.forward(call)
            if call.site in pipeline.denoisers and call.site not in specs:
                return f"{call.site} is called, and was not"
            if (spec := unseen.pop(call.site, None)) is not None:
                pair = [spec.prepare(call)] * 2
                for half in spec.split(rendezvous.forward(spec.merge(pair)), pair):
                    if not _alike(output, half, tolerance):
                        return f"{call.site} returns other values for two than for one"
            job.resume(output)
        _finished(job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        job.kill()
        pipeline.restore_networks()
    return f"{', '.join(unseen)} is not called, and was" if unseen else None


def _alike(one: Any, two: Any, tolerance: float) -> bool:
    """Whether the tensors in two outputs differ by no more than that, as a share of the largest."""
    pairs = list(zip(tensors(one), tensors(two), strict=True))
    return bool(pairs) and all(
        a.shape == b.shape
        and float((a.float() - b.float()).abs().max())
        <= tolerance * max(1.0, float(a.float().abs().max()))
        for a, b in pairs
    )


def _certify_tasks(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    requests: Sequence[GenerationParams],
    tolerance: float,
) -> tuple[tuple[Task, ...], bool]:
    """Those for which such sharing is right too, text-to-image among them; and whether that lasts,
    no task being left out for want of memory alone."""
    width, height = pipeline.default_size_px
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    mask_image = Image.radial_gradient("L").resize((width, height))
    certified: list[Task] = []
    lasting = True
    for task in pipeline.tasks:
        if task == "text-to-image":
            certified.append(task)
            continue
        mask = mask_image if task == "inpainting" else None
        pair = [
            replace(request, image=image, mask_image=mask, strength=0.9) for request in requests
        ]
        try:
            alone = [_record(pipeline, rendezvous, request, images=1)[1] for request in pair]
            _checked(alone, _together(pipeline, rendezvous, specs, pair), tolerance)
        except Exception as error:
            logger.warning("%s is not offered: its pictures %s", task, error)
            lasting = lasting and not isinstance(error, torch.OutOfMemoryError)
        else:
            certified.append(task)
    return tuple(certified), lasting


def _checked(alone: Sequence[Tensor], together: Sequence[Tensor], tolerance: float) -> float:
    """The largest difference. Raises `_Different` if it is more than ``tolerance``."""
    difference = largest_difference(alone, together)
    if not difference <= tolerance:  # not a number is a failure too
        raise _Different(difference, f"differ by {difference:.2g}, more than {tolerance:.2g}")
    return difference


class _Different(Exception):
    """The pictures are not those that each request paints alone."""

    def __init__(self, difference: float, message: str) -> None:
        super().__init__(message)
        self.difference = difference


def largest_difference(alone: Sequence[Tensor], together: Sequence[Tensor]) -> float:
    """Over all pixels of all pictures; not a number if any pixel is none."""
    return float(
        torch.stack(
            [(a.float() - b.float()).abs().max() for a, b in zip(alone, together, strict=True)]
        ).max()
    )


_Recorded = dict[str, tuple[Call, Any]]
"""By site, the first call of that denoiser and its output."""


def _learn(rendezvous: Rendezvous, one: _Recorded, two: _Recorded) -> dict[str, BatchSpec]:
    """How the calls for one picture grow when there are two."""
    if one.keys() != two.keys():
        raise NotMergeable(f"one picture calls {', '.join(one)}, two call {', '.join(two)}")
    return {
        site: BatchSpec.learn(rendezvous.signature_of(site), one[site], two[site]) for site in one
    }


def _finished(job: Job[Tensor]) -> Tensor:
    if job.error is not None:
        raise job.error
    return job.result


def _record(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, params: GenerationParams, images: int
) -> tuple[_Recorded, Tensor]:
    """Paint alone, merging nothing; the first picture is ``[3, height, width]``."""
    job = Job(lambda: pipeline.generate(params, images=images))
    recorded: _Recorded = {}
    try:
        job.start()
        while job.call is not None:
            call = job.call
            output = rendezvous.forward(call)
            if call.site in pipeline.denoisers:
                recorded.setdefault(call.site, (call, output))
            job.resume(output)
        return recorded, _finished(job)[0]
    finally:
        job.kill()


def _advance(pipeline: LoadedPipeline, rendezvous: Rendezvous, job: Job[Tensor]) -> None:
    """Answer calls of other modules than denoisers, enough for half a decoding at the most.

    So that another's steps fall into its middle, and others follow its end.
    """
    for _ in range(max(1, len(pipeline.sites) // 4)):
        if job.call is not None and job.call.site not in pipeline.denoisers:
            job.resume(rendezvous.forward(job.call))


def _together(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    requests: Sequence[GenerationParams],
    must_merge: bool = False,
) -> list[Tensor]:
    """Paint side by side, merging wherever two calls fit; without ``specs``, in turns.

    Raises:
        NotMergeable: if no two calls fit where some must.
    """
    jobs = [Job(functools.partial(pipeline.generate, params)) for params in requests]
    merged = 0
    try:
        for job in jobs:
            job.start()
        while parked := [job for job in jobs if job.call is not None]:
            for job in parked:
                _advance(pipeline, rendezvous, job)
            waiting = [(job, job.call) for job in parked if job.call is not None]
            prepared = []
            for job, call in waiting:
                try:
                    if call.site in specs:
                        prepared.append((job, specs[call.site].prepare(call)))
                    elif call.site in pipeline.denoisers:
                        job.resume(rendezvous.forward(call))
                except NotMergeable:
                    if must_merge:
                        raise
                    job.resume(rendezvous.forward(call))
            if not prepared:
                continue
            _, leader = prepared[0]
            batch = [(job, call) for job, call in prepared if call.key == leader.key]
            merged += len(batch) > 1
            spec = specs[leader.call.site]
            fitting = [call for _, call in batch]
            outputs = spec.split(rendezvous.forward(spec.merge(fitting)), fitting)
            for (job, _), output in zip(batch, outputs, strict=True):
                job.resume(output)
        if must_merge and not merged:
            raise NotMergeable("no two calls of different requests fit together")
        return [_finished(job)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
        pipeline.restore_networks()
