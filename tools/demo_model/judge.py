"""Recognizes the shapes and colours in an image: the measure of the demo model.

Plain image processing with no learned part: nearest palette colour, connected areas, overlap with
the six templates. The tests show that it reads rendered scenes almost without error.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.demo_model.scenes import COLORS, SHAPES, Scene, coverage

_NAMES = list(COLORS)
_PALETTE = np.array([COLORS[name] for name in _NAMES], dtype=float)

MIN_AREA = 0.004
"""Share of the image below which an area is a speck and not an object."""


@dataclass(frozen=True)
class SeenObject:
    """One recognized object."""

    shape: str
    color: str
    x: float
    """Centre of its box, as a fraction of the width."""
    y: float
    overlap: float
    """Intersection over union with the best template."""


@dataclass(frozen=True)
class Reading:
    """The content of an image; objects from left to right."""

    background: str
    objects: tuple[SeenObject, ...]


@dataclass(frozen=True)
class Verdict:
    """The parts of a scene that an image shows correctly."""

    color: bool
    """True if every object is there, in its colour, and nothing else."""
    background: bool
    shape: bool
    """True if every object is there, in its shape."""


def _nearest_color(rgb: NDArray[np.float64]) -> str:
    return _NAMES[int(np.argmin(((_PALETTE - rgb) ** 2).sum(-1)))]


def _background(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the border's most common palette colour, as it is in this image: ``[3]``."""
    border = np.concatenate(
        [image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3),
         image[:, -2:].reshape(-1, 3)]
    )  # fmt: skip
    labels = np.argmin(((border[:, None] - _PALETTE) ** 2).sum(-1), axis=1)
    commonest = np.bincount(labels).argmax()
    return np.asarray(np.median(border[labels == commonest], axis=0))


def _areas(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Split ``mask`` into connected parts, with eight neighbours, largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = labels
        for dy in (0, 1, 2):
            for dx in (0, 1, 2):
                shifted = padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
                spread = np.maximum(spread, shifted)
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            break
        labels = spread
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    order = values[np.argsort(-counts)]
    return [labels == value for value in order]


def _best_template(mask: NDArray[np.bool_]) -> tuple[str, float]:
    """Return the shape whose template, fitted to the area's box, overlaps it most, and how much."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = mask.shape
    best = ("", 0.0)
    for shape in SHAPES:
        # The template's own box, in units of its radius, from a large drawing of it.
        drawn = coverage(shape, 96, 96, (48, 48), 40) > 0.5
        v, u = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        box_w, box_h = (u[-1] + 1 - u[0]) / 40, (v[-1] + 1 - v[0]) / 40
        middle = ((u[-1] + 1 + u[0]) / 2 - 48) / 40, ((v[-1] + 1 + v[0]) / 2 - 48) / 40
        radius = ((right - left) / box_w + (bottom - top) / box_h) / 2
        center = (left + right) / 2 - middle[0] * radius, (top + bottom) / 2 - middle[1] * radius
        for scale in (0.94, 1.0, 1.06):
            template = coverage(shape, width, height, center, radius * scale) > 0.5
            overlap = float((template & mask).sum() / max((template | mask).sum(), 1))
            if overlap > best[1]:
                best = (shape, overlap)
    return best


def read(image: NDArray[np.uint8]) -> Reading:
    """Read an image, ``[height, width, 3]`` sRGB, without its prompt."""
    pixels = image.astype(float)
    background = _background(pixels)
    # Half-way between the background and the nearest other palette colour.
    name = _nearest_color(background)
    others = np.array([rgb for other, rgb in COLORS.items() if other != name], dtype=float)
    threshold = 0.45 * np.sqrt(((others - background) ** 2).sum(-1)).min()
    mask = np.sqrt(((pixels - background) ** 2).sum(-1)) > threshold
    objects = []
    for area in _areas(mask):
        if area.sum() < MIN_AREA * mask.size:
            break
        # The edge mixes with the background; the most common colour inside is the object's.
        labels = np.argmin(((pixels[area][:, None] - _PALETTE) ** 2).sum(-1), axis=1)
        counts = np.bincount(labels, minlength=len(_NAMES))
        color = _NAMES[int(counts.argmax())]
        # Cut again half-way to that colour: otherwise a bright object keeps a rim of its edge.
        own = np.median(pixels[area][labels == counts.argmax()], axis=0)
        nearer = ((pixels - own) ** 2).sum(-1) < ((pixels - background) ** 2).sum(-1)
        exact = area & nearer
        if not exact.any():
            continue
        shape, overlap = _best_template(exact)
        rows, columns = np.flatnonzero(exact.any(1)), np.flatnonzero(exact.any(0))
        objects.append(
            SeenObject(
                shape,
                color,
                float(columns[0] + columns[-1] + 1) / 2 / image.shape[1],
                float(rows[0] + rows[-1] + 1) / 2 / image.shape[0],
                overlap,
            )
        )
    return Reading(name, tuple(sorted(objects, key=lambda seen: seen.x)))


def judge(image: NDArray[np.uint8], scene: Scene) -> Verdict:
    """Compare the content of the image with the scene."""
    reading = read(image)
    return Verdict(
        color=sorted(seen.color for seen in reading.objects)
        == sorted(item.color for item in scene.objects),
        background=reading.background == scene.background,
        shape=sorted(seen.shape for seen in reading.objects)
        == sorted(item.shape for item in scene.objects),
    )
