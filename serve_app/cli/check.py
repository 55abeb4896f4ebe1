"""``diffusion-serve check``: find mistakes in a Serve config file before Ray is started."""

from pathlib import Path
from typing import Annotated

import typer

from serve_app.config.environment import keys_in_environment
from serve_app.config.models import ModelConfig
from serve_app.config.prechecks import check_models
from serve_app.config.serve_file import (
    foreign_policy,
    policy_kwargs,
    read_generators,
    read_serve_config,
)
from serve_app.config.storage import StorageConfig
from serve_app.errors import ConfigError, LoraSourceAway

BUCKET_WITHIN_S = 3.0
"""Time for a bucket to list its adapters."""


def check(
    config: Annotated[Path, typer.Argument(help="Serve config file, such as configs/demo.yaml.")],
) -> None:
    """Validate a config file within a second, without starting anything."""
    try:
        for warning in check_serve_file(config):
            typer.echo(f"warning: {warning}", err=True)
    except ConfigError as error:
        typer.echo(f"error: {config}: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{config}: ok")


def check_serve_file(path: Path, name: object = None) -> list[str]:
    """Check all that a Serve config file sets for this project, without Ray and without torch.

    Args:
        path: The file.
        name: The name of the file in warnings; ``path`` by default.

    Returns:
        Warnings about settings that cannot be checked.

    Raises:
        ConfigError: for the first mistake.
    """
    # Imported here, so that --help does not wait for HTTP libraries.
    from serve_app.autoscaling.params import read_scaling_params
    from serve_app.gateway.auth import KeyRing

    warnings = []
    for generator in read_generators(path):
        read_scaling_params(policy_kwargs(generator.autoscaling))
        if other := foreign_policy(generator.autoscaling):
            warnings.append(
                f"{name or path}: {other} scales {generator.deployment}; its parameters are not "
                "checked."
            )
    for application in read_serve_config(path):
        check_models(application)
        keys = KeyRing(application.gateway.keys_file, keys_in_environment())
        warnings += (f"{name or path}: {text}" for text in keys.unknown_models(application.ids))
        warnings += _storage_warnings(application.gateway.storage, name or path)
        for one in application.each_model():
            warnings += _lora_warnings(one.model, name or path)
    return warnings


def _lora_warnings(model: ModelConfig, name: object) -> list[str]:
    """Warn of a bucket whose adapters cannot be listed from here."""
    if model.lora_source_kind != "bucket":
        return []
    from serve_app.engine.loras.source import new_source

    source = new_source(model, BUCKET_WITHIN_S)
    assert source is not None
    try:
        source.names()
    except LoraSourceAway as error:
        return [f"{name}: model.lora_source is {model.lora_source!r}: {error}"]
    return []


def _storage_warnings(storage: StorageConfig, name: object) -> list[str]:
    """Warn of a store that takes no images from here. The server's machines may reach it."""
    if storage.url is None:
        return []
    from serve_app.gateway.storage.store import problem_with  # an optional dependency

    problem = problem_with(storage)
    if problem is None:
        return []
    return [f"{name}: gateway.storage.url is {storage.url!r}, which takes no images: {problem}"]
