"""Loading of a stock diffusers pipeline from its config, onto its device."""

import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from serve_app.config.model_files import check_model_folder
from serve_app.config.models import ModelConfig
from serve_app.config.needed_packages import check_model_packages
from serve_app.engine.model.checkpoints import read_parts, read_single_file
from serve_app.engine.model.networks import denoisers_of, networks_of
from serve_app.engine.model.speed import speed_up
from serve_app.engine.model.weights import check_weights, record_weights
from serve_app.errors import ConfigError, ModelLoadError


def load_stock(config: ModelConfig) -> DiffusionPipeline:
    """Load weights (safetensors only, no code of the model's own) and move them to the device.

    Raises:
        ModelLoadError: the model cannot be loaded; the message says why.
        ConfigError: the device or a speed option cannot be used.
    """
    check_model_folder(config)
    check_model_packages(config)
    device = resolve_device(config.device)
    _quiet_libraries()
    try:
        pipeline = read_pipeline(config, device)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"model {config.id!r} cannot be loaded from {config.source}: "
            f"{type(error).__name__}: {error}"
        ) from error
    speed_up(pipeline, denoisers_of(pipeline), config.speed, device)
    return pipeline


def resolve_device(wanted: str) -> torch.device:
    """Return the device to run on.

    Raises:
        ConfigError: ``wanted`` is ``cuda`` and torch cannot use a GPU.
    """
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        built_for = torch.version.cuda
        raise ConfigError(
            "model.device is 'cuda', but torch cannot use a GPU. "
            + (
                f"This torch {torch.__version__} has no CUDA support: install a CUDA build."
                if built_for is None
                else f"This torch {torch.__version__} needs CUDA {built_for}: check the driver "
                "with nvidia-smi, and start a container with --gpus all."
            )
        )
    return torch.device("cuda" if wanted != "cpu" and usable else "cpu")


def _resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def _quiet_libraries() -> None:
    """Turn off progress bars on stderr, and advice without use for a server."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_modules)
    for handler in logging.getLogger("diffusers").handlers:  # each pipeline has its own logger
        handler.addFilter(_is_not_about_safety)


def _names_modules(record: logging.LogRecord) -> bool:
    """Drop diffusers' warning of a cast that names no module: SDXL casts its VAE at each image."""
    return "should be kept in float32: []" not in record.getMessage()


def _is_not_about_safety(record: logging.LogRecord) -> bool:
    """Drop diffusers' remarks on safety checkers, which do not apply: they see images later."""
    return not record.getMessage().startswith(
        ("You have disabled the safety checker", "Potential NSFW content was detected")
    )


def read_pipeline(config: ModelConfig, device: torch.device) -> DiffusionPipeline:
    """Read the pipeline and its weights, directly to ``device`` where that is possible.

    Raises:
        ModelLoadError: weights are missing in the files, or have the wrong shape.
    """

    dtype = _resolve_dtype(config.dtype, device)

    def read(**placement: str) -> DiffusionPipeline:
        with record_weights() as reports:
            try:
                if config.is_single_file:
                    return read_single_file(config, dtype)
                return DiffusionPipeline.from_pretrained(
                    config.source,
                    revision=config.revision,
                    variant=config.variant,
                    dtype=dtype,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=Path(config.source).is_dir(),
                    **read_parts(config, dtype),
                    **placement,
                )
            finally:
                check_weights(config, reports)  # the better reason, if reading failed as well

    # Some options must not put all weights on the GPU. Offloading keeps most networks on the CPU,
    # and 8-bit weights are made layer by layer so that the originals never fill the GPU.
    speed = config.speed
    # diffusers reads single files to the CPU, from which `speed_up` moves them.
    if (
        config.is_single_file
        or device.type == "cpu"
        or speed.offload != "none"
        or speed.quantize != "none"
    ):
        return read()
    try:
        pipeline = read(device_map=device.type)
    except NotImplementedError:  # diffusers rejects pipelines in two parts, before it reads
        return read()
    _forget_placement(pipeline)
    return pipeline


def _forget_placement(pipeline: DiffusionPipeline) -> None:
    """Make a pipeline that was read with a ``device_map`` look as if it had been moved.

    For a single device, diffusers 0.42 places each weight as it is read from the file
    (`load_model_dict_into_meta`), like transformers 5, and does not build the network on the CPU
    first. accelerate then adds no hooks (`dispatch_model` without ``force_hooks``), but the map
    stays noted. With that note, the pipeline loads adapters differently and rejects moves.
    """
    pipeline.hf_device_map = None
    for network in networks_of(pipeline).values():
        vars(network).pop("hf_device_map", None)
