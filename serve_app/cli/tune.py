"""``diffusion-serve tune``: find the thresholds of a model's acceleration."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from serve_app.config.model_files import check_model_folder
from serve_app.config.serve_file import choose_generator
from serve_app.errors import ConfigError, DiffusionServeError

DEMO_PROMPTS = (
    "a red circle on a blue background",
    "a green star on a white background",
    "two yellow rings on a purple background",
    "a large orange triangle on a black background",
    "a small cyan square at the top on a pink background",
    "a white cross on a green background",
    "a purple ring in the bottom right on a yellow background",
    "a blue circle and a red square on white",
)
"""Prompts of the demo model, which knows a hundred words."""

LEAST_PROMPTS = 4


def tune(
    config: Annotated[Path, typer.Option(help="Serve config file with the model.")],
    model: Annotated[
        str | None,
        typer.Option(help="Name of the model in a config with several. Default: the first."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt on each line. The demo model needs none."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=4, help="Denoising steps. Default: the model's.")
    ] = None,
    truth_steps: Annotated[
        int, typer.Option(min=4, help="Denoising steps of the images that count as the truth.")
    ] = 200,
    balanced_db: Annotated[
        float, typer.Option(help="Least median PSNR of 'balanced' to the images with all calls.")
    ] = 45.0,
    fast_db: Annotated[
        float, typer.Option(help="Least median PSNR of 'fast' to the images with all calls.")
    ] = 36.0,
    output: Annotated[
        Path | None, typer.Option(help="Write all results to this .json file.")
    ] = None,
) -> None:
    """Measure what extrapolated denoiser calls cost, and print thresholds for the config."""
    try:
        application = choose_generator(config, model).config
        chosen = application.model
        texts = _read_prompts(prompts, chosen.id == "demo")
        check_model_folder(chosen)
        # Imported here, so that --help and mistakes do not wait for torch.
        from serve_app.engine.engine import Engine
        from serve_app.engine.model.pipeline import LoadedPipeline
        from serve_app.tuning.caches import cache_rows
        from serve_app.tuning.front import Measurement, markdown, measure

        own = application.engine.limits
        limits = own.model_copy(update={"max_steps": max(own.max_steps, truth_steps)})
        engine_config = application.engine.model_copy(
            update={"limits": limits, "max_backlog_s": float("inf")}
        )
        pipeline = LoadedPipeline.load(chosen)
        with tqdm(unit="image", desc="generating") as bar:
            with Engine(pipeline, chosen, engine_config) as engine:
                count = steps or engine.info.default_steps
                measurement = Measurement(engine, pipeline, texts, count, truth_steps, bar.update)
                front = measure(measurement, balanced_db, fast_db)
            rows, notes = cache_rows(measurement, pipeline)  # they need networks without an engine
            front = replace(front, rows=[*front.rows, *rows], notes=notes)
    except DiffusionServeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if output is not None:
        try:
            output.write_text(json.dumps(asdict(front), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            typer.echo(f"error: {output} cannot be written: {error.strerror}", err=True)
            raise typer.Exit(2) from None
    typer.echo(f"{len(texts)} images in {count} steps; the truth has {truth_steps}.\n")
    typer.echo(markdown(front))
    for note in front.notes:
        typer.echo(f"\n{note}")
    typer.echo("\nFor the config:\n\nmodel:\n  acceleration:")
    levels = {
        "balanced": (front.balanced_error, balanced_db),
        "fast": (front.fast_error, fast_db),
    }
    for level, (threshold, least_db) in levels.items():
        value = 0 if threshold is None else threshold
        why = f"  # no threshold reaches {least_db:g} dB" if threshold is None else ""
        typer.echo(f"    {level}_error: {value:g}{why}")


def _read_prompts(path: Path | None, is_demo: bool) -> tuple[str, ...]:
    if path is None:
        if is_demo:
            return DEMO_PROMPTS
        raise ConfigError("--prompts: give a file with prompts like those of your users.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8.") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if len(prompts) < LEAST_PROMPTS:
        raise ConfigError(
            f"{path} has {len(prompts)} prompts; at least {LEAST_PROMPTS} are needed, better 16."
        )
    return prompts
