"""The components that `model.components` takes from elsewhere: their places and their files."""

import json
from pathlib import Path

from serve_app.config.checkpoint_files import GGUF, PICKLES, read_tensors
from serve_app.config.component_files import check_files
from serve_app.config.models import ModelConfig
from serve_app.config.source import SINGLE_FILE, is_path
from serve_app.errors import ModelLoadError


def is_file(source: str) -> bool:
    """Return whether a source names one file rather than a folder or a repository."""
    return source.endswith((SINGLE_FILE, GGUF))


def split_repository(source: str) -> tuple[str, str]:
    """Split ``owner/name/path`` into the repository and the path in it, which may be empty."""
    owner, name, *rest = source.strip("/").split("/")
    return f"{owner}/{name}", "/".join(rest)


def component_folder(source: str, name: str) -> Path:
    """Return the folder of a component: ``source`` itself, or its place in a whole model."""
    folder = Path(source).expanduser().resolve()
    return folder / name if (folder / "model_index.json").is_file() else folder


def check_replaced(model: ModelConfig, name: str, library: str, class_name: str) -> None:
    """Check the files of a component that lies in a folder or file of its own.

    A source on the hub is checked when it is loaded.

    Args:
        model: The model.
        name: The component.
        library: The library of its class in the model's index; empty if it is not known.
        class_name: The class; empty if it is not known.

    Raises:
        ModelLoadError: naming the file, and what to do.
    """
    source = model.components[name]
    if source is None:
        return
    place = f"model {model.id!r}: model.components.{name}"
    if is_file(source) or source.endswith(PICKLES):
        if is_path(source) or source.endswith(PICKLES):
            read_tensors(place, Path(source).expanduser())
        return
    if not is_path(source):
        return
    folder = component_folder(source, name)
    if folder.is_file():
        raise ModelLoadError(
            f"{place}: {folder} is neither a folder nor a .safetensors or .gguf file. Name one."
        )
    if not folder.is_dir():
        raise ModelLoadError(f"{place}: the folder {folder} does not exist. Correct the path.")
    if own := own_class(folder):
        library, class_name = "diffusers", own
    if class_name:
        check_files(model, folder, library, class_name)


def own_class(folder: Path) -> str | None:
    """Return the class of diffusers that a component's own configuration names."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return None  # `check_files` says so
    name = config.get("_class_name") if isinstance(config, dict) else None
    return name if isinstance(name, str) else None
