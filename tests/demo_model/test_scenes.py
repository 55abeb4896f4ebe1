from random import Random

import numpy as np
import pytest

from tools.demo_model.scenes import (
    COLORS,
    SHAPES,
    Scene,
    SceneObject,
    caption,
    coverage,
    is_held_out,
    render,
    sample_scene,
    vocabulary,
)


def test_the_language_has_enough_combinations() -> None:
    assert len(COLORS) >= 8
    assert len(SHAPES) >= 5


def test_a_scene_is_drawn_in_its_colors_at_its_place() -> None:
    scene = Scene("blue", (SceneObject("square", "red", 0.25, 0.5, 0.15),))
    image = render(scene, 64, 32)
    assert image.shape == (32, 64, 3)
    assert tuple(image[16, 16]) == COLORS["red"]
    assert tuple(image[16, 48]) == COLORS["blue"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_inside_their_radius(shape: str) -> None:
    alpha = coverage(shape, 64, 64, (32, 32), 20)
    y, x = np.nonzero(alpha > 0.5)
    assert 0.2 < alpha.sum() / (np.pi * 20**2) < 1.05
    assert np.abs(x + 0.5 - 32).max() <= 21
    assert np.abs(y + 0.5 - 32).max() <= 21


def test_sampling_is_reproducible_and_objects_stay_inside() -> None:
    again = [sample_scene(Random(3)) for _ in range(2)]
    assert again[0] == again[1]
    rng = Random(0)
    for scene in (sample_scene(rng) for _ in range(500)):
        for item in scene.objects:
            assert item.radius <= item.x <= 1 - item.radius
            assert item.radius <= item.y <= 1 - item.radius
            assert item.color != scene.background


def test_training_never_shows_held_out_combinations() -> None:
    rng = Random(1)
    for held_out in (False, True):
        for _ in range(500):
            scene = sample_scene(rng, held_out=held_out)
            marks = [is_held_out(i.shape, i.color, scene.background) for i in scene.objects]
            assert all(marks) if held_out else not any(marks)


def test_captions_describe_the_scene() -> None:
    rng = Random(2)
    words = set(vocabulary())
    for _ in range(500):
        scene = sample_scene(rng)
        text = caption(scene, rng, name_background=True)
        said = text.replace(",", " ").split()
        assert set(said) <= words
        assert scene.background in said
        for item in scene.objects:
            assert item.color in said
            assert any(word.startswith(item.shape) for word in said)
