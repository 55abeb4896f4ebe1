"""NaN and infinity in a model's output fail the request, and never become an image."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
)
from PIL import Image
from torch import Tensor, nn

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.timer import CallTimer
from serve_app.errors import NotFinite
from serve_app.metrics.engine import DEADLINES, IMAGES
from serve_app.protocol.events import Completed, Event, Failed, Preview
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO, FIFO
from tests.engine.engines import TOLERANCE, largest_difference, params, result_of
from tests.lora import ADAPTER_FILE, save_adapter, spoil_adapter
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX, animatediff
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("reused_starts")

NAN, INFINITY = float("nan"), float("inf")
ONE = EngineConfig(max_running=1)
BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {**FAMILIES, "animatediff": animatediff}


def tiny(family: str) -> tuple[LoadedPipeline, ModelConfig]:
    size_px, call_kwargs = (WIDTH_PX, HEIGHT_PX), CALL_KWARGS.get(family, {})
    model = DEMO.model_copy(update={"default_size_px": size_px, "call_kwargs": call_kwargs})
    return LoadedPipeline(BUILDERS[family](), model), model


def quick(**options: Any) -> GenerationParams:
    return params(**({"num_inference_steps": 3} | options))


def ends(engine: Engine, requests: list[GenerationParams]) -> list[Event]:
    """Return the last event of each request; all of them start together."""
    submitted = threading.Event()
    engine._commands.put(lambda: bool(submitted.wait(60)) and None)
    streams = [engine.stream(request) for request in requests]
    submitted.set()
    return [list(stream)[-1] for stream in streams]


def failure(event: Event) -> str:
    """Return the message of a request that failed for this reason."""
    assert isinstance(event, Failed), event
    assert isinstance(event.error, NotFinite), event.error
    assert (event.error.status, event.error.code) == (500, "generation_failed")
    message = str(event.error)
    assert message.startswith("the image is not finite (NaN or infinite), in ")
    return message


@contextmanager
def output_of(network: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the output of a layer."""
    hook = network.register_forward_hook(lambda _module, _args, output: change(output))
    try:
        yield
    finally:
        hook.remove()


