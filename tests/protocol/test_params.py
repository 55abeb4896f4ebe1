import dataclasses
import io
import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve_app.config.limits import LimitsConfig
from serve_app.errors import InvalidRequest, LoraNotFound
from serve_app.protocol.fitting import near
from serve_app.protocol.params import MAX_SEED, AdapterSet, GenerationParams
from tests.fakes.backend import INFO

MODEL = replace(
    INFO,
    default_height=32,
    size_multiple=16,
    tasks=("text-to-image", "image-to-image"),
    default_strengths={"image-to-image": 0.5},
    fewest_steps={"euler": 1, "ddim": 4},
    limits=LimitsConfig(max_pixels=128 * 128, max_side_px=512, max_steps=50, max_prompt_chars=20),
)


IMAGE = Image.new("RGB", (50, 90))


def test_defaults_are_filled_in_and_nothing_else_changes() -> None:
    resolved = GenerationParams("a cat", 3, guidance_scale=2.5).resolved(MODEL)
    assert resolved == GenerationParams(
        "a cat",
        3,
        None,
        width=64,
        height=32,
        num_inference_steps=20,
        guidance_scale=2.5,
        acceleration="none",
    )
    assert resolved.resolved(MODEL) == resolved
    assert pickle.loads(pickle.dumps(resolved)) == resolved


@pytest.mark.parametrize(
    ("sent", "generated"),
    [
        ((32, 48), (32, 48)),
        ((35, 44), (32, 48)),
        ((3, 3), (16, 16)),
        ((48, 96), (32, 64)),  # as many pixels as the model's own size, in its shape
        ((4000, 3000), (48, 32)),
        ((1, 20_000), (16, 128)),  # cropped: the shorter side is a multiple, and no side too long
        ((20_000, 1), (128, 16)),
        ((16, 120), (16, 128)),
        ((3_000, 9), (128, 16)),
    ],
)
def test_the_size_of_an_image_is_the_default(
    sent: tuple[int, int], generated: tuple[int, int]
) -> None:
    image = Image.new("RGB", sent)
    resolved = GenerationParams("a cat", 1, image=image).resolved(MODEL)
    assert (resolved.width, resolved.height) == generated
    resolved = GenerationParams("a cat", 1, image=image, width=32).resolved(MODEL)
    assert (resolved.width, resolved.height) == (32, generated[1])


@given(st.integers(1, 30_000), st.integers(1, 30_000))
def test_an_image_of_any_shape_has_a_supported_size(width: int, height: int) -> None:
    for limits in (MODEL.limits, LimitsConfig(max_pixels=1024, max_side_px=40)):
        size = near((width, height), (64, 32), 16, limits)
        assert all(side % 16 == 0 and 16 <= side <= limits.max_side_px for side in size)
        assert math.prod(size) <= min(64 * 32, limits.max_pixels)


def test_another_shape_is_cropped() -> None:
    image = Image.new("RGB", (96, 32), "blue")
    image.paste("red", (32, 0, 64, 32))
    resolved = GenerationParams("a cat", 1, image=image, width=32, height=32).resolved(MODEL)
    assert resolved.image is not None
    assert set(resolved.image.get_flattened_data()) == {(255, 0, 0)}


@pytest.mark.parametrize(
    ("steps", "strength", "count", "after"),
    [
        (20, None, 2, (7, 13)),
        (20, 0.5, 3, (2, 5, 8)),
        (2, None, 3, (1,)),
        (1, None, 3, ()),
        (9, None, 0, ()),
    ],
)
def test_previews_are_spread_over_the_steps_that_run(
    steps: int, strength: float | None, count: int, after: tuple[int, ...]
) -> None:
    image = None if strength is None else IMAGE
    request = GenerationParams(
        "a cat", 1, num_inference_steps=steps, image=image, strength=strength
    )
    assert request.resolved(MODEL).with_previews(count).preview_steps == after


