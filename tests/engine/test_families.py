"""Stock pipelines of seven families generate the same images together as alone.

Unmodified diffusers code on tiny random networks, saved and loaded the way a real model is.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from PIL import Image
from torch import Tensor

from serve_app.config.models import ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.errors import InvalidRequest
from serve_app.protocol.events import Completed, GenerationResult, Preview
from serve_app.protocol.fitting import fitted
from serve_app.protocol.inpainting import feather_px
from serve_app.protocol.params import GenerationParams
from tests.conftest import FIFO
from tests.engine.engines import result_of
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, HEIGHT_PX, WIDTH_PX

GUIDANCE_DISTILLED = {"flux"}
"""Families without a second, negative call of the denoiser: a negative prompt is rejected."""

ROUNDING = 1e-5
VISIBLE = 5 / 255
"""Largest pixel difference in [0, 1] that rounding explains, and the least that people see."""


def _request(
    prompt: str, seed: int, steps: int, guidance: float, negative: str | None
) -> GenerationParams:
    return GenerationParams(
        prompt=prompt,
        seed=seed,
        negative_prompt=negative,
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )


# The prompts have different lengths, and some families do not pad them. The first request is
# without guidance: its calls have half the rows of the others'.
REQUESTS = (
    _request("a red circle", 1, 3, 1.0, None),
    _request("a green star on a white background", 2, 6, 2.0, "a black square at the top left"),
    _request("a pink cross on a black background", 3, 4, 3.5, "a small cyan ring on the right"),
    _request("two yellow rings on a purple background", 4, 5, 5.0, "a large red star on the left"),
    # As many pixels as the others, arranged otherwise.
    replace(
        _request(
            "a blue ring on a pink background and a star",
            5,
            4,
            3.0,
            "two large stars at the top left",
        ),
        width=HEIGHT_PX,
        height=WIDTH_PX,
    ),
)

pytestmark = pytest.mark.usefixtures("reused_starts")


@pytest.fixture(scope="module", params=FAMILIES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The config of a family's pipeline, saved to a folder."""
    family: str = request.param
    folder = tmp_path_factory.mktemp(family)
    FAMILIES[family]().save_pretrained(folder, safe_serialization=True)
    return ModelConfig(
        id=family,
        path=str(folder),
        device="cpu",
        default_size_px=(WIDTH_PX, HEIGHT_PX),
        call_kwargs=CALL_KWARGS.get(family, {}),
    )


@pytest.fixture(scope="module")
def pipeline(config: ModelConfig) -> LoadedPipeline:
    return LoadedPipeline.load(config)


def _difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max()) if one.shape == two.shape else 1.0


def check_extrapolated(engine: Engine, pipeline: LoadedPipeline) -> None:
    """Check that requests whose calls are extrapolated share batches without a trace.

    Outputs of random weights are far from any line, so the threshold of "fast" is lifted.
    """
    lifted = {"fast_error": 100.0}
    pipeline.acceleration = pipeline.acceleration.model_copy(update=lifted)
    levels = ("fast", "fast", "none", "fast")
    requests = [
        replace(request, num_inference_steps=8 + index, acceleration=level)
        for index, (request, level) in enumerate(zip(REQUESTS[1:], levels, strict=True))
    ]
    if engine.info.id in GUIDANCE_DISTILLED:
        requests = [replace(request, negative_prompt=None) for request in requests]
    streams = [engine.stream(request) for request in requests]
    together = [result_of(list(stream)) for stream in streams]
    for request, one in zip(requests, together, strict=True):
        alone = engine.generate(request)
        assert one.calls == alone.calls
        assert _difference(one.pixels, alone.pixels) <= ROUNDING
        exact = engine.generate(replace(request, acceleration="none"))
        assert sum(one.calls) == exact.calls.made  # guidance may have calls of its own
        assert bool(one.calls.extrapolated) == (request.acceleration == "fast")
        changed = _difference(one.pixels, exact.pixels)
        assert changed > ROUNDING if one.calls.extrapolated else changed <= ROUNDING


def test_together_as_alone(
    config: ModelConfig,
    pipeline: LoadedPipeline,
    caplog: pytest.LogCaptureFixture,
    report: Callable[[str], None],
) -> None:
    requests = REQUESTS
    if config.id in GUIDANCE_DISTILLED:
        with Engine(pipeline, config) as engine, pytest.raises(InvalidRequest, match="negative"):
            engine.generate(REQUESTS[1])
        requests = tuple(replace(params, negative_prompt=None) for params in REQUESTS)
    alone = [pipeline.generate(params)[0] for params in requests]
    together = []
    with Engine(pipeline, config, FIFO) as engine:
        assert engine.info.sharing == "batched", engine.info.sharing_note
        for stream in [engine.stream(params) for params in requests]:
            *_, last = stream
            assert isinstance(last, Completed), last
            together.append(last.result.pixels)
        stats = engine.stats()
        check_extrapolated(engine, pipeline)
    differences = [_difference(a, b) for a, b in zip(alone, together, strict=True)]
    report(
        f"{pipeline.class_name}: largest difference from alone {max(differences):.1e}, "
        f"mean batch size {stats.mean_batch_size:.2f}"
    )
    assert differences == pytest.approx([0.0] * len(REQUESTS), abs=ROUNDING)
    assert stats.mean_batch_size > 1.5
    # A merged call that fails is repeated one by one, with the same images and a warning.
    assert not [record for record in caplog.records if record.name.startswith("serve_app")]
    for params, image in zip(requests, together, strict=True):
        assert image.shape == (3, params.height, params.width)
        assert torch.isfinite(image).all()
    for one, two in combinations(together, 2):
        assert _difference(one, two) > VISIBLE


