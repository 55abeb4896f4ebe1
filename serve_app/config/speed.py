"""The settings that trade memory or exactness for speed."""

from typing import Literal

from pydantic import Field

from serve_app.config.section import Section

Acceleration = Literal["none", "balanced", "fast"]
"""Level at which denoiser calls are extrapolated from earlier ones, to save time."""


class SpeedConfig(Section):
    """Options that make the model faster or smaller. All are off by default."""

    compile: bool = Field(
        False,
        description="Compile the repeated blocks of the denoiser at start-up, for batches of "
        "1, 2, 4, … images of each size in engine.warmup_sizes_px. Without any size, the model's "
        "default size is compiled. Other sizes run uncompiled. Needs a C++ compiler.",
    )
    cuda_graphs: bool = Field(
        False,
        description="Capture small denoiser calls as CUDA graphs at start-up, for images of the "
        "same sizes. A graph repeats a call with a single launch. It is kept if it is faster. "
        "Calls with LoRA adapters run without graphs. Needs a GPU.",
    )
    channels_last: bool = Field(
        False,
        description="Keep the weights of convolutions in the denoiser and the VAE in "
        "channels-last order.",
    )
    attention_backend: str | None = Field(
        None,
        min_length=1,
        description="Attention kernel by its name in diffusers, such as 'native' or 'flash'. "
        "Default: the kernel that diffusers chooses. Not for UNets.",
    )
    offload: Literal["none", "model"] = Field(
        "none",
        description="'model': text encoders and denoisers take turns on the GPU, for GPUs that "
        "cannot hold all networks at once.",
    )
    quantize: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="Store the weights of the denoiser's linear layers in 8 bits. Calculations "
        "use model.dtype. Needs the package torchao.",
    )


class AccelerationConfig(Section):
    """Denoiser calls that are extrapolated from a request's earlier ones."""

    default: Acceleration = Field(
        "none",
        description="Level of requests that set no `acceleration`. Images are exact at 'none' "
        "only.",
    )
    low_quality: Acceleration = Field(
        "none",
        description="Level of requests of `quality: low` that set neither `acceleration` nor "
        "`num_inference_steps`. With 'balanced' or 'fast', they make all of the default steps. "
        "With 'none', they make half of them, at the default level.",
    )
    balanced_error: float = Field(
        0.04,
        ge=0,
        le=1,
        description="Largest predicted error of an extrapolated output at the level 'balanced', as "
        "a share of the output's norm. `diffusion-serve tune` finds the value for a model.",
    )
    fast_error: float = Field(
        0.24, ge=0, le=1, description="The same for the level 'fast', which makes fewer calls."
    )

    def most_error(self, level: Acceleration) -> float:
        """Return the largest predicted error at a level; 0 for ``"none"``."""
        return {"none": 0.0, "balanced": self.balanced_error, "fast": self.fast_error}[level]
