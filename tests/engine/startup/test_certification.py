"""A pipeline whose images change when they are batched is served one call at a time."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference
from serve_app.errors import ModelLoadError
from serve_app.metrics.export import report
from serve_app.protocol.events import Completed, Progress
from serve_app.protocol.params import GenerationParams
from tests.conftest import DEMO, FIFO
from tests.tiny_pipelines import FAMILIES, animatediff, pag


@pytest.fixture
def pipeline() -> LoadedPipeline:
    """A pipeline that a test may change."""
    return LoadedPipeline(
        FAMILIES["stable-diffusion"](), DEMO.model_copy(update={"default_size_px": (32, 32)})
    )


@pytest.fixture
def mixing(pipeline: LoadedPipeline) -> Iterator[LoadedPipeline]:
    """A pipeline that mixes rows: beyond two rows, its first layer adds the mean of the batch."""

    def mix(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (args[0] + args[0].mean(),) if args[0].shape[0] > 2 else None

    handle = pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(mix)
    yield pipeline
    handle.remove()


def _requests() -> list[GenerationParams]:
    return [
        GenerationParams(f"a {color} circle", seed, width=32, height=32, num_inference_steps=4)
        for seed, color in enumerate(("red", "green", "blue"))
    ]


def _together(pipeline: LoadedPipeline, model: ModelConfig) -> tuple[Engine, list[Tensor]]:
    with Engine(pipeline, model, FIFO) as engine:
        ends = [list(stream)[-1] for stream in [engine.stream(r) for r in _requests()]]
    assert all(isinstance(end, Completed) for end in ends)
    return engine, [end.result.pixels for end in ends if isinstance(end, Completed)]


def test_a_sound_pipeline_is_certified(pipeline: LoadedPipeline) -> None:
    engine, _ = _together(pipeline, DEMO)
    assert engine.info.sharing == "batched"
    assert engine.info.sharing_difference is not None
    assert engine.info.sharing_difference < 1e-4
    assert engine.info.sharing_psnr_db is not None
    assert engine.info.sharing_psnr_db > 100
    assert engine.stats().mean_batch_size > 1


def test_a_pipeline_that_mixes_rows_takes_turns_with_correct_images(
    mixing: LoadedPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    separate = [mixing.generate(request)[0] for request in _requests()]
    with caplog.at_level(logging.WARNING):
        engine, together = _together(mixing, DEMO)
    assert engine.info.sharing == "interleaved"
    assert "a row depends on its neighbours" in engine.info.sharing_note
    assert "batching=off" in caplog.text
    assert engine.stats().mean_batch_size == 1
    for one, two in zip(separate, together, strict=True):
        assert float((one - two).abs().max()) <= 1e-5


def test_perturbed_attention_runs_one_request_after_another() -> None:
    """PAG splits the batch in three, and swaps the shared network's attention during a call."""
    pipeline = LoadedPipeline(pag(), DEMO.model_copy(update={"default_size_px": (32, 32)}))
    attention = dict(pipeline.denoisers["unet"].attn_processors)
    separate = [pipeline.generate(request)[0] for request in _requests()]
    with Engine(pipeline, DEMO) as engine:
        assert engine.info.sharing == "sequential"
        assert engine.info.sharing_note  # the images differ, or the swapped attention raises
        assert pipeline.denoisers["unet"].attn_processors == attention
        cut_short = engine.stream(_requests()[2])
        assert next(event for event in cut_short if isinstance(event, Progress)).step == 1
        assert pipeline.denoisers["unet"].attn_processors != attention
        cut_short.close()  # type: ignore[attr-defined]
        ends = [list(stream)[-1] for stream in [engine.stream(r) for r in _requests()]]
    together = [end.result.pixels for end in ends if isinstance(end, Completed)]
    assert largest_difference(separate, together) <= 1e-5


def test_frames_in_the_batch_are_not_taken_for_images() -> None:
    """AnimateDiff repeats the prompt for each frame: its arguments differ in rows per image."""
    model = DEMO.model_copy(update={"default_size_px": (32, 32), "call_kwargs": {"num_frames": 3}})
    pipeline = LoadedPipeline(animatediff(), model)
    separate = [pipeline.generate(request)[0] for request in _requests()]
    engine, together = _together(pipeline, model)
    assert largest_difference(separate, together) <= 1e-5
    assert engine.info.sharing == "batched"
    assert engine.stats().mean_batch_size > 1


