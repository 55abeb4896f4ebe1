"""The memory that a model needs, from the headers of its weights, without loading them.

It counts what `serve_app.engine.model.loader` loads: the components that model_index.json names,
their safetensors of the configured variant, at the configured dtype.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from serve_app.config.models import ModelConfig
from serve_app.config.safetensors_header import read_header
from serve_app.errors import ModelLoadError

_FLOATS = ("F8", "F16", "BF16", "F32", "F64")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TAKE_TURNS = ("unet", "transformer", "text_encoder")
"""Name prefixes of the networks that ``offload: model`` loads in turns: denoisers, encoders."""
_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Component:
    """One network's weights."""

    name: str
    parameters: int
    """Count of numbers that are stored in the model's dtype."""
    other_bytes: int
    """Bytes of integers, which keep their type."""

    def size_bytes(self, bytes_each: int) -> int:
        """Return the memory of the network with ``bytes_each`` bytes a parameter."""
        return self.parameters * bytes_each + self.other_bytes


def cache_folder() -> Path:
    """Return the folder of models from the hub, as HF_HOME and the like set it."""
    return Path(constants.HF_HUB_CACHE)


def find_folder(model: ModelConfig) -> Path | None:
    """Find the weights on this machine: a local model's folder, or one in the hub's cache.

    Returns None for a model of the hub that is not here or not fully downloaded. Raises
    `ModelLoadError` if its index is not JSON.
    """
    if model.is_folder:
        return Path(model.source)
    repository = cache_folder() / f"models--{model.source.replace('/', '--')}"
    revision = model.revision or "main"
    reference = repository / "refs" / revision
    if reference.is_file():
        revision = reference.read_text(encoding="utf-8").strip()
    folder = repository / "snapshots" / revision
    index = folder / "model_index.json"
    if not index.is_file() or any(not _files(folder / name, model) for name in _named(index)):
        return None
    return folder


def read_components(folder: Path, model: ModelConfig) -> list[Component]:
    """Read the sizes of the networks of the model in ``folder``.

    Raises:
        ModelLoadError: if a file is not what its name says.
    """
    found = []
    for name in _named(folder / "model_index.json"):
        sizes = [_size(file) for file in _files(folder / name, model)]
        found.append(Component(name, sum(p for p, _ in sizes), sum(b for _, b in sizes)))
    return found


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


def _files(folder: Path, model: ModelConfig) -> list[Path]:
    """Choose the variant's files, else the plain ones, as diffusers does; all parts, or none."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if "." not in file.stem]
    chosen = plain
    if model.variant is not None:
        wanted = re.compile(rf"\.{re.escape(model.variant)}(-\d+-of-\d+)?$")
        chosen = [file for file in files if wanted.search(file.stem)] or plain
    parts = [re.search(r"-of-(\d+)", file.stem) for file in chosen]
    if parts and all(parts) and len(chosen) < max(int(part[1]) for part in parts if part):
        return []
    return chosen


def _size(file: Path) -> tuple[int, int]:
    """Return (count of floats, bytes of other numbers). Raises `ModelLoadError`."""
    parameters = other_bytes = 0
    for tensor in read_header(file).values():
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