def check_kept(result: GenerationResult, image: Image.Image) -> None:
    """Check that the right half is that of the input image, and the left one as generated."""
    middle, edge = WIDTH_PX // 2, WIDTH_PX // 2 + feather_px((WIDTH_PX, HEIGHT_PX))
    right, left = (edge, 0, WIDTH_PX, HEIGHT_PX), (0, 0, middle, HEIGHT_PX)
    kept = fitted(image, "RGB", (WIDTH_PX, HEIGHT_PX)).crop(right)
    assert result.image.crop(right).tobytes() == kept.tobytes()
    generated = Image.fromarray((result.pixels * 255).round().byte().permute(1, 2, 0).numpy())
    assert result.image.crop(left).tobytes() == generated.crop(left).tobytes()
    assert generated.crop(right).tobytes() != kept.tobytes()


WITHOUT_IMAGES = {"pixart-sigma", "sana"}
"""Families for which diffusers has no image-to-image pipeline."""


def test_images_to_start_from_share_the_batch(
    config: ModelConfig, pipeline: LoadedPipeline, report: Callable[[str], None]
) -> None:
    """Three tasks on one set of networks: text-to-image, image-to-image, inpainting."""
    image = Image.linear_gradient("L").convert("RGB")
    text = replace(REQUESTS[0], guidance_scale=3.0, num_inference_steps=4)
    start = replace(text, image=image, strength=0.6, num_inference_steps=6)
    half = Image.new("L", image.size)
    half.paste(255, (0, 0, 128, 256))
    with Engine(pipeline, config, FIFO) as engine:
        if config.id in WITHOUT_IMAGES:
            with pytest.raises(InvalidRequest, match="does not support image-to-image"):
                engine.generate(start)
            return
        requests = [text, start, replace(start, mask_image=half), replace(start, strength=0.9)]
        streams = [engine.stream(params) for params in requests]
        together = []
        for stream in streams:
            *_, last = stream
            assert isinstance(last, Completed), last
            together.append(last.result.pixels)
            if last.result.params.task == "inpainting":
                check_kept(last.result, image)
        mean = engine.stats().mean_batch_size
    alone = [pipeline.generate(params)[0] for params in requests]
    differences = [_difference(a, b) for a, b in zip(alone, together, strict=True)]
    report(
        f"{pipeline.class_name} with image-to-image and inpainting: largest difference from alone "
        f"{max(differences):.1e}, mean batch size {mean:.2f}"
    )
    assert differences == pytest.approx([0.0] * len(requests), abs=ROUNDING)
    assert mean > 1.5
    for one, two in combinations(together, 2):
        assert _difference(one, two) > VISIBLE
    weights = pipeline.denoisers.values()
    for other in pipeline.pipelines.values():
        assert all(network in other.components.values() for network in weights)


def test_previews_change_nothing(config: ModelConfig, pipeline: LoadedPipeline) -> None:
    params = replace(REQUESTS[0], num_inference_steps=4)
    with Engine(pipeline, config) as engine:
        plain = engine.generate(params)
        events = list(engine.stream(replace(params, preview_steps=(2, 4))))
    last = events[-1]
    assert isinstance(last, Completed), last
    assert torch.equal(plain.pixels, last.result.pixels)
    previews = [event for event in events if isinstance(event, Preview)]
    assert [preview.step for preview in previews] == [2, 4]
    for preview in previews:
        channels, rows, columns = preview.pixels.shape
        assert (channels, columns) == (3, 2 * rows)
        assert torch.isfinite(preview.pixels).all()


def test_long_prompts_are_cut_with_a_warning(config: ModelConfig, pipeline: LoadedPipeline) -> None:
    long = replace(REQUESTS[0], prompt="a red circle on a blue background " * 200)
    tokens, warnings = pipeline.read_prompt(REQUESTS[0])
    assert tokens > 0
    assert warnings == ()
    tokens, [warning] = pipeline.read_prompt(long)
    assert f"reads {tokens} of them" in warning
    assert "the model reads" in warning
    assert torch.isfinite(pipeline.generate(replace(long, num_inference_steps=1))).all()


CHANGES: dict[str, str | int | float] = {
    "prompt": "a white square on a green background",
    "seed": 5,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "negative_prompt": "a cyan ring on the top right",
}


def test_all_that_a_request_asks_for_shows_in_the_image(
    config: ModelConfig, pipeline: LoadedPipeline
) -> None:
    params = replace(REQUESTS[1], num_inference_steps=3)
    image = pipeline.generate(params)[0]
    ignored = {"negative_prompt"} if config.id in GUIDANCE_DISTILLED else set()
    shows = {
        name
        for name, value in CHANGES.items()
        if _difference(image, pipeline.generate(replace(params, **{name: value}))[0]) > VISIBLE
    }
    assert shows == CHANGES.keys() - ignored
