from collections.abc import Callable
from random import Random

import pytest

from tools.demo_model.judge import judge, read
from tools.demo_model.scenes import Scene, SceneObject, render, sample_scene


@pytest.mark.slow
def test_the_judge_reads_rendered_scenes_almost_without_error(
    report: Callable[[str], None],
) -> None:
    rng = Random(11)
    scenes = [sample_scene(rng, held_out=index % 2 == 0) for index in range(600)]
    verdicts = [judge(render(scene), scene) for scene in scenes]
    for part in ("color", "background", "shape"):
        accuracy = sum(getattr(verdict, part) for verdict in verdicts) / len(verdicts)
        report(f"judge, {part}: {accuracy:.2%} of {len(verdicts)} rendered scenes read right")
        assert accuracy > 0.99


def test_the_judge_detects_wrong_parts() -> None:
    asked = Scene("blue", (SceneObject("circle", "red", 0.5, 0.5, 0.25),))
    other_color = Scene("blue", (SceneObject("circle", "green", 0.5, 0.5, 0.25),))
    other_shape = Scene("blue", (SceneObject("star", "red", 0.5, 0.5, 0.25),))
    other_background = Scene("white", (SceneObject("circle", "red", 0.5, 0.5, 0.25),))
    one_too_many = Scene(
        "blue",
        (
            SceneObject("circle", "red", 0.25, 0.5, 0.15),
            SceneObject("circle", "red", 0.75, 0.5, 0.15),
        ),
    )
    assert not judge(render(other_color), asked).color
    assert not judge(render(other_shape), asked).shape
    assert not judge(render(other_background), asked).background
    assert not judge(render(one_too_many), asked).shape
    assert not judge(render(Scene("blue", ())), asked).color


def test_objects_are_read_from_left_to_right() -> None:
    scene = Scene(
        "white",
        (SceneObject("star", "blue", 0.7, 0.4, 0.2), SceneObject("ring", "red", 0.25, 0.6, 0.2)),
    )
    seen = read(render(scene)).objects
    assert [(item.shape, item.color) for item in seen] == [("ring", "red"), ("star", "blue")]
    assert abs(seen[0].x - 0.25) < 0.03
    assert abs(seen[1].y - 0.4) < 0.03
