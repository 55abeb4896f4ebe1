"""Models as they are found: one file with all weights, and components from elsewhere.

diffusers converts the names of the tensors (``from_single_file``). This module finds the files and
the configurations for it, here or on the hub. `serve_app.engine.model.weights` sees which tensors
were there.
"""

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, GGUFQuantizationConfig
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from serve_app.config.checkpoint_files import GGUF, check_whole, read_tensors
from serve_app.config.model_index import read_model_index
from serve_app.config.models import ModelConfig
from serve_app.config.replaced_components import component_folder, is_file, split_repository
from serve_app.config.safetensors_header import TensorHeader
from serve_app.config.source import is_path
from serve_app.config.weight_files import has_variant
from serve_app.errors import ModelLoadError

_CONFIGURATIONS = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
"""Patterns of all files of a repository but its weights."""

_PREDICTS_V = "v_pred"
"""Name of a tensor that marks files for v-prediction. diffusers does not look at it."""

_UNCONVERTED = (SingleFileComponentError, KeyError, IndexError, AttributeError)
"""How diffusers' conversions fail if a tensor is missing."""


def read_single_file(config: ModelConfig, dtype: torch.dtype) -> DiffusionPipeline:
    """Read a pipeline from one file, to the CPU.

    Raises:
        ModelLoadError: the file does not hold the model that the configurations describe, or no
            configurations are to be had.
    """
    place = f"model {config.id!r}: model.path"
    file = _fetch_file(config.source, config.revision)
    check_whole(place, file, has_vae="vae" in config.components)
    tensors = read_tensors(place, file)
    layout = _fetch_layout(config, tensors)
    index_file = layout / "model_index.json"
    read_model_index(config, index_file)
    class_name = DiffusionPipeline.load_config(layout)["_class_name"]
    pipeline_class = getattr(diffusers, class_name)
    if not hasattr(pipeline_class, "from_single_file"):
        raise ModelLoadError(
            f"{place}: diffusers reads no {class_name} from one file. Use a folder in the "
            "diffusers format. If the file holds one component, name it in model.components."
        )
    parts = read_parts(config, dtype, layout)
    try:
        pipeline: DiffusionPipeline = pipeline_class.from_single_file(
            str(file), config=str(layout), dtype=dtype, local_files_only=True, **parts
        )
    except SingleFileComponentError as error:
        lost = re.search(r"^(\w+) = (\w+)", str(error), re.MULTILINE)
        name, kind = lost.groups() if lost else ("…", "a component")
        raise ModelLoadError(
            f"{place}: {file} has no weights for {name} ({kind}), which {index_file} names. Set "
            f"model.components.{name} to a folder or repository that has them, or to null."
        ) from error
    except _UNCONVERTED as error:
        raise _unconverted(place, file, class_name, index_file, error) from error
    predicts = getattr(pipeline.scheduler.config, "prediction_type", None)
    if _PREDICTS_V in tensors and predicts != "v_prediction":
        raise ModelLoadError(
            f"{place}: {file} was trained for v-prediction (it has {_PREDICTS_V!r}), and the noise "
            f"scheduler in {layout} has prediction_type {predicts!r}, so that images would be "
            "noise. Set model.components.scheduler to a folder with 'v_prediction'."
        )
    return pipeline


def read_parts(
    config: ModelConfig, dtype: torch.dtype, layout: Path | None = None
) -> dict[str, Any]:
    """Read the components that come from elsewhere, to the CPU; None for those left out.

    Args:
        config: The model.
        dtype: Type of their weights, and of the calculations with quantized ones.
        layout: The folder with the configurations, if it is not ``config.layout``.

    Raises:
        ModelLoadError: a component cannot be read from its source.
    """
    if not any(config.components.values()):
        return dict(config.components)
    if layout is None and is_path(config.source):
        layout = Path(config.source)
    if layout is None:
        file = hf_hub_download(config.source, "model_index.json", revision=config.revision)
        index = read_model_index(config, Path(file))
    else:
        index = read_model_index(config, layout / "model_index.json")
    parts: dict[str, Any] = {}
    for name, source in config.components.items():
        if source is None:
            parts[name] = None
            continue
        kind = simple_get_class_obj(*index[name])
        try:
            if is_file(source):
                parts[name] = _read_file(config, kind, name, source, layout, dtype)
            else:
                parts[name] = _read_folder(config, kind, name, source, dtype)
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"model {config.id!r}: model.components.{name}: {source} cannot be loaded as "
                f"{kind.__name__}: {type(error).__name__}: {error}"
            ) from error
    return parts


