"""The settings of the storage of images, for responses that have links to them."""

from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator, model_validator

from serve_app.config.addresses import check_store, without_password
from serve_app.config.section import Section

LONGEST_PRESIGNED_S = 7 * 24 * 3600
"""Longest time for which a store signs a link."""


class StorageConfig(Section):
    """Storage of images, for `response_format: url`. Off without a URL."""

    url: str | None = Field(
        None,
        description="Place of the images: `s3://bucket/prefix`, or `file:///folder` for a folder "
        "that all gateway replicas share. The environment has the credentials of the bucket. Needs "
        "the extra 'storage'. Default: no images are stored.",
    )
    public_url: str | None = Field(
        None,
        description="Address of this server in links, such as `https://images.example.com`. "
        "Default: the address that the request was sent to, as the server sees it.",
    )
    ttl_s: int = Field(
        3600,
        ge=1,
        le=366 * 24 * 3600,
        description="Time, in seconds, after which a link ends.",
    )
    presigned: bool = Field(
        False,
        description="Let links lead to the store itself, which signs them. Clients must reach the "
        "store. Not for `file:`.",
    )
    default_for: tuple[str, ...] = Field(
        (),
        description="Names of the model and aliases whose requests get links if they set no "
        "`response_format`. `*` stands for all.",
    )
    when_away: Literal["reject", "b64_json"] = Field(
        "reject",
        description="Treatment of requests for links while the store cannot be reached. 'reject': "
        "status 503 before anything is generated. 'b64_json': the response has the images "
        "themselves, and a warning.",
    )

    @field_validator("url")
    @classmethod
    def _url_names_a_place(cls, url: str | None) -> str | None:
        if url is None:
            return url
        if not url.startswith(("s3://", "file://")):
            raise ValueError(
                f"gateway.storage.url is {without_password(url)!r}: it must begin with s3:// or "
                "file://"
            )
        check_store("gateway.storage.url", url)
        parts = urlsplit(url)
        if parts.scheme == "file" and (parts.netloc or len(parts.path) < 2):
            raise ValueError(
                f"gateway.storage.url is {url!r}: write a folder with an absolute path, as in "
                "file:///srv/images"
            )
        return url

    @field_validator("public_url")
    @classmethod
    def _public_url_is_an_address(cls, url: str | None) -> str | None:
        if url is None:
            return url
        parts = urlsplit(url)
        extra = parts.query or parts.fragment or parts.username is not None
        if parts.scheme not in ("http", "https") or not parts.hostname or extra:
            raise ValueError(
                f"gateway.storage.public_url is {without_password(url)!r}: write "
                "https://HOST or https://HOST/PATH"
            )
        return url.rstrip("/")

    @model_validator(mode="after")
    def _options_fit(self) -> "StorageConfig":
        if self.url is None:
            if given := self.model_fields_set - {"url"}:
                raise ValueError(
                    f"gateway.storage.{min(given)} has no effect without gateway.storage.url"
                )
            return self
        if not self.presigned:
            return self
        if self.folder is not None:
            raise ValueError(
                "gateway.storage.presigned is true, and a folder signs no links: leave it out"
            )
        if self.public_url is not None:
            raise ValueError(
                "gateway.storage.presigned lets links lead to the store, so that public_url has "
                "no effect: set one of them only"
            )
        if self.ttl_s > LONGEST_PRESIGNED_S:
            raise ValueError(
                f"gateway.storage.ttl_s is {self.ttl_s}, and presigned links last at most "
                f"{LONGEST_PRESIGNED_S} s"
            )
        return self

    @property
    def folder(self) -> Path | None:
        """The folder of a `file:` URL."""
        if self.url is None or not self.url.startswith("file:"):
            return None
        return Path(unquote(urlsplit(self.url).path))
