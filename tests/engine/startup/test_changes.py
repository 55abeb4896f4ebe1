"""Any change to the model, its config or its environment invalidates the profile."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.config.speed import SpeedConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model import fingerprint
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.profile import Profile
from serve_app.engine.startup.warmup import startup_fingerprint
from tests.conftest import DEMO
from tests.engine.startup.starts import NEW, REUSED, TINY, config, reported_reuse, tiny
from tests.lora import ADAPTER_FILE, save_adapter

pytestmark = pytest.mark.slow


def change_unet(pipeline: LoadedPipeline) -> None:
    with torch.no_grad():
        pipeline.denoisers["unet"].mid_block.resnets[0].conv1.weight[3, 2, 1, 0] += 1e-6


def change_vae(pipeline: LoadedPipeline) -> None:
    with torch.no_grad():
        pipeline.stock.vae.decoder.conv_out.bias[0] += 1e-6


def change_dtype(pipeline: LoadedPipeline) -> None:
    pipeline.stock.text_encoder.to(torch.bfloat16)


def change_noise_scheduler(pipeline: LoadedPipeline) -> None:
    pipeline.stock.scheduler.register_to_config(steps_offset=0)


def change_tokenizer(pipeline: LoadedPipeline) -> None:
    pipeline.stock.tokenizer.add_tokens(["whatever"])


def change_layer(pipeline: LoadedPipeline) -> None:
    pipeline.denoisers["unet"].conv_act = nn.GELU()


def change_by_hook(pipeline: LoadedPipeline) -> None:
    pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(lambda _, args: None)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_unet, "component unet"),
        (change_vae, "component vae"),
        (change_dtype, "component text_encoder"),
        (change_noise_scheduler, "component scheduler"),
        (change_tokenizer, "component tokenizer"),
        (change_layer, "component unet"),
        (change_by_hook, "component unet"),
    ],
)
def test_a_changed_pipeline_is_certified_again(
    change: Callable[[LoadedPipeline], None],
    name: str,
    profile: Path,
    log: pytest.LogCaptureFixture,
) -> None:
    pipeline = tiny()
    assert Profile(profile, startup_fingerprint(pipeline, config(profile))).read() is not None
    change(pipeline)
    assert Profile(profile, startup_fingerprint(pipeline, config(profile))).read() is None
    assert log.messages[-1].endswith(f"changed: {name}")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"call_kwargs": {"clip_skip": 1}}, "model.call_kwargs"),
        ({"speed": SpeedConfig(channels_last=True)}, "model.speed"),
        ({"dtype": "float32"}, "model.dtype"),
        ({"default_guidance_scale": 1.0}, "model.default_guidance_scale"),
        ({"revision": "main"}, "model.revision"),
    ],
)
def test_a_changed_model_config_is_certified_again(
    change: dict[str, Any], name: str, profile: Path, log: pytest.LogCaptureFixture
) -> None:
    pipeline = tiny(TINY.model_copy(update=change))
    assert Profile(profile, startup_fingerprint(pipeline, config(profile))).read() is None
    assert log.messages[-1].endswith(f"changed: {name}")


@pytest.mark.parametrize("name", ["max_batch_size", "max_running"])
def test_a_changed_engine_config_is_certified_again(
    name: str, profile: Path, log: pytest.LogCaptureFixture
) -> None:
    other = config(profile, **{name: 1})
    assert Profile(profile, startup_fingerprint(tiny(), other)).read() is None
    assert log.messages[-1].endswith(f"changed: engine.{name}")


def test_a_changed_environment_is_certified_again(
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    pipeline = tiny()

    def changed() -> str:
        assert Profile(profile, startup_fingerprint(pipeline, config(profile))).read() is None
        return log.messages[-1].partition("changed: ")[2]

    with monkeypatch.context() as patch:
        patch.setenv("DIFFUSERS_ATTN_BACKEND", "native")
        assert changed() == "environment"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert changed() == "threads"
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of another machine")
        assert changed() == "processor"
    try:
        torch.set_float32_matmul_precision("high")
        assert changed() == "precision"
    finally:
        torch.set_float32_matmul_precision("highest")
    with monkeypatch.context() as patch:
        info = tmp_path / "diffusers-0.42.1.dist-info"  # the same version, other files
        info.mkdir()
        (info / "RECORD").write_text("diffusers/__init__.py,sha256=0,1\n")
        patch.syspath_prepend(tmp_path)
        assert changed() == "package diffusers"
        once = fingerprint.of_code()
        (info / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///"}')
        assert fingerprint.of_code()["package diffusers"] != once["package diffusers"]
        # An editable package may change between two starts.
        assert fingerprint.of_code() != fingerprint.of_code()
    with monkeypatch.context() as patch:
        package = Path(fingerprint.__file__).parents[2]
        for folder in ("engine", "protocol"):
            shutil.copytree(package / folder, tmp_path / folder)
        with (tmp_path / "engine/batching/batch.py").open("a") as file:
            file.write("\n")
        patch.setattr(fingerprint, "__file__", str(tmp_path / "engine/model/fingerprint.py"))
        assert changed() == "diffusion-serve"
    assert Profile(profile, startup_fingerprint(pipeline, config(profile))).read() is not None


def test_other_adapters_are_certified_again(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """Another file of the same name counts as a change."""

    def load() -> LoadedPipeline:
        return LoadedPipeline.load(DEMO.model_copy(update={"lora_folder": str(tmp_path)}))

    def read(pipeline: LoadedPipeline) -> dict[str, Any] | None:
        return Profile(path, startup_fingerprint(pipeline, config(path))).read()

    path = tmp_path / "profile.json"
    save_adapter(tmp_path, seed=1)
    Profile(path, startup_fingerprint(load(), config(path))).write({"certificate": 1})
    assert read(load()) == {"certificate": 1}
    save_adapter(tmp_path, seed=2)
    assert read(load()) is None
    assert log.messages[-1].endswith("changed: component unet")
    (tmp_path / ADAPTER_FILE).rename(tmp_path / "other.safetensors")
    assert read(load()) is None
    assert log.messages[-1].endswith("changed: component unet, adapters")


def test_a_start_with_changed_weights_replaces_the_profile(
    profile: Path, log: pytest.LogCaptureFixture
) -> None:
    before = json.loads(profile.read_text())
    pipeline = tiny()
    change_unet(pipeline)
    with Engine(pipeline, TINY, config(profile)):
        assert reported_reuse(log.messages) == NEW
    assert f"{profile} is not used and will be replaced; changed: component unet" in log.text
    after = json.loads(profile.read_text())
    changed = {
        name
        for name in before["found_with"]
        if before["found_with"][name] != after["found_with"][name]
    }
    assert changed == {"component unet"}
    with Engine(pipeline, TINY, config(profile)):
        assert reported_reuse(log.messages) == REUSED
