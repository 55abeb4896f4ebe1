"""The kept part of an input image, laid over a generated one."""

import random

import pytest
from PIL import Image, ImageDraw

from serve_app.protocol.inpainting import feather_px, with_kept_part
from serve_app.protocol.params import GenerationParams

RED, BLUE = (255, 0, 0), (0, 0, 255)
"""Colors of the generated image and of the input."""


def composite(mask: Image.Image) -> Image.Image:
    params = GenerationParams("x", 1, image=Image.new("RGB", mask.size, BLUE), mask_image=mask)
    return with_kept_part(Image.new("RGB", mask.size, RED), params)


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Make a mask of which a box changes, with exclusive right and lower sides."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (1024, 640), (8, 8)])
def test_kept_pixels_are_the_inputs_and_changed_ones_are_generated(size: tuple[int, int]) -> None:
    width, height = size
    middle = width // 2
    image = composite(box_mask(size, (0, 0, middle, height)))
    row = [image.getpixel((column, height // 2)) for column in range(width)]
    feather = feather_px(size)
    assert row[:middle] == [RED] * middle
    assert row[middle + feather :] == [BLUE] * (width - middle - feather)
    shares = [pixel[0] for pixel in row[middle : middle + feather]]  # type: ignore[index]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == feather
    steps = [one - two for one, two in zip([255, *shares], [*shares, 0], strict=True)]
    assert max(steps) < 255 / feather + 20, "a seam"


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_thin_stroke_is_generated_whole(width: int) -> None:
    image = composite(box_mask((64, 64), (30, 10, 30 + width, 54)))
    assert image.crop((30, 10, 30 + width, 54)).getcolors() == [(44 * width, RED)]


def test_any_shape_is_generated_whole_and_kept_away_from_its_edge() -> None:
    size = (96, 64)
    rng = random.Random(1)
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for _ in range(6):
        x, y = rng.randrange(90), rng.randrange(60)
        draw.ellipse((x, y, x + rng.randrange(1, 30), y + rng.randrange(1, 30)), fill=255)
    image = composite(mask)
    feather = feather_px(size)
    for x in range(size[0]):
        for y in range(size[1]):
            near = mask.crop((x - feather, y - feather, x + feather + 1, y + feather + 1))
            if mask.getpixel((x, y)) == 255:
                assert image.getpixel((x, y)) == RED
            elif near.getextrema() == (0, 0):
                assert image.getpixel((x, y)) == BLUE


def test_a_soft_mask_mixes_by_its_own_values() -> None:
    mask = Image.linear_gradient("L").rotate(90)
    image = composite(mask)
    for column in range(256):
        value = mask.getpixel((column, 100))
        share = image.getpixel((column, 100))[0]  # type: ignore[index]
        assert isinstance(value, int)
        assert share >= value
        if value < 128 - 3 * feather_px(mask.size):
            assert share == value


def test_a_mask_that_is_white_everywhere_keeps_nothing() -> None:
    assert composite(Image.new("L", (64, 48), 255)).getcolors() == [(64 * 48, RED)]


def test_other_tasks_are_not_changed() -> None:
    image = Image.new("RGB", (8, 8), RED)
    assert with_kept_part(image, GenerationParams("x", 1)) is image
    start = GenerationParams("x", 1, image=Image.new("RGB", (8, 8), BLUE))
    assert with_kept_part(image, start) is image
