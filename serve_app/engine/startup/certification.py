"""Certification at start-up: find out how requests may share the pipeline.

Requests must not change each other's images when they take turns, and calls that are merged must
return what they return alone. If calls must not be merged, requests take turns at every step. If
they must not take turns either, they run one after another. So no image is ever wrong, and every
slower way is reported.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from serve_app.engine.batching.axis import NotMergeable
from serve_app.engine.batching.batch import BatchSpec
from serve_app.engine.batching.first_rows import mark_first_rows
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.device import free_memory, memory_meter, release
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.model.sample_requests import sample, with_input
from serve_app.engine.startup.comparison import is_finite, largest_difference, psnr_db, relative_l2
from serve_app.engine.startup.input_images import count_input_images
from serve_app.engine.startup.merging import Deviation, MergingCheck, rounding
from serve_app.engine.startup.runs import RecordedCall, Recording, Runs
from serve_app.engine.startup.task_trials import (
    Unfit,
    certify_tasks,
    check_size,
    check_turns,
    failed,
    find_needs,
)
from serve_app.protocol.params import GenerationParams, Sharing, Task


@dataclass(frozen=True)
class Certificate:
    """Certified way in which requests share the pipeline."""

    sharing: Sharing
    specs: dict[str, BatchSpec]
    """Batch specs by site; empty unless batched."""
    note: str
    """Reason why requests do not share more; empty if they share all that they can."""
    tasks: tuple[Task, ...]
    """Tasks that the certificate covers; the model does not offer others."""
    input_images: int = 0
    """Most input images of a request without a mask."""
    deviation: Deviation | None = None
    """Deviations of merged calls; ``None`` if no calls were merged."""
    difference: float | None = None
    """Largest difference between separate and batched images, in [0, 1] pixels, if measured.
    Reported only: in bfloat16 the choice of kernels alone makes it visible."""
    psnr_db: float | None = None
    """Peak signal-to-noise ratio of the batched image that differs most, in decibels, if measured.
    Reported only."""
    lasting: bool = True
    """True if another start would find the same; False if only a lack of memory decided."""

    @property
    def batch_size(self) -> int:
        """Largest certified number of requests in a merged call."""
        return 1 if self.deviation is None or not self.specs else self.deviation.batch_size

    def to_json(self) -> dict[str, Any]:
        """Return the certificate for a file. Raises `NotWritable`."""
        return {
            "sharing": self.sharing,
            "specs": {site: spec.to_json() for site, spec in self.specs.items()},
            "note": self.note,
            "tasks": self.tasks,
            "input_images": self.input_images,
            "deviation": None if self.deviation is None else asdict(self.deviation),
            "difference": self.difference,
            "psnr_db": self.psnr_db,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], rendezvous: Rendezvous) -> "Certificate":
        """Read the result of `to_json`, for the same pipeline.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: ``value`` is not such a result.
        """
        if value["sharing"] not in get_args(Sharing) or not set(value["tasks"]) <= set(
            get_args(Task)
        ):
            raise ValueError(f"{value['sharing']!r} for {value['tasks']!r}")
        for name in ("difference", "psnr_db"):
            if not isinstance(value[name], float | None):
                raise TypeError(f"{name} is {value[name]!r}")
        specs = {
            site: BatchSpec.from_json(rendezvous.signature_of(site), spec)
            for site, spec in value["specs"].items()
        }
        deviation = value["deviation"]
        return cls(
            value["sharing"],
            specs,
            value["note"],
            tuple(value["tasks"]),
            int(value["input_images"]),
            None if deviation is None else Deviation.from_json(deviation),
            value["difference"],
            value["psnr_db"],
        )


def certify(
    pipeline: LoadedPipeline,
    rendezvous: Rendezvous,
    max_batch_size: int = 2,
    max_input_images: int = 1,
) -> Certificate:
    """Generate images of four requests alone and in turns, and merge their denoiser calls.

    Runs on the calling thread, which must be the one that will own the pipeline.

    Args:
        max_batch_size: Largest number of calls to merge.
        max_input_images: Largest number of input images to try, for pipelines that take several.

    Raises:
        ModelLoadError, NotFinite: an output of a denoiser, or an image, is not finite.
        ModelLoadError: the pipeline is an upscaler.
        Exception: the pipeline failed to generate a single image, so it cannot be served.
    """
    runs = Runs(pipeline, rendezvous)
    find_needs(runs)
    requests = _requests(pipeline)
    alone = [runs.alone(params) for params in requests]
    check_size(pipeline, requests[0], alone[0])
    try:
        check_turns(runs, requests, alone)
    except Exception as error:
        lasting = isinstance(error, Unfit)
        tasks = pipeline.tasks
        images = count_input_images(runs, requests, None, tasks, max_input_images)
        lasting = lasting and images.lasting
        return Certificate("sequential", {}, failed(error), tasks, images.most, lasting=lasting)

    deviation, note, lasting = None, "", True
    try:
        specs = _read_by_row(runs, _learn(runs, requests[0], alone[0]), alone)
        joined = _join_prompts(runs, requests, alone, specs, max_batch_size)
        specs, deviation, limit = joined.specs, joined.deviation, joined.limit
        if deviation is None:
            deviation = _merging_check(runs, specs).compare(alone, max_batch_size)
        if reason := deviation.reason(rounding(pipeline.dtype, pipeline.device)):
            raise Unfit(reason)
        together = runs.together(specs, requests)
        if not is_finite(together):
            raise Unfit("a batched image is NaN or infinite")
    except Exception as error:
        note = f"calls cannot be merged: {failed(error)}"
        # A lack of memory has many types, and another start may have more.
        lasting = isinstance(error, Unfit | NotMergeable)
        release(error)
    if note:
        free_memory()
        found = certify_tasks(runs, requests, {})
        images = count_input_images(runs, requests, {}, found.tasks, max_input_images)
        lasting = lasting and found.lasting and images.lasting
        return Certificate(
            "interleaved", {}, note, found.tasks, images.most, deviation, lasting=lasting
        )
    separate = [recording.image for recording in alone]
    found = certify_tasks(runs, requests, specs)
    images = count_input_images(runs, requests, specs, found.tasks, max_input_images)
    return Certificate(
        "batched",
        specs,
        limit,
        found.tasks,
        images.most,
        deviation,
        largest_difference(separate, together),
        min(psnr_db(one, two) for one, two in zip(separate, together, strict=True)),
        joined.lasting and found.lasting and images.lasting,
    )


def certify_without_sharing(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, max_input_images: int
) -> Certificate:
    """Return the certificate of a pipeline whose requests run one after another."""
    first = sample(pipeline, pipeline.default_size_px)
    requests, tasks = (first, replace(first, seed=2)), pipeline.tasks
    runs = Runs(pipeline, rendezvous)
    images = count_input_images(runs, requests, None, tasks, max_input_images)
    note = "max_running is 1"
    return Certificate("sequential", {}, note, tasks, images.most, lasting=images.lasting)


def contradiction(
    pipeline: LoadedPipeline, rendezvous: Rendezvous, specs: dict[str, BatchSpec]
) -> str | None:
    """Return why specs of an earlier start do not fit; ``None`` if no contradiction is found.

    Generates one image in two steps, and merges one pair of its calls of each denoiser. This is
    cheap and warms up what a certification would. It does not merge different requests; that this
    is harmless follows from the fingerprint.
    """
    runs = Runs(pipeline, rendezvous)
    try:
        recording = runs.alone(sample(pipeline, pipeline.default_size_px))
        called = {recorded.call.site for recorded in recording.calls}
        if new := called - specs.keys():
            return f"{', '.join(sorted(new))} is called, but was not called before"
        if unseen := specs.keys() - called:
            return f"{', '.join(sorted(unseen))} is not called, but was called before"
        deviation = MergingCheck(rendezvous, specs).compare([recording])
        return deviation.reason(rounding(pipeline.dtype, pipeline.device)) or None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _requests(pipeline: LoadedPipeline) -> tuple[GenerationParams, ...]:
    """Return requests that differ in everything but the size.

    The same words in another order give the same number of tokens, which some models need to share
    a call. The last prompt is longer. All but one request end at once, so that they decode side by
    side. One goes on, because a request that ends may undo a change that others still need. One has
    no guidance, so that its calls have fewer rows than the others'.
    """
    first = sample(pipeline, pipeline.default_size_px)
    requests = (
        first,
        replace(
            first, prompt="a dog sees a cat", seed=2, num_inference_steps=3, guidance_scale=3.0
        ),
        replace(first, prompt="a cat a dog sees", seed=3, guidance_scale=1.0),
        replace(_longer(first, pipeline), seed=4),
    )
    return tuple(with_input(request, pipeline.tasks[0]) for request in requests)


_LONGER_BY = 48
"""Tokens by which the longest prompt exceeds the others, unless the model would cut it.

