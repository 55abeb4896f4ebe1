"""``model_index.json`` of a local model: its pipeline class and its components."""

import json
from pathlib import Path
from typing import Any

from serve_app.config.models import ModelConfig
from serve_app.config.stock_pipelines import PipelineSource, is_stock, read_pipeline_source
from serve_app.errors import ModelLoadError

DENOISERS = ("unet", "transformer", "transformer_2")
"""Component names under which diffusers keeps the network of the denoising loop."""


def read_model_index(model: ModelConfig, index_file: Path) -> dict[str, tuple[str, str]]:
    """Return the library and the class of each component, without those that are null.

    Raises:
        ModelLoadError: if the file is missing or wrong, or names a pipeline that is not in
            diffusers, lacks a component, or does not generate images from a prompt; or if it has
            no class for a name of ``model.components``.
    """
    place = f"model {model.id!r}: {index_file}"
    if not index_file.is_file():
        raise ModelLoadError(
            f"model {model.id!r}: {index_file.parent} has no model_index.json, so it is not in the "
            "diffusers format. If it has one .safetensors file, set model.path to that file."
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(
            f"{place} is not JSON: {error}. Fetch it again: `git lfs pull`, or `hf download`."
        ) from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelLoadError(
            f"{place} names no stock pipeline in _class_name; models that bring code of their own "
            "are not loaded."
        )
    class_name = index["_class_name"]
    if is_stock(class_name) is False or class_name.startswith(("Flax", "Onnx")):
        raise ModelLoadError(
            f"{place} names the pipeline {class_name!r}, which the installed diffusers does not "
            "have for PyTorch. Use a model of a stock pipeline; code of a model's own is not run."
        )
    source = read_pipeline_source(class_name)
    components = {
        name: _read_component(place, name, value)
        for name, value in index.items()
        if _is_component(source, name, value)
    }
    possible = set(index)
    if source is not None:
        _check_pipeline(place, class_name, source, components.keys() | model.components.keys())
        possible |= set() if source.components is None else source.components.names
    for name, elsewhere in model.components.items():
        if name not in (possible if elsewhere is None else components):
            raise ModelLoadError(
                f"{place} has no class for {name!r}, which model.components names. It has "
                f"{', '.join(sorted(components))}."
            )
    return components


def _is_component(source: PipelineSource | None, name: str, value: Any) -> bool:
    """Return whether diffusers loads the entry. Others are arguments, null or ignored."""
    if name.startswith("_") or value is None or (isinstance(value, list) and value[:1] == [None]):
        return False
    if source is None or source.components is None:
        return isinstance(value, list) and bool(value)
    return name in source.components.required | source.optional_components


def _check_pipeline(
    place: str, class_name: str, source: PipelineSource, components: set[str]
) -> None:
    if source.components is not None:
        missing = source.components.required - source.optional_components - components
        if missing:
            raise ModelLoadError(
                f"{place} lacks {', '.join(sorted(missing))}, which {class_name} needs. Fetch the "
                "whole model folder again."
            )
    if source.call is None:
        return
    if "prompt" not in source.call.names or not components.intersection(DENOISERS):
        raise ModelLoadError(
            f"{place}: {class_name} is not a text-to-image pipeline that can be served: it needs a "
            f"prompt and one of the components {', '.join(DENOISERS)}."
        )
    if inputs := sorted(source.call.required - {"prompt"}):
        raise ModelLoadError(
            f"{place}: {class_name} is not a text-to-image pipeline that can be served: each call "
            f"needs {', '.join(inputs)}. Use a pipeline that needs a prompt only."
        )


def _read_component(place: str, name: str, value: Any) -> tuple[str, str]:
    match value:
        case [str(library), str(class_name)] if library and class_name:
            return library, class_name
    raise ModelLoadError(
        f"{place}: the component {name!r} is {value!r}. It must be a library and a class, such as "
        '["diffusers", "UNet2DConditionModel"], or [null, null].'
    )
