"""``diffusion-serve infer``: generate one image without a server."""

import re
import secrets
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from serve_app.config.model_files import check_model_folder, find_model
from serve_app.config.models import EngineConfig
from serve_app.errors import DiffusionServeError, InvalidRequest

FORMATS: dict[str, Literal["png", "jpeg", "webp"]] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}


def infer(
    prompt: Annotated[str, typer.Option(help="Description of the image.")],
    output: Annotated[Path, typer.Option(help="File to write: .png, .jpg, .jpeg or .webp.")] = Path(
        "image.png"
    ),
    model: Annotated[
        str, typer.Option(help="'demo', a folder, a .safetensors file, or a repository on the hub.")
    ] = "demo",
    steps: Annotated[
        int | None, typer.Option(help="Number of denoising steps. Default: the model's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed: the same seed gives the same image. Default: random.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Description of content to avoid.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Weight of the prompt. Default: the model's.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Noise scheduler, such as euler, dpm++ or ddim. Default: the model's."),
    ] = None,
) -> None:
    """Generate one image, without a server and without Ray."""
    try:
        image_format = FORMATS.get(output.suffix.lower())
        if image_format is None:
            raise InvalidRequest(f"--output must end in {', '.join(FORMATS)}; got {output}.")
        if not output.absolute().parent.is_dir():
            raise InvalidRequest(f"--output: the folder {output.absolute().parent} does not exist.")
        width, height = _size(size)
        config = find_model(model)
        check_model_folder(config)
        # Imported here, so that --help and mistakes do not wait for torch.
        from serve_app.engine.engine import Engine
        from serve_app.protocol.events import Event, Progress
        from serve_app.protocol.images import Encoding
        from serve_app.protocol.params import GenerationParams

        params = GenerationParams(
            prompt=prompt,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            noise_scheduler=scheduler,
        )
        # One request shares no batch, so there is nothing to certify.
        single = EngineConfig(max_running=1)
        with Engine.load(config, single) as engine, tqdm(unit="step", desc="denoising") as bar:

            def on_event(event: Event) -> None:
                if isinstance(event, Progress):
                    bar.total = event.total_steps
                    bar.update(event.step - bar.n)

            started_at = time.perf_counter()
            result = engine.generate(params, on_event)
            took_s = time.perf_counter() - started_at
        data = Encoding(image_format).encode(result.image)
    except DiffusionServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        output.write_bytes(data)
    except OSError as error:
        typer.echo(f"error: {output} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(
        f"{output}: {result.image.width}x{result.image.height}, seed {params.seed}, {took_s:.1f} s"
    )


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    if match := re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text):
        return int(match[1]), int(match[2])
    raise InvalidRequest(f"--size must be WIDTHxHEIGHT in pixels, such as 512x512; got {text!r}.")
