"""The settings of the gateway."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from serve_app.config.environment import (
    KEYS_PATH_VARIABLE,
    KEYS_VARIABLE,
    keys_path_in_environment,
)
from serve_app.config.section import Section
from serve_app.config.storage import StorageConfig

Safety = Literal["flag", "block", "off"]
"""Treatment of images that a model's safety checker flags."""

UnknownFields = Literal["reject", "ignore"]
"""Treatment of fields that the API does not have."""


class GatewayConfig(Section):
    """The gateway: the page, API keys, waits, logs and traces."""

    page: bool = Field(True, description="Serve a web page at '/' to try the model.")
    keys_path: str | None = Field(
        None,
        description="File of API keys, with entries from `diffusion-serve key`. Without keys, "
        f"every client is admitted. Default: the file that {KEYS_PATH_VARIABLE} names. The "
        f"environment variable {KEYS_VARIABLE} may hold further entries.",
    )
    max_hold_s: float = Field(
        300.0,
        gt=0,
        description="Longest time, in seconds, that a request waits in the gateway for a starting "
        "replica. After it the gateway rejects the request with a time to retry.",
    )
    safety: Safety = Field(
        "flag",
        description="Treatment of images that the model's safety checker flags. 'flag': the "
        "image is returned as generated, and the response names it. 'block': the request fails "
        "with status 400, and no previews are sent; needs a model with a safety checker. 'off': no "
        "image is checked.",
    )
    model_aliases: dict[str, str] = Field(
        {},
        description="Further names of the model, for clients with a fixed name: `gpt-image-1: "
        "sdxl`. `*` stands for any characters, as in `dall-e-*: sdxl`.",
    )
    any_model: bool = Field(
        False,
        description="Accept every name of a model. The response warns of a name that is no alias.",
    )
    unknown_fields: UnknownFields = Field(
        "reject",
        description="Treatment of fields that the API does not have. 'reject': the request fails "
        "with status 400, which names the field. 'ignore': the response warns of it, for clients "
        "that send fields of other servers.",
    )
    sdapi: bool = Field(
        False,
        description="Serve the API of AUTOMATIC1111's web UI as well, below `/sdapi/v1`, for "
        "clients that speak no other.",
    )
    embed_parameters: bool = Field(
        False,
        description="Write prompts and parameters into image files, for tools of AUTOMATIC1111's "
        "web UI. PNG has them as text, JPEG and WebP as EXIF.",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="Web pages that may call the API from a browser, by their origins: "
        "`https://app.example.com`, or `*` for all pages.",
    )
    storage: StorageConfig = StorageConfig()
    log_prompts: bool = Field(False, description="Write prompts into the log and into traces.")
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry traces of requests over OTLP/HTTP. OpenTelemetry's own "
        "environment variables, such as OTEL_EXPORTER_OTLP_ENDPOINT, set the destination. Needs "
        "the extra 'tracing'.",
    )

    @model_validator(mode="after")
    def _tracing_is_installed(self) -> "GatewayConfig":
        if self.tracing and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
            raise ValueError(
                "gateway.tracing is true, which needs the OTLP exporter of OpenTelemetry: pip "
                "install 'diffusion-serve[tracing]', on every node"
            )
        return self

    @model_validator(mode="after")
    def _storage_is_installed(self) -> "GatewayConfig":
        if self.storage.url is not None and not _is_installed("obstore"):
            raise ValueError(
                "gateway.storage.url is set, which needs the package obstore: pip install "
                "'diffusion-serve[storage]', on every node"
            )
        return self

    @field_validator("cors_origins")
    @classmethod
    def _origins_have_no_path(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/*?#@\s]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin: write SCHEME://HOST or SCHEME://HOST:PORT without a "
                    "path, or '*' for all pages"
                )
        return origins

    @property
    def keys_file(self) -> Path | None:
        """The file of API keys that the config, or else the environment, names."""
        path = self.keys_path or keys_path_in_environment()
        return Path(path).expanduser() if path else None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