def with_one(value: float, row: int = 0, channel: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a change that writes a value to one place."""

    def change(output: Tensor) -> Tensor:
        output = output.clone()
        output[(row, channel) + (0,) * (output.ndim - 2)] = value
        return output

    return change


def test_a_noise_scheduler_that_divides_by_zero_fails_the_request() -> None:
    """Zero-SNR betas leave no signal at the first step, and epsilon prediction divides by it."""
    pipeline = LoadedPipeline.load(DEMO)
    with Engine(pipeline, DEMO, ONE) as engine:
        scheduler = DDIMScheduler.from_config(
            pipeline.stock.scheduler.config, prediction_type="epsilon", rescale_betas_zero_snr=True
        )
        for stock in pipeline.pipelines.values():
            stock.register_modules(scheduler=scheduler)
        with pytest.raises(NotFinite, match=r"in float32\. Try another noise_scheduler") as caught:
            engine.generate(quick())
    assert "LoRA" not in str(caught.value)
    assert "float16" not in str(caught.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(DDPMScheduler(clip_sample=True), id="clip_sample"),
        pytest.param(DPMSolverMultistepScheduler(thresholding=True), id="thresholding"),
    ],
)
def test_infinity_that_a_noise_scheduler_would_clip_fails_the_request(
    scheduler: SchedulerMixin,
) -> None:
    pipeline = LoadedPipeline.load(DEMO)
    for stock in pipeline.pipelines.values():
        stock.register_modules(scheduler=scheduler)
    with Engine(pipeline, DEMO, ONE) as engine:
        assert isinstance(ends(engine, [quick()])[0], Completed)
        # Infinity in the row without the prompt would become NaN by the guidance.
        with output_of(pipeline.denoisers["unet"].conv_out, with_one(INFINITY, row=1)):
            failure(ends(engine, [quick()])[0])


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_an_adapter_with_one_bad_weight_harms_only_its_own_requests(
    value: float, tmp_path: Path
) -> None:
    save_adapter(tmp_path, 1)
    spoil_adapter(tmp_path, value)
    loras = {"ink": str(tmp_path / ADAPTER_FILE)}
    model = ModelConfig.model_validate(DEMO.model_dump() | {"loras": loras})
    pipeline = LoadedPipeline.load(model)
    good = [quick(seed=seed) for seed in range(3)]
    alone = [pipeline.generate(request) for request in good]
    with Engine(pipeline, model, FIFO) as engine:
        first, *others = ends(engine, [quick(seed=7, lora=(("ink", 1.0),)), *good])
        assert engine.stats().mean_batch_size > 1
    assert "Try without the LoRA adapters: 'ink'." in failure(first)
    assert largest_difference([result_of([end]) for end in others], alone) <= TOLERANCE


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_one_bad_row_of_a_batch_fails_one_request(
    demo_pipeline: LoadedPipeline, value: float
) -> None:
    """The other rows are bit by bit those of the same batch without it."""
    requests = [quick(seed=seed) for seed in range(4)]
    sizes: list[int] = []

    def spoil_second_call(output: Tensor) -> Tensor:
        sizes.append(len(output))
        # Two rows for each request: this one is the third request's.
        return with_one(value, row=5)(output) if len(sizes) == 2 else output

    unet = demo_pipeline.denoisers["unet"]
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        clean = [result_of([end]) for end in ends(engine, requests)]
        with output_of(unet.conv_out, spoil_second_call):
            events = ends(engine, requests)
    assert sizes == [8, 8, 8]
    failure(events.pop(2))
    del clean[2]
    for event, result in zip(events, clean, strict=True):
        assert torch.equal(result_of([event]).pixels, result.pixels)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_one_bad_value_of_the_decoder_fails_the_request(
    demo_pipeline: LoadedPipeline, task: str, value: float
) -> None:
    """Clamping to [0, 1] would turn infinity into white or black."""
    request = quick()
    if task != "text-to-image":
        request = replace(request, image=Image.new("RGB", (64, 64), "red"))
    if task == "inpainting":
        request = replace(request, mask_image=Image.new("L", (64, 64), 255))
    with Engine(demo_pipeline, DEMO, ONE) as engine:
        with output_of(demo_pipeline.stock.vae.decoder.conv_out, with_one(value)):
            [end] = ends(engine, [request])
        assert isinstance(ends(engine, [request])[0], Completed)
    failure(end)


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_one_bad_value_of_the_encoder_fails_the_request(value: float) -> None:
    """Diffusers limits the encoder's variance, which would turn infinity into strong noise."""
    pipeline, model = tiny("sd3")
    request = quick(
        width=WIDTH_PX, height=HEIGHT_PX, image=Image.new("RGB", (WIDTH_PX, HEIGHT_PX), "red")
    )
    with Engine(pipeline, model, ONE) as engine:
        assert isinstance(ends(engine, [request])[0], Completed)
        # The last channels are the variance. This VAE has no layer between these and the limit.
        with output_of(pipeline.stock.vae.encoder.conv_out, with_one(value, channel=-1)):
            failure(ends(engine, [request])[0])


def test_a_vae_that_overflows_in_float16_is_explained() -> None:
    """The VAE of SDXL does: its activations exceed 65504."""
    small = {"dtype": "float16", "default_size_px": (32, 32)}  # a CPU is slow in float16
    model = ModelConfig.model_validate(DEMO.model_dump() | small)
    pipeline = LoadedPipeline.load(model)
    request = quick(width=32, height=32)
    with Engine(pipeline, model, ONE) as engine:
        assert isinstance(ends(engine, [request])[0], Completed)
        with torch.no_grad():
            pipeline.stock.vae.decoder.conv_in.weight.mul_(3e4)
        [end] = ends(engine, [request])
    assert "in float16. float16 overflows above 65504, as in the VAE of SDXL" in failure(end)
    assert "set model.dtype to bfloat16 or float32" in failure(end)


def test_latents_that_a_tiny_autoencoder_would_limit_fail_the_request() -> None:
    """Its decoder maps infinite latents to 3, which gives an image."""
    pipeline = FAMILIES["stable-diffusion"]()
    torch.manual_seed(0)
    channels = (8, 8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    pipeline.register_modules(vae=vae)
    model = DEMO.model_copy(update={"default_size_px": (32, 32)})
    loaded = LoadedPipeline(pipeline, model)
    request = quick(width=32, height=32, num_inference_steps=1)
    with Engine(loaded, model, ONE) as engine:
        assert isinstance(ends(engine, [request])[0], Completed)
        # Infinity in the row without the prompt would become NaN by the guidance.
        with output_of(loaded.denoisers["unet"].conv_out, with_one(INFINITY, row=1)):
            failure(ends(engine, [request])[0])


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_is_checked(family: str, value: float) -> None:
    """Some clamp in the VAE, others in their image processor. The image of a video is one frame."""
    pipeline, model = tiny(family)
    request = quick(width=WIDTH_PX, height=HEIGHT_PX, num_inference_steps=2)
    vae = pipeline.stock.vae
    [denoiser] = pipeline.denoisers.values()
    with Engine(pipeline, model, ONE) as engine:
        assert isinstance(ends(engine, [request])[0], Completed)
        for network in (vae.decoder, denoiser):
            last = [part for part in network.modules() if isinstance(part, LAYERS)][-1]
            with output_of(last, with_one(value)):
                failure(ends(engine, [request])[0])
        assert isinstance(ends(engine, [request])[0], Completed)


LAYERS = nn.Linear | nn.Conv2d | nn.Conv3d


class DoneEvent:
    """Event of a device that is done at once, as `CallTimer` uses it."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, _: object) -> float:
        return 1.0


@pytest.mark.parametrize("later", [False, True])
def test_an_image_that_is_not_finite_counts_as_failed(
    demo_pipeline: LoadedPipeline, later: bool
) -> None:
    """On a GPU the engine counts it only ``later``, when the device has decoded it."""
    metrics = EngineMetrics(f"not finite, {later}")

    def counted() -> float:
        return sum(
            sample.value
            for family in (IMAGES, DEADLINES)
            for metric in family.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["model"] == f"not finite, {later}"
        )

    with Engine(demo_pipeline, DEMO, ONE, metrics=metrics) as engine:
        if later:
            engine._executor._timer = CallTimer(torch.device("cuda"), DoneEvent)
        with output_of(demo_pipeline.stock.vae.decoder.conv_out, with_one(NAN)):
            failure(ends(engine, [quick()])[0])
        wait_until(lambda: engine.stats().log[-1].what == "failed")
        assert counted() == 0
        assert isinstance(ends(engine, [quick()])[0], Completed)
        wait_until(lambda: engine.stats().log[-1].what == "completed")
        wait_until(lambda: counted() == 2)


def test_a_preview_that_is_not_finite_is_no_image(demo_pipeline: LoadedPipeline) -> None:
    request = quick(preview_steps=(1, 3))
    with Engine(demo_pipeline, DEMO, FIFO) as engine:
        with output_of(demo_pipeline.denoisers["unet"].conv_out, with_one(INFINITY)):
            events = list(engine.stream(request))
        good = [event for event in engine.stream(request) if isinstance(event, Preview)]
    bad = [event for event in events if isinstance(event, Preview)]
    assert [preview.image.size for preview in good] == [(16, 16), (16, 16)]
    assert len(bad) == 2
    for preview in bad:
        with pytest.raises(NotFinite, match="the preview of step"):
            _ = preview.image
    failure(events[-1])
