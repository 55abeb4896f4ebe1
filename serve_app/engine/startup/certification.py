"""Certification at start-up: learn the batch axis, and check that sharing gives the same images.

If calls must not be merged, requests take turns at every step. If they must not take turns either,
requests run one after another. So no image is ever wrong, and every slower way is reported.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from serve_app.engine.batching.axis import NotMergeable, tensors
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.protocol.params import GenerationParams, Sharing, Task, probe

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference of a pixel in [0, 1] that rounding explains over a few steps, by dtype.

A CPU usually differs by a few millionths; a GPU's convolutions round float32 to TF32.
"""


@dataclass(frozen=True)
class Certificate:
    """Certified way in which requests share the pipeline."""

    sharing: Sharing
    specs: dict[str, BatchSpec]
    """Batch specs by site; empty unless batched."""
    difference: float | None
    """Largest difference between separate and batched images, in [0, 1] pixels, if measured."""
    note: str
    """Reason why requests do not share more; empty if batched."""
    tasks: tuple[Task, ...]
    """Tasks that the certificate covers; the model does not offer others."""
    lasting: bool = True
    """True if another start would find the same; False if only a lack of memory decided."""

    def to_json(self) -> dict[str, Any]:
        """Return the certificate for a file. Raises `NotWritable`."""
        return {
            "sharing": self.sharing,
            "specs": {site: spec.to_json() for site, spec in self.specs.items()},
            "difference": self.difference,
            "note": self.note,
            "tasks": self.tasks,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], rendezvous: Rendezvous) -> "Certificate":
        """Read the result of `to_json`, for the same pipeline.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: ``value`` is not such a result.
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
    """Generate one image, two images, and two requests together, in a few steps each.

    Runs on the calling thread, which must be the one that will own the pipeline.

    Raises:
        Exception: the pipeline failed to generate a single image, so it cannot be served.
    """
    first = probe(pipeline.default_size_px)
    # The same words in another order give the same number of tokens. The number of steps differs:
    # the first request to end may undo a change that the other still needs.
    second = replace(
        first, prompt="a dog sees a cat", seed=2, num_inference_steps=8, guidance_scale=3.0
    )
    one, first_image = _record(pipeline, rendezvous, first, images=1)
    _, second_image = _record(pipeline, rendezvous, second, images=1)

    tolerance = TOLERANCE.get(pipeline.dtype, TOLERANCE[torch.float32])

    def compare(specs: dict[str, BatchSpec]) -> float:
        together = _together(pipeline, rendezvous, specs, (first, second), must_merge=bool(specs))
        return _checked((first_image, second_image), together, tolerance)

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
        difference, note = error.difference, f"batched images {error}"
    except Exception as error:
        note = f"a call for two images failed: {type(error).__name__}: {error}"
        lasting = not isinstance(error, torch.OutOfMemoryError)
    try:
        compare({})
    except _Different as error:
        note += f"; images generated in turns {error}"
    except Exception as error:
        note += f"; generation in turns failed: {type(error).__name__}: {error}"
        lasting = lasting and not isinstance(error, torch.OutOfMemoryError)
    else:
        tasks, found = _certify_tasks(pipeline, rendezvous, {}, (first, second), tolerance)
        return Certificate("interleaved", {}, difference, note, tasks, lasting and found)
    return Certificate("sequential", {}, difference, note, pipeline.tasks, lasting)


def contradiction(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, specs: dict[str, BatchSpec]
) -> str | None:
    """Return why specs of an earlier start do not fit; ``None`` if no contradiction is found.

    Generates one image in two steps and calls each denoiser once more with a batch of two equal
    calls. This is cheap and warms up what a certification would. It does not compare images of
    different requests; their equality follows from the fingerprint.
    """
    tolerance = TOLERANCE.get(pipeline.dtype, TOLERANCE[torch.float32])
    job = Job(functools.partial(pipeline.generate, probe(pipeline.default_size_px)))
    unseen = dict(specs)
    try:
        job.start()
        while (call := job.call) is not None:
            output = rendezvous.forward(call)
            if call.site in pipeline.denoisers and call.site not in specs:
                return f"{call.site} is called, but was not called before"
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
    return f"{', '.join(unseen)} is not called, but was called before" if unseen else None


def _alike(one: Any, two: Any, tolerance: float) -> bool:
    """Return True if the tensors of two outputs differ by at most ``tolerance``, relatively."""
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
    """Return the tasks that may share in this way, and True if another start would find the same.

    Text-to-image is always among them. Another start may differ if memory ran out for a task.
    """
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
            separate = [_record(pipeline, rendezvous, request, images=1)[1] for request in pair]
            _checked(separate, _together(pipeline, rendezvous, specs, pair), tolerance)
        except Exception as error:
            logger.warning("%s is not offered: its images %s", task, error)
            lasting = lasting and not isinstance(error, torch.OutOfMemoryError)
        else:
            certified.append(task)
    return tuple(certified), lasting


def _checked(separate: Sequence[Tensor], together: Sequence[Tensor], tolerance: float) -> float:
    """Return the largest difference. Raises `_Different` if it exceeds ``tolerance``."""
    difference = largest_difference(separate, together)
    if not difference <= tolerance:  # NaN fails as well
        raise _Different(difference, f"differ by {difference:.2g}, more than {tolerance:.2g}")
    return difference


class _Different(Exception):
    """The images differ from those of separate requests."""

    def __init__(self, difference: float, message: str) -> None:
        super().__init__(message)
        self.difference = difference


def largest_difference(separate: Sequence[Tensor], together: Sequence[Tensor]) -> float:
    """Return the largest difference over all pixels of all images; NaN if any pixel is NaN."""
    return float(
        torch.stack(
            [(a.float() - b.float()).abs().max() for a, b in zip(separate, together, strict=True)]
        ).max()
    )


_Recorded = dict[str, tuple[Call, Any]]
"""First call of each denoiser and its output, by site."""


def _learn(rendezvous: Rendezvous, one: _Recorded, two: _Recorded) -> dict[str, BatchSpec]:
    """Learn the batch axis of each denoiser from calls for one image and for two."""
    if one.keys() != two.keys():
        raise NotMergeable(f"one image calls {', '.join(one)}, two call {', '.join(two)}")
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
    """Generate without merging; return the denoiser calls and the image ``[3, height, width]``."""
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
    """Run calls of modules other than denoisers, for at most half of a decoding.

    So steps of another request happen in the middle of a decoding, and more of them after it.
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
    """Generate concurrently: merge calls with equal keys; without ``specs``, take turns.

    Raises:
        NotMergeable: ``must_merge`` is set and no two calls could be merged.
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
