"""A model that needs a package is rejected before its weights are read."""

import json
from pathlib import Path

import pytest

from serve_app.config import needed_packages
from serve_app.config.models import ModelConfig
from serve_app.config.needed_packages import check_model_packages
from serve_app.errors import ModelLoadError

COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "processor": ["transformers", "Qwen2VLProcessor"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
}


def test_a_processor_of_images_and_videos_needs_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"_class_name": "QwenImageEditPlusPipeline"} | COMPONENTS
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = ModelConfig(id="m", path=str(tmp_path))
    looked_up: list[str] = []

    def find(package: str, found: object) -> object:
        looked_up.append(package)
        return found

    monkeypatch.setattr(needed_packages, "find_spec", lambda package: find(package, None))
    with pytest.raises(ModelLoadError, match=r"processor needs the package torchvision.*pip"):
        check_model_packages(model)
    monkeypatch.setattr(needed_packages, "find_spec", lambda package: find(package, "a spec"))
    check_model_packages(model)
    assert looked_up == ["torchvision"] * 2
