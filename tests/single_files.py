"""Tiny models as they are found: single files, with the tensor names of original checkpoints.

The names are the inverse of what diffusers' `loaders/single_file_utils.py` converts.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from serve_app.config.models import ModelConfig
from tests.tiny_networks import CLIP_DIM, draw_weights
from tests.tiny_pipelines import FAMILIES, HEIGHT_PX, WIDTH_PX

Names = Mapping[str, str]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}
_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
}


def paint(pipeline: DiffusionPipeline) -> Tensor:
    """Return one image ``[3, height, width]`` of a stock pipeline."""
    image: Tensor = pipeline(
        "a red circle",
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images[0]
    return image


def config(path: Path, **options: object) -> ModelConfig:
    return ModelConfig.model_validate({"id": "m", "path": str(path), "device": "cpu"} | options)


def sdxl() -> StableDiffusionXLPipeline:
    """Build a tiny SDXL whose two text encoders differ in width, by which diffusers tells them."""
    pipeline = FAMILIES["sdxl"]()
    small = {**pipeline.text_encoder.config.to_dict(), "hidden_size": 24}
    large = {**small, "hidden_size": 2 * CLIP_DIM - 24}
    pipeline.register_modules(
        text_encoder=CLIPTextModel(CLIPTextConfig(**small)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**large)),
    )
    draw_weights(pipeline)
    return pipeline


def save_single_file(pipeline: DiffusionPipeline, file: Path) -> dict[str, Tensor]:
    """Write all networks of a tiny SD or SDXL to one file, and return its tensors."""
    tensors = {
        **_renamed(pipeline.unet, "model.diffusion_model.", _unet_name(pipeline.unet)),
        **original_vae(pipeline.vae, "first_stage_model."),
    }
    if hasattr(pipeline, "text_encoder_2"):
        first = "conditioner.embedders.0.transformer.text_model."
        tensors |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        first = "cond_stage_model.transformer.text_model."
    tensors |= _renamed(pipeline.text_encoder, first, lambda name: name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return tensors


def original_vae(vae: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a VAE under their original names."""
    last = len(vae.config.up_block_types) - 1

    def name(key: str) -> str:
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", key)
        key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        return _replaced(key.replace("down_blocks", "down"), _VAE)

    tensors = _renamed(vae, prefix, name)
    attention = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {  # its linear layers were convolutions
        key: tensor[:, :, None, None] if attention.search(key) else tensor
        for key, tensor in tensors.items()
    }


def _unet_name(network: UNet2DConditionModel) -> Callable[[str], str]:
    layers = network.config.layers_per_block + 1
    fixed = DIFFUSERS_TO_LDM_MAPPING["unet"]
    exact = {**fixed["layers"], **fixed["addition_embed_type"]}

    def name(key: str) -> str:
        if key in exact:
            return exact[key]
        block, rest = key.split(".", 1)
        if block == "mid_block":
            kind, index, rest = rest.split(".", 2)
            place = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
        else:
            number, kind, index, rest = rest.split(".", 3)
            first = int(number) * layers
            if kind == "downsamplers":
                return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                with_attention = "Cross" in network.config.up_block_types[int(number)]
                return f"output_blocks.{first + layers - 1}.{1 + with_attention}.{rest}"
            down = block == "down_blocks"
            side, first = ("input_blocks", first + 1) if down else ("output_blocks", first)
            place = f"{side}.{first + int(index)}.{0 if kind == 'resnets' else 1}"
        return f"{place}.{_replaced(rest, _RESNET) if kind == 'resnets' else rest}"

    return name


def _open_clip(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    tensors = _renamed(encoder, prefix, lambda name: _replaced(name, _OPEN_CLIP))
    tensors[f"{prefix}text_projection"] = tensors[f"{prefix}text_projection"].T
    for key in [key for key in tensors if ".q_proj." in key]:
        parts = [tensors.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        tensors[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return tensors


def _renamed(
    network: torch.nn.Module, prefix: str, name: Callable[[str], str]
) -> dict[str, Tensor]:
    return {prefix + name(key): tensor for key, tensor in network.state_dict().items()}


def _replaced(key: str, names: Names) -> str:
    for ours, theirs in names.items():
        key = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, key)
    return key
