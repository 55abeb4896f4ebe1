"""The description of a loaded model, from its pipeline, its certificate and the limits."""

import logging

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.startup.certification import Certificate
from serve_app.errors import ConfigError, InvalidRequest
from serve_app.protocol.params import GenerationParams, ModelInfo

logger = logging.getLogger(__name__)


def describe_model(
    model: ModelConfig, config: EngineConfig, pipeline: LoadedPipeline, certificate: Certificate
) -> ModelInfo:
    """Return what clients may ask of the model.

    Raises:
        ConfigError: if the model's own defaults break the configured limits.
    """
    width, height = pipeline.default_size_px
    info = ModelInfo(
        id=model.id,
        pipeline=pipeline.class_name,
        dtype=str(pipeline.dtype).removeprefix("torch."),
        device=str(pipeline.device),
        default_width=width,
        default_height=height,
        size_multiple=pipeline.size_multiple,
        default_steps=pipeline.default_steps,
        takes_negative_prompt=pipeline.takes_negative_prompt,
        tasks=certificate.tasks,
        default_strengths=pipeline.default_strengths,
        noise_schedulers=pipeline.noise_schedulers,
        fewest_steps=pipeline.fewest_steps,
        loras=pipeline.adapters.names,
        sharing=certificate.sharing,
        sharing_difference=certificate.difference,
        sharing_note=certificate.note,
        limits=config.limits,
    )
    try:
        GenerationParams("defaults", 0).resolved(info)
    except InvalidRequest as error:
        raise ConfigError(
            f"model {model.id!r}: a request without options breaks the engine's limits: {error} "
            "Set model.default_steps, model.default_size_px or engine.limits."
        ) from None
    return info


def log_sharing(info: ModelInfo, batching_wanted: bool) -> None:
    """Log how requests share the pipeline: a warning if they cannot, though the config wants it."""
    name = f"{info.id} ({info.pipeline})"
    if info.sharing == "batched":
        logger.info("model %s: batching=on, largest difference %.2g", name, info.sharing_difference)
        return
    logger.log(
        logging.WARNING if batching_wanted else logging.INFO,
        "model %s: batching=off, requests %s: %s",
        name,
        "take turns" if info.sharing == "interleaved" else "run one after another",
        info.sharing_note,
    )
