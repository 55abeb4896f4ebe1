"""Images that are not finite end a start.

A start with `engine.max_running: 1` generates an image to find out; others certify.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from serve_app.config.models import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.previews import PreviewMap
from serve_app.errors import ModelLoadError, NotFinite
from tests.engine.startup.starts import REUSED, TINY, config, start, tiny
from tests.tiny_pipelines import FAMILIES

NAN, INFINITY = float("nan"), float("inf")


@contextmanager
def decoded(pipeline: LoadedPipeline, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Replace what the decoder returns by ``change(number of the decoding, output)``."""
    calls = 0

    def replaced(_: nn.Module, args: object, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return change(calls, output)

    hook = pipeline.stock.vae.decoder.conv_out.register_forward_hook(replaced)
    try:
        yield
    finally:
        hook.remove()


EVERY_START = [
    pytest.param(EngineConfig(max_running=1), "NaN or infinite", id="one at a time"),
    pytest.param(EngineConfig(), "NaN or infinite", id="certified"),
]


@pytest.mark.parametrize(("engine_config", "message"), EVERY_START)
def test_a_scheduler_config_that_gives_nan_ends_the_start(
    engine_config: EngineConfig, message: str
) -> None:
    stock = FAMILIES["stable-diffusion"]()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,  # clipping would repair the division by zero
    )
    stock.register_modules(scheduler=scheduler)
    with pytest.raises(ModelLoadError, match=message):
        Engine(LoadedPipeline(stock, TINY), TINY, engine_config)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize(("engine_config", "message"), EVERY_START)
def test_a_decoder_that_gives_no_finite_image_ends_the_start(
    engine_config: EngineConfig, message: str, value: float
) -> None:
    pipeline = tiny()
    with (
        decoded(pipeline, lambda _, output: torch.full_like(output, value)),
        pytest.raises(ModelLoadError, match=message),
    ):
        Engine(pipeline, TINY, engine_config)


def test_a_profile_does_not_hide_that_images_are_not_finite(profile: Path) -> None:
    assert start(tiny(), config(profile)).reuse == REUSED
    pipeline = tiny()
    with (
        decoded(pipeline, lambda _, output: output / 0),
        pytest.raises(NotFinite, match="NaN or infinite"),
    ):
        start(pipeline, config(profile))


def test_a_task_whose_images_are_not_finite_is_not_offered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline = tiny()
    encoder = pipeline.stock.vae.encoder.conv_out
    hook = encoder.register_forward_hook(lambda _module, _args, output: output / 0)
    try:
        with Engine(pipeline, TINY) as engine:
            assert engine.info.tasks == ("text-to-image",)
    finally:
        hook.remove()
    assert "image-to-image is not offered" in caplog.text
    assert "NaN or infinite" in caplog.text


def test_previews_are_not_fitted_to_images_that_are_not_finite() -> None:
    pipeline = tiny()
    with (
        decoded(pipeline, lambda calls, output: output / 0 if calls == 2 else output),
        pytest.raises(NotFinite, match="the image is not finite"),
    ):
        PreviewMap.fit(pipeline)
