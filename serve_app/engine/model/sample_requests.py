"""Requests that a start makes of a pipeline, with input images of their own where it needs some."""

from dataclasses import replace

from PIL import Image

from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.protocol.params import GenerationParams, Task


def probe(size: tuple[int, int]) -> GenerationParams:
    """Make a request of two steps, for (width, height), to test a pipeline with."""
    return GenerationParams(
        "a cat sees a dog", 1, width=size[0], height=size[1], num_inference_steps=2
    )


def sample(pipeline: LoadedPipeline, size: tuple[int, int]) -> GenerationParams:
    """Make a request of two steps, for (width, height), for the pipeline's first task."""
    task = pipeline.tasks[0]
    return with_input(probe(size), task, 1.0 if task in pipeline.default_strengths else None)


def with_input(
    request: GenerationParams, task: Task, strength: float | None = 1.0
) -> GenerationParams:
    """Return the request with what its task needs: an input image of its size, and a mask.

    Requests with different seeds have different images.
    """
    if task == "text-to-image":
        return request
    assert request.width is not None
    assert request.height is not None
    size = request.width, request.height
    gradient = Image.linear_gradient("L").rotate(90 * (request.seed - 1))
    image = gradient.resize(size).convert("RGB")
    mask_image = Image.radial_gradient("L").resize(size) if task == "inpainting" else None
    return replace(request, image=image, mask_image=mask_image, strength=strength)


def with_more_images(request: GenerationParams, count: int) -> GenerationParams:
    """Return the request with ``count`` input images. The first one has another shape."""
    assert request.image is not None
    width, height = request.image.size
    narrow = request.image.resize((max(1, width // 2), height))
    return replace(request, more_images=(narrow,) * (count - 1))
