"""The files of one component of a local model: its configuration, its vocabulary, its weights."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve_app.config.models import ModelConfig
from serve_app.config.safetensors_header import LFS_POINTER
from serve_app.config.stock_pipelines import has_own_module, is_network, is_stock
from serve_app.config.weight_files import check_weights
from serve_app.errors import ModelLoadError

_WITHOUT_VOCABULARY = ("ByT5", "Canine", "Perceiver")
"""Tokenizers that read bytes."""
_ABOUT_TOKENIZERS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
)
_QUANTIZERS = ("torchao", "bitsandbytes")
"""Packages that read weights that they quantized."""
_VOCABULARIES = (".json", ".txt", ".model", ".tiktoken", ".vocab")


def check_component(
    model: ModelConfig, folder: Path, library: str, class_name: str, with_weights: bool = True
) -> None:
    """Find what would stop a component from loading, or make it load without its content.

    Without ``with_weights``, the weights come from elsewhere.

    Raises:
        ModelLoadError: naming the file, and what to do.
    """
    _check_class(model, folder, library, class_name)
    if not folder.is_dir():
        raise ModelLoadError(
            f"model {model.id!r}: {folder.parent / 'model_index.json'} names the component "
            f"{folder.name!r}, but {folder} does not exist. Copy the whole model folder."
        )
    check_files(model, folder, library, class_name, with_weights)


def check_files(
    model: ModelConfig, folder: Path, library: str, class_name: str, with_weights: bool = True
) -> None:
    """Check the files of a component of a known class.

    Raises:
        ModelLoadError: naming the file, and what to do.
    """
    if class_name.endswith(("Tokenizer", "TokenizerFast")):
        _read_config(model, folder / "tokenizer_config.json", required=False)
        _check_vocabulary(model, folder, class_name)
    elif library == "diffusers" and class_name.endswith("Scheduler"):
        _read_config(model, folder / "scheduler_config.json", required=True)
    elif "Processor" in class_name or "FeatureExtractor" in class_name:  # also ProcessorPil
        for name in ("preprocessor_config.json", "processor_config.json"):
            _read_config(model, folder / name, required=False)
    elif library != "diffusers" or is_network(class_name):
        config = _read_config(model, folder / "config.json", required=True)
        if not with_weights:
            return
        _check_quantization(model, folder / "config.json", config)
        if "transformers_weights" not in config:  # else it names the file
            check_weights(model, folder, library)


def _check_class(model: ModelConfig, folder: Path, library: str, class_name: str) -> None:
    place = f"model {model.id!r}: {folder.parent / 'model_index.json'}: the component"
    entry = f"{folder.name!r} is {json.dumps([library, class_name])}"
    if library == "diffusers":
        if is_stock(class_name) is False:
            raise ModelLoadError(
                f"{place} {entry}, and the installed diffusers has no such class. Use a model for "
                "this version of diffusers, or install the version that the model needs."
            )
        if class_name.startswith(("Flax", "Onnx")):
            raise ModelLoadError(
                f"{place} {entry}, which does not run on PyTorch. Use the model's version for "
                "PyTorch."
            )
    elif library == "transformers":
        if class_name.startswith(("Flax", "TF")):
            raise ModelLoadError(
                f"{place} {entry}, which does not run on PyTorch. Use the model's version for "
                "PyTorch."
            )
    elif not has_own_module(library):
        if (folder / f"{library}.py").is_file():
            raise ModelLoadError(
                f"{place} {entry}, which is code of the model's own ({folder.name}/{library}.py). "
                "Such code is not run: use a model that has stock components only."
            )
        if not _is_installed(library):
            raise ModelLoadError(
                f"{place} {entry}, and there is no library {library!r}. Use a model that has "
                "components of diffusers and transformers only."
            )


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library.partition(".")[0]) is not None
    except ValueError:
        return False


def _read_config(model: ModelConfig, file: Path, required: bool) -> dict[str, Any]:
    place = f"model {model.id!r}: {file}"
    if not file.is_file():
        if not required and not file.is_symlink():
            return {}
        reason = "is a link to a file that does not exist" if file.is_symlink() else "is missing"
        raise ModelLoadError(f"{place} {reason}. Copy or fetch the whole model folder.")
    content = file.read_bytes()
    try:
        config = json.loads(content)
    except ValueError as error:
        lfs = content.startswith(LFS_POINTER)
        raise ModelLoadError(
            f"{place} is {'a Git LFS pointer' if lfs else f'not JSON: {error}'}. Fetch it again: "
            "`git lfs pull`, or `hf download`."
        ) from None
    if not isinstance(config, dict):
        raise ModelLoadError(
            f"{place} has a {type(config).__name__}, not a JSON object. Fetch it again."
        )
    return config


def quantization_methods(folder: Path) -> list[str | None]:
    """Return how a component's configuration says that its weights are quantized; usually empty.

    A method without a name is None. The file was checked before.
    """
    file = folder / "config.json"
    return _methods(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})


def _methods(config: dict[str, Any]) -> list[str | None]:
    found = [
        part["quantization_config"]
        for part in (config, config.get("text_config"))
        if isinstance(part, dict) and part.get("quantization_config") is not None
    ]
    return [one.get("quant_method") if isinstance(one, dict) else None for one in found]


def _check_quantization(model: ModelConfig, file: Path, config: dict[str, Any]) -> None:
    for method in _methods(config):
        if method not in _QUANTIZERS:
            raise ModelLoadError(
                f"model {model.id!r}: {file} has a quantization_config "
                f"({method}). Only weights that {' or '.join(_QUANTIZERS)} quantized are "
                "supported. Use the original weights; model.speed.quantize ('int8', 'fp8') "
                "quantizes the denoiser at start."
            )


def _check_vocabulary(model: ModelConfig, folder: Path, class_name: str) -> None:
    """Find a missing vocabulary: transformers makes an empty one, and images ignore the prompt."""
    files = {
        file.name: file
        for file in folder.iterdir()
        if file.suffix in _VOCABULARIES and file.name not in _ABOUT_TOKENIZERS
    }
    place = f"model {model.id!r}: {folder}"
    if not files and not class_name.startswith(_WITHOUT_VOCABULARY):
        raise ModelLoadError(
            f"{place} has no vocabulary, such as tokenizer.json. {class_name} would load without "
            "words. Copy or fetch the whole model folder."
        )
    if "tokenizer.json" in files:
        files = {"tokenizer.json": files["tokenizer.json"]}  # the only one that is read
    elif len(pair := files.keys() & {"vocab.json", "merges.txt"}) == 1:
        [other] = {"vocab.json", "merges.txt"} - pair
        raise ModelLoadError(
            f"{place} has {pair.pop()} and no {other}; {class_name} needs both. Copy or fetch the "
            "whole model folder."
        )
    for file in files.values():
        if not file.is_file():
            raise ModelLoadError(
                f"model {model.id!r}: {file} is no file, or a link to none. Copy or fetch the "
                "whole model folder."
            )
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
        if not start or start == LFS_POINTER:
            raise ModelLoadError(
                f"model {model.id!r}: {file} is {'a Git LFS pointer' if start else 'empty'}. Fetch "
                "it again: `git lfs pull`, or `hf download`."
            )
