"""The memory that a model needs, from the headers of its files."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from serve_app.config.models import ModelConfig
from serve_app.config.speed import SpeedConfig
from serve_app.doctor.weights import Component, find_folder, needed_bytes, read_components
from serve_app.errors import ModelLoadError

PARTS = [
    Component("text_encoder", 100, 0),
    Component("text_encoder_2", 300, 0),
    Component("unet", 1000, 8),
    Component("vae", 50, 0),
]


def write_model(folder: Path, variants: tuple[str, ...] = ("",)) -> None:
    """Write a model in the diffusers format with 6 numbers in the unet and 2 in the encoder."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    for name, file in (("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        for variant in variants:
            kind = np.float16 if "fp16" in variant else np.float32
            numbers = np.zeros((2, 3) if name == "unet" else 2, kind)
            tensors = {"weight": numbers, "ids": np.zeros(1, np.int64)}
            save_file(tensors, folder / name / f"{file}{variant}.safetensors")


def test_the_demo_model_is_measured() -> None:
    model = ModelConfig(device="cpu")
    folder = find_folder(model)
    assert folder is not None
    parts = read_components(model)
    assert parts is not None
    assert [part.name for part in parts] == ["text_encoder", "unet", "vae"]
    files = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    needed = needed_bytes(parts, model, on_gpu=True)
    assert 0.9 * files < needed <= files  # in 16 bits, with headers
    assert needed_bytes(parts, model, on_gpu=False) > 1.9 * needed


@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_one_variant_is_counted(tmp_path: Path, variant: str | None) -> None:
    write_model(tmp_path / "model", ("", ".fp16"))
    model = ModelConfig(id="x", path=str(tmp_path / "model"), variant=variant)
    parts = read_components(model)
    assert parts == [Component("text_encoder", 2, 8), Component("unet", 6, 8)]


def test_a_single_file_and_replaced_components_are_counted(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    found, vae = tmp_path / "found.safetensors", tmp_path / "vae.safetensors"
    sizes = {
        "model.diffusion_model.input_blocks.0.0.weight": 5,
        "model.diffusion_model.out.0.weight": 2,
        "model_ema.decay": 100,  # a copy that is not loaded
        "first_stage_model.decoder.conv_in.bias": 3,
        "conditioner.embedders.0.x": 7,
        "conditioner.embedders.1.x": 11,
    }
    save_file({name: np.zeros(size, np.float16) for name, size in sizes.items()}, found)
    save_file({"decoder.conv_in.bias": np.zeros(13, np.float16)}, vae)
    file = ModelConfig(id="x", path=str(found))
    parts = {part.name: part.parameters for part in read_components(file) or []}
    assert parts == {"unet": 7, "vae": 3, "text_encoder": 7, "text_encoder_2": 11}
    folder = ModelConfig(id="x", path=str(tmp_path / "model"))
    components = {"vae": str(vae), "text_encoder": None}
    for model, rest in ((file, {"unet": 7, "text_encoder_2": 11}), (folder, {"unet": 6})):
        changed = model.model_copy(update={"components": components})
        parts = {part.name: part.parameters for part in read_components(changed) or []}
        assert parts == rest | {"vae": 13}
    elsewhere = {"vae": "owner/name/vae.safetensors"}
    assert read_components(file.model_copy(update={"components": elsewhere})) is None


def test_parts_of_one_file_are_added_up(tmp_path: Path) -> None:
    write_model(tmp_path / "model", ("-00001-of-00002", "-00002-of-00002"))
    model = ModelConfig(id="x", path=str(tmp_path / "model"))
    parts = read_components(model)
    assert parts is not None
    assert parts[1] == Component("unet", 12, 16)


@pytest.mark.parametrize(
    ("model", "on_gpu", "needed"),
    [
        (ModelConfig(), True, 1450 * 2 + 8),
        (ModelConfig(), False, 1450 * 4 + 8),
        (ModelConfig(dtype="float32"), True, 1450 * 4 + 8),
        (ModelConfig(speed=SpeedConfig(quantize="int8")), True, 450 * 2 + 1000 + 8),
        (ModelConfig(speed=SpeedConfig(offload="model")), True, 1000 * 2 + 8 + 50 * 2),
        (
            ModelConfig(speed=SpeedConfig(offload="model", quantize="fp8")),
            True,
            1000 + 8 + 50 * 2,
        ),
    ],
)
def test_needed_memory_follows_the_configuration(
    model: ModelConfig, on_gpu: bool, needed: int
) -> None:
    assert needed_bytes(PARTS, model, on_gpu) == needed


def test_the_hubs_cache_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = ModelConfig(id="x", path="owner/name")
    assert find_folder(model) is None
    repository = tmp_path / "models--owner--name"
    folder = repository / "snapshots" / "abc123"
    write_model(folder)
    assert find_folder(model) is None  # no branch leads there
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    assert find_folder(model) == folder
    assert find_folder(model.model_copy(update={"revision": "abc123"})) == folder
    assert find_folder(model.model_copy(update={"revision": "other"})) is None
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    )
    assert find_folder(model) is None  # the other half is still coming
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not JSON"):
        find_folder(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer",
        ),
        (b"", "it is empty"),
        (b"\x02\0\0\0\0\0\0\0[]", "damaged"),
        (b"\xff" * 8, "has no end"),
    ],
)
def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    write_model(tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for broken, expected in ((content, words), (whole[:-1], "it is cut off")):
        file.write_bytes(broken)
        with pytest.raises(ModelLoadError, match=expected) as raised:
            read_components(ModelConfig(id="x", path=str(tmp_path / "model")))
        assert str(file) in str(raised.value)
