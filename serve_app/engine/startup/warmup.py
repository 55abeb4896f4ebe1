"""The warm-up of an engine before its first request: certify, try, fit, measure and compile.

Results of an earlier start are reused if nothing has changed.
"""

import copy
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
from serve_app.engine.batching.axis import NotWritable
from serve_app.engine.batching.batch import BatchSpec, prepare
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.model.fingerprint import Fingerprint, of_code, of_machine
from serve_app.engine.model.noise_schedulers import fewest_steps_of
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.previews import PreviewMap
from serve_app.engine.model.speed import compile_batches
from serve_app.engine.scheduling.cost import CostModel, Measurement, Size, worthwhile_batch
from serve_app.engine.startup.certification import Certificate, certify, contradiction
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.noise_scheduler_trials import SchedulerTrials, try_noise_schedulers
from serve_app.engine.startup.profile import Profile
from serve_app.engine.startup.runs import Runs
from serve_app.engine.timer import wait_for_device
from serve_app.errors import ConfigError
from serve_app.protocol.params import probe

logger = logging.getLogger(__name__)

REPEATS = 3
"""Measured repetitions of a call, after one that is not counted."""


def warm_up(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    config: EngineConfig,
    speed: SpeedConfig,
    cost: CostModel,
    start: ColdStart,
) -> tuple[Certificate, PreviewMap | None, SchedulerTrials]:
    """Return the certificate, the preview map and the trials of noise schedulers; fill ``cost``.

    Reuses the profile of an earlier start if nothing has changed since, and reports the phases to
    ``start``. Measures and compiles for the sizes of the config only, or for the model's default.
    Runs on the thread that owns the pipeline.

    Raises:
        ConfigError: the model does not support a size, or the profile is damaged.
        Exception: the pipeline failed to generate a single image.
    """
    _check_sizes(pipeline, config)
    profile = None
    if config.profile_path is not None:
        path = Path(config.profile_path).expanduser()
        profile = Profile(path, startup_fingerprint(pipeline, config))
    reused = None if profile is None else _reuse(profile, pipeline, rendezvous, cost)
    if reused is not None:
        certificate, previews, trials = reused
        start.ended("certify")
    else:
        certificate, previews = _certify_and_fit(pipeline, rendezvous, config, start)
        start.ended("certify")
        trials = try_noise_schedulers(pipeline, rendezvous, certificate.tasks)
        start.ended("schedulers")
    if certificate.sharing == "batched":  # larger batches did not fit into memory
        cost.max_batch_size = min(cost.max_batch_size, certificate.batch_size)

    def measured(size: Size, max_batch_size: int) -> Measurement:
        return measure(pipeline, rendezvous, certificate.specs, size, max_batch_size)

    missing = [size for size in config.warmup_sizes_px if size not in cost.caps]
    for size in missing:
        cost.measured(size, measured(size, cost.max_batch_size))
        logger.info("size %dx%d: batches up to %d are worthwhile", *size, cost.caps[size])
    single = not cost.call_s and config.max_running > 1
    if single:  # single calls, so that the first requests have a deadline
        size = pipeline.default_size_px
        cost.measured(size, measured(size, 1), capped=False)
    if missing or single:
        start.ended("measure")
    if profile is None:
        start.reuse = "nothing reused, because engine.profile_path is not set"
    elif reused is None:
        start.reuse = "certification and caps are new"
    else:
        caps = f"{len(config.warmup_sizes_px) - len(missing)} of {len(config.warmup_sizes_px)}"
        start.reuse = f"certification reused, and caps of {caps} sizes"
    if profile is not None and (reused is None or missing or single):
        _write(profile, certificate, previews, trials, cost)
    if speed.compile:
        # Also compile calls that were not measured: those without guidance, and reused sizes.
        for size in config.warmup_sizes_px or (pipeline.default_size_px,):
            most = cost.cap(size)
            compile_batches(pipeline.generate, rendezvous, certificate.specs, size, most)
        start.ended("compile")
    return certificate, previews, trials


def _check_sizes(pipeline: LoadedPipeline, config: EngineConfig) -> None:
    for size in config.warmup_sizes_px:
        if any(side % pipeline.size_multiple for side in size):
            raise ConfigError(
                f"engine.warmup_sizes_px: this model does not support {size[0]}x{size[1]}: both "
                f"sides must be multiples of {pipeline.size_multiple}."
            )


def _certify_and_fit(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, config: EngineConfig, start: ColdStart
) -> tuple[Certificate, PreviewMap | None]:
    if config.max_running == 1:
        _generate_once(pipeline, rendezvous)
        return Certificate("sequential", {}, "max_running is 1", pipeline.tasks), None
    certificate = certify(pipeline, rendezvous, config.max_batch_size)
    start.ended("certify")
    previews = None
    try:
        previews = PreviewMap.fit(pipeline)
    except Exception:
        logger.warning(
            "no previews: the map from latents to colours cannot be fitted", exc_info=True
        )
        certificate = replace(certificate, lasting=False)
    start.ended("preview")
    return certificate, previews


