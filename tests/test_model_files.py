"""Broken model folders: what `check` finds in the files is what a start would run into."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from serve_app.config.model_files import check_model_folder
from serve_app.config.models import ModelConfig
from serve_app.engine.model.loader import read_pipeline
from serve_app.errors import ModelLoadError
from tests.tiny_pipelines import FAMILIES

ROOT = Path(__file__).parents[1]
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943\nsize 12345\n"
)
FULL, VARIANT, SHARDS = {}, {"variant": "fp16"}, {"max_shard_size": "40KB"}

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, str]], Path]:
    """Save the tiny Stable Diffusion once for each way to save it."""
    pipeline = FAMILIES["stable-diffusion"]()
    folders: dict[str, Path] = {}

    def save(options: dict[str, str]) -> Path:
        key = json.dumps(options)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("saved")
            pipeline.save_pretrained(folders[key], **options)
        return folders[key]

    return save


def config(folder: Path, variant: str | None = None) -> ModelConfig:
    return ModelConfig(id="m", path=str(folder), device="cpu", variant=variant)


def starts(model: ModelConfig) -> bool:
    """Return whether a start can load the weights, without the check before it."""
    try:
        read_pipeline(model, torch.device("cpu")).to("cpu")
    except Exception:  # noqa: BLE001  each library raises its own
        return False
    return True


def edit(name: str, **entries: object) -> Break:
    """Change entries of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | entries
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return change


def remove(pattern: str) -> Break:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def rename(name: str, other: str) -> Break:
    return lambda folder: (folder / name).rename(folder / other)


def write(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str, size: int) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def link(name: str) -> Break:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/no/such/blob")

    return change


def only(name: str) -> Break:
    """Replace the weights of the unet by a file that PyTorch does not read."""

    def change(folder: Path) -> None:
        (folder / UNET).unlink()
        (folder / "unet" / name).write_bytes(b"x" * 10)

    return change


def own_code(folder: Path) -> None:
    edit("model_index.json", unet=["my_module", "Mine"])(folder)
    (folder / "unet" / "my_module.py").write_text("class Mine: pass")


def slow_tokenizer(folder: Path) -> None:
    """Write the vocabulary as older versions did: in two files."""
    model = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "tokenizer/merges.txt").write_text("\n".join(lines) + "\n")


def slow_without(name: str, content: str | None) -> Break:
    def change(folder: Path) -> None:
        slow_tokenizer(folder)
        file = folder / "tokenizer" / name
        file.unlink() if content is None else file.write_text(content)

    return change


def edit_index(folder: Path, shard: str, tensor: str | None = None) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][tensor or min(index["weight_map"])] = shard
    file.write_text(json.dumps(index))


INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"

