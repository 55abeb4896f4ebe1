"""Single files with weights: what their headers tell before anything is loaded."""

import shlex
from importlib.util import find_spec
from pathlib import Path

from serve_app.config.safetensors_header import LFS_POINTER, TensorHeader, read_header
from serve_app.errors import ModelLoadError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Suffixes of files that can run code when they are loaded."""

GGUF = ".gguf"

_ADAPTER = ("lora_", ".lora", ".hada_", ".lokr_")
"""Parts of the names of an adapter's tensors."""
_SCALED = (".scale_weight", ".weight_scale", ".scale_input", "scaled_fp8")
"""Ends of the names of scales, by which other programs multiply 8-bit weights."""
_VAE = ("first_stage_model.", "vae.")
"""Starts of the names of a VAE's tensors in a file that holds a whole model."""


def read_tensors(place: str, file: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a .safetensors or .gguf file, by name, from its header.

    Without the package gguf, all of a .gguf file counts as one tensor.

    Args:
        place: Which setting names the file, for messages.
        file: The file.

    Raises:
        ModelLoadError: it is missing, of another format, cut off, or holds something else than
            weights that diffusers reads.
    """
    if file.suffix in PICKLES:
        raise ModelLoadError(
            f"{place}: {file} is a pickle, which can run code when it is loaded. Convert it, and "
            f"name the new file: `{conversion_command(file, file.with_suffix('.safetensors'))}`"
        )
    if not file.is_file():
        raise ModelLoadError(f"{place}: the file {file} does not exist. Correct the path.")
    tensors = _read_gguf(place, file) if file.suffix == GGUF else read_header(file)
    if adapter := next((name for name in tensors if any(p in name for p in _ADAPTER)), None):
        raise ModelLoadError(
            f"{place}: {file} is a LoRA adapter (it has {adapter!r}). Name it in model.loras."
        )
    if scale := next((name for name in tensors if name.endswith(_SCALED)), None):
        raise ModelLoadError(
            f"{place}: {file} has 8-bit weights with scales ({scale!r}), which diffusers would "
            "leave out. Use a file in float16, bfloat16 or plain float8."
        )
    return tensors


def check_whole(place: str, file: Path, has_vae: bool) -> None:
    """Check a file that is to hold a whole model; ``has_vae`` says that it needs no VAE.

    Raises:
        ModelLoadError: it cannot be read, or holds one network only.
    """
    if file.suffix == GGUF:
        raise ModelLoadError(
            f"{place}: {file} holds a transformer only. Set model.path to the whole model, and "
            "model.components.transformer to this file."
        )
    tensors = read_tensors(place, file)
    if not has_vae and not any(name.startswith(_VAE) for name in tensors):
        raise ModelLoadError(
            f"{place}: {file} holds no whole model, for it has no VAE; its first tensor is "
            f"{min(tensors)!r}. Set model.path to the whole model, and the component that this "
            "file holds to it, such as model.components.transformer. Or name "
            "model.components.vae."
        )


def _read_gguf(place: str, file: Path) -> dict[str, TensorHeader]:
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
    if not start.startswith(b"GGUF"):
        what = "a Git LFS pointer" if start == LFS_POINTER else "not in the GGUF format"
        raise ModelLoadError(f"{place}: {file} is {what}. Fetch it again.")
    if find_spec("gguf") is None:  # a check may run where no replica does
        return {"": TensorHeader(GGUF, (), file.stat().st_size)}
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise ModelLoadError(
            f"{place}: {file} has no weights, it is damaged or cut off ({error}). Fetch it again."
        ) from None
    return {
        tensor.name: TensorHeader(
            tensor.tensor_type.name, tuple(int(n) for n in tensor.shape[::-1]), int(tensor.n_bytes)
        )
        for tensor in tensors
    }


def conversion_command(pickle: Path, target: Path) -> str:
    """Return a command that writes the weights of a pickle to ``target``, without running code."""
    return shlex.join(
        [
            "python",
            "-c",
            "import torch; from safetensors.torch import save_file; "
            f"c = torch.load({str(pickle)!r}, map_location='cpu', weights_only=True); "
            "c = c.get('state_dict', c); "
            "save_file({k: v.clone(memory_format=torch.contiguous_format) "
            "for k, v in c.items() if isinstance(v, torch.Tensor)}, "
            f"{str(target)!r}, {{'format': 'pt'}})",
        ]
    )
