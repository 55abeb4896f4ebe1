"""LoRA files that fit a model not at all or in part, and all formats that fit it whole."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from serve_app.config.models import ModelConfig
from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.engine.engine import Engine
from serve_app.engine.model.adapters import Adapters
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ModelLoadError
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO, FIFO
from tests.lora import ADAPTER_FILE, save_adapter
from tests.tiny_pipelines import FAMILIES

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The tensors of an adapter of the demo model's UNet and text encoder."""
    folder = tmp_path_factory.mktemp("lora")
    save_adapter(folder, 1, text_encoder=True)
    return load_file(folder / ADAPTER_FILE)


def _config(file: Path, **options: object) -> ModelConfig:
    return ModelConfig.model_validate(DEMO.model_dump() | {"loras": {"ink": str(file)}} | options)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedPipeline]:
    def load(weights: Weights, **options: object) -> LoadedPipeline:
        file = tmp_path / "ink.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, file)
        return LoadedPipeline.load(_config(file, **options))

    return load


def _renamed(weights: Weights, old: str, new: str) -> Weights:
    renamed = {key.replace(old, new): tensor for key, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    return renamed


def _unet(weights: Weights) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key.startswith("unet.")}


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", "text_encoder_2.", ""])
def test_keys_of_no_component_are_rejected(
    load: Callable[..., LoadedPipeline], saved: Weights, prefix: str
) -> None:
    weights = _renamed(_unet(saved), "unet.", prefix)
    with pytest.raises(
        ModelLoadError,
        match=rf"'ink' .* would change nothing: none of its {len(weights)} tensors .*"
        rf"keys are {prefix}.* begin with unet. or text_encoder",
    ):
        load(weights, partial_loras=True)


def test_keys_of_no_layer_are_rejected(load: Callable[..., LoadedPipeline], saved: Weights) -> None:
    with pytest.raises(ModelLoadError, match="'ink'"):
        load(_renamed(_unet(saved), "attentions", "joints"))


def test_an_empty_file_is_rejected(load: Callable[..., LoadedPipeline]) -> None:
    with pytest.raises(ModelLoadError, match=r"ink\.safetensors has no weights"):
        load({})


def _half(weights: Weights) -> Weights:
    """Rename every second layer, as if it were that of a deeper model."""
    layers = sorted({key.split(".lora_")[0] for key in weights})
    other = {layer: layer.replace("blocks", "stages") for layer in layers[::2]}
    return {
        other.get(layer := key.split(".lora_")[0], layer) + key.removeprefix(layer): tensor
        for key, tensor in weights.items()
    }


def test_half_an_adapter_is_rejected(load: Callable[..., LoadedPipeline], saved: Weights) -> None:
    weights = _half(_unet(saved))
    with pytest.raises(
        ModelLoadError,
        match=rf"only in part: {len(weights) // 2} of its {len(weights)} tensors are used. "
        r"No layer takes .*stages.*partial_loras",
    ):
        load(weights)


def test_half_an_adapter_is_announced_where_it_is_allowed(
    load: Callable[..., LoadedPipeline], saved: Weights
) -> None:
    weights = _half(_unet(saved))
    pipeline = load(weights, partial_loras=True)
    plain, changed = (
        pipeline.generate(
            GenerationParams(
                "a red star", 1, width=64, height=64, num_inference_steps=2, lora=adapters
            )
        )
        for adapters in ((), (("ink", 0.5),))
    )
    assert float((plain - changed).abs().max()) > 1e-2
    with Engine(pipeline, DEMO, FIFO) as engine:
        assert engine.info.loras == ("ink",)
        share = f"{len(weights) // 2} of its {len(weights)} tensors are used"
        assert engine.info.partial_loras == {"ink": share}


def test_a_part_for_an_encoder_that_the_model_lacks_is_not_used(
    load: Callable[..., LoadedPipeline], saved: Weights
) -> None:
    """The text encoder of another model, as in an adapter of SDXL."""
    with pytest.raises(ModelLoadError, match=r"only in part.*text_encoder_2\."):
        load(_renamed(saved, "text_encoder.", "text_encoder_2."))


@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
@pytest.mark.parametrize("component", ["unet.", "text_encoder."])
def test_a_missing_tensor_of_a_layer_is_rejected(
    load: Callable[..., LoadedPipeline], saved: Weights, component: str, role: str
) -> None:
    """Its value would be random, so each replica would have another."""
    weights = dict(saved)
    key = next(key for key in weights if role in key and key.startswith(component))
    del weights[key]
    with pytest.raises(ModelLoadError, match="'ink'"):
        load(weights, partial_loras=True)