def test_a_task_that_cannot_be_shared_is_not_offered(
    pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The image encoder returns another result at each call."""
    vae = pipeline.stock.vae
    encode, calls = vae.encode, 0

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = encode(*args, **kwargs)
        output.latent_dist.mean += calls
        return output

    monkeypatch.setattr(vae, "encode", forgetful)
    with Engine(pipeline, DEMO) as engine:
        assert engine.info.sharing == "batched"
        assert engine.info.tasks == ("text-to-image",)
        assert engine.info.max_input_images == 0
    assert "image-to-image is not offered: the same request alone gives" in caplog.text


def test_a_network_that_fails_on_merged_calls_takes_turns(pipeline: LoadedPipeline) -> None:
    def one_prompt_only(_: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        embeds = kwargs["encoder_hidden_states"]
        if embeds.shape[0] == 4 and not torch.equal(embeds[2], embeds[3]):
            raise RuntimeError("one prompt at a time")

    handle = pipeline.denoisers["unet"].mid_block.register_forward_pre_hook(
        one_prompt_only, with_kwargs=True
    )
    try:
        engine, _ = _together(pipeline, DEMO)
    finally:
        handle.remove()
    assert engine.info.sharing == "interleaved"
    assert "one prompt at a time" in engine.info.sharing_note


def _replace_decoder(
    pipeline: LoadedPipeline,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensor, int], Tensor],
) -> None:
    """Change the decoded images, with the number of the decoding."""
    vae = pipeline.stock.vae
    decode, decoded = vae.decode, 0

    def changed(*args: Any, **kwargs: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return (change(decode(*args, **kwargs)[0], decoded),)

    monkeypatch.setattr(vae, "decode", changed)


def test_an_image_with_nan_is_no_match(
    pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one image of those that take turns has NaN; a maximum must not lose it."""
    # Decodings: four images alone, then four in turns.
    _replace_decoder(
        pipeline, monkeypatch, lambda image, count: image * (float("nan") if count == 6 else 1)
    )
    engine, _ = _together(pipeline, DEMO)
    assert engine.info.sharing == "sequential"
    assert "nan" in engine.info.sharing_note


def test_a_start_with_an_image_of_nan_fails(
    pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace_decoder(pipeline, monkeypatch, lambda image, _: image * float("nan"))
    with pytest.raises(ModelLoadError, match="NaN"):
        Engine(pipeline, DEMO)


def test_a_start_with_a_denoiser_of_nan_fails(pipeline: LoadedPipeline) -> None:
    pipeline.denoisers["unet"].conv_out.bias.data[0] = float("inf")
    with pytest.raises(ModelLoadError, match="unet is NaN or infinite"):
        Engine(pipeline, DEMO)


def test_black_images_prove_nothing(
    pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter that returns a black image makes any two images equal."""
    _replace_decoder(pipeline, monkeypatch, lambda image, _: torch.full_like(image, -1.0))
    engine, _ = _together(pipeline, DEMO)
    assert engine.info.sharing == "sequential"
    assert "single colour" in engine.info.sharing_note


def test_one_image_for_all_requests_proves_nothing(
    pipeline: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace_decoder(
        pipeline,
        monkeypatch,
        lambda image, _: torch.linspace(-1, 1, image.numel()).reshape(image.shape),
    )
    engine, _ = _together(pipeline, DEMO)
    assert engine.info.sharing == "sequential"
    assert "the same image" in engine.info.sharing_note


def test_a_denoiser_without_an_output_proves_nothing(pipeline: LoadedPipeline) -> None:
    """Zero weights in the last layer, as before a training, hide everything before it."""
    last = pipeline.denoisers["unet"].conv_out
    last.weight.data.zero_()
    last.bias.data.zero_()
    engine, _ = _together(pipeline, DEMO)
    assert engine.info.sharing == "interleaved"
    assert "the output of unet is constant" in engine.info.sharing_note


def test_a_failed_call_for_two_images_is_reported(pipeline: LoadedPipeline) -> None:
    def one_image_only(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] > 2:
            raise RuntimeError("one image at a time")

    handle = pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(one_image_only)
    try:
        engine, _ = _together(pipeline, DEMO)
    finally:
        handle.remove()
    assert "RuntimeError: one image at a time" in engine.info.sharing_note


def test_one_request_at_a_time_needs_no_certification(pipeline: LoadedPipeline) -> None:
    engine = Engine(
        pipeline, DEMO, EngineConfig(max_running=1), metrics=EngineMetrics("one at a time")
    )
    with engine:
        assert engine.stats().denoiser_calls == 0
        engine.generate(_requests()[0])
    assert engine.info.sharing == "sequential"
    assert engine.info.sharing_note == "max_running is 1"
    samples = [one for family in report("engine", "a").families for one in family.samples]
    ours = {one.name for one in samples if one.labels.get("model") == "one at a time"}
    assert "diffusion_serve_images_total" in ours
    assert not {name for name in ours if "sharing" in name}  # would look like a failure


def test_a_pipeline_that_cannot_generate_is_rejected_at_start(pipeline: LoadedPipeline) -> None:
    def broken(_: nn.Module, args: object) -> None:
        raise RuntimeError("no such kernel")

    handle = pipeline.denoisers["unet"].conv_in.register_forward_pre_hook(broken)
    try:
        with pytest.raises(ModelLoadError, match="no such kernel"):
            Engine(pipeline, DEMO)
    finally:
        handle.remove()
    assert "forward" not in vars(pipeline.denoisers["unet"])
