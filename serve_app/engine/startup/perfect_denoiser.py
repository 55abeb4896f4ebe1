"""A denoiser that knows the image: it shows at which noise levels a noise scheduler samples.

It replaces the model's output by the right one for a known image. Then the latents of every
denoiser call must hold as much of the image and of noise as the model was trained with at that
timestep, and the last latents must be the image. Both hold for every solver, whatever its order.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve_app.protocol.params import MAX_SEED

TOLERANCE = 0.1
"""Largest difference of a share, of 1, that a solver may have. Larger ones show in the image."""

_LEAST_ALPHA = 2.0**-24
"""Substitute for zero in ``alphas_cumprod``; diffusers takes the same."""


@dataclass(frozen=True)
class Shares:
    """Standard deviations of the image and of the noise in latents, as the denoiser gets them."""

    image: float
    noise: float

    def difference(self, other: "Shares") -> float:
        """Return the larger difference of the two shares; NaN counts as infinite."""
        largest = max(abs(self.image - other.image), abs(self.noise - other.noise))
        return math.inf if math.isnan(self.image + self.noise) else largest


class TrainedNoise:
    """Noise levels that a model was trained with, taken from its own noise scheduler."""

    def __init__(self, own: Any) -> None:
        """Read the config of the model's own noise scheduler.

        Raises:
            ValueError: it has no known prediction type or no betas.
        """
        self.prediction_type: str | None = own.config.get("prediction_type")
        self.timesteps: int = own.config.get("num_train_timesteps") or 0
        self.clips = bool(own.config.get("clip_sample") or own.config.get("thresholding"))
        self._alphas: Tensor | None = None
        if self.prediction_type not in _OUTPUTS or not self.timesteps:
            raise ValueError("the model's own noise scheduler states no known prediction_type")
        if self.prediction_type != "flow_prediction":
            self._alphas = getattr(own, "alphas_cumprod", None)
            if self._alphas is None:
                raise ValueError("the model's own noise scheduler has no betas")

    def at(self, timestep: float) -> Shares:
        """Return the shares at a timestep, which may lie between two of training."""
        if self._alphas is None:
            noise = timestep / self.timesteps
            return Shares(1 - noise, noise)
        low = min(max(math.floor(timestep), 0), len(self._alphas) - 1)
        high = min(low + 1, len(self._alphas) - 1)
        near, far = (_sigma(float(self._alphas[index])) for index in (low, high))
        part = min(max(timestep - low, 0.0), 1.0)
        sigma = near + (far - near) * part if part else near
        return Shares(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))

    def betas_difference(self, other: Any) -> float:
        """Return the largest difference of a share at any timestep from another noise scheduler."""
        if self._alphas is None:
            return 0.0
        alphas = getattr(other, "alphas_cumprod", None)
        if alphas is None or alphas.shape != self._alphas.shape:
            return math.inf
        return float((self._alphas.double().sqrt() - alphas.double().sqrt()).abs().max())


@dataclass(frozen=True)
class DenoiserCall:
    """What one denoiser call got."""

    timestep: float
    held: Shares
    trained: Shares
    """Shares that the model was trained with at the timestep."""


class PerfectDenoiser:
    """Stand-in for a model's outputs during one request.

    Attributes:
        calls: the denoiser calls of the request, in order.
    """

    calls: list[DenoiserCall]

    def __init__(self, trained: TrainedNoise) -> None:
        self.calls = []
        self._trained = trained
        self._image: Tensor | None = None
        self._input: Tensor | None = None
        self._latents: Tensor | None = None

    @property
    def end(self) -> Shares:
        """Shares in the last latents."""
        assert self._latents is not None
        return self._shares(self._latents)

    @property
    def slack(self) -> float:
        """Largest allowed difference of a share; with few latents, chance makes it larger."""
        assert self._image is not None
        return max(TOLERANCE, 4 / math.sqrt(self._image.numel()))

    def watch(self, noise_scheduler: Any) -> None:
        """Replace methods of a request's own noise scheduler."""
        watched = vars(noise_scheduler)
        for name, make in (
            ("add_noise", self._adding),
            ("scale_model_input", self._scaling),
            ("step", self._stepping),
        ):
            if (method := getattr(noise_scheduler, name, None)) is not None:
                # Pipelines inspect the signature.
                watched[name] = functools.wraps(method)(make(method))

    def _adding(self, add_noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def added(original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            return add_noise(self._known(noise).to(original_samples.dtype), noise, timesteps)

        return added

    def _scaling(self, scale_model_input: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def scaled(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._input = scale_model_input(sample, *args, **kwargs)
            return self._input

        return scaled

    def _stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            image = self._known(sample)
            # With guidance, the same latents are there twice.
            given = sample if self._input is None else self._input[: len(sample)]
            given = given if given.shape == sample.shape else sample
            self._input = None
            latents, at = given.float(), float(timestep)
            trained = self._trained.at(at)
            self.calls.append(DenoiserCall(at, self._shares(latents), trained))
            noise = (latents - trained.image * image) / max(trained.noise, 1e-6)
            right = _OUTPUTS[str(self._trained.prediction_type)](image, noise, trained)
            right = right.to(model_output.dtype)
            if model_output.shape[1] == 2 * right.shape[1]:  # the second half is a variance
                right = torch.cat([right, model_output[:, right.shape[1] :]], dim=1)
            output = step(right, timestep, sample, *args, **kwargs)
            self._latents = output[0]
            return output

        return stepped

    def _known(self, noise: Tensor) -> Tensor:
        """Return the known image, which has nothing in common with the first noise."""
        if self._image is None:
            # Another seed than a request's, which would draw its noise once more.
            generator = torch.Generator("cpu").manual_seed(MAX_SEED)
            drawn = torch.randn(noise.shape, generator=generator)
            if self._trained.clips:  # an image without values to clip
                drawn = 0.8 * drawn.sign()
            image, other = drawn.to(noise.device), noise.float()
            self._image = image - (image * other).sum() / (other * other).sum() * other
        return self._image

    def _shares(self, latents: Tensor) -> Shares:
        assert self._image is not None
        share = (latents.float() * self._image).sum() / (self._image * self._image).sum()
        rest = latents.float() - share * self._image
        return Shares(float(share), float(rest.square().mean().sqrt()))


def _sigma(alpha: float) -> float:
    alpha = max(alpha, _LEAST_ALPHA)
    return math.sqrt((1 - alpha) / alpha)


_OUTPUTS: dict[str | None, Callable[[Tensor, Tensor, Shares], Tensor]] = {
    "epsilon": lambda image, noise, at: noise,
    "sample": lambda image, noise, at: image,
    "v_prediction": lambda image, noise, at: at.image * noise - at.noise * image,
    "flow_prediction": lambda image, noise, at: noise - image,
}
"""The right output of a model for an image and noise, by prediction type."""
