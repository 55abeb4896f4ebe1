"""LoRA adapters of the demo model, in the files that a training script writes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from serve_app.config.source import DEMO_MODEL_DIR

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def save_adapter(folder: Path, seed: int, text_encoder: bool = False, rank: int = 4) -> None:
    """Write random weights of this rank into `ADAPTER_FILE` in the folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_MODEL_DIR)
    torch.manual_seed(seed)
    pipeline.unet.add_adapter(
        LoraConfig(
            r=rank,
            init_lora_weights=False,
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
    )
    layers = {"unet_lora_layers": get_peft_model_state_dict(pipeline.unet)}
    if text_encoder:
        pipeline.text_encoder.add_adapter(
            LoraConfig(r=rank, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        )
        layers["text_encoder_lora_layers"] = get_peft_model_state_dict(pipeline.text_encoder)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)


def save_adapters(folder: Path, names: Sequence[str], rank: int = 4) -> None:
    """Write ``NAME.safetensors`` of random weights for each name into the folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_MODEL_DIR)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        config = LoraConfig(r=rank, init_lora_weights=False, target_modules=layers)
        pipeline.unet.add_adapter(config, f"adapter_{seed}")
        weights = get_peft_model_state_dict(pipeline.unet, adapter_name=f"adapter_{seed}")
        pipeline.unet.delete_adapters(f"adapter_{seed}")
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=weights, weight_name=f"{name}.safetensors"
        )


def spoil_adapter(folder: Path, value: float) -> None:
    """Write this value to one place of the weights in the folder."""
    path = folder / ADAPTER_FILE
    weights = load_file(path)
    name = next(name for name in weights if "mid_block" in name and "lora_B" in name)
    weights[name][0, 0] = value
    save_file(weights, path)
