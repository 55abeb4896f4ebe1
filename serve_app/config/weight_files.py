"""The weight files that diffusers and transformers would read for one network of a local model."""

import json
import re
from pathlib import Path

from serve_app.config.checkpoint_files import PICKLES, conversion_command
from serve_app.config.models import ModelConfig
from serve_app.config.safetensors_header import read_header
from serve_app.errors import ModelLoadError

_STEMS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model",)}
"""File names by library. Networks of a pipeline's own module derive from either."""

_FOREIGN = {
    ".onnx": "ONNX Runtime",
    ".msgpack": "JAX",
    ".h5": "TensorFlow",
    ".gguf": "llama.cpp",
    ".xml": "OpenVINO",
    ".flashpack": "FlashPack",
}


def check_weights(model: ModelConfig, component: Path, library: str) -> None:
    """Find what would stop the weights of a network from loading, from the headers of its files.

    Raises:
        ModelLoadError: naming the file, and what to do.
    """
    stems = _STEMS.get(library, ("model", "diffusion_pytorch_model"))
    variant = model.variant if has_variant(component, model.variant) else None
    found = [file for stem in stems for file in _candidates(component, stem, variant)]
    if not found:
        raise _no_weights(model, component, stems[0], variant)
    if found[0].suffix == ".json":
        _check_index(model, found[0])
    else:
        read_header(found[0])


def has_variant(component: Path, variant: str | None) -> bool:
    """Return whether diffusers takes the files of ``variant`` in this folder, else plain ones."""
    if variant is None or not component.is_dir():
        return False
    parts = (file.name.split(".") for file in component.iterdir())
    return any(len(part) > 1 and part[1].startswith(variant) for part in parts)


def _candidates(component: Path, stem: str, variant: str | None) -> list[Path]:
    """Return the files that exist, in the order in which the library looks for them."""
    between = "" if variant is None else f".{variant}"
    single = f"{stem}{between}.safetensors"
    index = f"{stem}.safetensors.index{between}.json"
    names = [single, index]
    if stem == "diffusion_pytorch_model":
        names = [index, f"{stem}.safetensors{between}.index.json", single]
    return [component / name for name in names if (component / name).is_file()]


def _check_index(model: ModelConfig, index: Path) -> None:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        shards: dict[str, set[str]] = {}
        for tensor, shard in content["weight_map"].items():
            shards.setdefault(shard, set()).add(tensor)
        dict(content["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"model {model.id!r}: {index} is not an index of weights "
            f"({type(error).__name__}: {error}). Fetch it again."
        ) from None
    folder = index.parent
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ModelLoadError(
            f"model {model.id!r}: {index} names {outside[0]!r}. It may only name files of its own "
            "folder."
        )
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise ModelLoadError(
            f"model {model.id!r}: {index} names {len(shards)} files, and {len(missing)} of them "
            f"do not exist: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Copy or "
            "fetch them: `hf download` continues where it stopped."
        )
    held = {tensor for shard in shards for tensor in read_header(folder / shard)}
    if lost := sorted(set().union(*shards.values()) - held):
        raise ModelLoadError(
            f"model {model.id!r}: {index} names {len(lost)} tensors that none of its files has, "
            f"such as {lost[0]!r}. Fetch the index and its files from one version of the model."
        )


def _no_weights(
    model: ModelConfig, component: Path, stem: str, variant: str | None
) -> ModelLoadError:
    """Say what a folder without the wanted weights has instead, and what to do."""
    wanted = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
    place = f"model {model.id!r}: {component}"
    files = sorted(component.iterdir())
    names = [file.name for file in files if file.is_file()]
    if broken := [file.name for file in files if file.is_symlink() and not file.exists()]:
        return ModelLoadError(
            f"{place} has a link to a file that does not exist: {broken[0]}. Copy the files "
            "themselves (`cp -rL`), or make the link's target available here."
        )
    other = re.compile(rf"{stem}\.(.+?)(-\d{{5}}-of-\d{{5}})?\.safetensors")
    variants = sorted({match[1] for match in map(other.fullmatch, names) if match})
    if variants:
        return ModelLoadError(
            f"{place} has no {wanted}, it has the weights of the variant "
            f"{' and of '.join(map(repr, variants))}. Set model.variant: {variants[0]}"
            f"{', or leave it out' if wanted in names else ''}."
        )
    if shards := [name for name in names if re.fullmatch(r".+-\d{5}-of-\d{5}\.safetensors", name)]:
        return ModelLoadError(
            f"{place} has {shards[0]}, a part of the weights, and no index of the parts. Fetch "
            f"{stem}.safetensors.index.json too."
        )
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        how = (
            "load them where you trust them and call save_pretrained(..., safe_serialization=True)."
        )
        if len(pickles) == 1:
            how = f"`{conversion_command(component / pickles[0], component / wanted)}`"
        return ModelLoadError(
            f"{place} has only pickled weights ({', '.join(pickles)}), which can run code when "
            f"they are loaded. Convert them to safetensors: {how}"
        )
    for file in files:
        if file.suffix in _FOREIGN:
            return ModelLoadError(
                f"{place} has only weights for {_FOREIGN[file.suffix]} ({file.name}). Use the "
                f"model's weights for PyTorch, {wanted}."
            )
    if strays := [name for name in names if name.endswith(".safetensors")]:
        return ModelLoadError(
            f"{place} has no {wanted}, the only name that is read, but {strays[0]}. If the file "
            f"is in the diffusers format, rename it to {wanted}."
        )
    return ModelLoadError(
        f"{place} has no weights: {wanted} is missing. Copy or fetch the whole model folder."
    )
