"""The outcome of a start: the description of the model, or the error, for clients and the log."""

import logging

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.sample_requests import with_input
from serve_app.engine.startup.certification import Certificate
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.noise_scheduler_trials import SchedulerTrials
from serve_app.errors import ConfigError, DiffusionServeError, InvalidRequest, ModelLoadError
from serve_app.protocol.params import GenerationParams, ModelInfo

logger = logging.getLogger(__name__)


def describe_model(
    model: ModelConfig,
    config: EngineConfig,
    pipeline: LoadedPipeline,
    certificate: Certificate,
    trials: SchedulerTrials,
) -> ModelInfo:
    """Return what clients may ask of the model.

    Raises:
        ConfigError: if the model's own defaults break the configured limits.
    """
    width, height = pipeline.default_size_px
    limits, longest_px = config.limits, pipeline.longest_side_px
    if longest_px is not None and longest_px < limits.max_side_px:
        limits = limits.model_copy(update={"max_side_px": longest_px})
    offered = trials.offered(pipeline.noise_schedulers, certificate.tasks)
    info = ModelInfo(
        id=model.id,
        pipeline=pipeline.class_name,
        dtype=str(pipeline.dtype).removeprefix("torch."),
        device=str(pipeline.device),
        default_width=width,
        default_height=height,
        size_multiple=pipeline.size_multiple,
        default_steps=pipeline.default_steps,
        default_acceleration=model.acceleration.default,
        low_quality_acceleration=model.acceleration.low_quality,
        takes_negative_prompt=pipeline.takes_negative_prompt,
        tasks=certificate.tasks,
        max_input_images=certificate.input_images,
        default_strengths=pipeline.default_strengths,
        noise_schedulers=offered,
        unavailable_noise_schedulers=trials.faults,
        fewest_steps={name: pipeline.fewest_steps[name] for name in offered},
        loras=pipeline.adapters.names,
        partial_loras=pipeline.adapters.partial,
        loras_on_demand=model.lora_source is not None,
        sharing=certificate.sharing,
        sharing_difference=certificate.difference,
        sharing_psnr_db=certificate.psnr_db,
        sharing_note=certificate.note,
        limits=limits,
        safety=pipeline.safety.mode,
        safety_checker=pipeline.safety.is_checked,
    )
    try:
        defaults = GenerationParams("defaults", 0, width=width, height=height)
        with_input(defaults, certificate.tasks[0], strength=None).resolved(info)
    except InvalidRequest as error:
        raise ConfigError(
            f"model {model.id!r}: a request without options breaks the engine's limits: {error} "
            "Set model.default_steps, model.default_size_px or engine.limits."
        ) from None
    return info


def start_error(crash: BaseException, model: ModelConfig, pipeline: str) -> DiffusionServeError:
    """Return the error to raise when the engine's thread ended during the start."""
    if isinstance(crash, ConfigError):
        return crash
    error = ModelLoadError(
        f"model {model.id!r}: {pipeline} cannot generate an image: {type(crash).__name__}: {crash}"
    )
    error.__cause__ = crash
    return error


def report_start(
    info: ModelInfo, cold_start: ColdStart, metrics: EngineMetrics, batching_wanted: bool
) -> None:
    """Report how requests share the pipeline, and how long the start took.

    Requests that cannot share it are a warning, unless ``batching_wanted`` is false.
    """
    if batching_wanted:  # without it nothing was compared
        metrics.certified(info.sharing, info.sharing_difference, info.sharing_note)
    _log_sharing(info, batching_wanted)
    cold_start.report(info.id)


def _log_sharing(info: ModelInfo, batching_wanted: bool) -> None:
    name = f"{info.id} ({info.pipeline})"
    if info.sharing == "batched":
        logger.info(
            "model %s: batching=on, images differ from separate ones by %.2g (PSNR %.0f dB)",
            name,
            info.sharing_difference,
            info.sharing_psnr_db,
        )
        if info.sharing_note:
            logger.warning("model %s: batches are limited: %s", name, info.sharing_note)
        return
    logger.log(
        logging.WARNING if batching_wanted else logging.INFO,
        "model %s: batching=off, requests %s: %s",
        name,
        "take turns" if info.sharing == "interleaved" else "run one after another",
        info.sharing_note,
    )
