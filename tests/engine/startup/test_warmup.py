"""A start measures and certifies, and reuses the profile of an earlier start."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.config.models import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.certification import Certificate
from serve_app.engine.startup.comparison import largest_difference
from serve_app.engine.startup.profile import Profile
from serve_app.engine.startup.warmup import startup_fingerprint
from serve_app.errors import ConfigError
from serve_app.metrics.registry import ENGINE
from serve_app.protocol.events import Completed, Preview
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO
from tests.engine.startup.starts import (
    NEW,
    REUSED,
    SIZES,
    TINY,
    called,
    config,
    reported_reuse,
    requests,
    start,
    tiny,
)
from tests.tiny_pipelines import FAMILIES

pytestmark = pytest.mark.slow


def test_the_next_start_reuses_all_measurements(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "model.json"
    pipeline = tiny()
    with called(pipeline.denoisers["unet"]) as first_calls:
        first = start(pipeline, config(path))
    assert first.reuse == NEW
    assert first.cost.caps.keys() == set(SIZES)
    assert all(1 <= cap <= 4 for cap in first.cost.caps.values())
    pipeline = tiny()
    with called(pipeline.denoisers["unet"]) as second_calls:
        second = start(pipeline, config(path))
    assert second.reuse == REUSED
    assert second.cost.caps == first.cost.caps
    assert second.cost.call_s == first.cost.call_s
    assert second.certificate == first.certificate
    assert second.trials == first.trials
    assert set(first.trials.faults) == {"ddim", "ddpm"}  # a tiny config says nothing of clipping
    # One image takes three calls with PNDM; the check adds a pair, and a control of each row.
    assert len(second_calls) == 6 < len(first_calls)
    assert list(path.parent.iterdir()) == [path]


def test_an_engine_with_a_profile_offers_the_same(profile: Path) -> None:
    with Engine(tiny(), TINY, config(profile)) as reused:
        pass
    with Engine(tiny(), TINY, config(profile.with_name("none"))) as new:
        pass
    assert reused.info == new.info


def test_only_the_sizes_of_the_config_are_warmed_up() -> None:
    pipeline = tiny()
    small = EngineConfig(max_batch_size=2, warmup_sizes_px=((64, 32),))
    with called(pipeline.denoisers["unet"]) as shapes:
        start(pipeline, small)
    # A latent cell has two pixels a side. The certification takes the model's own size.
    assert {tuple(shape[2:]) for shape in shapes} == {(16, 16), (16, 32)}


def test_a_reused_profile_gives_the_same_images_in_the_same_batches(
    profile: Path, log: pytest.LogCaptureFixture
) -> None:
    def generate(file: Path) -> tuple[Engine, list[Any]]:
        with Engine(tiny(), TINY, config(file)) as engine:
            streams = [engine.stream(request) for request in requests()]
            ends = [list(stream)[-1] for stream in streams]
        return engine, [end.result.pixels for end in ends if isinstance(end, Completed)]

    pipeline = tiny()
    separate = [pipeline.generate(request)[0] for request in requests()]
    new, new_images = generate(profile.with_name("none"))
    assert reported_reuse(log.messages) == NEW
    reused, reused_images = generate(profile)
    assert reported_reuse(log.messages) == REUSED
    assert reused.stats().mean_batch_size == new.stats().mean_batch_size > 1
    assert largest_difference(new_images, reused_images) <= 1e-5
    assert largest_difference(separate, reused_images) <= 1e-5


def test_previews_are_reused(profile: Path) -> None:
    params = GenerationParams("a", 1, num_inference_steps=3, preview_steps=(2,))

    def preview(file: Path) -> Any:
        with Engine(tiny(), TINY, config(file)) as engine:
            [found] = [e for e in engine.stream(params) if isinstance(e, Preview)]
        return torch.as_tensor(found.pixels)

    assert torch.allclose(preview(profile), preview(profile.with_name("none")), atol=1e-5)


def test_another_process_reuses_the_profile(tmp_path: Path) -> None:
    """The digests are the same in every process, and for weights that are read from files."""
    folder = tmp_path / "model"
    FAMILIES["stable-diffusion"]().save_pretrained(folder)
    program = (
        "import logging, sys\n"
        "from serve_app.config.models import EngineConfig, ModelConfig\n"
        "from serve_app.engine.engine import Engine\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "model = ModelConfig.model_validate_json(sys.argv[1])\n"
        "with Engine.load(model, EngineConfig.model_validate_json(sys.argv[2])):\n"
        "    pass\n"
    )
    model = TINY.model_copy(update={"path": str(folder)})
    arguments = [model.model_dump_json(), config(tmp_path / "p").model_dump_json()]
    reuse = [
        reported_reuse(
            subprocess.run(
                [sys.executable, "-c", program, *arguments],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            ).stdout.splitlines()
        )
        for _ in range(2)
    ]
    assert reuse == [NEW, REUSED]


def test_a_new_size_is_measured_and_the_others_reused(profile: Path) -> None:
    larger = config(profile, warmup_sizes_px=(*SIZES, (64, 64)))
    assert start(tiny(), larger).reuse == "certification reused, and caps of 2 of 3 sizes"
    assert start(tiny(), larger).reuse == "certification reused, and caps of 3 of 3 sizes"


def test_an_interleaved_certificate_is_reused(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    certificate = Certificate("interleaved", {}, "rows mix", ("text-to-image",))
    pipeline, path = tiny(), tmp_path / "profile.json"
    content = {
        "certificate": certificate.to_json(),
        "previews": None,
        "noise_schedulers": {},
        "sizes": [],
    }
    Profile(path, startup_fingerprint(pipeline, config(path))).write(content)
    with Engine(pipeline, TINY, config(path)) as engine:
        assert reported_reuse(log.messages) == "certification reused, and caps of 0 of 2 sizes"
        assert engine.info.sharing == "interleaved"
        assert engine.info.sharing_note == "rows mix"
        assert engine.info.tasks == ("text-to-image",)
        for request in requests():
            engine.generate(request)
        assert engine.stats().mean_batch_size == 1


def test_a_result_that_a_lack_of_memory_decided_is_not_kept(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    pipeline, path = tiny(), tmp_path / "profile.json"

    def two_rows_fit(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(two_rows_fit)
    with Engine(pipeline, TINY, config(path)) as engine:
        assert engine.info.sharing == "interleaved"
    assert not path.exists()
    assert "another start may find out more" in log.text


def test_a_size_that_the_model_does_not_support_is_rejected(demo_pipeline: LoadedPipeline) -> None:
    with pytest.raises(ConfigError, match="warmup_sizes_px: this model does not support 33x32"):
        Engine(demo_pipeline, DEMO, EngineConfig(warmup_sizes_px=((33, 32),)))


def test_the_duration_of_a_start_is_reported(log: pytest.LogCaptureFixture) -> None:
    model = DEMO.model_copy(update={"id": "timed", "path": DEMO.source})
    with Engine.load(model, EngineConfig(max_batch_size=1, profile_path="none")) as engine:
        pass
    seconds = {
        phase: ENGINE.get_sample_value(
            "diffusion_serve_cold_start_seconds", {"model": "timed", "phase": phase}
        )
        for phase in ("load", "certify", "preview", "schedulers", "measure", "compile")
    }
    assert seconds.pop("compile") == 0
    assert all(value is not None and value > 0 for value in seconds.values())
    assert sum(value for value in seconds.values() if value) == pytest.approx(
        engine.cold_start.total_s
    )
    [line] = [line for line in log.messages if "ready after" in line]
    assert line.startswith(f"model timed: ready after {engine.cold_start.total_s:.2f} s: load ")
    assert line.endswith("; nothing reused and nothing stored")
