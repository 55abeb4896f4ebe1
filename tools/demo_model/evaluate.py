"""Measures the demo model on held-out prompts: ``python -m tools.demo_model.evaluate``."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from serve_app.config.source import DEMO_MODEL_DIR
from tools.demo_model.judge import Verdict, judge
from tools.demo_model.scenes import Scene, caption, sample_scene

BATCH = 16


@dataclass(frozen=True)
class GeneratedImage:
    """A held-out scene, its caption, the generated image, and the judge's verdict."""

    scene: Scene
    prompt: str
    image: NDArray[np.uint8]
    verdict: Verdict


def generate_held_out(
    pipeline: DiffusionPipeline,
    pairs: int = 256,
    steps: int = 20,
    guidance_scale: float = 7.5,
    size_px: int = 64,
    seed: int = 0,
) -> list[GeneratedImage]:
    """Generate images for ``pairs`` prompts and seeds; a quarter of the prompts name two objects.

    Training never saw any of their combinations of shape, colour and background.
    """
    rng = Random(f"held out {seed}")
    scenes = [sample_scene(rng, held_out=True, pairs=0.25) for _ in range(pairs)]
    prompts = [caption(scene, rng, name_background=True) for scene in scenes]
    pipeline.set_progress_bar_config(disable=True)
    generated = []
    for start in range(0, pairs, BATCH):
        end = min(start + BATCH, pairs)
        images = pipeline(
            prompts[start:end],
            width=size_px,
            height=size_px,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(start, end)],
            output_type="np",
        ).images
        for scene, prompt, pixels in zip(
            scenes[start:end], prompts[start:end], images, strict=True
        ):
            image = (pixels * 255).round().astype(np.uint8)
            generated.append(GeneratedImage(scene, prompt, image, judge(image, scene)))
    return generated


def accuracy(generated: list[GeneratedImage]) -> dict[str, float]:
    """Return the shares of images with all colours, the background, and all shapes right."""
    return {
        part: sum(getattr(item.verdict, part) for item in generated) / len(generated)
        for part in ("color", "background", "shape")
    }


def contact_sheet(images: list[NDArray[np.uint8]], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Join images of one size side by side, row by row."""
    framed = [
        np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=255)
        for image in images[: len(images) // columns * columns]
    ]
    rows = [
        np.concatenate(framed[start : start + columns], axis=1)
        for start in range(0, len(framed), columns)
    ]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = DEMO_MODEL_DIR,
    pairs: Annotated[int, typer.Option(help="Number of prompts and seeds.")] = 256,
    steps: int = 20,
    guidance_scale: float = 7.5,
    size_px: int = 64,
    seed: int = 0,
    sheet: Annotated[Path | None, typer.Option(help="Write the first 32 images here.")] = None,
) -> None:
    """Print how often colours, backgrounds and shapes match the prompt."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    generated = generate_held_out(pipeline, pairs, steps, guidance_scale, size_px, seed)
    for part, share in accuracy(generated).items():
        typer.echo(f"{part:<10} {share:.1%} of {pairs}")
    for item in generated:
        if not (item.verdict.color and item.verdict.background and item.verdict.shape):
            typer.echo(f"  wrong: {item.prompt}")
    if sheet is not None:
        contact_sheet([item.image for item in generated[:32]]).save(sheet)


if __name__ == "__main__":
    typer.run(main)
