"""The files of a model on this machine: its folder and its LoRA adapters.

These checks read folder listings and one JSON file, so they take milliseconds. The loader and the
command line call them before torch is imported.
"""

import json
from pathlib import Path

from serve_app.config.models import ModelConfig, is_path
from serve_app.errors import ModelLoadError

_WEIGHTS = (".safetensors",)
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def find_loras(model: ModelConfig) -> dict[str, str]:
    """Return ``{name: file or repository}`` of the named adapters and of those in the folder.

    Raises:
        ModelLoadError: if a file or the folder does not exist, or two adapters have one name.
    """
    found = dict(model.loras)
    for name, source in found.items():
        path = Path(source).expanduser()
        if is_path(source) and not (path.is_file() and path.suffix == ".safetensors"):
            raise ModelLoadError(f"model.loras: {name!r}: {path} is not a .safetensors file.")
    if model.lora_folder is None:
        return found
    folder = Path(model.lora_folder).expanduser()
    if not folder.is_dir():
        raise ModelLoadError(f"model.lora_folder: the folder {folder} does not exist.")
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ModelLoadError(
                f"model.lora_folder: {path} and an entry of model.loras have the name {name!r}. "
                "Rename one of the two."
            )
        found[name] = str(path)
    return found


def find_model(name: str) -> ModelConfig:
    """Return the configuration of ``demo``, of a folder, or of a repository of the hub.

    Raises:
        ModelLoadError: if ``name`` is a file, or neither a folder nor a possible repository.
    """
    if name == "demo":
        return ModelConfig(id=name)
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelConfig(id=path.resolve().name or "model", path=str(path.resolve()))
    if path.is_file():
        raise ModelLoadError(
            f"model {name!r} is a file. Give a folder in the diffusers format; diffusers' "
            "from_single_file and save_pretrained make one of a single-file checkpoint."
        )
    if is_path(name):
        raise ModelLoadError(
            f"model {name!r}: the folder {path} does not exist. Give a folder in the diffusers "
            "format, a Hugging Face repository as owner/name, or 'demo'."
        )
    if name.count("/") != 1 or not all(name.split("/")):
        raise ModelLoadError(
            f"model {name!r}: {path.absolute()} does not exist, and a Hugging Face repository is "
            "written as owner/name. Give one of the two, or 'demo'."
        )
    return ModelConfig(id=name)


def check_model_folder(model: ModelConfig) -> None:
    """Find what would stop a local model from loading.

    A repository of the hub is checked when it is loaded.

    Raises:
        ModelLoadError: if the folder is missing, is not in the diffusers format, needs code of its
            own, or holds a component whose weights are pickles only; or if an adapter is missing.
    """
    find_loras(model)
    if not model.is_folder:
        return
    folder = Path(model.source)
    if not folder.is_dir():
        raise ModelLoadError(
            f"model {model.id!r}: the folder {folder} does not exist. Set model.path to a folder "
            "in the diffusers format, or to the name of a Hugging Face repository. If the folder "
            "is only in an image or on a volume, check the file there."
        )
    for name in _component_names(model, folder / "model_index.json"):
        _check_component(model, folder / name)


def _component_names(model: ModelConfig, index_file: Path) -> list[str]:
    """Return the components that ``model_index.json`` lists, without those that are null."""
    if not index_file.is_file():
        raise ModelLoadError(
            f"model {model.id!r}: {index_file.parent} has no model_index.json, so it is not in the "
            "diffusers format. Convert a single-file checkpoint with diffusers' from_single_file "
            "and save_pretrained."
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"model {model.id!r}: {index_file} is not JSON: {error}") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelLoadError(
            f"model {model.id!r}: {index_file} names no stock pipeline in _class_name; models that "
            "bring code of their own are not loaded."
        )
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value[:1] not in ([], [None])
    ]


def _check_component(model: ModelConfig, component: Path) -> None:
    if not component.is_dir():
        raise ModelLoadError(
            f"model {model.id!r}: {component.parent / 'model_index.json'} names the component "
            f"{component.name!r}, but {component} does not exist. Copy the whole model folder."
        )
    files = [file.name for file in component.iterdir()]
    pickles = sorted(file for file in files if file.endswith(_PICKLES))
    if pickles and not any(file.endswith(_WEIGHTS) for file in files):
        raise ModelLoadError(
            f"model {model.id!r}: {component} has only pickled weights ({', '.join(pickles)}), "
            "which can run code when they are loaded. Convert them to safetensors: load them "
            "where you trust them and call save_pretrained(..., safe_serialization=True)."
        )
