"""The settings of LoRA adapters: those that are loaded at the start, and those on demand."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from serve_app.config.addresses import check_store
from serve_app.config.source import SourceConfig, is_path

BUCKETS = ("s3://", "gs://")


class LoraConfig(SourceConfig):
    """The model's adapters."""

    loras: dict[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters that requests may use, by name. Each source is a .safetensors "
        "file (starts with '/', '.' or '~') or a repository on the Hugging Face hub "
        "(owner/name or owner/name/file). The start loads them.",
    )
    lora_folder: str | None = Field(
        None,
        description="Folder of further LoRA adapters: every .safetensors file below it. An "
        "adapter's name is its path in the folder without the suffix. The start loads them.",
    )
    lora_source: str | tuple[str, ...] | None = Field(
        None,
        description="Place of LoRA adapters that are loaded when a request names them: a folder "
        "(starts with '/', '.' or '~'), `s3://bucket/prefix` or `gs://bucket/prefix`. An adapter's "
        "name is the path of its .safetensors file in it, without the suffix. A bucket needs the "
        "extra 'storage'. Or a list of repositories on the Hugging Face hub, such as `owner/name` "
        "or `owner/*`: the name is owner/name or owner/name/file.",
    )
    partial_loras: bool = Field(
        False,
        description="Also load adapters of which only a part fits the model. `/v1/models` names "
        "those of the start.",
    )

    @field_validator("loras")
    @classmethod
    def _adapters_have_an_owner(cls, loras: dict[str, str]) -> dict[str, str]:
        for name, source in loras.items():
            if not is_path(source) and "/" not in source.strip("/"):
                raise ValueError(
                    f"model.loras.{name} is {source!r}: write a path that starts with '/', '.' or "
                    "'~', or a repository as owner/name"
                )
            if source.count("/") > 1 and not source.endswith(".safetensors"):
                raise ValueError(
                    f"model.loras.{name} is {source!r}: only .safetensors files are loaded"
                )
        return loras

    @field_validator("lora_source")
    @classmethod
    def _source_is_a_place(cls, source: str | tuple[str, ...] | None) -> object:
        if isinstance(source, tuple):
            _check_repositories(source)
        elif source is not None and source.startswith(BUCKETS):
            _check_bucket(source)
        elif source is not None and not is_path(source):
            raise ValueError(
                f"model.lora_source is {source!r}: write a folder that starts with '/', '.' or "
                "'~', an address as s3://bucket/prefix or gs://bucket/prefix, or a list of "
                "repositories as [owner/name]"
            )
        return source

    @property
    def lora_source_kind(self) -> Literal["none", "folder", "bucket", "hub"]:
        """Kind of `lora_source`."""
        if self.lora_source is None:
            return "none"
        if isinstance(self.lora_source, tuple):
            return "hub"
        return "bucket" if self.lora_source.startswith(BUCKETS) else "folder"

    @property
    def lora_source_folder(self) -> Path | None:
        """The folder of `lora_source`, if it is one."""
        if self.lora_source_kind != "folder":
            return None
        return Path(str(self.lora_source)).expanduser().absolute()

    @property
    def takes_loras(self) -> bool:
        """True if a request may name an adapter."""
        return bool(self.loras or self.lora_folder or self.lora_source)

    def check_loras_exclude(
        self, call_kwargs: Mapping[str, object], options: Mapping[str, bool]
    ) -> None:
        """Check that the model's other settings allow adapters.

        Args:
            call_kwargs: arguments of each call of the pipeline.
            options: names in `model.speed` that exclude adapters, each with whether it is set.

        Raises:
            ValueError: they do not.
        """
        if not self.takes_loras:
            return
        for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
            given = call_kwargs.get(name)
            if isinstance(given, dict) and "scale" in given:
                raise ValueError(
                    f"model.call_kwargs.{name}.scale scales the adapters of all requests: leave it "
                    "out, requests name their scales"
                )
        for option, enabled in options.items():
            if enabled:
                raise ValueError(
                    f"model.speed.{option} and LoRA adapters exclude each other: set one of them "
                    "only"
                )


def _check_repositories(patterns: tuple[str, ...]) -> None:
    if not patterns:
        raise ValueError(
            "model.lora_source is an empty list: name repositories, as owner/name or owner/*, or "
            "leave it out"
        )
    for pattern in patterns:
        owner, _, name = pattern.partition("/")
        if not owner or not name or "/" in name or "*" in owner:
            raise ValueError(
                f"model.lora_source has {pattern!r}: write a repository as owner/name, or all of "
                "an owner as owner/*"
            )


def _check_bucket(url: str) -> None:
    check_store("model.lora_source", url)
    if find_spec("obstore") is None:
        raise ValueError(
            f"model.lora_source is {url!r}, which needs the package obstore: pip install "
            "'diffusion-serve[storage]', on every node"
        )
