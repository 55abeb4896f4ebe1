"""Bodies of txt2img and img2img, and what becomes of fields that this server does not have.

Clients of this API send all of its fields, most of them at a value that means "off". A field that
would change the image is rejected unless it is off. Any other field has no effect, and a warning
names it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.config.speed import Acceleration
from serve_app.errors import InvalidRequest
from serve_app.gateway.errors import MOST_SHOWN
from serve_app.protocol.params import MAX_SEED

MOST_NAMED = 24
"""Fields without effect that a warning names."""

_LONGEST_NAME = 40

_GREY = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR4nGOM"
    "YoAAJgaKGAAbfgBqEMfrVAAAAABJRU5ErkJggg=="
)
"""A grey image, as an example."""

_OFF: tuple[Any, ...] = (None, False, "", "None", [], {})
"""Values that mean "off", for most fields; 0 equals False."""


@dataclass(frozen=True)
class Rule:
    """A field that is accepted only while it is off."""

    reason: str
    """The remedy."""
    off: tuple[Any, ...] = ()
    """Further values that mean "off"."""

    def is_off(self, value: Any) -> bool:
        """Return whether a value asks for nothing."""
        return value in _OFF or value in self.off


_EXTENSIONS = "this server runs no scripts or extensions; leave it out."
_NOISE = "the noise schedulers here have no such setting; leave it out."
_CLIP_SKIP = Rule("this server uses all layers of the text encoder; send 1.", (1, -1))

REJECTED: dict[str, Rule] = {
    "alwayson_scripts": Rule(_EXTENSIONS),
    "clip_skip": _CLIP_SKIP,
    "disable_extra_networks": Rule("take the <lora:…> tags out of the prompt instead."),
    "enable_hr": Rule("there is no second pass here; send false, and the size that you want."),
    "eta": Rule(_NOISE, (1,)),
    "infotext": Rule("send its values as fields."),
    "initial_noise_multiplier": Rule(_NOISE, (1,)),
    "inpainting_fill": Rule("an edit starts from the image; send 1.", (1,)),
    "refiner_checkpoint": Rule("this server has no refiner; leave it out."),
    "resize_mode": Rule("the image is scaled and cropped to the size; send 1.", (1,)),
    "restore_faces": Rule("this server restores no faces; send false."),
    "s_churn": Rule(_NOISE),
    "s_min_uncond": Rule(_NOISE),
    "script_name": Rule(_EXTENSIONS),
    "seed_resize_from_h": Rule("leave it out.", (-1,)),
    "seed_resize_from_w": Rule("leave it out.", (-1,)),
    "styles": Rule("this server has no styles; write them into the prompt."),
    "subseed_strength": Rule("this server mixes no seeds; send 0."),
    "tiling": Rule("this server generates no tiles; send false."),
}
"""Fields that would change the image, and are accepted only while they are off."""

SEND_IMAGES = Rule("this server stores no images, so they are always sent; send true.", (True,))

SETTINGS: dict[str, Rule] = {
    "CLIP_stop_at_last_layers": _CLIP_SKIP,
    "forge_additional_modules": Rule("the model has its own parts; leave it out."),
    "samples_format": Rule("images are PNG files here; leave it out.", ("png",)),
    "sd_vae": Rule("the model has its own VAE; send 'Automatic'.", ("Automatic",)),
}
"""Settings of ``override_settings`` and ``options`` that are accepted only while they are off."""

CHECKPOINT = "sd_model_checkpoint"

ACCELERATION = "acceleration"
"""Setting of ``override_settings`` that is this server's own."""

_OF_FILES = (
    "do_not_",
    "enable_pnginfo",
    "grid_",
    "live_preview",
    "return_",
    "samples_save",
    "save_",
)
"""Prefixes of settings of files and of the web page, which change no image."""


