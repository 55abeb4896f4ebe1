"""A GGUF file in place of the transformer."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from serve_app.config import checkpoint_files, needed_packages
from serve_app.config.model_files import check_model_folder
from serve_app.config.models import ModelConfig
from serve_app.config.speed import SpeedConfig
from serve_app.doctor.weights import read_components
from serve_app.engine.engine import Engine
from serve_app.engine.model.fingerprint import of_component
from serve_app.engine.model.loader import load_stock
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ConfigError, ModelLoadError
from serve_app.protocol.events import Completed
from serve_app.protocol.params import GenerationParams
from tests.single_files import config, paint
from tests.tiny_pipelines import FAMILIES, HEIGHT_PX, WIDTH_PX

gguf = pytest.importorskip("gguf")


def write_gguf(transformer: nn.Module, file: Path, kind: str, skip: str = "") -> None:
    """Write a transformer as a GGUF file, with the weights of its linear layers quantized."""
    quantized = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "flux")
    for name, tensor in transformer.state_dict().items():
        numbers = tensor.numpy()
        if name == skip:
            continue
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(numbers, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    pipeline = FAMILIES["flux"]()
    pipeline.save_pretrained(folder)
    for kind in ("Q8_0", "Q4_0"):
        write_gguf(pipeline.transformer, folder / f"{kind}.gguf", kind)
    return folder


def with_gguf(folder: Path, kind: str, **options: object) -> ModelConfig:
    return config(folder, components={"transformer": str(folder / f"{kind}.gguf")}, **options)


def stock_with_gguf(folder: Path, kind: str) -> FluxPipeline:
    transformer = FluxTransformer2DModel.from_single_file(
        str(folder / f"{kind}.gguf"),
        config=str(folder),
        subfolder="transformer",
        dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    return FluxPipeline.from_pretrained(folder, transformer=transformer)


def test_a_gguf_transformer_paints_what_stock_diffusers_paints(flux: Path) -> None:
    full = paint(DiffusionPipeline.from_pretrained(flux))
    digests, errors = [], []
    for kind in ("Q8_0", "Q4_0"):
        loaded, stock = load_stock(with_gguf(flux, kind)), stock_with_gguf(flux, kind)
        image = paint(loaded)
        assert torch.equal(image, paint(stock))
        errors.append(float((image - full).abs().mean()))
        digests.append(of_component(loaded.transformer))
        assert of_component(stock.transformer) == digests[-1]
    assert 0 < errors[0] < errors[1]
    assert digests[0] != digests[1]


def test_an_adapter_changes_a_gguf_transformer_as_in_stock_diffusers(
    flux: Path, tmp_path: Path
) -> None:
    trained = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer")
    trained.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))
    FluxPipeline.save_lora_weights(
        str(tmp_path), transformer_lora_layers=get_peft_model_state_dict(trained)
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    loaded = LoadedPipeline.load(with_gguf(flux, "Q8_0", loras={"ink": str(file)}))
    stock = stock_with_gguf(flux, "Q8_0")
    plain = paint(stock)
    stock.load_lora_weights(str(tmp_path))
    size = {"width": WIDTH_PX, "height": HEIGHT_PX, "num_inference_steps": 2}
    for lora, expected in (((), plain), ((("ink", 1.0),), paint(stock))):
        params = GenerationParams("a red circle", 1, lora=lora, **size)
        assert torch.allclose(loaded.generate(params)[0], expected, atol=1e-5)


def test_the_engine_batches_a_gguf_transformer(flux: Path) -> None:
    model = with_gguf(flux, "Q8_0", default_size_px=(WIDTH_PX, HEIGHT_PX))
    size = {"width": WIDTH_PX, "height": HEIGHT_PX, "num_inference_steps": 2}
    params = [GenerationParams("a red circle", seed, **size) for seed in (1, 2)]
    pipeline = LoadedPipeline.load(model)
    alone = [pipeline.generate(one)[0] for one in params]
    with Engine(pipeline, model) as engine:
        assert engine.info.sharing == "batched", engine.info.sharing_note
        for stream, expected in zip([engine.stream(one) for one in params], alone, strict=True):
            *_, last = stream
            assert isinstance(last, Completed), last
            assert torch.allclose(last.result.pixels, expected, atol=1e-5)


def test_a_gguf_file_that_does_not_fit_is_refused(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer")
    lacking, cut, other = (tmp_path / f"{name}.gguf" for name in ("lacking", "cut", "other"))
    write_gguf(transformer, lacking, "Q8_0", skip="proj_out.bias")
    cut.write_bytes(lacking.read_bytes()[:-5000])
    transformer.proj_out.weight = nn.Parameter(torch.zeros(3, 32))
    write_gguf(transformer, other, "Q8_0")
    cases = {
        lacking: "cannot convert .*lacking.gguf to the FluxTransformer2DModel",
        cut: "has no weights, it is damaged or cut off",
        other: r"proj_out.weight is \[3, 32\], needed is \[16, 32\]",
    }
    for file, words in cases.items():
        with pytest.raises(ModelLoadError, match=words):
            load_stock(config(flux, components={"transformer": str(file)}))
    model = with_gguf(flux, "Q8_0")
    with pytest.raises(ConfigError, match=r"speed.quantize.* already quantized"):
        load_stock(model.model_copy(update={"speed": SpeedConfig(quantize="int8")}))
    # A check may run where no replica does, such as the head: it needs no package.
    for module in (checkpoint_files, needed_packages):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    check_model_folder(model)
    [part] = [part for part in read_components(model) or [] if part.name == "transformer"]
    assert part.other_bytes == (flux / "Q8_0.gguf").stat().st_size
    with pytest.raises(ModelLoadError, match=r"needs the package gguf.*diffusion-serve\[gguf\]"):
        load_stock(model)
