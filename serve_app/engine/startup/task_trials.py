"""Trials of a pipeline's tasks at start-up: what a call needs and makes, and which may share it."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from serve_app.engine.batching.axis import NotMergeable
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.device import is_out_of_memory, release
from serve_app.engine.model.noise_schedulers import fewest_steps_of
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.sample_requests import probe, sample, with_input
from serve_app.engine.startup.comparison import is_constant, relative_l2
from serve_app.engine.startup.merging import MergingCheck, rounding
from serve_app.engine.startup.runs import Recording, Runs
from serve_app.errors import ModelLoadError
from serve_app.protocol.params import GenerationParams, Task

logger = logging.getLogger(__name__)


class Unfit(Exception):
    """Requests must not share the pipeline in the way that was tried."""


def failed(error: Exception) -> str:
    """Return why a trial failed."""
    if isinstance(error, NotMergeable | Unfit):
        return str(error)
    return f"{type(error).__name__}: {error}"


def find_needs(runs: Runs) -> None:
    """Leave out text-to-image if the pipeline's own call takes an image, and fails without one.

    Not in a greenlet, where an error that torch raises in C++ can end the process.

    Raises:
        Exception: the call fails with an image, too, or memory runs out.
    """
    pipeline = runs.pipeline
    task = pipeline.own_image_task
    if task is None or "text-to-image" not in pipeline.tasks:
        return
    request = probe(pipeline.default_size_px)
    try:
        pipeline.generate(request)
        return
    except Exception as error:
        if is_out_of_memory(error):
            raise
        logger.info("%s needs an image: %s", pipeline.class_name, failed(error))
        release(error)
    pipeline.generate(with_input(request, task))
    pipeline.require_image()


def generate_once(runs: Runs) -> None:
    """Generate one image, in two steps or as few as the model's own noise scheduler accepts.

    Raises:
        ModelLoadError: the pipeline is an upscaler.
        Exception: the pipeline failed, or the image is not finite.
    """
    pipeline = runs.pipeline
    params = sample(pipeline, pipeline.default_size_px)
    steps = max(2, fewest_steps_of(copy.deepcopy(pipeline.stock.scheduler)))
    check_size(pipeline, params, runs.alone(replace(params, num_inference_steps=steps)))


def check_size(pipeline: LoadedPipeline, params: GenerationParams, one: Recording) -> None:
    """Check that a pipeline that needs an image keeps its size, unlike an upscaler.

    Raises:
        ModelLoadError: the generated image has another size, which no limit applies to.
    """
    height, width = one.image.shape[1:]
    if "text-to-image" not in pipeline.tasks and (width, height) != (params.width, params.height):
        raise ModelLoadError(
            f"{pipeline.class_name} makes {width}x{height} pixels of an input image of "
            f"{params.width}x{params.height}. Upscalers are not served: use a model that edits "
            "images."
        )


def check_turns(
    runs: Runs, requests: Sequence[GenerationParams], alone: Sequence[Recording]
) -> None:
    """Check that requests that take turns get the same images as alone, bit for bit.

    If they differ, they may differ no more than two images of the same request alone, and those
    only by rounding.

    Raises:
        Unfit: an image differs, or the images would be equal whatever sharing does.
        Exception: what the pipeline raises.
    """
    separate = [recording.image for recording in alone]
    if any(is_constant(image) for image in separate):
        raise Unfit("an image has a single colour, which proves nothing")
    if all(torch.equal(separate[0], image) for image in separate[1:]):
        raise Unfit("different requests have the same image, which proves nothing")
    shared = runs.in_turns(requests, alone)
    for params, image, in_turns in zip(requests, separate, shared, strict=True):
        if torch.equal(image, in_turns):
            continue
        difference = relative_l2(image, in_turns)
        again = [runs.alone(params).image for _ in range(2)]
        repetition = max(relative_l2(image, other) for other in again)
        if repetition > rounding(runs.pipeline.dtype, runs.pipeline.device):
            raise Unfit(f"the same request alone gives images that differ by {repetition:.2g}")
        if not difference <= 2 * repetition:  # NaN fails as well
            raise Unfit(f"images of requests that take turns differ by {difference:.2g}")


@dataclass(frozen=True)
class CertifiedTasks:
    """Tasks that may share the pipeline in the certified way."""

    tasks: tuple[Task, ...]
    lasting: bool
    """True if another start would find the same; memory may have run out for a task."""


def certify_tasks(
    runs: Runs, requests: Sequence[GenerationParams], specs: Mapping[str, BatchSpec]
) -> CertifiedTasks:
    """Certify the tasks after the first one, for which ``requests`` and ``specs`` are certified."""
    first_task, *others = runs.pipeline.tasks
    certified: list[Task] = [first_task]
    lasting = True
    joins = any(spec.joins_prompts for spec in specs.values())
    for task in others:
        first, second = (
            # With equally many rows, so that they can be compared.
            with_input(replace(request, guidance_scale=3.0), task, strength=0.9)
            for request in (requests[0], requests[-1 if joins else 1])
        )
        pair = (first, replace(second, num_inference_steps=4))  # three of them run
        try:
            certify_pair(runs, pair, specs)
        except Exception as error:
            logger.warning("%s is not offered: %s", task, failed(error))
            lasting = lasting and isinstance(error, Unfit | NotMergeable)
            release(error)
        else:
            certified.append(task)
    return CertifiedTasks(tuple(certified), lasting)


def certify_pair(
    runs: Runs, pair: Sequence[GenerationParams], specs: Mapping[str, BatchSpec]
) -> None:
    """Check that two requests take turns, and share calls if there are ``specs``.

    Raises:
        Unfit: they must not share in this way.
        Exception: what the pipeline raises.
    """
    alone = [runs.alone(params) for params in pair]
    check_turns(runs, pair, alone)
    if not specs:
        return
    deviation = MergingCheck(runs.rendezvous, specs).compare(alone)
    if reason := deviation.reason(rounding(runs.pipeline.dtype, runs.pipeline.device)):
        raise Unfit(reason)
