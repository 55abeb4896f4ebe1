"""The front of a model: calls and distances by threshold, beside fewer steps and other solvers."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import psnr_db
from serve_app.errors import GenerationFailed
from serve_app.protocol.events import Completed, Failed, GenerationResult
from serve_app.protocol.params import GenerationParams
from serve_app.tuning.distances import ssim

GRID = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32)
"""Thresholds to try."""

PEERS = ("dpm++", "unipc")
"""Noise schedulers to compare with, beside the model's own, where the model offers them."""


MOST_BELOW_DB = 10.0
"""Decibels by which the worst image may miss the wanted median."""


@dataclass(frozen=True)
class Row:
    """One way to generate the images of all prompts."""

    way: str
    threshold: float | None
    """Largest predicted error; ``None`` for a way that makes all calls."""
    calls: float
    """Mean number of denoiser calls."""
    to_none_db: float
    """Median PSNR to the images with all calls at the same steps."""
    least_to_none_db: float
    to_none_ssim: float
    """Median structural similarity to the same images."""
    to_truth_db: float
    """Median PSNR to the images in many steps."""


@dataclass(frozen=True)
class Front:
    """What the ways cost and gain, and the thresholds that reach the wanted distances."""

    rows: Sequence[Row]
    balanced_error: float | None
    """``None`` if no threshold reaches the distance."""
    fast_error: float | None
    notes: Sequence[str] = ()
    """Sentences on what was left out."""


class Measurement:
    """Generates the same prompts and seeds in several ways, and compares the images."""

    def __init__(
        self,
        engine: Engine,
        pipeline: LoadedPipeline,
        prompts: Sequence[str],
        steps: int,
        truth_steps: int,
        on_image: Callable[[], object],
    ) -> None:
        """Generate the images to compare with. ``on_image`` is called once an image."""
        self._engine = engine
        self._pipeline = pipeline
        self._steps = steps
        self._on_image = on_image
        self._requests = [GenerationParams(prompt, seed) for seed, prompt in enumerate(prompts)]
        results = self._generate(steps)
        self._none = [result.pixels for result in results]
        self._truth = [result.pixels for result in self._generate(truth_steps)]
        self.none = self._row_of("all calls", None, results)

    def threshold(self, most_error: float) -> Row:
        """Measure one threshold."""
        update = {"fast_error": most_error}
        self._pipeline.acceleration = self._pipeline.acceleration.model_copy(update=update)
        results = self._generate(self._steps, accelerated=True)
        return self._row_of("extrapolated", most_error, results)

    def peers(self, calls: float) -> list[Row]:
        """Measure fewer steps, with about as many calls, for each noise scheduler."""
        steps = max(1, round(self._steps * calls / self.none.calls))
        offered = [name for name in PEERS if name in self._engine.info.noise_schedulers]
        return [
            self._row_of(
                f"{steps} steps, {scheduler or 'own scheduler'}",
                None,
                self._generate(steps, scheduler),
            )
            for scheduler in (None, *offered)
        ]

    def solo(self, way: str, generate: Callable[[GenerationParams], tuple[Tensor, int]]) -> Row:
        """Measure a way without the engine, which returns an image and its number of calls."""
        images, calls = [], []
        for request in self._requests:
            params = replace(request, num_inference_steps=self._steps, acceleration="none")
            image, made = generate(params.resolved(self._engine.info))
            images.append(image)
            calls.append(made)
            self._on_image()
        return self._row(way, None, images, calls)

    def _generate(
        self, steps: int, scheduler: str | None = None, accelerated: bool = False
    ) -> list[GenerationResult]:
        streams = [
            self._engine.stream(
                GenerationParams(
                    request.prompt,
                    request.seed,
                    num_inference_steps=steps,
                    noise_scheduler=scheduler,
                    acceleration="fast" if accelerated else "none",
                )
            )
            for request in self._requests
        ]
        results = []
        for stream in streams:
            *_, last = stream
            if isinstance(last, Failed):
                raise last.error
            if not isinstance(last, Completed):
                raise GenerationFailed(f"the last event of a request is {last}")
            if (error := last.result.not_finite()) is not None:
                raise error
            results.append(last.result)
            self._on_image()
        return results

    def _row_of(
        self, way: str, threshold: float | None, results: Sequence[GenerationResult]
    ) -> Row:
        images = [result.pixels for result in results]
        return self._row(way, threshold, images, [result.calls.made for result in results])

    def _row(
        self, way: str, threshold: float | None, images: Sequence[Tensor], calls: Sequence[int]
    ) -> Row:
        to_none = _distances(psnr_db, images, self._none)
        return Row(
            way,
            threshold,
            statistics.mean(calls),
            statistics.median(to_none),
            min(to_none),
            statistics.median(_distances(ssim, images, self._none)),
            statistics.median(_distances(psnr_db, images, self._truth)),
        )


def _distances(
    distance: Callable[[Tensor, Tensor], float], some: Sequence[Tensor], others: Sequence[Tensor]
) -> list[float]:
    pairs = zip(some, others, strict=True)
    return [distance(one.float().cpu(), two.float().cpu()) for one, two in pairs]


def measure(measurement: Measurement, balanced_db: float, fast_db: float) -> Front:
    """Try all thresholds, then compare those that reach the wanted distances with their peers.

    ``balanced_db`` and ``fast_db`` are the least median PSNR to the images with all calls, of which
    the worst image may be `MOST_BELOW_DB` less.
    """
    rows = [measurement.threshold(threshold) for threshold in GRID]
    chosen = [largest(rows, least_db) for least_db in (balanced_db, fast_db)]
    levels = dict.fromkeys(row for row in chosen if row is not None)
    peers = [peer for row in levels for peer in measurement.peers(row.calls)]
    balanced, fast = (None if row is None else row.threshold for row in chosen)
    return Front([measurement.none, *rows, *dict.fromkeys(peers)], balanced, fast)


def largest(rows: Sequence[Row], least_db: float) -> Row | None:
    """Return the row of the largest threshold up to which all reach a median of ``least_db``.

    No image may be far below it. Returns ``None`` if the first threshold fails.
    """
    found = None
    for row in rows:
        if row.to_none_db < least_db or row.least_to_none_db < least_db - MOST_BELOW_DB:
            break
        found = row
    return found


def markdown(front: Front) -> str:
    """Return the rows as a table."""
    header = ["", "threshold", "calls", "PSNR to all calls (least)", "SSIM", "PSNR to the truth"]
    lines = [header, ["---"] * len(header), *(_cells(row) for row in front.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row) -> list[str]:
    return [
        row.way,
        "" if row.threshold is None else f"{row.threshold:g}",
        f"{row.calls:.1f}",
        f"{row.to_none_db:.1f} dB ({row.least_to_none_db:.1f} dB)",
        f"{row.to_none_ssim:.3f}",
        f"{row.to_truth_db:.1f} dB",
    ]