BROKEN: dict[str, tuple[dict[str, str], str | None, Break, str]] = {
    "only fp16": (VARIANT, None, lambda folder: None, "Set model.variant: fp16"),
    "no fp16": (FULL, "fp16", lambda folder: None, "no files of the variant 'fp16'"),
    "part fp16": (
        FULL,
        None,
        rename(UNET, "unet/diffusion_pytorch_model.fp16.safetensors"),
        "unet has no diffusion_pytorch_model.safetensors.*Set model.variant: fp16",
    ),
    "near variant": (
        {"variant": "fp16"},
        "fp",
        lambda folder: None,
        "'fp16'. Set model.variant: fp16",
    ),
    "no weights": (FULL, None, remove(UNET), "unet has no weights: diffusion_pytorch_model"),
    "no text weights": (FULL, None, remove(TEXT), "text_encoder has no weights: model.safetensors"),
    "other name": (FULL, None, rename(UNET, "unet/model.safetensors"), "rename it to diffusion_"),
    "no shard": (SHARDS, None, remove("unet/*-00002-of*"), "8 files.*00002-of-00008.safetensors"),
    "no text shard": (SHARDS, None, remove("text_encoder/*-00002-of*"), "model-00002-of-00003"),
    "no index": (SHARDS, None, remove("unet/*index*"), "Fetch .*safetensors.index.json"),
    "index no JSON": (SHARDS, None, write(INDEX, "{"), "not an index of weights"),
    "index empty": (SHARDS, None, write(INDEX, "{}"), "not an index of weights.*weight_map"),
    "index a list": (SHARDS, None, write(INDEX, "[]"), "not an index of weights"),
    "index leads out": (SHARDS, None, lambda f: edit_index(f, "../x"), "own folder"),
    "shard cut": (
        SHARDS,
        None,
        cut("unet/diffusion_pytorch_model-00002-of-00008.safetensors", 900),
        "cut off",
    ),
    "cut": (FULL, None, cut(UNET, 150_000), "cut off after 150000 of 290008 bytes"),
    "cut in header": (FULL, None, cut(UNET, 100), "cut off in its header"),
    "empty": (FULL, None, cut(UNET, 0), f"{UNET} has no weights, it is empty"),
    "empty text": (FULL, None, cut(TEXT, 0), f"{TEXT} has no weights, it is empty"),
    "LFS": (FULL, None, write(UNET, POINTER), "Git LFS pointer.*git lfs pull"),
    "LFS text": (FULL, None, write(TEXT, POINTER), "Git LFS pointer.*git lfs pull"),
    "LFS config": (FULL, None, write("unet/config.json", POINTER), "Git LFS pointer"),
    "LFS words": (FULL, None, write("tokenizer/tokenizer.json", POINTER), "Git LFS pointer"),
    "LFS merges": (FULL, None, slow_without("merges.txt", POINTER), "merges.txt is a Git LFS"),
    "web page": (FULL, None, write(UNET, "<html>Please log in</html>"), "a web page"),
    "pickle": (FULL, None, lambda f: torch.save({}, f / UNET), "a pickle"),
    "no tensors": (
        FULL,
        None,
        lambda f: save_file({}, f / UNET, {"format": "pt"}),
        "lists no tensors",
    ),
    "link": (FULL, None, link(UNET), "link to a file that does not exist: diffusion_pytorch"),
    "config link": (FULL, None, link("unet/config.json"), "config.json is a link"),
    "no config": (FULL, None, remove("unet/config.json"), "unet/config.json is missing"),
    "no text config": (FULL, None, remove("text_encoder/config.json"), "config.json is missing"),
    "no scheduler": (FULL, None, remove("scheduler/*"), "scheduler_config.json is missing"),
    "config no JSON": (FULL, None, write("unet/config.json", "{"), "config.json is not JSON"),
    "config empty": (FULL, None, write("unet/config.json", ""), "config.json is not JSON"),
    "config a list": (FULL, None, write("text_encoder/config.json", "[]"), "not a JSON object"),
    "scheduler a list": (FULL, None, write("scheduler/scheduler_config.json", "[]"), "a list"),
    "tokenizer a list": (FULL, None, write("tokenizer/tokenizer_config.json", "[]"), "a list"),
    "no merges": (FULL, None, slow_without("merges.txt", None), "vocab.json and no merges.txt"),
    "no vocab": (FULL, None, slow_without("vocab.json", None), "merges.txt and no vocab.json"),
    "no unet": (FULL, None, edit("model_index.json", unet=None), "lacks unet"),
    "unet null": (FULL, None, edit("model_index.json", unet=[None, None]), "lacks unet"),
    "half a component": (FULL, None, edit("model_index.json", unet=["diffusers"]), "'unet' is"),
    "numbers": (FULL, None, edit("model_index.json", unet=[1, 2]), "must be a library and a"),
    "string": (FULL, None, edit("model_index.json", unet="diffusers"), "must be a library"),
    "library": (FULL, None, edit("model_index.json", unet=["no_lib", "X"]), "no library 'no_lib'"),
    "own code": (FULL, None, own_code, "code of the model's own"),
    "class": (FULL, None, edit("model_index.json", unet=["diffusers", "X"]), "no such class"),
    "pipeline": (FULL, None, edit("model_index.json", _class_name="X"), "the pipeline 'X'"),
    "ONNX": (FULL, None, only("model.onnx"), "only weights for ONNX Runtime"),
    "Flax": (FULL, None, only("diffusion_flax_model.msgpack"), "only weights for JAX"),
    "GGUF": (FULL, None, only("model.gguf"), "only weights for llama.cpp"),
    "pickled": (FULL, None, only("diffusion_pytorch_model.bin"), "only pickled weights"),
    "quantized": (
        FULL,
        None,
        edit("unet/config.json", quantization_config={"quant_method": "gptq"}),
        r"quantization_config \(gptq\).*model.speed.quantize",
    ),
    "quantized text": (
        FULL,
        None,
        edit("text_encoder/config.json", text_config={"quantization_config": {"x": "gptq"}}),
        r"quantization_config \(None\). Only weights.*model.speed.quantize",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_finds_what_stops_a_start(
    case: str, saved: Callable[[dict[str, str]], Path], tmp_path: Path
) -> None:
    options, variant, change, words = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(saved(options), folder)
    change(folder)
    model = config(folder, variant)
    with pytest.raises(ModelLoadError, match=words):
        check_model_folder(model)
    assert not starts(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("tokenizer/*"), "tokenizer has no vocabulary"),
        (remove("tokenizer/tokenizer.json"), "tokenizer has no vocabulary"),
        (slow_without("merges.txt", ""), "merges.txt is empty"),
    ],
    ids=["nothing", "no words", "empty merges"],
)
def test_check_finds_a_tokenizer_that_would_load_without_its_words(
    change: Break, words: str, saved: Callable[[dict[str, str]], Path], tmp_path: Path
) -> None:
    """A start succeeds with it, and each prompt is read wrongly."""
    whole, folder = saved(FULL), tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    read = [CLIPTokenizer.from_pretrained(path / "tokenizer") for path in (whole, folder)]
    assert read[0]("red circle").input_ids != read[1]("red circle").input_ids
    with pytest.raises(ModelLoadError, match=words):
        check_model_folder(config(folder))


