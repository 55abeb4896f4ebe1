"""Loading of folders in the diffusers format, and errors for invalid ones."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from torch import Tensor, nn

from serve_app.config.models import ModelConfig, parse_app_config
from serve_app.config.speed import SpeedConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.loader import read_pipeline, resolve_device
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ConfigError, ModelLoadError
from serve_app.protocol.params import GenerationParams
from tests.tiny_pipelines import FAMILIES, HEIGHT_PX, WIDTH_PX

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["stable-diffusion"]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _load(folder: Path) -> LoadedPipeline:
    return LoadedPipeline.load(ModelConfig(id="m", path=str(folder), device="cpu"))


def test_the_sdxl_config_loads_and_generates_an_sdxl(tmp_path: Path) -> None:
    """Loads configs/sdxl.yaml with its half-precision variant; only the weights are small."""
    FAMILIES["sdxl"]().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert list((tmp_path / "unet").glob("*.fp16.safetensors"))
    [application] = yaml.safe_load((CONFIGS / "sdxl.yaml").read_text())["applications"]
    model = parse_app_config(application["args"]).model
    assert model.path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert not model.is_local
    # A CPU lacks some half-precision kernels, and takes minutes for 1024 pixels a side.
    small = {"dtype": "float32", "device": "cpu", "default_size_px": (WIDTH_PX, HEIGHT_PX)}
    local = model.model_copy(update={"path": str(tmp_path), **small})
    pipeline = LoadedPipeline.load(local)
    assert pipeline.class_name == "StableDiffusionXLPipeline"
    with Engine(pipeline, local) as engine:
        assert engine.info.default_steps == 30
        result = engine.generate(GenerationParams("a cat", 1, num_inference_steps=2))
    assert torch.isfinite(result.pixels).all()


def test_a_cast_that_changes_nothing_is_not_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = _load(folder).stock
    pipeline.vae.to(torch.float32)
    caplog.set_level(logging.WARNING, "diffusers")
    logging.getLogger("diffusers.models.modeling_utils").warning(
        "should be kept in float32: ['norm']"
    )
    assert caplog.messages == ["should be kept in float32: ['norm']"]


def test_a_seed_generates_the_same_image_after_loading_again(folder: Path) -> None:
    params = GenerationParams("a cat", 5, width=32, height=32, num_inference_steps=2)
    assert torch.equal(_load(folder).generate(params), _load(folder).generate(params))


def test_a_request_does_not_change_the_shared_noise_scheduler(folder: Path) -> None:
    pipeline = _load(folder)
    before = dict(vars(pipeline.stock.scheduler))
    config = dict(pipeline.stock.config)
    pipeline.generate(GenerationParams("a", 1, width=32, height=32, num_inference_steps=3))
    after = vars(pipeline.stock.scheduler)
    assert after["num_inference_steps"] == before["num_inference_steps"]
    assert dict(pipeline.stock.config) == config


@pytest.mark.filterwarnings("ignore:.upcast_vae. is deprecated:FutureWarning")
def test_a_failed_call_restores_the_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SDXL converts its VAE to float32 to decode, in a copy: nobody else may see that."""
    stock = FAMILIES["sdxl"]()
    stock.vae.to(torch.float16)
    pipeline = LoadedPipeline(stock, ModelConfig(id="m"))
    params = GenerationParams("a", 1, width=64, height=32, num_inference_steps=1)
    dtypes: list[torch.dtype] = []

    def fail(*args: object, **kwargs: object) -> None:
        dtypes.append(stock.vae.dtype)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(stock.vae, "decode", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            pipeline.generate(params)
    assert dtypes == [torch.float16]
    assert stock.vae.dtype == torch.float16


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelLoadError, match="/no/such/folder does not exist"):
        _load(Path("/no/such/folder"))


def test_a_folder_without_an_index_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model_index"):
        _load(tmp_path)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelLoadError, match=r"only pickled weights.*safetensors"):
        _load(folder)


def test_a_missing_component_is_named(folder: Path) -> None:
    for file in (folder / "vae").iterdir():
        file.unlink()
    (folder / "vae").rmdir()
    with pytest.raises(ModelLoadError, match="'vae'"):
        _load(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ('{"_class_name": ["mine", "P"]}', "code of their own"),
        ("[]", "no stock"),
    ],
)
def test_a_wrong_index_is_rejected(folder: Path, content: str, reason: str) -> None:
    (folder / "model_index.json").write_text(content)
    with pytest.raises(ModelLoadError, match=reason):
        _load(folder)


def test_an_unknown_pipeline_and_broken_weights_are_reported(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ModelLoadError, match="NoSuchPipeline"):
        _load(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelLoadError, match="damaged"):
        _load(folder)


def test_unknown_call_arguments_are_rejected_at_start(folder: Path) -> None:
    model = ModelConfig(id="m", path=str(folder), device="cpu", call_kwargs={"clip_skp": 1})
    with pytest.raises(ModelLoadError, match=r"clip_skp.*clip_skip"):
        LoadedPipeline.load(model)


def test_a_gpu_that_torch_cannot_use_is_explained() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    with pytest.raises(ConfigError, match=r"install a CUDA build|nvidia-smi"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def _networks(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{type(network).__name__} {name}": weights
        for network in _networks(pipeline)
        for name, weights in network.state_dict().items()
    }


META = torch.device("meta")
"""Replacement of a GPU: tensors that are moved there cannot return."""


@pytest.fixture
def meta_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow "meta" as a ``device_map``; diffusers lists only the CPU and the GPUs of torch."""
    monkeypatch.setattr(
        pipeline_utils, "SUPPORTED_DEVICE_MAP", [*pipeline_utils.SUPPORTED_DEVICE_MAP, "meta"]
    )


@pytest.mark.parametrize("family", ["stable-diffusion", "sd3"])
@pytest.mark.usefixtures("meta_is_supported")
def test_weights_are_read_to_the_device(tmp_path: Path, family: str) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    pipeline = read_pipeline(ModelConfig(id="m", path=str(tmp_path)), META)
    assert {weights.device for weights in _weights(pipeline).values()} == {META}
    # The pipeline can be moved or offloaded, as after an ordinary move.
    assert pipeline.hf_device_map is None
    for network in _networks(pipeline):
        assert "to" not in vars(network)
        assert not hasattr(network, "hf_device_map")
        assert not any(hasattr(layer, "_hf_hook") for layer in network.modules())
        assert not any(layer._forward_pre_hooks for layer in network.modules())


@pytest.mark.parametrize("speed", [SpeedConfig(offload="model"), SpeedConfig(quantize="int8")])
@pytest.mark.usefixtures("meta_is_supported")
def test_offloaded_or_quantized_weights_are_read_to_the_cpu(
    folder: Path, speed: SpeedConfig
) -> None:
    pipeline = read_pipeline(ModelConfig(id="m", path=str(folder), speed=speed), META)
    assert {weights.device.type for weights in _weights(pipeline).values()} == {"cpu"}


def test_weights_are_read_to_the_cpu_if_diffusers_rejects_the_device(folder: Path) -> None:
    """diffusers rejects unknown devices, and pipelines in two parts."""
    expected = _weights(FAMILIES["stable-diffusion"]())
    found = _weights(read_pipeline(ModelConfig(id="m", path=str(folder)), META))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_device_map_changes_no_weights(folder: Path) -> None:
    """Reads to the CPU in the way that diffusers and transformers use for a GPU."""
    plain, mapped = (
        DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16, **placement)
        for placement in ({}, {"device_map": "cpu"})
    )
    expected, found = _weights(plain), _weights(mapped)
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name
        assert found[name].dtype == weights.dtype, name
