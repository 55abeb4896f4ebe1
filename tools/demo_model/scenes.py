"""Scenes of the demo model: their content, their captions and their pixels.

A `Scene` is the ground truth. `sample_scene` draws one, `caption` describes it and `render` draws
its pixels. The trainer, the judge and the tests all use these three, so that a prompt and its image
cannot drift apart.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 30),
    "purple": (130, 50, 170),
    "cyan": (50, 200, 220),
    "pink": (245, 150, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""sRGB by name, for objects and backgrounds alike."""

SIZES = ("small", "medium", "large")
POSITIONS: dict[str, tuple[float, float]] = {
    "in the center": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the top left": (0.25, 0.25),
    "in the top right": (0.75, 0.25),
    "in the bottom left": (0.25, 0.75),
    "in the bottom right": (0.75, 0.75),
}
"""Object centre by phrase, as fractions of width and height from the top left."""

_RADIUS_ALONE = {"small": (0.13, 0.17), "medium": (0.21, 0.27), "large": (0.32, 0.4)}
_RADIUS_PAIRED = {"small": (0.11, 0.135), "medium": (0.15, 0.185), "large": (0.2, 0.225)}

Field = NDArray[np.floating[Any]]


def _circle(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 1.0


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.75) - 0.25


def _square(u: Field, v: Field) -> Field:
    return np.maximum(np.abs(u), np.abs(v)) - 0.88


def _cross(u: Field, v: Field) -> Field:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 1.0, b - 0.32), np.maximum(a - 0.32, b - 1.0))


def _triangle(u: Field, v: Field) -> Field:
    inradius = 0.62
    v = v - inradius / 2  # the box around the triangle is centred, not its centroid
    distance: Field = np.maximum(v, np.abs(u) * np.sqrt(3) / 2 - v / 2) - inradius
    return distance


def _star(u: Field, v: Field) -> Field:
    inner = 0.45
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    # One straight edge, from the tip (1, 0) to the notch, serves all ten by symmetry.
    notch_x, notch_y = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
    normal_x, normal_y = notch_y, 1.0 - notch_x
    length = np.hypot(normal_x, normal_y)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    distance: Field = ((x - 1.0) * normal_x + y * normal_y) / length
    return distance


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
}
"""Signed distance by name, in units of the radius; ``u`` grows right, ``v`` grows down."""