@pytest.mark.parametrize("component", ["unet.", "text_encoder."])
def test_a_tensor_of_a_wrong_shape_is_named(
    load: Callable[..., LoadedPipeline], saved: Weights, component: str
) -> None:
    weights = dict(saved)
    key = next(key for key in weights if "lora_A" in key and key.startswith(component))
    weights[key] = torch.zeros(4, 3)
    with pytest.raises(
        ModelLoadError, match=rf"{key.removesuffix('.weight')} is \[4, 3\], the layer"
    ):
        load(weights)


def test_scales_of_dora_that_diffusers_drops_are_missed(
    load: Callable[..., LoadedPipeline], saved: Weights
) -> None:
    weights = _kohya(saved)
    key = next(key for key in weights if key.endswith("lora_down.weight"))
    weights[key.replace("lora_down.weight", "dora_scale")] = torch.ones(32, 1)
    with pytest.raises(ModelLoadError, match=r"only in part.*dora_scale"):
        load(weights)


def _kohya(weights: Weights) -> Weights:
    """Name the tensors as kohya's scripts do, with an alpha for each layer."""
    named: Weights = {}
    for key, tensor in weights.items():
        layer, role = key.removesuffix(".weight").rsplit(".", 1)
        layer = layer.replace("text_encoder.", "te.text_model.").replace(".", "_")
        part = {"lora_A": "lora_down", "lora_B": "lora_up"}[role]
        # diffusers recognises the encoder's format by its output layers.
        for name in {layer, layer.replace("q_proj", "out_proj")}:
            named[f"lora_{name}.{part}.weight"] = tensor.clone()
            named[f"lora_{name}.alpha"] = torch.tensor(2.0)
    return named


def _old_diffusers(weights: Weights) -> Weights:
    return {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for key, tensor in _unet(weights).items()
    }


def _processors(weights: Weights) -> Weights:
    return {
        key.replace(".to_out.0", ".to_out")
        .replace(".to_", ".processor.to_")
        .replace(".lora_A", "_lora.down")
        .replace(".lora_B", "_lora.up"): tensor
        for key, tensor in _unet(weights).items()
    }


FORMATS: dict[str, Callable[[Weights], Weights]] = {
    "peft": dict,
    "kohya": _kohya,
    "old diffusers": _old_diffusers,
    "attention processors": _processors,
    "old text encoder": lambda weights: _renamed(
        weights, "text_encoder.encoder", "text_encoder.text_model.encoder"
    ),
    "float16": lambda weights: {key: tensor.half() for key, tensor in weights.items()},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_adapter_of_each_format_fits(
    load: Callable[..., LoadedPipeline], saved: Weights, kind: str
) -> None:
    pipeline = load(FORMATS[kind](saved))
    assert pipeline.adapters.partial == {}
    assert pipeline.adapters.layer_count > 10


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {}])
def test_variants_of_lora_fit(tmp_path: Path, options: dict[str, bool]) -> None:
    stock = StableDiffusionPipeline.from_pretrained(DEMO_MODEL_DIR)
    layers = ["to_out.0", "conv1", "conv_in", "proj_in", "time_embedding.linear_1"]
    stock.unet.add_adapter(
        LoraConfig(r=3, init_lora_weights=False, target_modules=layers, **options)
    )
    with warnings.catch_warnings(action="ignore"):  # of a bias, which has one dimension
        weights = get_peft_model_state_dict(stock.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights)
    pipeline = LoadedPipeline.load(_config(tmp_path / ADAPTER_FILE))
    assert pipeline.adapters.partial == {}


PARTS = {
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_each_family_fit(tmp_path: Path, family: str) -> None:
    trained, served = FAMILIES[family](), FAMILIES[family]()
    if not hasattr(trained, "load_lora_weights"):
        pytest.skip("diffusers has no adapters for this family")
    denoiser = "unet" if hasattr(trained, "unet") else "transformer"
    layers = {f"{denoiser}_lora_layers": _adapter(getattr(trained, denoiser), ["to_q", "to_v"])}
    for part in PARTS.get(family, ()):
        layers[f"{part}_lora_layers"] = _adapter(getattr(trained, part), ["q_proj", "v_proj"])
    trained.save_lora_weights(tmp_path, **layers)
    source = {"ink": str(tmp_path / ADAPTER_FILE)}
    adapters = _adapters(served, source)
    assert adapters.partial == {}
    assert 2 * adapters.layer_count == sum(map(len, layers.values()))
    file = tmp_path / ADAPTER_FILE
    save_file(_renamed(load_file(file), ".to_q.", ".to_z."), file)
    with pytest.raises(ModelLoadError, match=r"'ink'.*only in part.*to_z"):
        _adapters(FAMILIES[family](), source)


def _adapters(pipeline: DiffusionPipeline, source: dict[str, str]) -> Adapters:
    return Adapters(pipeline, source)


def _adapter(network: nn.Module, layers: list[str]) -> Weights:
    network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers))
    weights: Weights = get_peft_model_state_dict(network)
    return weights
