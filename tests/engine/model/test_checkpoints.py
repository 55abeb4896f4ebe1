"""Checkpoints as they are found: single files, and components from elsewhere."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve_app.config.gateway import GatewayConfig
from serve_app.config.model_files import check_model_folder, find_model
from serve_app.config.models import AppConfig, ModelConfig
from serve_app.config.safety import check_safety
from serve_app.engine.model.loader import load_stock
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import ConfigError, ModelLoadError
from serve_app.protocol.params import GenerationParams
from tests.single_files import config, original_vae, paint, save_single_file, sdxl
from tests.tiny_networks import autoencoder
from tests.tiny_pipelines import FAMILIES, HEIGHT_PX, WIDTH_PX


class Found:
    """A tiny model as a folder, as one file, and as a base without weights."""

    def __init__(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        self.pipeline = pipeline
        self.folder, self.base = folder / "whole", folder / "base"
        self.file = folder / "found.safetensors"
        pipeline.save_pretrained(self.folder)
        pipeline.save_pretrained(self.base)
        for weights in self.base.rglob("*.safetensors"):
            weights.unlink()
        self.tensors = save_single_file(pipeline, self.file)

    def config(self, file: Path | None = None, **options: object) -> ModelConfig:
        return config(file or self.file, **{"base": str(self.base), **options})


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(FAMILIES["stable-diffusion"](), tmp_path_factory.mktemp("sd"))


def test_a_single_file_paints_what_its_pipeline_paints(sd: Found, tmp_path: Path) -> None:
    for found in (sd, Found(sdxl(), tmp_path)):
        loaded = load_stock(found.config())
        assert type(loaded) is type(found.pipeline)
        assert torch.equal(paint(loaded), paint(found.pipeline))


def test_a_replaced_vae_paints_what_stock_diffusers_paints_with_it(
    sd: Found, tmp_path: Path
) -> None:
    """From a folder, a whole model, a file with the original names, and of another class."""
    stock = FAMILIES["stable-diffusion"]()
    halved = {key: 0.5 * value for key, value in stock.vae.state_dict().items()}
    stock.register_modules(vae=autoencoder(scaling_factor=0.5))
    stock.vae.load_state_dict(halved)
    stock.save_pretrained(tmp_path / "other")
    save_file(original_vae(stock.vae), tmp_path / "vae.safetensors")
    expected = paint(stock)
    assert not torch.equal(expected, paint(sd.pipeline))
    for source in (tmp_path / "other", tmp_path / "other" / "vae"):
        components = {"vae": str(source)}
        for model in (config(sd.folder, components=components), sd.config(components=components)):
            assert torch.equal(paint(load_stock(model)), expected)
    components = {"vae": str(tmp_path / "vae.safetensors")}
    stock.register_modules(vae=autoencoder())  # a file has no configuration: the model's is taken
    stock.vae.load_state_dict(halved)
    loaded = load_stock(config(sd.folder, components=components))
    assert torch.equal(paint(loaded), paint(stock))
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    stock.register_modules(vae=tiny)
    loaded = load_stock(config(sd.folder, components={"vae": str(tmp_path / "tiny")}))
    assert torch.equal(paint(loaded), paint(stock))


def test_sd3_without_t5_paints_what_stock_diffusers_paints(tmp_path: Path) -> None:
    FAMILIES["sd3"]().save_pretrained(tmp_path)
    without = {"text_encoder_3": None, "tokenizer_3": None}
    loaded = LoadedPipeline.load(config(tmp_path, components=without))
    assert loaded.stock.text_encoder_3 is None
    expected = paint(DiffusionPipeline.from_pretrained(tmp_path, **without))
    assert torch.equal(paint(loaded.stock), expected)
    params = GenerationParams(
        "a red circle", 1, width=WIDTH_PX, height=HEIGHT_PX, num_inference_steps=2
    )
    assert torch.allclose(loaded.generate(params)[0], expected, atol=1e-5)


Change = Callable[[dict[str, Tensor]], object]


def test_a_single_file_without_all_its_weights_is_refused(sd: Found, tmp_path: Path) -> None:
    """diffusers itself leaves missing weights without data, or as they were drawn at random."""
    file = tmp_path / "found.safetensors"
    unet, vae = "model.diffusion_model.", "first_stage_model."
    text = "cond_stage_model.transformer.text_model."
    cases: dict[str, Change] = {
        r"UNet2DCon.*1 of \d+ tensors are missing.*: mid_block.resnets.0.conv1.bias": lambda t: (
            t.pop(f"{unet}middle_block.0.in_layers.2.bias")
        ),
        r"AutoencoderKL: 1 of .* missing in the files: decoder.conv_out.weight": lambda t: t.pop(
            f"{vae}decoder.conv_out.weight"
        ),
        r"CLIPTextModel: 1 of .* missing.*final_layer_norm.bias": lambda t: t.pop(
            f"{text}final_layer_norm.bias"
        ),
        r"conv_in.bias is \[3\], needed is \[8\]": lambda t: t.update(
            {f"{unet}input_blocks.0.0.bias": torch.zeros(3)}
        ),
        r"no weights for text_encoder \(CLIPTextModel\).*model.components.text_encoder": lambda t: [
            t.pop(key) for key in list(t) if key.startswith(text)
        ],
        "holds no whole model.*model.components.vae": lambda t: [
            t.pop(key) for key in list(t) if key.startswith(vae)
        ],
        "is a LoRA adapter.*model.loras": lambda t: t.update({"lora_unet_x": torch.zeros(1)}),
        r"trained for v-prediction.*prediction_type 'epsilon'.*components.scheduler": lambda t: (
            t.update({"v_pred": torch.zeros(1)})
        ),
        "8-bit weights with scales": lambda t: t.update({"scaled_fp8": torch.zeros(1)}),
    }
    for words, change in cases.items():
        tensors = dict(sd.tensors)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        with pytest.raises(ModelLoadError, match=words):
            load_stock(sd.config(file))


def test_a_file_for_v_prediction_takes_a_scheduler_of_its_own(sd: Found, tmp_path: Path) -> None:
    stock = FAMILIES["stable-diffusion"]()
    stock.register_modules(
        scheduler=EulerDiscreteScheduler.from_config(
            stock.scheduler.config, prediction_type="v_prediction"
        )
    )
    stock.scheduler.save_pretrained(tmp_path / "scheduler")
    save_file(sd.tensors | {"v_pred": torch.zeros(1)}, tmp_path / "v.safetensors")
    components = {"scheduler": str(tmp_path / "scheduler")}
    loaded = load_stock(sd.config(tmp_path / "v.safetensors", components=components))
    assert torch.equal(paint(loaded), paint(stock))


def test_a_replaced_component_without_all_its_weights_is_refused(sd: Found, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    sd.pipeline.vae.save_pretrained(vae)
    file = vae / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, file)
    for source in (vae, file):
        with pytest.raises(ModelLoadError, match=r"AutoencoderKL.*decoder.conv_out.bias"):
            load_stock(config(sd.folder, components={"vae": str(source)}))


def test_what_check_finds_in_found_checkpoints(sd: Found, tmp_path: Path) -> None:
    pickle, other = tmp_path / "old.ckpt", tmp_path / "other.safetensors"
    torch.save({"state_dict": sd.tensors}, pickle)
    save_file({"a": torch.ones(1)}, other)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    index = json.loads((sd.base / "model_index.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/model_index.json").write_text(json.dumps(index))
    none, here = "/no/such", str(sd.folder)
    assert find_model(str(sd.file)).path == str(sd.file)
    cases: dict[str, ModelConfig] = {
        "is a pickle.*Convert it, and name the new file: `python -c": config(pickle),
        "file /no/such.safetensors does not exist": config(Path(f"{none}.safetensors")),
        "holds no whole model.*its first tensor is 'a'": sd.config(other),
        "x.gguf holds a transformer only.*components.transformer": config(tmp_path / "x.gguf"),
        "folder /no/such does not exist. Set model.base": sd.config(base=none),
        "names the component 'scheduler', but": sd.config(base=str(tmp_path / "bare")),
        "vae: .*x.gguf is not in the GGUF format": config(
            sd.folder, components={"vae": str(tmp_path / "x.gguf")}
        ),
        "vae: the folder /no/such does not exist": config(sd.folder, components={"vae": none}),
        "vae: .*notes.txt is neither a folder nor": config(
            sd.folder, components={"vae": str(tmp_path / "notes.txt")}
        ),
        "components.vae: .*old.ckpt is a pickle": config(
            sd.folder, components={"vae": str(pickle)}
        ),
        "no class for 'vea', which model.components names. It has": config(
            sd.folder, components={"vea": here}
        ),
        "no class for 'tokenizer_9'": config(sd.folder, components={"tokenizer_9": None}),
    }
    for words, model in cases.items():
        with pytest.raises(ModelLoadError, match=words):
            check_model_folder(model)
    with pytest.raises(ModelLoadError, match="CLIPTextModel from one file"):
        load_stock(config(sd.folder, components={"text_encoder": str(other)}))
    with pytest.raises(ModelLoadError, match=r"cannot tell the family.*Set model.base"):
        load_stock(config(other, components={"vae": here}))


def test_the_command_in_the_message_converts_a_pickle(sd: Found, tmp_path: Path) -> None:
    """For a whole model in one file, and for the weights of a folder."""
    pickle, folder = tmp_path / "it's old.ckpt", tmp_path / "old"
    torch.save({"state_dict": sd.tensors | {"step": 3}}, pickle)
    shutil.copytree(sd.folder, folder)
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), folder / "text_encoder" / "pytorch_model.bin")
    weights.unlink()
    converted = sd.config(pickle.with_suffix(".safetensors"))
    for before, after in ((config(pickle), converted), (config(folder), config(folder))):
        with pytest.raises(ModelLoadError) as raised:
            check_model_folder(before)
        command = shlex.split(str(raised.value).split("`")[1])
        assert command[:2] == ["python", "-c"]
        exec(command[2], {})
        assert torch.equal(paint(load_stock(after)), paint(sd.pipeline))


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_files_and_configurations_of_the_hub_are_found_offline(
    sd: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--found"
    snapshot = repository / "snapshots" / ("ab" * 20)
    shutil.copytree(sd.base, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20)
    shutil.copy(sd.file, snapshot)
    shutil.copytree(sd.folder / "vae", snapshot / "other-vae")
    hub = ModelConfig(
        id="m",
        path="me/found/found.safetensors",
        base="me/found",
        components={"vae": "me/found/other-vae"},
        device="cpu",
    )
    assert torch.equal(paint(load_stock(hub)), paint(sd.pipeline))
    known = "model.diffusion_model.output_blocks.11.0.skip_connection.weight"
    save_file(sd.tensors | {known: torch.ones(1)}, tmp_path / "sd.safetensors")
    with pytest.raises(ModelLoadError, match=r"v1-5, which cannot be fetched.*Set model.base"):
        load_stock(config(tmp_path / "sd.safetensors"))


def test_blocking_needs_a_safety_checker_for_a_single_file_too(sd: Found) -> None:
    block = GatewayConfig(safety="block")
    with pytest.raises(ConfigError, match=r"name one in model.components.safety_checker"):
        check_safety(AppConfig(model=sd.config(), gateway=block))
    model = sd.config(components={"safety_checker": "me/checker"})
    check_safety(AppConfig(model=model, gateway=block))
