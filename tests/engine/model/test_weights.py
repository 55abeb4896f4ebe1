"""Weights that are missing in a model's files, and complete files that look incomplete."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextModel,
    T5Config,
    T5ForConditionalGeneration,
)

from serve_app.config.models import ModelConfig
from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.engine.model.loader import load_stock, read_pipeline
from serve_app.engine.model.weights import record_weights
from serve_app.errors import ModelLoadError
from tests.tiny_pipelines import FAMILIES, animatediff, pag

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"

BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    **FAMILIES,
    "animatediff": animatediff,
    "pag": pag,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["stable-diffusion"]().save_pretrained(tmp_path)
    return tmp_path


def _place(monkeypatch: pytest.MonkeyPatch, placement: dict[str, str]) -> None:
    """Let pipelines be read with these further options."""
    read = DiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        DiffusionPipeline,
        "from_pretrained",
        lambda source, **options: read(source, **(options | placement)),
    )


def _load(folder: Path, **options: object) -> DiffusionPipeline:
    return load_stock(
        ModelConfig.model_validate({"id": "m", "path": str(folder), "device": "cpu"} | options)
    )


def _edit(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _without(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        for key in keys:
            del tensors[key]

    return remove


def _keys(file: Path, part: str) -> list[str]:
    return sorted(key for key in load_file(file) if part in key)


@pytest.mark.parametrize("placement", [{}, {"device_map": "cpu"}])
@pytest.mark.parametrize(
    ("file", "part", "component"),
    [
        (TEXT_ENCODER, "layers.0.mlp.fc1", r"text_encoder \(CLIPTextModel\)"),
        (TEXT_ENCODER, "final_layer_norm", r"text_encoder \(CLIPTextModel\)"),
        (UNET, "conv_in", r"unet \(UNet2DConditionModel\)"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.conv_out",
            r"vae \(AutoencoderKL\)",
        ),
    ],
)
def test_missing_weights_are_named(
    folder: Path,
    file: str,
    part: str,
    component: str,
    placement: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _place(monkeypatch, placement)
    keys = _keys(folder / file, part)
    assert len(keys) == 2
    count = len(load_file(folder / file))
    _edit(folder / file, _without(*keys))
    with pytest.raises(
        ModelLoadError,
        match=rf"{component}: 2 of {count} tensors are missing.*{keys[0]}, {keys[1]}",
    ):
        _load(folder)


@pytest.mark.parametrize("file", [UNET, TEXT_ENCODER])
def test_an_empty_file_has_no_weights(folder: Path, file: str) -> None:
    save_file({}, folder / file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"{file} has no weights.*it lists no tensors"):
        _load(folder)


@pytest.mark.parametrize("file", [UNET, TEXT_ENCODER])
@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_a_file_cut_short_is_named(folder: Path, file: str, size: int) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:size])
    with pytest.raises(ModelLoadError, match=rf"{file} has no weights.*Fetch it again"):
        _load(folder)


@pytest.mark.parametrize("file", [UNET, TEXT_ENCODER])
def test_a_file_cut_short_is_named_without_an_earlier_check(folder: Path, file: str) -> None:
    """Files of a repository are fetched by the reading itself."""
    (folder / file).write_bytes((folder / file).read_bytes()[:2000])
    with pytest.raises(ModelLoadError, match=rf"{file} has no weights.*cut off in its header"):
        read_pipeline(ModelConfig(id="m", path=str(folder)), torch.device("cpu"))


@pytest.mark.parametrize(
    ("file", "key", "needed"),
    [(UNET, "conv_in.bias", r"\[\d+\]"), (TEXT_ENCODER, "final_layer_norm.bias", r"\[32\]")],
)
def test_a_wrong_shape_is_named(folder: Path, file: str, key: str, needed: str) -> None:
    [key] = _keys(folder / file, key)
    _edit(folder / file, lambda tensors: tensors.update({key: torch.zeros(3)}))
    with pytest.raises(ModelLoadError, match=rf"{key} is \[3\], needed is {needed}"):
        _load(folder)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_tensors_of_a_shard_are_compared_with_the_index(folder: Path, component: str) -> None:
    """The index names the tensor, but its file does not have it."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for file in (folder / component).iterdir():
        file.unlink()
    getattr(pipeline, component).save_pretrained(folder / component, max_shard_size="60KB")
    [index] = (folder / component).glob("*.index.json")
    assert _tensors(_load(folder)).keys() == _tensors(pipeline).keys()
    key, shard = next(iter(json.loads(index.read_text())["weight_map"].items()))
    _edit(folder / component / shard, _without(key))
    with pytest.raises(ModelLoadError, match=rf"names 1 tensors that none of its files.*{key}"):
        _load(folder)
    (folder / component / shard).unlink()
    with pytest.raises(ModelLoadError, match=shard):
        _load(folder)


