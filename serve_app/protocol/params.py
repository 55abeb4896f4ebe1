"""Parameters of a request, and the model's options."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from PIL.Image import Image

from serve_app.config.gateway import Safety
from serve_app.config.limits import LimitsConfig
from serve_app.config.speed import Acceleration
from serve_app.errors import InvalidRequest, LoraNotFound
from serve_app.protocol.fitting import fitted_input, near
from serve_app.protocol.noise_schedulers import check_noise_scheduler
from serve_app.protocol.texts import check_texts

MAX_SEED = 2**63 - 1

Task = Literal["text-to-image", "image-to-image", "inpainting"]

Sharing = Literal["batched", "interleaved", "sequential"]
"""Requests share denoiser calls, take turns at them, or run one after another."""

Priority = Literal["interactive", "batch"]
"""Priority of a request: "batch" is low-priority and runs when no interactive request can."""

AdapterSet = tuple[tuple[str, float], ...]
"""LoRA adapters by name, each with its scale, sorted."""

MAX_LORA_SCALE = 10.0


@dataclass(frozen=True)
class ModelInfo:
    """Options and limits of the loaded model. The engine sets them once, when it is ready."""

    id: str
    """Name of the model in the API."""
    pipeline: str
    """Class name of the diffusers pipeline."""
    dtype: str
    """Floating-point type of the weights, such as ``bfloat16``."""
    device: str
    """Device of the model, such as ``cuda`` or ``cpu``."""
    default_width: int
    """Width in pixels of requests that set none."""
    default_height: int
    """Height in pixels of requests that set none."""
    size_multiple: int
    """Width and height must be multiples of this number of pixels."""
    default_steps: int
    """Denoising steps of requests that set none."""
    default_acceleration: Acceleration
    """Acceleration of requests that set none."""
    low_quality_acceleration: Acceleration
    """Acceleration instead of fewer steps at low quality; ``"none"`` for fewer steps."""
    takes_negative_prompt: bool
    """True if requests may have a negative prompt."""
    tasks: tuple[Task, ...]
    """Supported tasks."""
    max_input_images: int
    """Most input images of a request without a mask; with one, it is 1. 0 if it edits none."""
    default_strengths: Mapping[Task, float]
    """Default strength of each task with an input image."""
    noise_schedulers: tuple[str, ...]
    """Noise schedulers for requests; empty if the model supports only its own."""
    unavailable_noise_schedulers: Mapping[str, Mapping[Task, str]]
    """Why noise schedulers are not offered, by name and task; ``default`` is the model's own."""
    fewest_steps: Mapping[str, int]
    """Least number of steps of each noise scheduler."""
    loras: tuple[str, ...]
    """Names of the LoRA adapters that the start loaded."""
    partial_loras: Mapping[str, str]
    """Adapters that fit the model only in part, with the share that is used."""
    loras_on_demand: bool
    """True if requests may name others, which are loaded then."""
    sharing: Sharing
    """Result of the certification at start-up."""
    sharing_difference: float | None
    """Largest pixel difference between batched and sequential at start-up, in [0, 1]."""
    sharing_psnr_db: float | None
    """Peak signal-to-noise ratio of the batched image that differs most; 200 for equal images."""
    sharing_note: str
    """Reason why requests are not batched, or the limit to batches; empty without a limit."""
    limits: LimitsConfig
    """Limits of one request."""
    safety: Safety
    """Treatment of images that the safety checker flags."""
    safety_checker: bool
    """True if a safety checker looks at every image."""

    @property
    def quality_steps(self) -> dict[str, int]:
        """Denoising steps of each ``quality`` of OpenAI's API."""
        steps, most = self.default_steps, self.limits.max_steps
        factors = {"medium": 1, "high": 2, "xhigh": 3, "max": 4}
        more = {name: min(factor * steps, most) for name, factor in factors.items()}
        fewer = self.low_quality_acceleration == "none"
        return {"low": max(1, steps // 2) if fewer else steps, **more}

    def check_images(self, count: int, has_mask: bool) -> None:
        """Check that the model edits this number of images, of 1 or more, with or without a mask.

        Raises:
            InvalidRequest: it does not; the message says what to send.
        """
        if not has_mask and self.tasks == ("inpainting",):
            raise InvalidRequest(
                f"{self.pipeline} changes the part of an image that a mask marks; send a mask, "
                "too.",
                "mask_image",
            )
        task = "inpainting" if has_mask else "image-to-image"
        if task not in self.tasks:
            raise InvalidRequest(
                f"{self.pipeline} does not support {task}; it supports {', '.join(self.tasks)}.",
                "mask_image" if has_mask else "image",
            )
        most = 1 if has_mask else self.max_input_images
        if count > most:
            mask = " with a mask" if has_mask else ""
            raise InvalidRequest(
                f"image: {count} images are given; {self.pipeline} takes at most {most} in a "
                f"request{mask}. Send no more.",
                "image",
            )


@dataclass(frozen=True)
class GenerationParams:
    """Parameters of one image. ``None`` means the model's default.

    An engine checks the parameters when they are submitted, with `resolved`.
    """

    prompt: str
    """Description of the image, of 1 to ``limits.max_prompt_chars`` characters."""
    seed: int
    """Seed of the random numbers, from 0 to 2⁶³ - 1. The same seed gives the same image."""
    negative_prompt: str | None = None
    """Description of content to avoid, if ``ModelInfo.takes_negative_prompt``."""
    width: int | None = None
    """Width in pixels, a multiple of ``ModelInfo.size_multiple``."""
    height: int | None = None
    """Height in pixels, a multiple of ``ModelInfo.size_multiple``."""
    num_inference_steps: int | None = None
    """Number of denoising steps, from 1 to ``limits.max_steps``."""
    guidance_scale: float | None = None
    """Weight of the prompt, from 0 to 100."""
    noise_scheduler: str | None = None
    """Noise scheduler, a name from ``ModelInfo.noise_schedulers``."""
    acceleration: Acceleration | None = None
    """Level at which some denoiser calls are extrapolated from earlier ones: ``"none"``,
    ``"balanced"`` or ``"fast"``."""
    lora: AdapterSet = ()
    """LoRA adapters: pairs of a name from ``ModelInfo.loras`` and a scale from -10 to 10.
    Requests with the same adapters at the same scales share batches."""
    image: Image | None = None
    """Input image in sRGB, scaled and cropped to ``width`` x ``height``.

    The size of the input image is the default size of the output, reduced to at most the number of
    pixels of the model's default size."""
    more_images: tuple[Image, ...] = ()
    """Further input images in sRGB, for models that take several, each in a shape of its own.

    Each is reduced to at most the number of pixels of the model's default size."""
    mask_image: Image | None = None
    """Mask of the input image: white parts change, black parts stay."""
    preview_steps: tuple[int, ...] = ()
    """Steps after which to send a `Preview`, counted from 1."""
    deadline_s: float | None = None
    """Deadline in seconds from the submission, up to ``limits.max_deadline_s``.

    A request that would miss it is rejected. Without a deadline, ``EngineConfig.slo_scale`` times
    the request's solo seconds orders it among the others."""
    strength: float | None = None
    """Share of the input image that may change, over 0 and at most 1. The same share of the steps
    runs."""
    priority: Priority = "interactive"
    """``"interactive"``, or ``"batch"`` for low-priority work."""

    @property
    def task(self) -> Task:
        """The task that the images determine."""
        if self.image is None:
            return "text-to-image"
        return "image-to-image" if self.mask_image is None else "inpainting"

    @property
    def steps_to_run(self) -> int:
        """Denoising steps that run: a share of all if the request starts from an image."""
        assert self.num_inference_steps is not None
        return int(self.num_inference_steps * (1.0 if self.strength is None else self.strength))

    def resolved(self, model: ModelInfo) -> "GenerationParams":
        """Fill in sizes and steps, after all checks.

        Raises:
            InvalidRequest: naming the field and what is allowed.
        """
        limits = model.limits
        check_texts(self.prompt, self.negative_prompt, limits.max_prompt_chars)
        if self.negative_prompt and not model.takes_negative_prompt:
            raise InvalidRequest(
                f"{model.pipeline} does not support negative_prompt; leave it out.",
                "negative_prompt",
            )
        faults = model.unavailable_noise_schedulers.items()
        reasons = {name: tasks[self.task] for name, tasks in faults if self.task in tasks}
        offered = model.noise_schedulers
        check_noise_scheduler(self.noise_scheduler, self.task, model.pipeline, offered, reasons)
        self._check_lora(model)
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequest(f"seed must be from 0 to {MAX_SEED}; it is {self.seed}.", "seed")
        steps = self.num_inference_steps or model.default_steps
        if not 1 <= steps <= limits.max_steps or self.num_inference_steps == 0:
            raise InvalidRequest(
                f"num_inference_steps must be from 1 to {limits.max_steps}; it is "
                f"{steps if self.num_inference_steps is None else self.num_inference_steps}.",
                "num_inference_steps",
            )
        fewest = model.fewest_steps.get(self.noise_scheduler or "", 1)
        if steps < fewest:
            raise InvalidRequest(
                f"num_inference_steps must be at least {fewest} for the scheduler "
                f"{self.noise_scheduler!r}; it is {steps}.",
                "num_inference_steps",
            )
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 100:
            raise InvalidRequest(
                f"guidance_scale must be from 0 to 100; it is {self.guidance_scale:g}.",
                "guidance_scale",
            )
        acceleration = self.acceleration or model.default_acceleration
        if acceleration not in get_args(Acceleration):
            raise InvalidRequest(
                f"acceleration must be one of {', '.join(get_args(Acceleration))}; it is "
                f"{acceleration!r}.",
                "acceleration",
            )
        if any(not 1 <= step <= steps for step in self.preview_steps):
            raise InvalidRequest(
                f"preview_steps must be from 1 to {steps}; they are {self.preview_steps}.",
                "preview_steps",
            )
        if self.deadline_s is not None and not 0 < self.deadline_s <= limits.max_deadline_s:
            raise InvalidRequest(
                f"deadline_s must be over 0 and at most {limits.max_deadline_s:g}; it is "
                f"{self.deadline_s:g}.",
                "deadline_s",
            )
        strength = self._checked_strength(model, steps)
        step = model.size_multiple
        default_size = model.default_width, model.default_height
        if self.image is not None:
            default_size = near(self.image.size, default_size, step, limits)
        width = default_size[0] if self.width is None else self.width
        height = default_size[1] if self.height is None else self.height
        if width <= 0 or height <= 0 or width % step or height % step:
            raise InvalidRequest(
                f"size must be WIDTHxHEIGHT with both sides positive multiples of {step}, such as "
                f"{model.default_width}x{model.default_height}; got {width}x{height}.",
                "size",
            )
        if max(width, height) > limits.max_side_px:
            raise InvalidRequest(
                f"size {width}x{height} has a side of {max(width, height)} pixels; at most "
                f"{limits.max_side_px} are allowed.",
                "size",
            )
        if width * height > limits.max_pixels:
            side = math.isqrt(limits.max_pixels)
            raise InvalidRequest(
                f"size {width}x{height} has {width * height} pixels; at most {limits.max_pixels} "
                f"are allowed, such as {side}x{side}.",
                "size",
            )
        image = self.image and fitted_input(self.image, "RGB", (width, height), "image")
        more_images = tuple(shrunk(image, model) for image in self.more_images)
        mask_image = self.mask_image and fitted_input(
            self.mask_image, "L", (width, height), "mask_image"
        )
        return replace(
            self,
            width=width,
            height=height,
            num_inference_steps=steps,
            acceleration=acceleration,
            lora=tuple(sorted(self.lora)),
            image=image,
            more_images=more_images,
            mask_image=mask_image,
            strength=strength,
        )

    def with_previews(self, count: int) -> "GenerationParams":
        """Spread ``count`` previews, or fewer with few steps, over those of a resolved request."""
        steps = self.steps_to_run
        after = {round(steps * share / (count + 1)) for share in range(1, count + 1)}
        return replace(self, preview_steps=tuple(sorted(after - {0, steps})))

    def _check_lora(self, model: ModelInfo) -> None:
        if self.lora and not (model.loras or model.loras_on_demand):
            raise LoraNotFound("this server has no LoRA adapters; leave lora out.", "lora")
        if len(self.lora) > model.limits.max_loras:
            raise InvalidRequest(
                f"lora names {len(self.lora)} adapters; at most {model.limits.max_loras} are "
                "allowed.",
                "lora",
            )
        if len({name for name, _ in self.lora}) != len(self.lora):
            raise InvalidRequest("lora names an adapter twice; name each once.", "lora")
        for name, scale in self.lora:
            if name not in model.loras and not model.loras_on_demand:
                raise LoraNotFound(
                    f"no LoRA adapter {name[:100]!r} here; there are {', '.join(model.loras)}.",
                    "lora",
                )
            if not abs(scale) <= MAX_LORA_SCALE:
                raise InvalidRequest(
                    f"the scale of {name!r} must be from -{MAX_LORA_SCALE:g} to "
                    f"{MAX_LORA_SCALE:g}; it is {scale:g}.",
                    "lora",
                )

    def _checked_strength(self, model: ModelInfo, steps: int) -> float | None:
        """Check the images, and return the strength with the default filled in."""
        if self.image is None:
            for name in ("mask_image", "strength", "more_images"):
                if getattr(self, name) not in (None, ()):
                    raise InvalidRequest(f"{name} needs an image; leave it out, or send one.", name)
            if self.task not in model.tasks:
                raise InvalidRequest(
                    f"{model.pipeline} generates nothing from a prompt alone; send an image, too.",
                    "image",
                )
            return None
        model.check_images(1 + len(self.more_images), self.mask_image is not None)
        self._check_pixels(model)
        strength = self.strength
        if strength is not None and self.task not in model.default_strengths:
            raise InvalidRequest(
                f"{model.pipeline} does not support strength for {self.task}; leave it out.",
                "strength",
            )
        if strength is None:
            strength = model.default_strengths.get(self.task)
        if strength is not None and not (0 < strength <= 1 and int(steps * strength) >= 1):
            raise InvalidRequest(
                f"strength must be over 0 and at most 1, and at least one of {steps} steps must "
                f"run; it is {strength:g}.",
                "strength",
            )
        return strength

    def _check_pixels(self, model: ModelInfo) -> None:
        most_pixels = model.limits.max_image_pixels
        images = [("image", self.image), *(("image", image) for image in self.more_images)]
        for name, given in (*images, ("mask_image", self.mask_image)):
            if given is not None and given.width * given.height > most_pixels:
                raise InvalidRequest(
                    f"{name} has {given.width}x{given.height} pixels; at most {most_pixels} are "
                    "allowed.",
                    name,
                )


@dataclass(frozen=True)
class RequestContext:
    """Circumstances of a request, beside its parameters."""

    order: str = ""
    """Id of the HTTP request. Sibling requests are admitted together: they do not count as each
    other's backlog."""
    sent_at: float | None = None
    """Unix time of the sending, from which the deadline counts; ``None`` means now. It may come
    from another machine's clock, so timings do not use it."""
    is_retry: bool = False
    """The request was rejected before, and redeems a reservation or waited for a replica."""
    reserved_s: float = 0.0
    """Work, in seconds, that retries of other requests have reserved before its deadline."""
    trace: str = ""
    """W3C ``traceparent`` of the request, to which the traces of its batch peers link. Empty if it
    is not traced."""


INITIAL = RequestContext()
"""Context of a first attempt without siblings."""


def shrunk(image: Image, model: ModelInfo) -> Image:
    """Reduce a further input image to the number of pixels of the model's default size.

    Raises:
        InvalidRequest: it cannot be read.
    """
    native = model.default_width, model.default_height
    size = near(image.size, native, model.size_multiple, model.limits)
    return fitted_input(image, "RGB", size, "image")
