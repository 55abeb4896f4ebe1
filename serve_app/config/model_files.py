"""The files of a model on this machine: its folder and its LoRA adapters.

These checks read folder listings, JSON files and the headers of weights, so they take less than a
second. The loader and the command line call them before torch is imported.
"""

from pathlib import Path

from serve_app.config.checkpoint_files import GGUF, PICKLES, check_whole
from serve_app.config.component_files import check_component
from serve_app.config.model_index import read_model_index
from serve_app.config.models import ModelConfig
from serve_app.config.replaced_components import check_replaced, is_file
from serve_app.config.safetensors_header import read_header
from serve_app.config.source import SINGLE_FILE, is_path
from serve_app.config.weight_files import has_variant
from serve_app.errors import ModelLoadError


def find_loras(model: ModelConfig) -> dict[str, str]:
    """Return ``{name: file or repository}`` of the named adapters and of those in the folder.

    Raises:
        ModelLoadError: if a file or the folder does not exist, or two adapters have one name.
    """
    found = dict(model.loras)
    for name, source in found.items():
        path = Path(source).expanduser()
        if is_path(source) and path.suffix != ".safetensors":
            raise ModelLoadError(
                f"model.loras: {name!r}: {path} is not a .safetensors file. Only such files are "
                "loaded: convert it."
            )
        if is_path(source) and not path.is_file():
            raise ModelLoadError(
                f"model.loras: {name!r}: the file {path} does not exist. Correct the path, or copy "
                "the file to it."
            )
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


def check_lora_source(model: ModelConfig) -> None:
    """Check that the folder of `model.lora_source` exists, if it is a folder.

    Raises:
        ModelLoadError: if it does not.
    """
    folder = model.lora_source_folder
    if folder is not None and not folder.is_dir():
        raise ModelLoadError(
            f"model.lora_source: the folder {folder} does not exist. Make it, or correct the path."
        )


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
    if path.is_file() and name.endswith((SINGLE_FILE, GGUF, *PICKLES)):
        return ModelConfig(id=path.stem or "model", path=str(path.resolve()))
    if path.is_file():
        raise ModelLoadError(
            f"model {name!r} is a file. Give a folder in the diffusers format, or a .safetensors "
            "file."
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
            own, or holds a component that cannot be loaded; or if an adapter is missing.
    """
    try:
        for source in find_loras(model).values():
            if is_path(source):
                read_header(Path(source).expanduser())
        check_lora_source(model)
        _check_sources(model)
    except OSError as error:
        raise ModelLoadError(
            f"model {model.id!r}: {error.filename} cannot be read: {error.strerror}. Check its "
            "owner and mode."
        ) from None


def _check_sources(model: ModelConfig) -> None:
    place = f"model {model.id!r}: model.path"
    source = Path(model.source)
    if model.source.endswith((GGUF, *PICKLES)) or (model.is_single_file and model.is_local):
        check_whole(place, source, has_vae="vae" in model.components)
    elif not model.is_single_file and model.source.endswith(SINGLE_FILE):
        raise ModelLoadError(
            f"model {model.id!r} is the name of a file. Set model.path to it, as a path that "
            "starts with '/' or '.', or as owner/name/file.safetensors."
        )
    components: dict[str, tuple[str, str]] = {}
    if model.layout is not None and is_path(model.layout):
        components = _check_folder(model, Path(model.layout))
    for name in model.components:
        check_replaced(model, name, *components.get(name, ("", "")))


def _check_folder(model: ModelConfig, folder: Path) -> dict[str, tuple[str, str]]:
    """Check the folder of a model's components, and return their libraries and classes."""
    setting = "model.base" if model.is_single_file else "model.path"
    if not folder.is_dir():
        reason = "is a file" if folder.is_file() else "does not exist"
        raise ModelLoadError(
            f"model {model.id!r}: the folder {folder} {reason}. Set {setting} to a folder "
            "in the diffusers format, or to the name of a Hugging Face repository. If the folder "
            "is only in an image or on a volume, check the file there."
        )
    components = read_model_index(model, folder / "model_index.json")
    own = {name: value for name, value in components.items() if name not in model.components}
    if (variant := model.variant) is not None and not any(
        has_variant(folder / name, variant) for name in own
    ):
        raise ModelLoadError(
            f"model {model.id!r}: {folder} has no files of the variant {variant!r}. Correct "
            "model.variant, or leave it out to load the files without a variant."
        )
    for name, (library, class_name) in components.items():
        other = model.components.get(name, "")
        if name in own or (other is not None and is_file(other)):  # a file has no configuration
            with_weights = name in own and not model.is_single_file
            check_component(model, folder / name, library, class_name, with_weights)
    return components
