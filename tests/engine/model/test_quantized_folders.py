"""Folders whose weights torchao has quantized already."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, TorchAoConfig, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel
from transformers import TorchAoConfig as TextConfig

from serve_app.config import needed_packages
from serve_app.config.model_files import check_model_folder
from serve_app.config.speed import SpeedConfig
from serve_app.doctor.weights import read_components
from serve_app.engine.model.loader import load_stock
from serve_app.errors import ConfigError, ModelLoadError
from tests.single_files import config, paint
from tests.tiny_pipelines import FAMILIES

quantization = pytest.importorskip("torchao.quantization")
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore:.*torchao.*", "ignore:.*torch.*dtype.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with a denoiser and a text encoder in 8 bits."""
    folder = tmp_path_factory.mktemp("quantized")
    FAMILIES["stable-diffusion"]().save_pretrained(folder)
    int8 = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    parts = {
        "unet": (UNet2DConditionModel, TorchAoConfig(int8)),
        "text_encoder": (CLIPTextModel, TextConfig(int8)),
    }
    for name, (kind, method) in parts.items():
        kind.from_pretrained(
            folder / name, quantization_config=method, dtype=torch.float32
        ).save_pretrained(folder / name)
    return folder


def test_a_quantized_folder_paints_what_stock_diffusers_paints(folder: Path) -> None:
    model = config(folder)
    loaded = load_stock(model)
    image = paint(loaded)
    stock = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(image, paint(stock))
    assert not torch.equal(image, paint(FAMILIES["stable-diffusion"]()))
    parts = {part.name: part for part in read_components(model) or []}
    assert [name for name, part in parts.items() if part.quantized] == ["text_encoder", "unet"]
    assert parts["unet"].other_bytes > 0
    speed = SpeedConfig(quantize="int8")
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel are already quantized \(torchao"):
        load_stock(model.model_copy(update={"speed": speed}))


@pytest.mark.parametrize(
    ("file", "lost", "words"),
    [
        (UNET, "conv_in.bias", "1 of .* missing in the files: conv_in.bias"),
        (UNET, "time_embedding.linear_1._weight_scale", "missing .*time_embedding.linear_1.weight"),
        (TEXT, "final_layer_norm.bias", "1 of .* missing in the files: final_layer_norm.bias"),
        (TEXT, "encoder.layers.0.mlp.fc1._weight_scale", "cannot be loaded .*conversion"),
    ],
)
def test_a_part_of_a_quantized_weight_is_missed(
    folder: Path, tmp_path: Path, file: str, lost: str, words: str
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    with safe_open(tmp_path / "m" / file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys() if key != lost}  # noqa: SIM118
        metadata = opened.metadata()
    save_file(tensors, tmp_path / "m" / file, metadata)
    with pytest.raises(ModelLoadError, match=words):
        load_stock(config(tmp_path / "m"))


def test_the_package_of_a_quantized_folder_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config(folder)
    monkeypatch.setattr(needed_packages, "find_spec", lambda name: None)
    check_model_folder(model)
    with pytest.raises(ModelLoadError, match=r"package torchao, which.*diffusion-serve\[quan"):
        load_stock(model)