@dataclass(frozen=True)
class SceneObject:
    """One shape. ``x`` and ``y`` are fractions of width and height, ``radius`` of the less."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background colour and one or two objects, with the words that single them out."""

    background: str
    objects: tuple[SceneObject, ...]
    size: str | None = None
    position: str | None = None
    relation: str | None = None


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Return whether training never shows this combination: one in ten, by a checksum."""
    return zlib.crc32(f"{shape} {color} {background}".encode()) % 10 == 0


def coverage(
    shape: str, width: int, height: int, center: tuple[float, float], radius: float
) -> NDArray[np.float64]:
    """Compute the covered share of each pixel: ``[height, width]`` in [0, 1]. Lengths in pixels."""
    u = (np.arange(width) + 0.5 - center[0]) / radius
    v = (np.arange(height) + 0.5 - center[1]) / radius
    distance = SHAPES[shape](u[None, :], v[:, None]) * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, width: int = 64, height: int = 64) -> NDArray[np.uint8]:
    """Draw the scene, anti-aliased: ``[height, width, 3]`` sRGB."""
    image = np.empty((height, width, 3))
    image[:] = COLORS[scene.background]
    for item in scene.objects:
        alpha = coverage(
            item.shape,
            width,
            height,
            (item.x * width, item.y * height),
            item.radius * min(width, height),
        )[..., None]
        image = image * (1 - alpha) + np.array(COLORS[item.color]) * alpha
    return (image + 0.5).astype(np.uint8)


def _inside(value: float, radius: float) -> float:
    return min(max(value, radius + 0.02), 0.98 - radius)


def _single(rng: Random, background: str) -> Scene:
    color = rng.choice([name for name in COLORS if name != background])
    shape = rng.choice(list(SHAPES))
    size = rng.choice([None, None, *SIZES])
    position = rng.choice(list(POSITIONS)) if rng.random() < 0.4 else None
    radius = rng.uniform(*_RADIUS_ALONE[size or "medium"])
    x, y = POSITIONS[position or "in the center"]
    jitter = 0.04 if position else 0.1
    x = _inside(x + rng.uniform(-jitter, jitter), radius)
    y = _inside(y + rng.uniform(-jitter, jitter), radius)
    return Scene(background, (SceneObject(shape, color, x, y, radius),), size, position)


def _pair(rng: Random, background: str, alike: bool) -> Scene:
    color, other_color = rng.sample([name for name in COLORS if name != background], 2)
    shape, other_shape = rng.choice(list(SHAPES)), rng.choice(list(SHAPES))
    if alike:
        other_color, other_shape = color, shape
    size = rng.choice([None, *SIZES]) if alike else None
    radius = rng.uniform(*_RADIUS_PAIRED[size or "medium"])
    relation = None if alike else rng.choice([None, "left of", "above"])
    # Side by side or one above the other, far enough apart that they never touch.
    across = relation == "left of" or (relation is None and rng.random() < 0.7)
    near, far = rng.uniform(0.24, 0.28), rng.uniform(0.72, 0.76)
    drift = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58)
    places = [(near, drift[0]), (far, drift[1])] if across else [(drift[0], near), (drift[1], far)]
    if relation is None and rng.random() < 0.5:
        places.reverse()
    objects = tuple(
        SceneObject(s, c, _inside(x, radius), _inside(y, radius), radius)
        for s, c, (x, y) in zip((shape, other_shape), (color, other_color), places, strict=True)
    )
    return Scene(background, objects, size, None, relation)


def sample_scene(rng: Random, held_out: bool = False, pairs: float = 0.35) -> Scene:
    """Draw a scene with only seen, or with only held-out, combinations of shape and colours.

    ``pairs`` is the share of scenes with two objects; of those, half have two of a kind.
    """
    while True:
        background = rng.choice(list(COLORS))
        kind = rng.random()
        if kind < pairs:
            scene = _pair(rng, background, alike=kind < pairs / 2)
        else:
            scene = _single(rng, background)
        marks = [is_held_out(item.shape, item.color, background) for item in scene.objects]
        if all(marks) if held_out else not any(marks):
            return scene


def _words(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def caption(scene: Scene, rng: Random, name_background: bool = False) -> str:
    """Describe the scene in one of the ways that the model understands.

    One in twenty leaves the background open, unless ``name_background`` forbids it.
    """
    first = scene.objects[0]
    if len(scene.objects) == 1:
        noun = _words(scene.size, first.color, first.shape)
        subject = _with_article(noun) if rng.random() < 0.85 else noun
    elif scene.objects[1].color == first.color:
        subject = _words("two", scene.size, first.color, _plural(first.shape))
    else:
        second = scene.objects[1]
        subject = _words(
            _with_article(f"{first.color} {first.shape}"),
            scene.relation or "and",
            _with_article(f"{second.color} {second.shape}"),
        )
    if scene.position and rng.random() < 0.5:
        subject = _words(subject, scene.position)
        tail = ""
    else:
        tail = f", {scene.position}" if scene.position else ""
    style = rng.random()
    if style < 0.5:
        place = f" on {_with_article(scene.background)} background"
    elif style < 0.8:
        place = f" on {scene.background}"
    elif style < 0.95 or name_background:
        place = f", {scene.background} background"
    else:
        place = ""
    return subject + place + tail


def vocabulary() -> list[str]:
    """Return all words that `caption` can use, sorted."""
    text = " ".join(
        [
            *COLORS,
            *SHAPES,
            *(_plural(shape) for shape in SHAPES),
            *SIZES,
            *POSITIONS,
            "a an and two on background left of above",
        ]
    )
    return sorted(set(text.split()))
