"""Many requests of one kind at once: speed and images, compared with one at a time."""

import time
from dataclasses import dataclass, replace

from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference, psnr_db
from tests.benchmarks.ways import Arrival, Kind, Way

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Saturated:
    """One line of the table."""

    width: int
    height: int
    steps: int
    waiting: int
    alone_images_per_s: float
    """Images per second of the stock pipeline, one at a time."""
    engine_images_per_s: float
    efficiency: float
    psnr_db: float
    """Peak signal-to-noise ratio of the image that differs most from the one generated alone."""
    difference: float
    """Largest difference of a pixel in [0, 1] from the image generated alone."""

    @property
    def speedup(self) -> float:
        return self.engine_images_per_s / self.alone_images_per_s


def saturate(pipeline: LoadedPipeline, serve: Way, kind: Kind, waiting: int) -> Saturated:
    """Measure ``waiting`` requests at once; ``serve`` must keep the images.

    A first round of a few steps warms up.
    """
    short = replace(kind, steps=WARM_UP_STEPS)
    pipeline.generate(short.params(0)).cpu()
    started_at = time.perf_counter()
    alone = [pipeline.generate(kind.params(seed))[0].cpu() for seed in range(waiting)]
    solo_s = time.perf_counter() - started_at
    serve([Arrival(0.0, short, seed) for seed in range(waiting)])
    served = serve([Arrival(0.0, kind, seed) for seed in range(waiting)])
    together = [served.images[seed] for seed in range(waiting)]
    latencies = [outcome.latency_s for outcome in served.outcomes if outcome.latency_s is not None]
    assert served.report is not None
    return Saturated(
        width=kind.width,
        height=kind.height,
        steps=kind.steps,
        waiting=waiting,
        alone_images_per_s=waiting / solo_s,
        engine_images_per_s=waiting / max(latencies),
        efficiency=served.report.efficiency,
        psnr_db=min(psnr_db(*pair) for pair in zip(alone, together, strict=True)),
        difference=largest_difference(alone, together),
    )


def show(rows: list[Saturated]) -> str:
    lines = [
        f"{'at once':<28} {'alone/s':>8} {'engine/s':>8} {'faster':>7} {'effic.':>7} "
        f"{'PSNR dB':>8} {'differ by':>9}"
    ]
    for row in rows:
        name = f"{row.waiting} of {row.width}x{row.height}, {row.steps} steps"
        lines.append(
            f"{name:<28} {row.alone_images_per_s:>8.2f} {row.engine_images_per_s:>8.2f} "
            f"{row.speedup:>6.2f}x {row.efficiency:>7.2f} {row.psnr_db:>8.1f} "
            f"{row.difference:>9.1e}"
        )
    return "\n".join(lines)
