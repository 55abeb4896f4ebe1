"""The packages that a model needs, for quantized weights or for the images that it reads.

A replica needs them. `serve_app.app.build` and `diffusion-serve check` may run elsewhere, so that
only the loader and the doctor ask for them.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from serve_app.config.checkpoint_files import GGUF
from serve_app.config.component_files import quantization_methods
from serve_app.config.model_index import read_model_index
from serve_app.config.models import ModelConfig
from serve_app.config.replaced_components import component_folder, is_file
from serve_app.config.source import is_path
from serve_app.errors import ModelLoadError

_INSTALLATIONS = {
    "torchao": "Install 'diffusion-serve[quantize]'.",
    "bitsandbytes": "Install it where the replicas run: `pip install bitsandbytes`.",
    "gguf": "Install 'diffusion-serve[gguf]'.",
    "torchvision": "Install it where the replicas run, for their build of torch: `pip install "
    "torchvision`.",
}
"""Packages by their names, and how to install each."""


def check_model_packages(model: ModelConfig) -> None:
    """Check that this machine has the packages that the local model needs.

    Raises:
        ModelLoadError: naming the file, the package and its installation.
    """
    for file, package in _needed(model):
        if find_spec(package) is None:
            raise ModelLoadError(
                f"model {model.id!r}: {file} needs the package {package}, which is not installed. "
                f"{_INSTALLATIONS[package]}"
            )


def _needed(model: ModelConfig) -> Iterator[tuple[Path | str, str]]:
    folders = []
    if not model.is_single_file and model.is_local:
        replaced = model.components
        folder = Path(model.source)
        folders = [one for one in folder.iterdir() if one.name not in replaced]
        index_file = folder / "model_index.json"
        for name, (_, class_name) in read_model_index(model, index_file).items():
            if class_name.endswith("VLProcessor"):  # transformers reads videos with it, too
                yield folder / name, "torchvision"
    for name, source in model.components.items():
        if source is not None and source.endswith(GGUF):
            yield source, "gguf"
        elif source is not None and is_path(source) and not is_file(source):
            folders.append(component_folder(source, name))
    for folder in folders:
        for method in quantization_methods(folder):
            if method in _INSTALLATIONS:
                yield folder, method
