"""What an engine does before the first request comes: certify, fit previews, measure, compile."""

import functools
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from serve_app.config import EngineConfig, SpeedConfig
from serve_app.engine.batch import BatchSpec
from serve_app.engine.certification import Certificate, certify
from serve_app.engine.cost import CostModel, Measurement, Size, worthwhile_batch
from serve_app.engine.params import probe
from serve_app.engine.pipeline import LoadedPipeline
from serve_app.engine.preview import PreviewMap
from serve_app.engine.rendezvous import Call, Job, Rendezvous
from serve_app.engine.speed import compile_batches
from serve_app.engine.timer import wait_for_device
from serve_app.errors import ConfigError

logger = logging.getLogger(__name__)

REPEATS = 3


def warm_up(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    config: EngineConfig,
    speed: SpeedConfig,
    cost: CostModel,
) -> tuple[Certificate, PreviewMap | None]:
    """How requests may share the pipeline, and how to preview what they paint; fills ``cost``.

    Runs on the thread that owns the pipeline. Raises what the pipeline raises when it paints alone,
    and `ConfigError` if a size is none of this model's or the file of earlier measurements is none.
    """
    for size in config.warmup_sizes_px:
        if any(side % pipeline.size_multiple for side in size):
            raise ConfigError(
                f"engine.warmup_sizes_px: {size[0]}x{size[1]} is no size of this model: both sides "
                f"must be multiples of {pipeline.size_multiple}."
            )
    certificate = Certificate("alone", {}, None, "max_running is 1", pipeline.tasks)
    previews = None
    if config.max_running > 1:
        certificate = certify(pipeline, rendezvous)
        try:
            previews = PreviewMap.fit(pipeline)
        except Exception:
            logger.warning("no previews: their colours cannot be fitted", exc_info=True)

    def measured(size: Size, max_batch_size: int) -> Measurement:
        return measure(pipeline, rendezvous, certificate.specs, size, max_batch_size)

    path = None if config.profile_path is None else Path(config.profile_path).expanduser()
    subject = f"{pipeline.description}, {certificate.sharing} up to {config.max_batch_size}"
    if path is not None:
        cost.load(path, subject)
    missing = [size for size in config.warmup_sizes_px if size not in cost.caps]
    found = {size: measured(size, config.max_batch_size) for size in missing}
    for size, measurement in found.items():
        cost.measured(size, measurement)
        logger.info("size %dx%d: batches up to %d pay", *size, cost.caps[size])
    if path is not None and missing and not any(one.out_of_memory for one in found.values()):
        cost.save(path, subject)
    if not cost.call_s and config.max_running > 1:
        # Single calls, so that the first requests have a deadline.
        size = pipeline.default_size_px
        single = measured(size, 1)
        cost.observe_call(size, 1.0, 1, single.call_s[1])
        cost.observe_request(size, 1, 1, single.encode_s, single.decode_s)
    if speed.compile:
        # What was not measured: calls without guidance, and sizes of an earlier start.
        for size in config.warmup_sizes_px or (pipeline.default_size_px,):
            most = cost.cap(size)
            compile_batches(pipeline.paint, rendezvous, certificate.specs, size, most)
    return certificate, previews


def measure(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    size: Size,
    max_batch_size: int,
) -> Measurement:
    """What a request of this size costs, with denoiser calls for one, two, four and more of them.

    Ends with the first batch size that no longer pays or does not fit into memory.
    """
    # Once without a look at the clock: the first run may compile or allocate.
    with _at_denoiser(pipeline, rendezvous, size) as job:
        _finish(pipeline, rendezvous, job)
    started_at = time.perf_counter()
    with _at_denoiser(pipeline, rendezvous, size) as job:
        wait_for_device()
        encode_s = time.perf_counter() - started_at
        call = job.call
        assert call is not None
        spec = specs.get(call.site)
        call_s, out_of_memory = _measure_calls(rendezvous, spec, call, max_batch_size)
        decode_s = _finish(pipeline, rendezvous, job)
    return Measurement(call_s, encode_s, decode_s, out_of_memory)


@contextmanager
def _at_denoiser(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, size: Size
) -> Iterator[Job[Tensor]]:
    """A request of two steps, parked at its first denoiser call; ends with the block."""
    job = Job(functools.partial(pipeline.paint, probe(size)))
    try:
        job.start()
        while job.call is not None and job.call.site not in pipeline.denoisers:
            job.resume(rendezvous.forward(job.call))
        if job.call is None:
            raise job.error or AssertionError("the pipeline called no denoiser")
        yield job
    finally:
        job.kill()
        pipeline.restore_networks()


def _finish(pipeline: LoadedPipeline, rendezvous: Rendezvous, job: Job[Tensor]) -> float:
    """Run to the end; seconds from the last answer of a denoiser."""
    last_at = time.perf_counter()
    while job.call is not None:
        output = rendezvous.forward(job.call)
        if job.call.site in pipeline.denoisers:
            wait_for_device()
            last_at = time.perf_counter()
        job.resume(output)
    if job.error is not None:
        raise job.error
    wait_for_device()
    return time.perf_counter() - last_at


def _measure_calls(
    rendezvous: Rendezvous, spec: BatchSpec | None, call: Call, max_batch_size: int
) -> tuple[dict[int, float], bool]:
    """``{batch size: seconds}``, and whether memory was the end of it."""
    measured: dict[int, float] = {}
    batch = 1
    while batch <= max_batch_size:
        merged = call if spec is None else spec.merge([spec.prepare(call)] * batch)
        try:
            measured[batch] = _seconds(rendezvous, merged)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            return measured, True
        if spec is None or worthwhile_batch(measured) < batch:
            break
        batch *= 2
    return measured, False


def _seconds(rendezvous: Rendezvous, call: Call) -> float:
    """Median of a few; the first, which may compile or allocate, is left out."""
    taken = []
    for _ in range(REPEATS + 1):
        started_at = time.perf_counter()
        rendezvous.forward(call)
        wait_for_device()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken[1:])