def _generate_once(pipeline: LoadedPipeline, rendezvous: Rendezvous) -> None:
    """Generate one image, in two steps or as few as the model's own noise scheduler accepts.

    Raises:
        Exception: the pipeline failed, or the image is not finite.
    """
    params = probe(pipeline.default_size_px)
    steps = max(2, fewest_steps_of(copy.deepcopy(pipeline.stock.scheduler)))
    Runs(pipeline, rendezvous).alone(replace(params, num_inference_steps=steps))


def startup_fingerprint(pipeline: LoadedPipeline, config: EngineConfig) -> Fingerprint:
    """Return the fingerprint of everything that the certificate and the costs depend on.

    Three things decide if rows of a batch mix. Code does (of the engine, the pipeline and the
    kernels, hence the device), configs do, which select code, and weights do, which scale the
    effect. If all are unchanged, a new certification would run the same instructions on the same
    numbers. The fingerprint covers all of them, and any change invalidates every result. A needless
    certification costs seconds; a missing one costs wrong images.
    """
    return {
        **of_code(),
        **of_machine(pipeline.device),
        **pipeline.fingerprint(),
        "engine.max_batch_size": str(config.max_batch_size),
        # One request at a time shares nothing, so nothing is certified.
        "engine.max_running": "1" if config.max_running == 1 else "more than 1",
    }


def _reuse(
    profile: Profile, pipeline: LoadedPipeline, rendezvous: Rendezvous, cost: CostModel
) -> tuple[Certificate, PreviewMap | None, SchedulerTrials] | None:
    """Return the results of an earlier start and fill ``cost``; ``None`` if they do not apply.

    Raises:
        ConfigError: the file is damaged.
    """
    kept = profile.read()
    if kept is None:
        return None
    try:
        certificate = Certificate.from_json(kept["certificate"], rendezvous)
        weights = kept["previews"]
        previews = None if weights is None else PreviewMap.from_json(weights, pipeline.device)
        trials = SchedulerTrials.from_json(kept["noise_schedulers"])
        sizes = CostModel(cost.max_batch_size)
        sizes.add_json(kept["sizes"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise profile.damaged(error) from None
    if certificate.sharing == "batched":
        reason = contradiction(pipeline, rendezvous, certificate.specs)
        if reason is not None:
            logger.warning("%s does not fit and will be replaced: %s", profile.path, reason)
            return None
    else:
        _generate_once(pipeline, rendezvous)  # fails as a new start does
    cost.add_json(kept["sizes"])
    return certificate, previews, trials


def _write(
    profile: Profile,
    certificate: Certificate,
    previews: PreviewMap | None,
    trials: SchedulerTrials,
    cost: CostModel,
) -> None:
    if not (certificate.lasting and trials.lasting):
        logger.info("%s is not written: another start may find out more", profile.path)
        return
    try:
        content = certificate.to_json()
    except NotWritable as reason:
        logger.info("%s is not written: %s", profile.path, reason)
        return
    profile.write(
        {
            "certificate": content,
            "previews": None if previews is None else previews.to_json(),
            "noise_schedulers": trials.faults,
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
    """Measure a request of this size, with denoiser calls in batches of 1, 2, 4 and more.

    Stops at the first batch size that is not worthwhile or runs out of memory.
    """
    # The first run is not measured: it may compile or allocate.
    with _at_denoiser(pipeline, rendezvous, size) as job:
        _finish(pipeline, rendezvous, job)
    started_at = time.perf_counter()
    with _at_denoiser(pipeline, rendezvous, size) as job:
        wait_for_device()
        encode_s = time.perf_counter() - started_at
        call = job.call
        assert call is not None
        call_s, out_of_memory = _measure_calls(rendezvous, specs, call, max_batch_size)
        decode_s = _finish(pipeline, rendezvous, job)
    return Measurement(call_s, encode_s, decode_s, out_of_memory)


@contextmanager
def _at_denoiser(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, size: Size
) -> Iterator[Job[Tensor]]:
    """Yield a request of two steps, parked at its first denoiser call; end it with the block."""
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
    rendezvous: Rendezvous, specs: dict[str, BatchSpec], call: Call, max_batch_size: int
) -> tuple[dict[int, float], bool]:
    """Return ``{batch size: seconds}``, and True if memory ran out."""
    measured: dict[int, float] = {}
    single = prepare(specs, call)
    batch = 1
    while batch <= max_batch_size:
        merged = call if single is None else specs[call.site].merge([single] * batch)
        try:
            measured[batch] = _seconds(rendezvous, merged)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            return measured, True
        if single is None or worthwhile_batch(measured) < batch:
            break
        batch *= 2
    return measured, False


def _seconds(rendezvous: Rendezvous, call: Call) -> float:
    """Return the median time of a call; the first run, which may compile, is not counted."""
    taken = []
    for _ in range(REPEATS + 1):
        started_at = time.perf_counter()
        rendezvous.forward(call)
        wait_for_device()
        taken.append(time.perf_counter() - started_at)
    return statistics.median(taken[1:])
