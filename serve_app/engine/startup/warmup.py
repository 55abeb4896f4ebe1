"""The warm-up of an engine before its first request: certify, try, fit, measure and compile.

Results of an earlier start are reused if nothing has changed.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from serve_app.config.models import EngineConfig
from serve_app.config.speed import SpeedConfig
from serve_app.engine.batching.axis_json import NotWritable
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.device import is_out_of_memory, memory_meter
from serve_app.engine.model.fingerprint import Fingerprint, of_code, of_machine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.previews import PreviewMap
from serve_app.engine.model.sample_requests import sample
from serve_app.engine.model.speed import compile_batches
from serve_app.engine.request import work_of
from serve_app.engine.scheduling.cost import CostModel, Measurement, Size
from serve_app.engine.startup.certification import (
    Certificate,
    certify,
    certify_without_sharing,
    contradiction,
)
from serve_app.engine.startup.cold_start import ColdStart
from serve_app.engine.startup.graph_capture import GraphCapture
from serve_app.engine.startup.measurement import measure
from serve_app.engine.startup.memory import MemoryTrend
from serve_app.engine.startup.noise_scheduler_trials import SchedulerTrials, try_noise_schedulers
from serve_app.engine.startup.profile import Profile
from serve_app.engine.startup.profile_folder import (
    profile_folder,
    profile_name,
    remove_old_profiles,
)
from serve_app.engine.startup.runs import Runs
from serve_app.engine.startup.task_trials import find_needs, generate_once
from serve_app.errors import ConfigError
from serve_app.protocol.params import GenerationParams

logger = logging.getLogger(__name__)


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
    sizes = sizes_to_measure(pipeline, config)
    if pipeline.device.type != "cpu":
        pipeline.timesteps_on_cpu = True
        try:
            return _warm_up(pipeline, rendezvous, config, sizes, speed, cost, start)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # From torch: this pipeline joins its timesteps with other tensors.
            logger.warning("trying again with the timesteps on the device", exc_info=True)
            pipeline.timesteps_on_cpu = False
    return _warm_up(pipeline, rendezvous, config, sizes, speed, cost, start)


def _warm_up(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    config: EngineConfig,
    sizes: Sequence[Size],
    speed: SpeedConfig,
    cost: CostModel,
    start: ColdStart,
) -> tuple[Certificate, PreviewMap | None, SchedulerTrials]:
    profile = _open_profile(pipeline, config)
    reused = None
    if profile is not None:
        try:
            reused = _reuse(profile, pipeline, rendezvous, cost)
        except ConfigError as error:
            if config.profile_path != "auto":
                raise
            logger.warning("%s This start replaces it.", error)
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

    if pipeline.graphs is not None:  # before the times are measured, which graphs change
        capture = GraphCapture(
            pipeline, pipeline.graphs, rendezvous, certificate.specs, speed.compile
        )
        for size in sizes or (pipeline.default_size_px,):
            capture.capture(size, cost.max_batch_size)
        start.ended("compile")

    def measured(request: GenerationParams, max_batch_size: int) -> Measurement:
        trend = MemoryTrend(memory_meter(pipeline.device))
        return measure(pipeline, rendezvous, certificate.specs, request, max_batch_size, trend)

    samples = {size: sample(pipeline, size) for size in sizes}
    missing = [size for size in sizes if work_of(samples[size]) not in cost.caps]
    for size in missing:
        work = work_of(samples[size])
        cost.measured(work, measured(samples[size], cost.max_batch_size))
        logger.info("size %dx%d: batches up to %d are worthwhile", *size, cost.caps[work])
    single = not cost.call_s and config.max_running > 1
    if single:  # single calls, so that the first requests have a deadline
        request = sample(pipeline, pipeline.default_size_px)
        cost.measured(work_of(request), measured(request, 1), capped=False)
    if missing or single:
        start.ended("measure")
    if profile is None:
        start.reuse = "nothing reused and nothing stored"
    elif reused is None:
        start.reuse = "certification and caps are new"
    else:
        caps = f"{len(sizes) - len(missing)} of {len(sizes)}"
        start.reuse = f"certification reused, and caps of {caps} sizes"
    if profile is not None and (reused is None or missing or single):
        _write(profile, certificate, previews, trials, cost)
        if config.profile_path == "auto":
            remove_old_profiles(profile.path.parent)
    if speed.compile:
        # Also compile calls that were not measured: those without guidance, and reused sizes.
        for size in sizes or (pipeline.default_size_px,):
            request = sample(pipeline, size)
            most = cost.cap(work_of(request))
            compile_batches(pipeline.generate, rendezvous, certificate.specs, request, most)
        start.ended("compile")
    return certificate, previews, trials


def sizes_to_measure(pipeline: LoadedPipeline, config: EngineConfig) -> tuple[Size, ...]:
    """Return the sizes of the config, or those that 'auto' means.

    Raises:
        ConfigError: the model does not support one of them.
    """
    if isinstance(config.warmup_sizes_px, str):
        # On a CPU memory does not limit a batch, and a measurement takes long.
        wanted = pipeline.device.type == "cuda" and config.max_running > 1
        return (pipeline.default_size_px,) if wanted else ()
    for size in config.warmup_sizes_px:
        if any(side % pipeline.size_multiple for side in size):
            raise ConfigError(
                f"engine.warmup_sizes_px: this model does not support {size[0]}x{size[1]}: both "
                f"sides must be multiples of {pipeline.size_multiple}."
            )
    return config.warmup_sizes_px


def _open_profile(pipeline: LoadedPipeline, config: EngineConfig) -> Profile | None:
    """Return the profile of the config; ``None`` without one, or if its folder cannot be used."""
    if config.profile_path == "none":
        return None
    if config.profile_path != "auto":
        path = Path(config.profile_path).expanduser()
        return Profile(path, startup_fingerprint(pipeline, config))
    if (folder := profile_folder()) is None:
        return None
    fingerprint = startup_fingerprint(pipeline, config)
    return Profile(folder / profile_name(fingerprint), fingerprint)


def _certify_and_fit(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, config: EngineConfig, start: ColdStart
) -> tuple[Certificate, PreviewMap | None]:
    if config.max_running == 1:
        runs = Runs(pipeline, rendezvous)
        find_needs(runs)
        generate_once(runs)
        return certify_without_sharing(pipeline, rendezvous, config.limits.max_input_images), None
    certificate = certify(
        pipeline, rendezvous, config.max_batch_size, config.limits.max_input_images
    )
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
        "engine.limits.max_input_images": str(config.limits.max_input_images),
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
    if "text-to-image" not in certificate.tasks:
        pipeline.require_image()
    if certificate.sharing == "batched":
        reason = contradiction(pipeline, rendezvous, certificate.specs)
        if reason is not None:
            logger.warning("%s does not fit and will be replaced: %s", profile.path, reason)
            return None
    else:
        generate_once(Runs(pipeline, rendezvous))  # fails as a new start does
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
