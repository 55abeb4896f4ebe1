"""Stock pipelines that edit an image, built as `tests.tiny_pipelines` builds the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.more_pipelines import FEW_TOKENS, kontext, words
from tests.tiny_networks import (
    CLIP_DIM,
    HEIGHT_PX,
    LATENT_CHANNELS,
    WIDTH_PX,
    draw_weights,
    unet,
)
from tests.tiny_pipelines import flux, qwen_image, sdxl, stable_diffusion
from tools.demo_model.scenes import vocabulary

_WITH_IMAGE = 2 * LATENT_CHANNELS
"""Inputs of a UNet that reads the latents of an image."""
_WITH_MASK = _WITH_IMAGE + 1


def _on_unet(kind: type[DiffusionPipeline], in_channels: int) -> DiffusionPipeline:
    """Build a pipeline on the parts of Stable Diffusion, with another UNet."""
    parts = stable_diffusion().components
    parts |= {"unet": unet(CLIP_DIM, in_channels=in_channels)}
    pipeline = kind(**parts, requires_safety_checker=False)
    draw_weights(pipeline)
    return pipeline


def _on_xl_unet(kind: type[DiffusionPipeline], in_channels: int) -> DiffusionPipeline:
    """Build a pipeline on the parts of SDXL, with another UNet."""
    parts = sdxl(in_channels).components
    unused = ("image_encoder", "feature_extractor")
    return kind(**{name: part for name, part in parts.items() if name not in unused})


def instruct_pix2pix() -> DiffusionPipeline:
    """Build InstructPix2Pix: its UNet also reads the latents of the image to edit."""
    return _on_unet(StableDiffusionInstructPix2PixPipeline, _WITH_IMAGE)


def instruct_pix2pix_xl() -> DiffusionPipeline:
    """Build InstructPix2Pix of SDXL."""
    return _on_xl_unet(StableDiffusionXLInstructPix2PixPipeline, _WITH_IMAGE)


def inpainting() -> DiffusionPipeline:
    """Build an inpainting checkpoint: its UNet also reads the mask and the masked image."""
    return _on_unet(StableDiffusionInpaintPipeline, _WITH_MASK)


def inpainting_xl() -> DiffusionPipeline:
    """Build an inpainting checkpoint of SDXL."""
    return _on_xl_unet(StableDiffusionXLInpaintPipeline, _WITH_MASK)


def flux_fill() -> DiffusionPipeline:
    """Build FLUX.1 Fill, whose transformer also reads the masked image and the mask's pixels."""
    cell = 4  # pixels of a latent cell
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = flux(in_channels=4 * (2 * LATENT_CHANNELS + cell)).components
    return FluxFillPipeline(**{name: parts[name] for name in (*names, "transformer")})


class _WithoutVideos(Qwen2VLProcessor):
    """A processor of texts and images only: transformers reads videos with torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)


def _qwen_edit(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Build a Qwen-Image that edits. Its text encoder reads the images, too."""
    dim = 32
    parts = qwen_image()
    words = [*vocabulary(), *(f" {word}" for word in vocabulary())]
    template = kind.__init__.__code__.co_consts
    tokens = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokens += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(additional_special_tokens=tokens).train_new_from_iterator(
        [[*(text for text in template if isinstance(text, str)), *words]],
        vocab_size=2000,
        show_progress=False,
    )
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": dim,
                "intermediate_size": dim,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "bos_token_id": None,
                "eos_token_id": None,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": dim,
                "intermediate_size": dim,
                "num_heads": 2,
                "out_hidden_size": dim,
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    small = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    pipeline = kind(
        scheduler=parts.scheduler,
        vae=parts.vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=_WithoutVideos(
            image_processor=Qwen2VLImageProcessor(size=small), tokenizer=tokenizer
        ),
        transformer=parts.transformer,
    )
    draw_weights(pipeline)
    return pipeline


def qwen_image_edit() -> DiffusionPipeline:
    """Build Qwen-Image-Edit, which takes one image, or a mask, too."""
    return _qwen_edit(QwenImageEditPipeline)


def qwen_image_edit_plus() -> DiffusionPipeline:
    """Build Qwen-Image-Edit-2509, which takes several images."""
    return _qwen_edit(QwenImageEditPlusPipeline)


def flux_2_klein() -> DiffusionPipeline:
    """Build FLUX.2 klein, which generates from a prompt alone, or edits several images."""
    dim, blocks = 16, 3
    tokenizer = words()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            block_out_channels=(8,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
        ),
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=dim,
                intermediate_size=dim,
                head_dim=dim // 2,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                bos_token_id=None,
                eos_token_id=None,
            )
        ),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * dim,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )
    draw_weights(pipeline)
    return pipeline


@contextmanager
def few_pixels() -> Iterator[None]:
    """Let Qwen-Image-Edit scale input images to 64x64 pixels, not to its megapixel."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (
            pipeline_qwenimage_edit,
            pipeline_qwenimage_edit_inpaint,
            pipeline_qwenimage_edit_plus,
        ):
            dimensions = module.calculate_dimensions

            def fewer(area: int, ratio: float, of: Any = dimensions) -> Any:
                return of(area // 256, ratio)

            patch.setattr(module, "calculate_dimensions", fewer)
        yield


KONTEXT = FEW_TOKENS | {"max_area": WIDTH_PX * HEIGHT_PX, "_auto_resize": False}
"""Call arguments of Kontext, which rescales every image to ``max_area``."""

KLEIN = {"max_sequence_length": 32, "text_encoder_out_layers": [0, 1, 2]}
"""Call arguments of FLUX.2 klein, for a text encoder of two layers."""

EDITS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any], tuple[str, ...]]] = {
    "instruct-pix2pix": (instruct_pix2pix, {}, ("image-to-image",)),
    "instruct-pix2pix-xl": (instruct_pix2pix_xl, {}, ("image-to-image",)),
    "flux-kontext": (kontext, KONTEXT, ("text-to-image", "image-to-image")),
    "qwen-image-edit": (qwen_image_edit, {}, ("image-to-image", "inpainting")),
    "qwen-image-edit-plus": (qwen_image_edit_plus, {}, ("image-to-image",)),
    "flux-2-klein": (flux_2_klein, KLEIN, ("text-to-image", "image-to-image")),
    "inpainting": (inpainting, {}, ("inpainting",)),
    "inpainting-xl": (inpainting_xl, {}, ("inpainting",)),
    "flux-fill": (flux_fill, FEW_TOKENS, ("inpainting",)),
}
"""The builder, the call arguments and the tasks of pipelines whose own call takes an image."""

IN_MEMORY = ("qwen-image-edit", "qwen-image-edit-plus")
"""Pipelines that are not saved: transformers loads their processor only with torchvision."""
