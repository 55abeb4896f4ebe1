"""Runs of requests at start-up: alone, in turns, or with merged calls. No engine is needed."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from serve_app.engine.batching.axis import map_tensors
from serve_app.engine.batching.batch import BatchSpec, MergeableCall, prepare
from serve_app.engine.batching.rendezvous import Call, Job, Rendezvous
from serve_app.engine.model.finite import require_finite
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import is_finite
from serve_app.errors import ModelLoadError
from serve_app.protocol.params import GenerationParams


@dataclass(frozen=True)
class RecordedCall:
    """A denoiser call and its output, both unaffected by what the pipeline does later."""

    call: Call
    output: Any


@dataclass(frozen=True)
class Recording:
    """The run of one request alone."""

    calls: tuple[RecordedCall, ...]
    """Denoiser calls, in order."""
    image: Tensor
    """Tensor of shape ``[3, height, width]`` in [0, 1]."""


@contextmanager
def calls_of(pipeline: LoadedPipeline, job: Job[Tensor]) -> Iterator[Iterator[Call]]:
    """Start a job, and iterate over its calls. The block answers each one with ``job.resume``.

    The job ends with the block, and the pipeline's networks are then as before. After the last call
    the iterator raises what the job raised.
    """

    def calls() -> Iterator[Call]:
        while (call := job.call) is not None:
            yield call
        if job.error is not None:
            raise job.error

    try:
        job.start()
        yield calls()
    finally:
        _end(pipeline, [job])


class Runs:
    """Runs of requests on one pipeline. Used on the thread that owns the pipeline."""

    def __init__(self, pipeline: LoadedPipeline, rendezvous: Rendezvous) -> None:
        self.pipeline = pipeline
        self.rendezvous = rendezvous

    def alone(self, params: GenerationParams) -> Recording:
        """Generate an image without any other request.

        Raises:
            ModelLoadError: the output of a denoiser is not finite.
            NotFinite: the image is not.
            Exception: what the pipeline raises.
        """
        job = self._job(params)
        calls: list[RecordedCall] = []
        with calls_of(self.pipeline, job) as parked:
            for call in parked:
                output = self.rendezvous.forward(call)
                if call.site in self.pipeline.denoisers:
                    if not is_finite(output):
                        raise ModelLoadError(
                            f"at start-up the output of {call.site} is NaN or infinite. Set "
                            "model.dtype to bfloat16 or float32, correct the model's "
                            "scheduler_config.json, or check its weights."
                        )
                    calls.append(_recorded(call, output))
                job.resume(output)
        image = _result(job)
        require_finite(image, params, self.pipeline.dtype)
        return Recording(tuple(calls), image)

    def first_calls(
        self,
        params: GenerationParams,
        sites: Sequence[str],
        images: int = 1,
        prompts: Sequence[str] = (),
    ) -> dict[str, RecordedCall]:
        """Return the first call of each of these denoisers, for several images of one prompt.

        With ``prompts``, for one image of each of them.
        """
        job = self._job(params, images, prompts)
        found: dict[str, RecordedCall] = {}
        with calls_of(self.pipeline, job) as calls:
            for call in calls:
                if found.keys() >= set(sites):
                    break
                output = self.rendezvous.forward(call)
                if call.site in self.pipeline.denoisers:
                    found.setdefault(call.site, _recorded(call, output))
                job.resume(output)
        return found

    def in_turns(
        self, requests: Sequence[GenerationParams], alone: Sequence[Recording]
    ) -> list[Tensor]:
        """Generate side by side, and return the images: each call of one is between two of others.

        Requests start one call after another. So their encodings overlap, their steps do, and
        their decodings do if they have equally many steps. A request that ends may undo a change
        that others still need. So the longest one makes its last but one denoiser call after
        another has ended, and its last one after all others have.

        Args:
            alone: Recordings of the same requests.
        """
        jobs = [self._job(params) for params in requests]
        left = [len(recording.calls) for recording in alone]
        longest = left.index(max(left))
        late = list(jobs)
        try:
            while late or any(job.call is not None for job in jobs):
                if late:
                    late.pop(0).start()
                for index, job in enumerate(jobs):
                    if (call := job.call) is None:
                        continue
                    if call.site in self.pipeline.denoisers:
                        ended = sum(other.finished for other in jobs)
                        due = {2: 1, 1: len(jobs) - 1}.get(left[index], 0)
                        if index == longest and ended < due:
                            continue
                        left[index] -= 1
                    job.resume(self.rendezvous.forward(call))
            return [_result(job) for job in jobs]
        finally:
            _end(self.pipeline, jobs)

    def together(
        self, specs: Mapping[str, BatchSpec], requests: Sequence[GenerationParams]
    ) -> list[Tensor]:
        """Generate with merged calls, and return the images.

        Each request is brought to its denoiser first. So it does not depend on the number of other
        calls whether two requests meet there.
        """
        jobs = [self._job(params) for params in requests]
        try:
            for job in jobs:
                job.start()
            while any(job.call is not None for job in jobs):
                for job in jobs:
                    self._bring_to_denoiser(job)
                self._step(specs, [job for job in jobs if job.call is not None])
            return [_result(job) for job in jobs]
        finally:
            _end(self.pipeline, jobs)

    def _bring_to_denoiser(self, job: Job[Tensor]) -> None:
        while job.call is not None and job.call.site not in self.pipeline.denoisers:
            job.resume(self.rendezvous.forward(job.call))

    def _step(self, specs: Mapping[str, BatchSpec], jobs: Sequence[Job[Tensor]]) -> None:
        """Answer one denoiser call of each job; those with equal keys are merged."""
        batches: dict[Any, list[tuple[Job[Tensor], MergeableCall]]] = {}
        for job in jobs:
            call = job.call
            assert call is not None
            prepared = prepare(specs, call)
            if prepared is None:
                job.resume(self.rendezvous.forward(call))
            else:
                batches.setdefault(prepared.key, []).append((job, prepared))
        for batch in batches.values():
            calls = [call for _, call in batch]
            spec = specs[calls[0].call.site]
            outputs = spec.split(self.rendezvous.forward(spec.merge(calls)), calls)
            for (job, _), output in zip(batch, outputs, strict=True):
                job.resume(output)

    def _job(
        self, params: GenerationParams, images: int = 1, prompts: Sequence[str] = ()
    ) -> Job[Tensor]:
        return Job(
            functools.partial(self.pipeline.generate, params, images=images, prompts=prompts)
        )


def _end(pipeline: LoadedPipeline, jobs: Sequence[Job[Tensor]]) -> None:
    for job in jobs:
        job.kill()
    pipeline.restore_networks()


def _recorded(call: Call, output: Any) -> RecordedCall:
    """Copy the tensors of a call and its output, because pipelines may write into them later."""
    copied = Call(
        call.site,
        map_tensors(Tensor.clone, call.args),
        map_tensors(Tensor.clone, call.kwargs),
    )
    return RecordedCall(copied, map_tensors(Tensor.clone, output))


def _result(job: Job[Tensor]) -> Tensor:
    if job.error is not None:
        raise job.error
    return job.result[0]
