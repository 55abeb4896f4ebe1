"""The measurement of one request at start-up: its encoding, its denoiser calls and its decoding."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from serve_app.engine.batching.batch import BatchSpec, prepare
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.device import free_memory, is_out_of_memory, release
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.scheduling.cost import Measurement, worthwhile_batch
from serve_app.engine.startup.memory import MemoryTrend
from serve_app.engine.startup.runs import calls_of
from serve_app.engine.timer import median_seconds, wait_for_device
from serve_app.protocol.params import GenerationParams

REPEATS = 3
"""Measured repetitions of a call, after one that is not counted."""


def measure(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    request: GenerationParams,
    max_batch_size: int,
    trend: MemoryTrend,
) -> Measurement:
    """Measure this request, with denoiser calls in batches of 1, 2, 4 … the largest.

    Stops at the first batch size that is not worthwhile or runs out of memory, and at the largest
    one that ``trend`` predicts to fit.
    """
    # The first run is not measured: it may compile or allocate.
    with _at_denoiser(pipeline, rendezvous, request) as job:
        _finish(pipeline, rendezvous, job)
    started_at = time.perf_counter()
    with _at_denoiser(pipeline, rendezvous, request) as job:
        wait_for_device()
        encode_s = time.perf_counter() - started_at
        call = job.call
        assert call is not None
        call_s, out_of_memory = _measure_calls(rendezvous, specs, call, max_batch_size, trend)
        decode_s = _finish(pipeline, rendezvous, job)
    return Measurement(call_s, encode_s, decode_s, out_of_memory)


@contextmanager
def _at_denoiser(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, request: GenerationParams
) -> Iterator[Job[Tensor]]:
    """Yield the request, parked at its first denoiser call; end it with the block."""
    job = Job(functools.partial(pipeline.generate, request))
    with calls_of(pipeline, job) as calls:
        for call in calls:
            if call.site in pipeline.denoisers:
                yield job
                return
            job.resume(rendezvous.forward(call))
        raise AssertionError("the pipeline called no denoiser")


def _finish(pipeline: LoadedPipeline, rendezvous: Rendezvous, job: Job[Tensor]) -> float:
    """Run to the end; return the seconds from the last denoiser call to the end."""
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
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    call: Call,
    max_batch_size: int,
    trend: MemoryTrend,
) -> tuple[dict[int, float], bool]:
    """Return ``{batch size: seconds}``, and True if memory limits it."""
    measured: dict[int, float] = {}
    single = prepare(specs, call)

    def seconds(batch: int) -> float:
        merged = call if single is None else specs[call.site].merge([single] * batch)
        return _seconds(rendezvous, merged)

    batch = 1
    while True:
        fitting = trend.fitting(batch)
        if fitting in measured:
            return measured, True
        try:
            measured[fitting] = trend.run(fitting, functools.partial(seconds, fitting))
            if worthwhile_batch(measured) < fitting:
                # A slow moment of the machine looks the same, and the cap stays, in the profile
                # too. So compare with the smaller batch in one and the same moment.
                measured |= {size: seconds(size) for size in sorted(measured)[-2:]}
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            release(error)
            free_memory()
            return measured, True
        if fitting < batch:
            return measured, True
        if single is None or batch == max_batch_size or worthwhile_batch(measured) < batch:
            return measured, False
        batch = min(2 * batch, max_batch_size)


def _seconds(rendezvous: Rendezvous, call: Call) -> float:
    """Return the median time of a call; the first run, which may compile, is not counted."""
    run = functools.partial(rendezvous.forward, call)
    run()
    return median_seconds(run, REPEATS)