def _read_file(
    config: ModelConfig, kind: Any, name: str, source: str, layout: Path | None, dtype: torch.dtype
) -> Any:
    place = f"model {config.id!r}: model.components.{name}"
    if not hasattr(kind, "from_single_file"):
        raise ModelLoadError(
            f"{place}: diffusers reads no {kind.__name__} from one file. Name a folder or a "
            "repository."
        )
    file = _fetch_file(source, None)
    read_tensors(place, file)
    options = {}
    if file.suffix == GGUF:
        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
    configurations = config.source if layout is None else str(layout)
    try:
        return kind.from_single_file(
            str(file),
            config=configurations,
            config_revision=config.revision if layout is None else None,
            subfolder=name,
            dtype=dtype,
            local_files_only=layout is not None,
            **options,
        )
    except _UNCONVERTED as error:
        raise _unconverted(place, file, kind.__name__, configurations, error) from error


def _unconverted(
    place: str, file: Path, kind: str, configurations: object, error: Exception
) -> ModelLoadError:
    return ModelLoadError(
        f"{place}: diffusers cannot convert {file} to the {kind} that {configurations} describes "
        f"({type(error).__name__}: {error}). A tensor is missing in the file, or its family is "
        "another one."
    )


def _read_folder(config: ModelConfig, kind: Any, name: str, source: str, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {}
    if is_path(source):
        folder = component_folder(source, name)
        place, options["local_files_only"] = str(folder), True
    else:
        place, options["subfolder"] = split_repository(source)
    if issubclass(kind, ConfigMixin):  # its own configuration may name another class
        own = kind.load_config(place, **options).get("_class_name", kind.__name__)
        kind = getattr(diffusers, own)
    if issubclass(kind, nn.Module):
        options |= {"dtype": dtype, "use_safetensors": True}
        if is_path(source) and has_variant(folder, config.variant):
            options["variant"] = config.variant
    return kind.from_pretrained(place, **options)


def _fetch_file(source: str, revision: str | None) -> Path:
    if is_path(source):
        return Path(source).expanduser()
    repository, file = split_repository(source)
    return Path(hf_hub_download(repository, file, revision=revision))


def _fetch_layout(config: ModelConfig, tensors: dict[str, TensorHeader]) -> Path:
    """Return a folder with all configurations for a file with these ``tensors``."""
    base = config.layout
    if base is not None and is_path(base):
        return Path(base)
    source = base or _known_repository(tensors)
    advice = "Set model.base to a folder in the diffusers format of the same family"
    if source is None:
        raise ModelLoadError(
            f"model {config.id!r}: diffusers cannot tell the family of {config.source} from its "
            f"tensors. {advice}, or to a repository."
        )
    try:
        return Path(snapshot_download(source, allow_patterns=_CONFIGURATIONS))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"model {config.id!r}: the configurations for {config.source} come from the repository "
            f"{source}, which cannot be fetched: {error}. {advice}."
        ) from error


def _known_repository(tensors: dict[str, TensorHeader]) -> str | None:
    """Return the repository whose configurations diffusers takes for a file, if it knows one."""
    try:  # it looks at names and shapes only
        kind = single_file_utils.infer_diffusers_model_type(tensors)
    except (KeyError, IndexError):
        return None
    if kind == "v1" and single_file_utils.CHECKPOINT_KEY_NAMES["v1"] not in tensors:
        return None  # what it calls everything else
    source: str = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind][
        "pretrained_model_name_or_path"
    ]
    return source
