"""Measuring denoiser calls before the first request comes."""

import functools
import statistics
import time

import torch

from serve_app.engine.batch import BatchSpec
from serve_app.engine.cost import Size, worthwhile_batch
from serve_app.engine.params import GenerationParams
from serve_app.engine.pipeline import LoadedPipeline
from serve_app.engine.rendezvous import Call, Job, Rendezvous

REPEATS = 3


def measure_calls(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    specs: dict[str, BatchSpec],
    size: Size,
    max_batch_size: int,
) -> dict[int, float]:
    """``{batch size: seconds of a denoiser call}`` for one, two, four and more pictures.

    Ends with the first batch size that no longer pays or does not fit into memory. Runs on the
    thread that owns the pipeline.
    """
    params = GenerationParams(
        "a cat sees a dog", 1, width=size[0], height=size[1], num_inference_steps=2
    )
    job = Job(functools.partial(pipeline.paint, params))
    measured: dict[int, float] = {}
    try:
        job.start()
        call = job.call
        if call is None:
            raise job.error or AssertionError("the pipeline called no denoiser")
        spec = specs.get(call.site)
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
    finally:
        job.kill()
        pipeline.restore_networks()


def _seconds(rendezvous: Rendezvous, call: Call) -> float:
    """Median of a few; the first, which may compile or allocate, is left out."""
    taken = []
    for _ in range(REPEATS + 1):
        started_at = time.perf_counter()
        rendezvous.forward(call)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken[1:])