class SdapiRequest(BaseModel):
    """Fields of txt2img and img2img that have an effect.

    Types are as lax as those of the original: a number may come as text.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(
        "",
        description="Description of the image. `<lora:NAME:SCALE>` adds an adapter.",
        examples=["a red circle on a blue background"],
    )
    negative_prompt: str = Field("", description="Description of content to avoid.")
    seed: int = Field(
        -1,
        ge=-1,
        le=MAX_SEED,
        description="Seed of the random numbers; -1 is random. Image k, counted from 0, has the "
        "seed + k.",
    )
    sampler_name: str | None = Field(
        None, description="Noise scheduler, from `samplers`. Default: the model's own."
    )
    sampler_index: str | None = Field(
        None, description="An older name of `sampler_name`, which goes before it."
    )
    scheduler: str | None = Field(
        None, description="Spacing of the noise levels, from `schedulers`. Default: the model's."
    )
    steps: int | None = Field(
        None, ge=1, description="Number of denoising steps. Default: the model's.", examples=[8]
    )
    cfg_scale: float | None = Field(
        None, ge=0, le=100, description="Weight of the prompt. Default: the model's."
    )
    width: int | None = Field(
        None, ge=1, le=65536, description="Width in pixels. Default: the model's.", examples=[64]
    )
    height: int | None = Field(
        None, ge=1, le=65536, description="Height in pixels. Default: the model's.", examples=[64]
    )
    batch_size: int = Field(1, ge=1, description="Number of images, times `n_iter`.")
    n_iter: int = Field(1, ge=1, description="Number of images, times `batch_size`.")
    send_images: bool = Field(True, description="Must be true: the server stores no images.")
    override_settings: dict[str, Any] = Field(
        {},
        description=f"Settings for this request. `{CHECKPOINT}` names a served model, and "
        f"`{ACCELERATION}` is that of the images API. Settings that would change the image are "
        "rejected.",
        examples=[{}],
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    @property
    def extra(self) -> dict[str, Any]:
        """The other fields."""
        return self.model_extra or {}

    def check(self) -> list[str]:
        """Return warnings of fields without effect.

        Raises:
            InvalidRequest: a field would change the image, and this server cannot honour it.
        """
        if not SEND_IMAGES.off[0] == self.send_images:
            raise InvalidRequest(f"send_images: {SEND_IMAGES.reason}", "send_images")
        strays = _strays(self.extra)
        others = {name: one for name, one in self.override_settings.items() if name != ACCELERATION}
        return strays + check_settings(others, "override_settings.")

    @property
    def acceleration(self) -> Acceleration | None:
        """The level for this request. Raises `InvalidRequest` if there is no such level."""
        level = self.override_settings.get(ACCELERATION)
        if level is not None and level not in get_args(Acceleration):
            levels = ", ".join(get_args(Acceleration))
            where = f"override_settings.{ACCELERATION}"
            raise InvalidRequest(f"{where} must be one of {levels}.", where)
        return cast(Acceleration | None, level)


class TextToImageRequest(SdapiRequest):
    """The body of ``POST /sdapi/v1/txt2img``."""


class ImageToImageRequest(SdapiRequest):
    """The body of ``POST /sdapi/v1/img2img``."""

    init_images: list[str] = Field(
        min_length=1,
        max_length=1,
        description="The input image in base64, or as a data URL. There is one.",
        examples=[[_GREY]],
    )
    mask: str | None = Field(
        None,
        description="Mask in base64, or as a data URL: its white part is generated anew. In a mask "
        "with transparent parts, the opaque part is.",
    )
    inpainting_mask_invert: bool = Field(
        False, description="Generate the black part of the mask anew, not the white one."
    )
    denoising_strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the input image that may change. Default: the model's.",
        examples=[0.6],
    )


def check_settings(settings: Mapping[str, Any], where: str = "") -> list[str]:
    """Return warnings of settings without effect; the checkpoint is not checked here.

    Raises:
        InvalidRequest: a setting would change the image, and this server cannot honour it.
    """
    ignored = []
    for name, value in settings.items():
        if name == CHECKPOINT or value is None:
            continue
        shown = f"{where}{name}"[:MOST_SHOWN]
        if (rule := SETTINGS.get(name)) is not None:
            if not rule.is_off(value):
                raise InvalidRequest(f"{shown}: {rule.reason}", shown)
        elif name.startswith(_OF_FILES):
            ignored.append(shown)
        else:
            raise InvalidRequest(f"{shown} cannot be set here; leave it out.", shown)
    return without_effect(ignored)


def without_effect(names: Iterable[str]) -> list[str]:
    """Return a warning that names fields; none without any. Their values may be secrets."""
    shown = [name[:_LONGEST_NAME] for name in names]
    if not shown:
        return []
    more = ", …" if len(shown) > MOST_NAMED else ""
    return [f"fields without effect here: {', '.join(shown[:MOST_NAMED])}{more}."]


def _strays(extra: Mapping[str, Any]) -> list[str]:
    ignored = []
    for name, value in extra.items():
        rule = REJECTED.get(name)
        if rule is None:
            ignored.append(name)
        elif not rule.is_off(_content(name, value)):
            raise InvalidRequest(f"{name}: {rule.reason}", name)
    return without_effect(ignored)


def _content(name: str, value: Any) -> Any:
    """Return the scripts that do something, of those that a client always names."""
    if name != "alwayson_scripts" or not isinstance(value, dict):
        return value
    return {
        script: given
        for script, given in value.items()
        if given and not (isinstance(given, dict) and not given.get("args"))
    }
