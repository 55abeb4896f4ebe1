"""The shipped weights generate what the prompt names."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.protocol.params import GenerationParams
from tools.demo_model.evaluate import accuracy, generate_held_out
from tools.demo_model.judge import read

pytestmark = pytest.mark.slow


def test_it_loads_with_from_pretrained_alone_and_is_small() -> None:
    pipeline = DiffusionPipeline.from_pretrained(DEMO_MODEL_DIR)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert network.dtype == torch.float32
    assert sum(file.stat().st_size for file in DEMO_MODEL_DIR.rglob("*")) <= 16 * 1024 * 1024
    assert not [
        file for file in DEMO_MODEL_DIR.rglob("*") if file.suffix in {".bin", ".pt", ".ckpt"}
    ]


def test_images_match_held_out_prompts(report: Callable[[str], None]) -> None:
    generated = generate_held_out(
        DiffusionPipeline.from_pretrained(DEMO_MODEL_DIR), pairs=128, steps=20
    )
    share = accuracy(generated)
    shares = ", ".join(f"{part} {value:.1%}" for part, value in share.items())
    report(f"demo model, {len(generated)} held-out prompts at 20 steps: {shares}")
    assert share["color"] >= 0.95
    assert share["background"] >= 0.95
    assert share["shape"] >= 0.90


def _generate(pipeline: LoadedPipeline, **options: object) -> NDArray[np.uint8]:
    defaults: dict[str, object] = {
        "prompt": "a red circle on a blue background",
        "seed": 1,
        "width": 64,
        "height": 64,
        "num_inference_steps": 12,
    }
    pixels = pipeline.generate(GenerationParams(**(defaults | options)))[0]  # type: ignore[arg-type]
    return (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _difference(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(float) - two).mean())


def test_every_parameter_has_a_visible_effect(demo_pipeline: LoadedPipeline) -> None:
    plain = _generate(demo_pipeline)
    assert _difference(plain, _generate(demo_pipeline)) == 0
    assert _difference(plain, _generate(demo_pipeline, seed=2)) > 2
    assert _difference(plain, _generate(demo_pipeline, guidance_scale=1.0)) > 0.5
    assert _difference(plain, _generate(demo_pipeline, num_inference_steps=3)) > 0.5
    assert _difference(plain, _generate(demo_pipeline, negative_prompt="a blue background")) > 2


def test_all_sizes_from_32_to_128_run(demo_pipeline: LoadedPipeline) -> None:
    sides = list(range(32, 129, 8))
    for width, height in zip(sides, reversed(sides), strict=True):
        image = _generate(demo_pipeline, width=width, height=height, num_inference_steps=2)
        assert image.shape == (height, width, 3)
    for side in (48, 96):
        seen = read(_generate(demo_pipeline, width=side, height=side, num_inference_steps=20))
        assert seen.background == "blue"
        assert [item.color for item in seen.objects] == ["red"]
