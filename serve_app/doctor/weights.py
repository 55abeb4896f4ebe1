"""The memory that a model needs, from the headers of its weights, without loading them.

It counts what `serve_app.engine.model.loader` loads: the components that model_index.json names,
their safetensors of the configured variant, at the configured dtype. Or a single file, and the
components that the configuration takes from elsewhere.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from serve_app.config.checkpoint_files import GGUF, read_tensors
from serve_app.config.component_files import quantization_methods
from serve_app.config.models import ModelConfig
from serve_app.config.replaced_components import component_folder, is_file, split_repository
from serve_app.config.safetensors_header import TensorHeader, read_header
from serve_app.config.source import SINGLE_FILE, is_path
from serve_app.errors import ModelLoadError

_FLOATS = ("F8", "F16", "BF16", "F32", "F64")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TAKE_TURNS = ("unet", "transformer", "text_encoder")
"""Name prefixes of the networks that ``offload: model`` loads in turns: denoisers, encoders."""
_DENOISERS = ("unet", "transformer")
_PARTS = (
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
)
"""Components by the starts of the names of tensors in a single file; others are the denoiser's."""


@dataclass(frozen=True)
class Component:
    """One network's weights."""

    name: str
    parameters: int
    """Count of numbers that are stored in the model's dtype."""
    other_bytes: int
    """Bytes of integers, which keep their type."""
    quantized: bool = False
    """True if the weights are already quantized, and so count as integers."""

    def size_bytes(self, bytes_each: int) -> int:
        """Return the memory of the network with ``bytes_each`` bytes a parameter."""
        return self.parameters * bytes_each + self.other_bytes


def cache_folder() -> Path:
    """Return the folder of models from the hub, as HF_HOME and the like set it."""
    return Path(constants.HF_HUB_CACHE)


def read_components(model: ModelConfig) -> list[Component] | None:
    """Read the sizes of the model's networks from files of this machine and the hub's cache.

    Returns None if a part of a model of the hub is not here, or not fully downloaded.

    Raises:
        ModelLoadError: if a file is not what its name says.
    """
    found: list[Component] = []
    if model.is_single_file:
        if (file := _find_file(model.source, model.revision)) is None:
            return None
        found = _read_single_file(file)
    else:
        if (folder := find_folder(model)) is None:
            return None
        for name in _named(folder / "model_index.json"):
            if name not in model.components:
                found.append(_read(name, _files(folder / name, model.variant)))
    found = [part for part in found if part.name not in model.components]
    for name, source in model.components.items():
        if source is not None:
            if (files := _find_replacement(name, source, model.variant)) is None:
                return None
            if files:  # else it is no network
                found.append(_read(name, files))
    return found


def find_folder(model: ModelConfig) -> Path | None:
    """Find the folder of a model that is not a single file, here or in the hub's cache.

    Returns None for a model of the hub that is not here or not fully downloaded. Raises
    `ModelLoadError` if its index is not JSON.
    """
    if model.is_local:
        return Path(model.source)
    folder = _snapshot(model.source, model.revision)
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    wanted = [name for name in _named(index) if name not in model.components]
    return folder if all(_files(folder / name, model.variant) for name in wanted) else None


def _snapshot(repository: str, revision: str | None) -> Path:
    """Return the folder of a revision in the hub's cache, which may not exist."""
    folder = cache_folder() / f"models--{repository.replace('/', '--')}"
    revision = revision or "main"
    reference = folder / "refs" / revision
    if reference.is_file():
        revision = reference.read_text(encoding="utf-8").strip()
    return folder / "snapshots" / revision


def _find_file(source: str, revision: str | None = None) -> Path | None:
    if is_path(source):
        return Path(source).expanduser()
    repository, inner = split_repository(source)
    file = _snapshot(repository, revision) / inner
    return file if file.is_file() else None


def _find_replacement(name: str, source: str, variant: str | None) -> list[Path] | None:
    """Return the weights of a replaced component; None if they are not here."""
    if is_file(source):
        file = _find_file(source)
        return None if file is None else [file]
    if is_path(source):
        return _files(component_folder(source, name), variant)
    repository, inner = split_repository(source)
    folder = _snapshot(repository, None) / inner
    return _files(folder, None) if folder.is_dir() else None


def _read(name: str, files: list[Path]) -> Component:
    place = f"model.components.{name}"
    headers = [
        read_header(file) if file.suffix == SINGLE_FILE else read_tensors(place, file)
        for file in files
    ]
    sizes = _size(tensor for header in headers for tensor in header.values())
    quantized = any(file.suffix == GGUF or quantization_methods(file.parent) for file in files)
    return Component(name, *sizes, quantized)


def _read_single_file(file: Path) -> list[Component]:
    """Divide the tensors of a file by the component that they belong to."""
    tensors = read_tensors("model.path", file)
    denoiser = "unet" if any(".input_blocks." in name for name in tensors) else "transformer"
    parts: dict[str, list[TensorHeader]] = {}
    for name, tensor in tensors.items():
        if not name.startswith("model_ema."):  # a second copy of the denoiser, which is not loaded
            part = next((part for start, part in _PARTS if name.startswith(start)), denoiser)
            parts.setdefault(part, []).append(tensor)
    return [Component(name, *_size(part)) for name, part in parts.items()]


def _named(index: Path) -> list[str]:
    """List the components that are networks, judged by their names before they are here."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{index} is not JSON: {error}. Fetch it again.") from None
    return [
        name
        for name, value in content.items()
        if isinstance(value, list)
        and value[:1] not in ([], [None])
        and ((index.parent / name / "config.json").is_file() or name.startswith(_TAKE_TURNS))
    ]


def _files(folder: Path, variant: str | None) -> list[Path]:
    """Choose the variant's files, else the plain ones, as diffusers does; all parts, or none."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if "." not in file.stem]
    chosen = plain
    if variant is not None:
        wanted = re.compile(rf"\.{re.escape(variant)}(-\d+-of-\d+)?$")
        chosen = [file for file in files if wanted.search(file.stem)] or plain
    parts = [re.search(r"-of-(\d+)", file.stem) for file in chosen]
    if parts and all(parts) and len(chosen) < max(int(part[1]) for part in parts if part):
        return []
    return chosen


def _size(tensors: Iterable[TensorHeader]) -> tuple[int, int]:
    """Return (count of floats, bytes of other numbers)."""
    parameters = other_bytes = 0
    for tensor in tensors:
        if tensor.dtype.startswith(_FLOATS):
            parameters += math.prod(tensor.shape)
        else:
            other_bytes += tensor.size_bytes
    return parameters, other_bytes


def needed_bytes(components: list[Component], model: ModelConfig, on_gpu: bool) -> int:
    """Return the bytes that the weights take; running requests need more."""
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"

    def size_bytes(component: Component) -> int:
        # Most of a denoiser is linear layers.
        small = model.speed.quantize != "none" and component.name.startswith(_DENOISERS)
        return component.size_bytes(1 if small else _BYTES[dtype])

    sizes = {component.name: size_bytes(component) for component in components}
    if model.speed.offload == "none" or not on_gpu:
        return sum(sizes.values())
    in_turns = [size for name, size in sizes.items() if name.startswith(_TAKE_TURNS)]
    return sum(sizes.values()) - sum(in_turns) + max(in_turns, default=0)
