"""The settings that say which files a model is made of."""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from serve_app.config.section import Section

DEMO_MODEL_DIR = Path(__file__).parents[1] / "demo" / "model"
"""The folder of the weights that ship with the package."""

SINGLE_FILE = ".safetensors"
"""Suffix of a file that may hold a whole model."""

_NEEDED = ("unet", "transformer", "vae", "scheduler")
"""Components that may be replaced, and not left out."""


def is_path(source: str) -> bool:
    """Return whether ``source`` means a file or folder rather than a repository of the hub."""
    return source.startswith(("/", ".", "~"))


def absolute(source: str) -> str:
    """Return a path in full, and the name of a repository as it is."""
    return str(Path(source).expanduser().resolve()) if is_path(source) else source


class SourceConfig(Section):
    """The model's name, the place of its weights, and components from elsewhere."""

    id: str = Field("demo", min_length=1, description="Name of the model in the API.")
    path: str | None = Field(
        None,
        description="Folder in the diffusers format, or one .safetensors file with the whole "
        "model (both start with '/', '.' or '~'). Or a repository on the Hugging Face hub "
        "(owner/name), or such a file in one (owner/name/file.safetensors). Default: the bundled "
        "model if model.id is 'demo', otherwise the repository that model.id names.",
    )
    base: str | None = Field(
        None,
        min_length=1,
        description="Only if model.path is one file: folder in the diffusers format, or "
        "repository, with the configurations and tokenizers of the file's family. No weights are "
        "read from it. Default: the repository that diffusers knows for the tensors of the file.",
    )
    components: dict[str, str | None] = Field(
        default_factory=dict,
        description="Components to take from elsewhere, by name, or to leave out (null). A source "
        "is a folder, a .safetensors file or a .gguf file, and starts with '/', '.' or '~'. On the "
        "hub it is owner/name, owner/name/folder or owner/name/file. Default: all of the model.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of the repository. Default: its main branch."
    )
    variant: str | None = Field(
        None,
        min_length=1,
        description="Variant of the weight files, such as 'fp16'. "
        "Default: the files without a variant.",
    )

    @field_validator("components")
    @classmethod
    def _components_have_a_source(cls, components: dict[str, str | None]) -> dict[str, str | None]:
        for name, source in components.items():
            if source is None and name in _NEEDED:
                raise ValueError(
                    f"model.components.{name} is null, and no image is made without it: name "
                    "another source, or leave the entry out"
                )
            if source is not None and not is_path(source) and "/" not in source.strip("/"):
                raise ValueError(
                    f"model.components.{name} is {source!r}: write a path that starts with '/', "
                    "'.' or '~', or a repository as owner/name"
                )
        return components

    @model_validator(mode="after")
    def _base_and_variant_fit_the_path(self) -> Self:
        if self.base is not None and not self.is_single_file:
            raise ValueError(
                f"model.base is {self.base!r}, and {self.source} is no .safetensors file: leave "
                "model.base out, or set model.path to the file"
            )
        if self.is_single_file and not self.is_local and self.source.count("/") < 2:
            raise ValueError(
                f"model.path is {self.path!r}: write a file as a path that starts with '/', '.' or "
                "'~', or as owner/name/file.safetensors"
            )
        if self.variant is not None and self.is_single_file:
            raise ValueError(
                f"model.variant is {self.variant!r}, and model.path is one file: leave "
                "model.variant out"
            )
        return self

    @property
    def source(self) -> str:
        """Where the weights are: an absolute path, or a repository or file of the hub."""
        if self.path is None:
            return str(DEMO_MODEL_DIR) if self.id == "demo" else self.id
        return absolute(self.path)

    @property
    def is_local(self) -> bool:
        """True if the model is a folder or file of this machine rather than on the hub."""
        return self.id == "demo" if self.path is None else is_path(self.path)

    @property
    def is_single_file(self) -> bool:
        """True if the model is one file rather than a folder in the diffusers format."""
        return self.path is not None and self.path.endswith(SINGLE_FILE)

    @property
    def layout(self) -> str | None:
        """The folder or repository with model_index.json; None for a file without a base."""
        if not self.is_single_file:
            return self.source
        return None if self.base is None else absolute(self.base)