def test_unused_tensors_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They change no image, but they may show that config.json is that of a smaller model."""
    _edit(folder / UNET, lambda tensors: tensors.update({"extra.weight": torch.zeros(3)}))
    _load(folder)
    assert "unet (UNet2DConditionModel) does not use 1 tensors" in caplog.text
    assert "extra.weight" in caplog.text


def _tensors(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, network in pipeline.components.items()
        if isinstance(network, nn.Module)
        for key, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("placement", [{}, {"device_map": "cpu"}])
def test_complete_models_load_without_a_warning(
    tmp_path: Path,
    family: str,
    placement: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _place(monkeypatch, placement)
    pipeline = BUILDERS[family]()
    pipeline.save_pretrained(tmp_path)
    found = _tensors(read_pipeline(ModelConfig(id="m", path=str(tmp_path)), torch.device("cpu")))
    expected = _tensors(pipeline)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not [line for line in caplog.messages if "tensors in its files" in line]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_demo_model_loads(dtype: str) -> None:
    pipeline = load_stock(ModelConfig(id="demo", device="cpu", dtype=dtype))
    assert (
        _tensors(pipeline).keys()
        == _tensors(DiffusionPipeline.from_pretrained(DEMO_MODEL_DIR)).keys()
    )


def test_keys_that_old_files_have_or_lack_are_no_fault(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Older libraries saved position ids, and the prefix of the text model."""

    def age(tensors: dict[str, Tensor]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    _edit(folder / TEXT_ENCODER, age)
    _load(folder)
    assert "tensors in its files" not in caplog.text


def test_a_safety_checker_loads(folder: Path) -> None:
    sides = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(
            projection_dim=8,
            vision_config=sides | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        )
    )
    stock = StableDiffusionPipeline.from_pretrained(folder)
    StableDiffusionPipeline(
        **stock.components | {"safety_checker": checker, "feature_extractor": CLIPImageProcessor()}
    ).save_pretrained(folder)
    assert _load(folder).safety_checker is not None
    file = folder / "safety_checker" / "model.safetensors"
    _edit(file, _without("concept_embeds"))
    with pytest.raises(ModelLoadError, match=r"safety_checker.*concept_embeds"):
        _load(folder)


def test_tied_weights_may_be_saved_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """T5 and Qwen2 share embeddings, and an encoder may come from a file with a decoder."""
    pipeline = FAMILIES["pixart-sigma"]()
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / TEXT_ENCODER
    assert not {"shared.weight", "encoder.embed_tokens.weight"} <= load_file(file).keys()
    config: T5Config = pipeline.text_encoder.config
    whole = T5ForConditionalGeneration(config)
    whole.encoder.load_state_dict(pipeline.text_encoder.encoder.state_dict())
    file.unlink()
    whole.save_pretrained(tmp_path / "text_encoder")
    assert any("decoder" in key for key in load_file(file))
    found, expected = _tensors(_load(tmp_path)), _tensors(pipeline)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert "tensors in its files" not in caplog.text
    _edit(file, _without("shared.weight"))
    with pytest.raises(ModelLoadError, match=r"T5EncoderModel.*shared.weight"):
        _load(tmp_path)


def test_a_resized_vocabulary_loads(folder: Path) -> None:
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.resize_token_embeddings(encoder.config.vocab_size + 7)
    encoder.save_pretrained(folder / "text_encoder")
    assert _load(folder).text_encoder.config.vocab_size == encoder.config.vocab_size


def test_learned_buffers_are_needed_and_computed_ones_are_not(tmp_path: Path) -> None:
    """Statistics of a batch norm are learned; a table of positions can be computed."""
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    _edit(file, _without("bn.running_var", "bn.num_batches_tracked"))
    with record_weights() as reports:
        AutoencoderKLFlux2.from_pretrained(tmp_path / "vae")
    assert [report.missing for report in reports] == [("bn.running_var",)]
    FAMILIES["sd3"]().save_pretrained(tmp_path / "sd3")
    _edit(
        tmp_path / "sd3/transformer/diffusion_pytorch_model.safetensors",
        _without("pos_embed.pos_embed"),
    )
    expected = _tensors(FAMILIES["sd3"]())
    found = _tensors(_load(tmp_path / "sd3"))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_offloaded_and_quantized_models_load(folder: Path) -> None:
    pytest.importorskip("torchao")
    _load(folder, speed={"quantize": "int8"})


def test_the_libraries_are_left_as_they_were(folder: Path) -> None:
    """Loading asks both libraries for reports; other callers get a network alone."""
    _load(folder)
    assert isinstance(CLIPTextModel.from_pretrained(folder / "text_encoder"), CLIPTextModel)
    logging.getLogger("serve_app").debug("loaded")
