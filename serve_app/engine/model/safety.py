"""Safety checkers: hooks that look at finished images.

A stock pipeline with a checker replaces a flagged image by a black one. So the checker of the model
is set aside when the model is loaded, and looks at the pixels that the pipeline returns. The
pipeline itself, its certification and its previews work without it.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import Tensor, nn

from serve_app.config.gateway import Safety
from serve_app.config.models import ModelConfig
from serve_app.config.safety import SAFETY_CHECKER, no_safety_checker
from serve_app.errors import ModelLoadError
from serve_app.protocol.events import to_host
from serve_app.protocol.safety import SafetyVerdict

logger = logging.getLogger(__name__)

_REQUIRED = "requires_safety_checker"
"""Argument of a pipeline that makes it warn without a checker, again for each task."""

_REPORTS = ("nsfw_content_detected", "nsfw_detected")
"""Fields of a pipeline's output with the verdicts of its own checker."""


class ImageChecker(Protocol):
    """Looks at one finished image: pixels in, verdict out. Used by the engine's thread only."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Networks that it calls, by name. Requests yield at them, as at those of the pipeline."""
        ...

    def __call__(self, pixels: Tensor) -> SafetyVerdict:
        """Judge an image ``[3, height, width]``, in sRGB from 0 to 1, which stays as it is."""
        ...


class StableDiffusionChecker:
    """The checker of Stable Diffusion, called as the stock pipelines call it."""

    def __init__(self, network: StableDiffusionSafetyChecker, feature_extractor: Any) -> None:
        self.networks: Mapping[str, nn.Module] = {SAFETY_CHECKER: network.eval()}
        self._network = network
        self._feature_extractor = feature_extractor

    def __call__(self, pixels: Tensor) -> SafetyVerdict:
        features = self._feature_extractor(to_host(pixels), return_tensors="pt").pixel_values
        features = features.to(self._network.device, self._network.dtype)
        # It blackens the flagged ones of ``images``: it gets an image of its own.
        _, flagged = self._network(clip_input=features, images=pixels.new_zeros(1, 1))
        return SafetyVerdict(bool(flagged[0]))


class SafetyCheck:
    """The checker of a model, and the treatment of the images that it flags.

    Attributes:
        mode: ``gateway.safety`` of the config.
    """

    def __init__(self, mode: Safety, checker: ImageChecker | None, own: str = "") -> None:
        """Take the checker, or the class name of one that stays inside the pipeline."""
        self.mode: Safety = mode
        self._checker = checker
        self._own = own

    @classmethod
    def take_from(
        cls, pipeline: DiffusionPipeline, model: ModelConfig, mode: Safety
    ) -> "SafetyCheck":
        """Set the pipeline's checker aside; drop it if ``mode`` is 'off'.

        A checker of an unknown class stays: the pipeline knows how to call it.

        Raises:
            ConfigError: ``mode`` is 'block', and there is no checker.
        """
        network = pipeline.components.get(SAFETY_CHECKER)
        if network is None and mode == "block":
            raise no_safety_checker(model)
        if _REQUIRED in pipeline.config:
            pipeline.register_to_config(**{_REQUIRED: False})
        checker, own = None, ""
        if network is not None and mode == "off":
            pipeline.safety_checker = None
        elif isinstance(network, StableDiffusionSafetyChecker):
            checker = StableDiffusionChecker(network, pipeline.feature_extractor)
            pipeline.safety_checker = None
        elif network is not None:
            own = type(network).__name__
        check = cls(mode, checker, own)
        what = type(network).__name__ if check.is_checked else "nothing"
        logger.info("model %s: safety=%s, %s looks at its images", model.id, mode, what)
        return check

    @property
    def is_checked(self) -> bool:
        """True if every image is looked at."""
        return self._checker is not None or bool(self._own)

    @property
    def blocks(self) -> bool:
        """True if a request whose image is flagged fails."""
        return self.mode == "block"

    @property
    def sites(self) -> Mapping[str, nn.Module]:
        """Sites where requests yield while their image is checked."""
        return {} if self._checker is None else self._checker.networks

    def read_report(self, output: Any) -> bool | None:
        """Return whether the pipeline itself flagged an image; ``None`` if it says nothing.

        Raises:
            ModelLoadError: it has a checker of its own that did not report.
        """
        reports: Sequence[Sequence[bool | None] | None] = [
            getattr(output, name, None) for name in _REPORTS
        ]
        flags = [flag for report in reports for flag in report or () if flag is not None]
        if self._own and not flags:
            raise ModelLoadError(
                f"the safety checker {self._own} did not report on the image: diffusers does not "
                "run it here, or does not pass on its verdict. Use a model without it, or set "
                "gateway.safety to 'off'."
            )
        return any(flags) if flags else None

    def judge(self, pixels: Tensor, reported: bool | None) -> SafetyVerdict | None:
        """Judge an image ``[3, height, width]``; ``reported`` is the pipeline's own verdict.

        An image that is not finite gets no verdict: there is nothing to see.
        """
        if self._checker is not None and bool(pixels.isfinite().all()):
            verdict = self._checker(pixels)
            return SafetyVerdict(True) if reported else verdict
        return None if reported is None else SafetyVerdict(reported)
