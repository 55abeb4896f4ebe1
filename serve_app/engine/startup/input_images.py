"""Trials at start-up: how many input images a pipeline takes for one generated image."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import ImageOps

from serve_app.engine.batching.axis import NotMergeable
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.device import release
from serve_app.engine.model.sample_requests import with_input, with_more_images
from serve_app.engine.startup.runs import Runs
from serve_app.engine.startup.task_trials import Unfit, certify_pair, failed
from serve_app.protocol.params import GenerationParams, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputImages:
    """Input images that requests without a mask may have."""

    most: int
    lasting: bool = True
    """True if another start would find the same; memory may have run out for more images."""


def count_input_images(
    runs: Runs,
    requests: Sequence[GenerationParams],
    specs: Mapping[str, BatchSpec] | None,
    tasks: Sequence[Task],
    wanted: int,
) -> InputImages:
    """Return the largest number of input images that is certified: 0, 1, 2 or ``wanted``.

    A pipeline with a strength starts from its image, so it takes one. For others, most take a list
    of images for a batch. So each image of a request must change the only image that it gets.

    Args:
        requests: two requests or more, for which ``specs`` are certified.
        specs: certified specs; ``None`` if requests run one after another.
        tasks: certified tasks.
        wanted: largest number to try.
    """
    task: Task = "image-to-image"
    if task not in tasks or task in runs.pipeline.default_strengths:
        return InputImages(int(any(one != "text-to-image" for one in tasks)))
    most, lasting = 1, True
    first, second = (with_input(replace(one, guidance_scale=3.0), task) for one in requests[:2])
    for count in sorted({min(2, wanted), wanted} - {1}):
        pair = with_more_images(first, count), with_more_images(second, count)
        try:
            _check_each_counts(runs, pair[0], changed=(0, 1) if count == 2 else (count - 1,))
            if specs is not None:
                certify_pair(runs, pair, specs)
        except Exception as error:
            logger.info("%d input images are not offered: %s", count, failed(error))
            lasting = lasting and isinstance(error, Unfit | NotMergeable)
            release(error)
            break
        most = count
    return InputImages(most, lasting)


def _check_each_counts(runs: Runs, request: GenerationParams, changed: Sequence[int]) -> None:
    """Check that a request gets one image, and another one if one of its input images changes.

    Not in a greenlet, where an error that torch raises in C++ can end the process.

    Raises:
        Unfit: an input image makes no difference, or there are several images.
        Exception: what the pipeline raises.
    """
    before = runs.pipeline.generate(request)
    if len(before) != 1:
        raise Unfit("each input image gives an image of its own")
    assert request.image is not None
    for index in changed:
        images = [request.image, *request.more_images]
        images[index] = ImageOps.invert(images[index])
        image, *more = images
        other = replace(request, image=image, more_images=tuple(more))
        if torch.equal(before, runs.pipeline.generate(other)):
            raise Unfit(f"input image {index + 1} makes no difference")
