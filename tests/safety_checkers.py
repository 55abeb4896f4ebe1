"""Tiny safety checkers with random weights, and Stable Diffusion with one of them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, PreTrainedModel

from serve_app.config.models import ModelConfig
from tests.tiny_pipelines import stable_diffusion

FLAGS_EVERYTHING, FLAGS_NOTHING = -2.0, 2.0
"""Thresholds below and above every cosine."""

SIDE_PX = 32
"""Side of the images that the tiny checker looks at."""


def safety_checker(
    threshold: float, kind: type[PreTrainedModel] = StableDiffusionSafetyChecker
) -> PreTrainedModel:
    """Build a checker that flags an image if its cosine with a concept is over ``threshold``."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": SIDE_PX, "patch_size": 8}
    checker = kind(CLIPConfig(projection_dim=8, vision_config=vision))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in checker.parameters():
            if weights.ndim > 1:
                weights.normal_(0.0, weights[0].numel() ** -0.5, generator=generator)
            elif not bool((weights == 1).all()):  # the norms stay
                weights.normal_(0.0, 0.1, generator=generator)
        checker.concept_embeds_weights.fill_(threshold)
        checker.special_care_embeds_weights.fill_(FLAGS_NOTHING)
    return checker.eval()


def feature_extractor() -> CLIPImageProcessor:
    side = {"height": SIDE_PX, "width": SIDE_PX}
    return CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size=side)


def concept_cosine(checker: PreTrainedModel, inputs: Tensor) -> float:
    """Return the largest cosine of one image with a concept."""
    embedding = checker.visual_projection(checker.vision_model(inputs)[1])
    cosines = torch.cosine_similarity(embedding, checker.concept_embeds)
    return float(cosines.max())


def with_checker(
    checker: nn.Module | None, pipeline: DiffusionPipeline | None = None
) -> DiffusionPipeline:
    """Rebuild a pipeline, by default of Stable Diffusion, with a safety checker."""
    pipeline = pipeline or stable_diffusion()
    parts = {"safety_checker": checker, "feature_extractor": feature_extractor()}
    return type(pipeline)(**pipeline.components | parts, requires_safety_checker=True)


def save_with_checker(folder: Path, threshold: float) -> ModelConfig:
    """Save Stable Diffusion with a checker to a folder, and return the config of this model."""
    with_checker(safety_checker(threshold)).save_pretrained(folder)
    return ModelConfig(id="checked", path=str(folder), device="cpu", default_size_px=(64, 32))
