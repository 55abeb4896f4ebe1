"""The recipe of the demo model: sizes of the scenes, steps and rates of the training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """Scenes of one size, and its share of the denoiser's steps."""

    width: int
    height: int
    scenes: int
    early_share: float
    """Share in the first part of the run: small images teach the words three times as fast."""
    late_share: float


BUCKETS = [
    Bucket(64, 64, 20_000, early_share=0.20, late_share=0.54),
    Bucket(48, 48, 4_000, early_share=0.35, late_share=0.25),
    Bucket(32, 32, 4_000, early_share=0.35, late_share=0.04),
    Bucket(40, 56, 1_500, early_share=0.05, late_share=0.025),
    Bucket(56, 40, 1_500, early_share=0.05, late_share=0.025),
    Bucket(64, 48, 1_500, early_share=0.0, late_share=0.025),
    Bucket(48, 64, 1_500, early_share=0.0, late_share=0.025),
    Bucket(96, 64, 1_000, early_share=0.0, late_share=0.01),
    Bucket(64, 96, 1_000, early_share=0.0, late_share=0.01),
    Bucket(80, 80, 1_000, early_share=0.0, late_share=0.03),
    Bucket(96, 96, 1_000, early_share=0.0, late_share=0.01),
    Bucket(128, 128, 600, early_share=0.0, late_share=0.01),
]


@dataclass(frozen=True)
class Recipe:
    """The settings that determine the result, apart from the hardware's rounding."""

    seed: int = 0
    scene_share: float = 1.0
    """Share of each bucket's scenes; less for a quick trial."""
    vae_steps: int = 3_000
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    text_steps: int = 600
    text_batch: int = 128
    text_learning_rate: float = 1e-3
    denoiser_steps: int = 12_000
    early_steps: int = 1_800
    denoiser_batch: int = 48
    denoiser_learning_rate: float = 8e-4
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