def both_forms(folder: Path) -> None:
    """Leave a stale part of an index beside the whole weights, which transformers prefers."""
    (folder / "text_encoder/model.safetensors.index.json").write_text("{")


def null_quantization(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"quantization_config": None}))


SOUND: dict[str, tuple[dict[str, str], str | None, Break]] = {
    "full": (FULL, None, lambda folder: None),
    "variant": (VARIANT, "fp16", lambda folder: None),
    "shards": (SHARDS, None, lambda folder: None),
    "shards of a variant": (SHARDS | VARIANT, "fp16", lambda folder: None),
    "part without the variant": (
        VARIANT,
        "fp16",
        rename("text_encoder/model.fp16.safetensors", TEXT),
    ),
    "two vocabulary files": (FULL, None, slow_tokenizer),
    "index and whole": (FULL, None, both_forms),
    "not quantized": (FULL, None, null_quantization),
    "unknown entry": (FULL, None, edit("model_index.json", helper=["mine", "Helper"])),
    "pickles beside": (FULL, None, write("unet/diffusion_pytorch_model.bin", "x")),
    "image-to-image": (
        FULL,
        None,
        edit("model_index.json", _class_name="StableDiffusionImg2ImgPipeline"),
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_check_accepts_what_starts(
    case: str, saved: Callable[[dict[str, str]], Path], tmp_path: Path
) -> None:
    options, variant, change = SOUND[case]
    folder = tmp_path / "model"
    shutil.copytree(saved(options), folder)
    change(folder)
    assert starts(config(folder, variant))
    check_model_folder(config(folder, variant))


@pytest.mark.parametrize("family", FAMILIES)
def test_check_accepts_each_family(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    check_model_folder(config(tmp_path))


def test_a_pipeline_without_a_prompt_is_rejected_before_the_start(
    saved: Callable[[dict[str, str]], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved(FULL), folder)
    edit("model_index.json", _class_name="DDPMPipeline")(folder)
    with pytest.raises(ModelLoadError, match="DDPMPipeline is not a text-to-image pipeline"):
        check_model_folder(config(folder))
    edit("model_index.json", _class_name="KandinskyImg2ImgPipeline", movq=["diffusers", "VQModel"])(
        folder
    )
    with pytest.raises(ModelLoadError, match=r"KandinskyImg2ImgPipeline.*each call needs .*image"):
        check_model_folder(config(folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_folder_that_may_not_be_read_is_named(
    saved: Callable[[dict[str, str]], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved(FULL), folder)
    (folder / "unet/config.json").chmod(0)
    with pytest.raises(ModelLoadError, match=r"unet/config.json cannot be read: Permission"):
        check_model_folder(config(folder))


def test_a_check_imports_neither_torch_nor_diffusers(
    saved: Callable[[dict[str, str]], Path],
) -> None:
    code = (
        "import sys; from serve_app.config.model_files import check_model_folder; "
        "from serve_app.config.models import ModelConfig; "
        f"check_model_folder(ModelConfig(id='m', path={str(saved(SHARDS))!r})); "
        "print({'torch', 'diffusers', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