@pytest.mark.parametrize(
    ("change", "param", "allowed"),
    [
        ({"prompt": "  \n"}, "prompt", "empty"),
        ({"prompt": "x" * 21}, "prompt", "at most 20"),
        ({"negative_prompt": "x" * 21}, "negative_prompt", "at most 20"),
        ({"noise_scheduler": "default"}, "scheduler", "use one of euler, ddim"),
        (
            {"noise_scheduler": "pndm"},
            "scheduler",
            "'pndm' for text-to-image: it gives values that are not finite; use one of euler, ddim",
        ),
        (
            {"noise_scheduler": "euler", "image": IMAGE},
            "scheduler",
            "'euler' for image-to-image: it adds too much noise; use one of ddim.",
        ),
        ({"noise_scheduler": "fast"}, "scheduler", "use one of euler, ddim"),
        (
            {"noise_scheduler": "ddim", "num_inference_steps": 3},
            "num_inference_steps",
            "at least 4 for the scheduler 'ddim'",
        ),
        ({"strength": 0.5}, "strength", "needs an image"),
        ({"mask_image": IMAGE}, "mask_image", "needs an image"),
        ({"image": IMAGE, "mask_image": IMAGE}, "mask_image", "does not support inpainting"),
        ({"image": IMAGE, "strength": 0.0}, "strength", "over 0"),
        ({"image": IMAGE, "strength": 1.1}, "strength", "at most 1"),
        ({"image": IMAGE, "strength": 0.04}, "strength", "one of 20 steps"),
        ({"seed": -1}, "seed", f"0 to {MAX_SEED}"),
        ({"seed": MAX_SEED + 1}, "seed", f"0 to {MAX_SEED}"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 50"),
        ({"num_inference_steps": -3}, "num_inference_steps", "1 to 50"),
        ({"num_inference_steps": 51}, "num_inference_steps", "1 to 50"),
        ({"guidance_scale": -0.1}, "guidance_scale", "0 to 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "0 to 100"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "0 to 100"),
        ({"width": 0}, "size", "multiples of 16"),
        ({"width": -16}, "size", "multiples of 16"),
        ({"height": 40}, "size", "multiples of 16"),
        ({"width": 144, "height": 128}, "size", "at most 16384"),
        ({"width": 528, "height": 16}, "size", "at most 512"),
    ],
)
def test_unsupported_values_are_rejected_by_field(
    change: dict[str, object], param: str, allowed: str
) -> None:
    params = dataclasses.replace(GenerationParams("a cat", 1), **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=allowed) as caught:
        params.resolved(MODEL)
    assert caught.value.param == param


def test_a_negative_prompt_is_rejected_where_it_has_no_effect() -> None:
    model = dataclasses.replace(MODEL, takes_negative_prompt=False)
    with pytest.raises(InvalidRequest, match="does not support negative_prompt"):
        GenerationParams("a cat", 1, negative_prompt="dog").resolved(model)
    GenerationParams("a cat", 1, negative_prompt="").resolved(model)


def test_adapters_are_sorted_so_that_equal_sets_are_equal() -> None:
    resolved = GenerationParams("a cat", 1, lora=(("pixel", 0.5), ("ink", 1.0))).resolved(MODEL)
    assert resolved.lora == (("ink", 1.0), ("pixel", 0.5))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ((("oil", 1.0),), "there are pixel, ink"),
        ((("ink", 10.5),), "from -10 to 10"),
        ((("ink", float("nan")),), "from -10 to 10"),
        ((("ink", 1.0), ("ink", 0.5)), "twice"),
        ((("ink", 1.0), ("pixel", 1.0), ("ink", 0.5)) * 2, "at most 4"),
    ],
)
def test_adapters_are_checked(lora: AdapterSet, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        GenerationParams("a cat", 1, lora=lora).resolved(MODEL)
    assert caught.value.param == "lora"


def test_a_server_without_adapters_says_so() -> None:
    with pytest.raises(LoraNotFound, match="leave lora out"):
        GenerationParams("a", 1, lora=(("ink", 1.0),)).resolved(replace(MODEL, loras=()))


def test_images_are_resized_on_submission() -> None:
    resolved = GenerationParams("a", 1, width=64, height=32, image=IMAGE.convert("P")).resolved(
        MODEL
    )
    assert resolved.image is not None
    assert (resolved.image.mode, resolved.image.size) == ("RGB", (64, 32))
    assert resolved.strength == 0.5


def test_broken_and_huge_images_are_rejected() -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "png")
    broken = Image.open(io.BytesIO(file.getvalue()[:-400]))
    with pytest.raises(InvalidRequest, match="image cannot be read") as caught:
        GenerationParams("a", 1, image=broken).resolved(MODEL)
    assert caught.value.param == "image"
    limits = MODEL.limits.model_copy(update={"max_image_pixels": 100})
    with pytest.raises(InvalidRequest, match="has 50x90 pixels; at most 100"):
        GenerationParams("a", 1, image=IMAGE).resolved(replace(MODEL, limits=limits))


def test_half_a_character_is_rejected() -> None:
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(InvalidRequest, match="not valid Unicode") as caught:
            GenerationParams(**({"prompt": "a", "seed": 1} | {name: "a\ud800"})).resolved(MODEL)
        assert caught.value.param == name


def test_a_strength_of_a_task_without_one_is_rejected() -> None:
    """FLUX.1 Kontext edits an image by the prompt alone, and all of its steps run."""
    model = replace(MODEL, default_strengths={})
    with pytest.raises(InvalidRequest, match="does not support strength") as caught:
        GenerationParams("a", 1, image=IMAGE, strength=0.5).resolved(model)
    assert caught.value.param == "strength"
    resolved = GenerationParams("a", 1, image=IMAGE).resolved(model)
    assert (resolved.strength, resolved.steps_to_run) == (None, 20)
