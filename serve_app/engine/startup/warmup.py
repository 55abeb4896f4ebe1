"""What an engine does before the first request comes: certify, fit previews, measure, compile.

Or take over from an earlier start what that found out, where nothing has changed.
"""

import functools
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from serve_app.config.models import EngineConfig, SpeedConfig
from serve_app.engine.batching.batch import BatchSpec, NotWritable
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.model.fingerprint import Fingerprint, of_code, of_machine
from serve_app.engine.model.loader import LoadedPipeline
from serve_app.engine.model.previews import PreviewMap
from serve_app.engine.model.speed import compile_batches
from serve_app.engine.scheduling.cost import CostModel, Measurement, Size, worthwhile_batch
from serve_app.engine.startup.certification import Certificate, certify, contradiction
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.profile import Profile
from serve_app.engine.timer import wait_for_device
from serve_app.errors import ConfigError
from serve_app.protocol.params import probe

logger = logging.getLogger(__name__)

REPEATS = 3


def warm_up(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    config: EngineConfig,
    speed: SpeedConfig,
    cost: CostModel,
    start: ColdStart,
) -> tuple[Certificate, PreviewMap | None]:
    """How requests may share the pipeline, and how to preview what they paint; fills ``cost``.

    Takes over what an earlier start kept, if nothing has changed since, and tells ``start`` of its
    phases. Of sizes only those of the config are measured and compiled for, or the model's own.

    Runs on the thread that owns the pipeline. Raises what the pipeline raises when it paints alone,
    and `ConfigError` if a size is none of this model's or the file of an earlier start is none.
    """
    for size in config.warmup_sizes_px:
        if any(side % pipeline.size_multiple for side in size):
            raise ConfigError(
                f"engine.warmup_sizes_px: {size[0]}x{size[1]} is no size of this model: both sides "
                f"must be multiples of {pipeline.size_multiple}."
            )
    profile = None
    if config.profile_path is not None:
        path = Path(config.profile_path).expanduser()
        profile = Profile(path, _found_with(pipeline, config))
    known = None if profile is None else _known(profile, pipeline, rendezvous, cost)
    certificate, previews = known or _find_out(pipeline, rendezvous, config, start)
    start.ended("certify")

    def measured(size: Size, max_batch_size: int) -> Measurement:
        return measure(pipeline, rendezvous, certificate.specs, size, max_batch_size)

    missing = [size for size in config.warmup_sizes_px if size not in cost.caps]
    for size in missing:
        cost.measured(size, measured(size, config.max_batch_size))
        logger.info("size %dx%d: batches up to %d pay", *size, cost.caps[size])
    alone = not cost.call_s and config.max_running > 1
    if alone:  # single calls, so that the first requests have a deadline
        size = pipeline.default_size_px
        cost.measured(size, measured(size, 1), capped=False)
    if missing or alone:
        start.ended("measure")
    if profile is None:
        start.reuse = "nothing reused, for want of engine.profile_path"
    elif known is None:
        start.reuse = "certification and caps found anew"
    else:
        caps = f"{len(config.warmup_sizes_px) - len(missing)} of {len(config.warmup_sizes_px)}"
        start.reuse = f"certification reused, and caps of {caps} sizes"
    if profile is not None and (known is None or missing or alone):
        _keep(profile, certificate, previews, cost)
    if speed.compile:
        # What was not measured: calls without guidance, and sizes of an earlier start.
        for size in config.warmup_sizes_px or (pipeline.default_size_px,):
            most = cost.cap(size)
            compile_batches(pipeline.generate, rendezvous, certificate.specs, size, most)
        start.ended("compile")
    return certificate, previews


def _find_out(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, config: EngineConfig, start: ColdStart
) -> tuple[Certificate, PreviewMap | None]:
    if config.max_running == 1:
        return Certificate("alone", {}, None, "max_running is 1", pipeline.tasks), None
    certificate = certify(pipeline, rendezvous)
    start.ended("certify")
    previews = None
    try:
        previews = PreviewMap.fit(pipeline)
    except Exception:
        logger.warning("no previews: their colours cannot be fitted", exc_info=True)
        certificate = replace(certificate, lasting=False)
    start.ended("preview")
    return certificate, previews


def _found_with(pipeline: LoadedPipeline, config: EngineConfig) -> Fingerprint:
    """All that the outcome depends on: whether batching is right, for one.

    Whether rows of a batch mix is a matter of code (the engine's, the pipeline's, the kernels' and
    hence the device's), of configs that choose among code, and of weights that make a difference
    large or small. If each of these is what it was when the pictures were compared, comparing them
    again would run the same instructions on the same numbers. All of it is in here, and no part is
    taken over when another has changed: too many certifications cost seconds, one too few a
    picture.
    """
    return {
        **of_code(),
        **of_machine(pipeline.device),
        **pipeline.fingerprint(),
        "engine.max_batch_size": str(config.max_batch_size),
        # Nobody shares anything with one request at a time, and nothing is certified.
        "engine.max_running": "1" if config.max_running == 1 else "more than 1",
    }


def _known(
    profile: Profile, pipeline: LoadedPipeline, rendezvous: Rendezvous, cost: CostModel
) -> tuple[Certificate, PreviewMap | None] | None:
    """What an earlier start kept, and ``cost`` filled with its times; none if it is not to be used.

    Raises `ConfigError` if the file is damaged.
    """
    kept = profile.read()
    if kept is None:
        return None
    try:
        certificate = Certificate.from_json(kept["certificate"], rendezvous)
        weights = kept["previews"]
        previews = None if weights is None else PreviewMap.from_json(weights, pipeline.device)
        sizes = CostModel(cost.max_batch_size)
        sizes.add_json(kept["sizes"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise profile.damaged(error) from None
    if certificate.sharing == "batched":
        reason = contradiction(pipeline, rendezvous, certificate.specs)
        if reason is not None:
            logger.warning("%s does not fit and will be replaced: %s", profile.path, reason)
            return None
    cost.add_json(kept["sizes"])
    return certificate, previews


def _keep(
    profile: Profile, certificate: Certificate, previews: PreviewMap | None, cost: CostModel
) -> None:
    if not certificate.lasting:
        logger.info("nothing is kept in %s: another start may find out more", profile.path)
        return
    try:
        content = certificate.to_json()
    except NotWritable as reason:
        logger.info("nothing is kept in %s: %s", profile.path, reason)
        return
    profile.write(
        {
            "certificate": content,
            "previews": None if previews is None else previews.to_json(),
            "sizes": cost.to_json(),
        }
    )


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
    job = Job(functools.partial(pipeline.generate, probe(size)))
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