Some networks pad prompts to multiples of 32 themselves, so the prompts must differ by more."""


def _longer(params: GenerationParams, pipeline: LoadedPipeline) -> GenerationParams:
    """Return the request with a longer prompt."""
    longer = params
    least = pipeline.read_prompt(params)[0] + _LONGER_BY
    for _ in range(_LONGER_BY):  # each time adds a token or more, where tokens are known
        more = replace(longer, prompt=f"{longer.prompt} and {params.prompt}")
        tokens, warnings = pipeline.read_prompt(more)
        if warnings:
            break
        longer = more
        if tokens >= least or not tokens:
            break
    return longer


@dataclass(frozen=True)
class _Joined:
    """Specs with which prompts of different lengths share calls, or the reason why they do not."""

    specs: dict[str, BatchSpec]
    deviation: Deviation | None = None
    """Deviations of merged calls; ``None`` if nothing was learned."""
    limit: str = ""
    lasting: bool = True


def _join_prompts(
    runs: Runs,
    requests: Sequence[GenerationParams],
    alone: Sequence[Recording],
    specs: dict[str, BatchSpec],
    max_batch_size: int,
) -> _Joined:
    """Learn which arguments are as long as the prompt, and check that padding changes nothing.

    The last request has a longer prompt than the others.
    """
    first, last = requests[0], requests[-1]
    ones, longer = _first_calls(alone[0]), _first_calls(alone[-1])

    def fit(specs: dict[str, BatchSpec]) -> bool:
        return all(
            spec.prepare(ones[site].call).key == spec.prepare(longer[site].call).key
            for site, spec in specs.items()
        )

    try:
        if fit(specs):
            return _Joined(specs)
        both = runs.first_calls(first, tuple(specs), prompts=(first.prompt, last.prompt))
        joined = {
            site: spec.learn_prompts(
                (ones[site].call, ones[site].output), (both[site].call, both[site].output)
            )
            for site, spec in specs.items()
        }
        if not fit(joined):
            raise NotMergeable("their calls do not fit together")
        deviation = _merging_check(runs, joined).compare(alone, max_batch_size)
        if reason := deviation.reason(rounding(runs.pipeline.dtype, runs.pipeline.device)):
            raise Unfit(reason)
    except Exception as error:
        lasting = isinstance(error, Unfit | NotMergeable)
        release(error)
        limit = f"only prompts of the same length share calls: {failed(error)}"
        return _Joined(specs, limit=limit, lasting=lasting)
    return _Joined(joined, deviation)


def _merging_check(runs: Runs, specs: dict[str, BatchSpec]) -> MergingCheck:
    return MergingCheck(runs.rendezvous, specs, memory_meter(runs.pipeline.device))


def _first_calls(recording: Recording) -> dict[str, RecordedCall]:
    """Return the first call of each denoiser."""
    return {recorded.call.site: recorded for recorded in reversed(recording.calls)}


def _learn(runs: Runs, params: GenerationParams, one: Recording) -> dict[str, BatchSpec]:
    """Learn the batch axis of each denoiser from calls for one image and for two."""
    first = _first_calls(one)
    with warnings.catch_warnings():
        # Some pipelines advise to pass an input image for each image of a prompt.
        warnings.simplefilter("ignore", FutureWarning)
        two = runs.first_calls(params, tuple(first), images=2)
    if missing := first.keys() - two.keys():
        raise NotMergeable(f"two images do not call {', '.join(missing)}, but one does")
    return {
        site: BatchSpec.learn(
            runs.rendezvous.signature_of(site),
            (recorded.call, recorded.output),
            (two[site].call, two[site].output),
        )
        for site, recorded in first.items()
    }


def _read_by_row(
    runs: Runs, specs: dict[str, BatchSpec], alone: Sequence[Recording]
) -> dict[str, BatchSpec]:
    """Find the arguments of which a network reads one row only, which must not differ."""
    tolerance = rounding(runs.pipeline.dtype, runs.pipeline.device)

    def differs(one: object, two: object) -> bool:
        return not relative_l2(one, two) <= tolerance

    one, two = (_first_calls(recording) for recording in alone[:2])
    forward = runs.rendezvous.forward
    return {
        site: mark_first_rows(spec, one[site].call, two[site].call, forward, differs)
        for site, spec in specs.items()
    }
