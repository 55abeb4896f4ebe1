"""Previews of the demo model resemble the final image and cost little."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional

from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.previews import PreviewMap
from serve_app.protocol.events import Preview, Progress
from serve_app.protocol.params import GenerationParams


def test_later_previews_are_closer_to_the_image(demo_engine: Engine) -> None:
    params = GenerationParams(
        "a red circle on a blue background", 1, width=96, height=64, num_inference_steps=20,
        preview_steps=(2, 8, 20),
    )  # fmt: skip
    previews: list[Preview] = []
    steps: list[int] = []

    def on_event(event: object) -> None:
        if isinstance(event, Preview):
            previews.append(event)
            steps.append(event.step)
        elif isinstance(event, Progress):
            steps.append(event.step)

    result = demo_engine.generate(params, on_event)
    assert [preview.step for preview in previews] == [2, 8, 20]
    assert steps == sorted(steps)
    small = functional.adaptive_avg_pool2d(result.pixels, (16, 24))
    errors = []
    for preview in previews:
        assert preview.pixels.shape == (3, 16, 24)
        assert preview.image.size == (24, 16)
        errors.append(float((preview.pixels - small).abs().mean()))
    assert errors[2] < 0.06, errors
    assert errors[2] <= errors[1] < errors[0]


def test_a_preview_costs_little_next_to_a_step(
    demo_pipeline: LoadedPipeline, report: Callable[[str], None]
) -> None:
    """The result depends on the machine, so it is reported and not asserted."""
    previews = PreviewMap.fit(demo_pipeline)
    assert previews is not None
    latents = torch.randn(1, 4, 16, 16)
    taken = []
    for _ in range(50):
        started_at = time.perf_counter()
        previews(latents, 64, 64)
        taken.append(time.perf_counter() - started_at)
    params = GenerationParams("a", 1, width=64, height=64, num_inference_steps=10)
    started_at = time.perf_counter()
    demo_pipeline.generate(params)
    step_s = (time.perf_counter() - started_at) / 10
    report(
        f"a preview takes {median(taken) * 1e6:.0f} us, {median(taken) / step_s:.2%} of a step of "
        "the demo model"
    )
