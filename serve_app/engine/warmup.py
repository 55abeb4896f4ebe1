"""Measuring what requests cost before the first one comes."""

import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from serve_app.engine.batch import BatchSpec
from serve_app.engine.cost import Measurement, Size, worthwhile_batch
from serve_app.engine.params import GenerationParams
from serve_app.engine.pipeline import LoadedPipeline
from serve_app.engine.rendezvous import Call, Job, Rendezvous

REPEATS = 3


def measure(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    size: Size,
    max_batch_size: int,
) -> Measurement:
    """What a request of this size costs, with denoiser calls for one, two, four and more of them.

    Ends with the first batch size that no longer pays or does not fit into memory. Runs on the
    thread that owns the pipeline.
    """
    # Once without a look at the clock: the first run may compile or allocate.
    with _at_denoiser(pipeline, rendezvous, size) as job:
        _finish(pipeline, rendezvous, job)
    started_at = time.perf_counter()
    with _at_denoiser(pipeline, rendezvous, size) as job:
        _wait()
        encode_s = time.perf_counter() - started_at
        call = job.call
        assert call is not None
        call_s = _measure_calls(rendezvous, specs.get(call.site), call, max_batch_size)
        decode_s = _finish(pipeline, rendezvous, job)
    return Measurement(call_s, encode_s, decode_s)


@contextmanager
def _at_denoiser(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, size: Size
) -> Iterator[Job[Tensor]]:
    """A request of two steps, parked at its first denoiser call; ends with the block."""
    params = GenerationParams(
        "a cat sees a dog", 1, width=size[0], height=size[1], num_inference_steps=2
    )
    job = Job(functools.partial(pipeline.paint, params))
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
            _wait()
            last_at = time.perf_counter()
        job.resume(output)
    if job.error is not None:
        raise job.error
    _wait()
    return time.perf_counter() - last_at


def _measure_calls(
    rendezvous: Rendezvous, spec: BatchSpec | None, call: Call, max_batch_size: int
) -> dict[int, float]:
    """``{batch size: seconds}``."""
    measured: dict[int, float] = {}
    batch = 1
    while batch <= max_batch_size:
        merged = call if spec is None else spec.merge([spec.prepare(call)] * batch)
        try:
            measured[batch] = _seconds(rendezvous, merged)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            break
        if spec is None or worthwhile_batch(measured) < batch:
            break
        batch *= 2
    return measured


def _seconds(rendezvous: Rendezvous, call: Call) -> float:
    """Median of a few; the first, which may compile or allocate, is left out."""
    taken = []
    for _ in range(REPEATS + 1):
        started_at = time.perf_counter()
        rendezvous.forward(call)
        _wait()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken[1:])


def _wait() -> None:
    """Until the device is done, or the time would be that of asking for it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
