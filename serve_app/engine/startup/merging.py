"""The check of merged calls: no row depends on its neighbours, and each is what it is alone.

Whole images cannot show this. In bfloat16 they differ visibly by the choice of kernels alone, and
a tolerance that allows for it would hide rows that mix. Single calls can: a row beside other
neighbours, in a batch of the same shapes, runs through the same kernels. So it must be the same
bit for bit.
"""

import functools
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from serve_app.engine.batching.axis import NotMergeable
from serve_app.engine.batching.batch import BatchSpec, MergeableCall, prepare
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.device import MemoryMeter, free_memory, is_out_of_memory, release
from serve_app.engine.startup.comparison import is_constant, relative_l2
from serve_app.engine.startup.memory import MemoryTrend
from serve_app.engine.startup.runs import RecordedCall, Recording

ROUNDING = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative L2 distance, between a call alone and merged, that rounding explains.

A GPU picks other kernels for other batch sizes, and these add in another order.
"""


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative L2 distance that rounding explains on this device.

    A GPU may round the inputs of float32 kernels to TF32, which has as many bits as float16.
    """
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if dtype == torch.float32 and device.type == "cuda" and tf32:
        return ROUNDING[torch.float16]
    return ROUNDING.get(dtype, ROUNDING[torch.float32])


MOST_POSITIONS = 4
"""Positions along the trajectory at which pairs of requests are merged."""


@dataclass(frozen=True)
class Deviation:
    """The largest deviations of the rows of merged calls, as relative L2 distances."""

    neighbours: float = 0.0
    """Between a row and the same row with other neighbours; 0 if bit-equal, or if a repetition
    explains it."""
    repetition: float = 0.0
    """Between two runs of the same merged call; 0 for deterministic kernels."""
    batching: float = 0.0
    """Between a call alone and its row in a merged call."""
    batch_size: int = 1
    """Largest number of merged calls that fitted into memory."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Deviation":
        """Read the result of ``dataclasses.asdict``.

        Raises:
            ValueError, TypeError: ``value`` is not such a result.
        """
        found = cls(**value)
        numbers = (found.neighbours, found.repetition, found.batching)
        if not all(isinstance(number, float) for number in numbers):
            raise TypeError(f"deviations of {numbers}")
        if not isinstance(found.batch_size, int) or found.batch_size < 1:
            raise ValueError(f"a batch size of {found.batch_size!r}")
        return found

    def __or__(self, other: "Deviation") -> "Deviation":
        return Deviation(
            _larger(self.neighbours, other.neighbours),
            _larger(self.repetition, other.repetition),
            _larger(self.batching, other.batching),
            max(self.batch_size, other.batch_size),
        )

    def reason(self, tolerance: float) -> str:
        """Return why calls must not be merged; an empty text if they may."""
        if self.neighbours != 0:  # also for NaN
            return f"a row depends on its neighbours: it changes by {self.neighbours:.2g}"
        if not self.batching <= tolerance:
            return (
                f"a merged call differs from a single one by {self.batching:.2g}, more than "
                f"{tolerance:.2g}"
            )
        return ""


def _larger(one: float, two: float) -> float:
    """Return the larger number, or NaN if one of them is."""
    return two if two > one or two != two else one


@dataclass(frozen=True)
class _Single:
    """A call of one request alone, ready to be merged."""

    request: int
    call: MergeableCall
    recorded: RecordedCall


class MergingCheck:
    """Merges recorded calls of different requests, and compares the rows."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        specs: Mapping[str, BatchSpec],
        meter: MemoryMeter | None = None,
    ) -> None:
        """Prepare; with a ``meter``, no batch is tried that smaller ones rule out."""
        self._rendezvous = rendezvous
        self._specs = specs
        self._meter = meter

    def compare(self, recordings: Sequence[Recording], max_batch_size: int = 2) -> Deviation:
        """Merge pairs of calls along the trajectory, and once 3, 4, 8, … ``max_batch_size``.

        A single recording is merged with itself.

        Raises:
            NotMergeable: the calls of a denoiser never fit together, or prove nothing.
            Exception: what the network raises for merged calls, such as a lack of memory for two.
        """
        found = Deviation()
        fewest = min(2, len(recordings))
        groups = [
            group for group in self._groups(recordings).values() if _requests_in(group) >= fewest
        ]
        for site in self._specs:
            of_site = [group for group in groups if group[0].call.call.site == site]
            if not of_site:
                raise NotMergeable(f"no two calls of {site} from different requests fit together")
            if not any(_requests_in(alike) >= fewest for alike in _alike(of_site)):
                raise NotMergeable(f"calls of {site} from different requests differ in their rows")
            for group in of_site:
                found |= self._compare_group(group)
            # Large batches are slow, so they are merged once.
            found |= self._compare_sizes(max(of_site, key=len), max_batch_size)
        return found

    def _groups(self, recordings: Sequence[Recording]) -> dict[Hashable, list[_Single]]:
        """Return the calls by the key of their merge, in the order of the steps."""
        found: dict[Hashable, list[_Single]] = {}
        rows = itertools.zip_longest(*(recording.calls for recording in recordings))
        for row in rows:
            for request, recorded in enumerate(row):
                if recorded is None or recorded.call.site not in self._specs:
                    continue
                if is_constant(recorded.output):
                    raise NotMergeable(
                        f"the output of {recorded.call.site} is constant, which proves nothing"
                    )
                call = prepare(self._specs, recorded.call)
                if call is None:  # it has other arguments, so it always runs alone
                    continue
                found.setdefault(call.key, []).append(_Single(request, call, recorded))
        return found

    def _compare_group(self, group: list[_Single]) -> Deviation:
        """Merge pairs of requests, and all requests where they differ in rows."""
        found = self._compare_padded(group)
        by_length = _by_length(group)
        for alike in by_length.values():
            for pair in _pairs(alike):
                found |= self._compare_rows(pair, range(len(pair)))
        if len(by_length) > 1:
            mixed = [alike[-1] for alike in by_length.values()]
            found |= self._compare_rows(mixed) | self._compare_rows(mixed[::-1])
        return found

    def _compare_padded(self, group: list[_Single]) -> Deviation:
        """Pad the first call of each request to its bucket, as for a compiled network."""
        found = Deviation()
        spec = self._specs[group[0].call.call.site]
        for single in {single.request: single for single in reversed(group)}.values():
            if (length := spec.bucket([single.call])) is not None:
                output = self._rendezvous.forward(spec.merge([single.call], length))
                found |= Deviation(batching=relative_l2(single.recorded.output, output))
        return found

    def _compare_sizes(self, group: list[_Single], max_batch_size: int) -> Deviation:
        """Merge calls in batches of 3, 4, 8 and so on, as far as memory allows."""
        found = Deviation()
        alike = max(_by_length(group).values(), key=len)
        trend = MemoryTrend(self._meter)

        def first(size: int) -> list[_Single]:
            return list(itertools.islice(itertools.cycle(alike), size))

        for size in (1, 2) if self._meter is not None else ():
            trend.run(size, functools.partial(self._merged, first(size)))
        for wanted in _sizes(max_batch_size):
            size = trend.fitting(wanted)
            if size <= found.batch_size or size < 3:
                break
            compare = functools.partial(self._compare_rows, first(size), [size - 1])
            try:
                found |= trend.run(size, compare)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                release(error)
                free_memory()
                break
            if size < wanted:
                break
        return found

    def _compare_rows(self, batch: Sequence[_Single], controlled: Sequence[int] = ()) -> Deviation:
        """Merge a batch, and compare each row with its call alone.

        Also compare the rows at the positions ``controlled`` with those of a batch that has nothing
        but copies of the same call, with prompts as long as those of the batch.
        """
        merged = self._merged(batch)
        spec = self._specs[batch[0].call.call.site]
        found = Deviation(batch_size=len(batch))
        for single, output in zip(batch, merged, strict=True):
            found |= Deviation(batching=relative_l2(single.recorded.output, output))
        for position in controlled:
            one = batch[position]
            copies = [replace(one, call=spec.resized(one.call, other.call)) for other in batch]
            control = self._merged(copies)
            for index, single in enumerate(batch):
                if single is batch[position]:
                    found |= self._compare_neighbours(copies, index, control[index], merged[index])
        return found

    def _compare_neighbours(
        self, copies: Sequence[_Single], index: int, control: object, output: object
    ) -> Deviation:
        """Compare a row with the same one beside copies, and if they differ, that with itself."""
        distance = relative_l2(control, output)
        if distance == 0:
            return Deviation()
        repeated = [self._merged(copies)[index] for _ in range(2)]
        repetition = max(relative_l2(control, again) for again in repeated)
        # Judged here: the noise of one network must not excuse another one.
        return Deviation(0.0 if distance <= 2 * repetition else distance, repetition)

    def _merged(self, batch: Sequence[_Single]) -> list[object]:
        calls = [single.call for single in batch]
        spec = self._specs[calls[0].call.site]
        return spec.split(self._rendezvous.forward(spec.merge(calls)), calls)


def _requests_in(calls: Sequence[_Single]) -> int:
    return len({single.request for single in calls})


def _alike(groups: Sequence[list[_Single]]) -> Iterator[list[_Single]]:
    """Yield the calls that differ in nothing but values, group by group."""
    for group in groups:
        yield from _by_length(group).values()


def _by_length(group: list[_Single]) -> dict[Fraction, list[_Single]]:
    """Return the calls by their number of rows, which depends on guidance."""
    lengths: dict[Fraction, list[_Single]] = {}
    for single in group:
        lengths.setdefault(single.call.length, []).append(single)
    return lengths


def _pairs(alike: Sequence[_Single]) -> Iterator[tuple[_Single, _Single]]:
    """Yield pairs of calls of two requests along the trajectory; of one request a single pair.

    The request that comes first changes from pair to pair.
    """
    by_request: dict[int, list[_Single]] = {}
    for single in alike:
        by_request.setdefault(single.request, []).append(single)
    if len(by_request) == 1:
        yield alike[0], alike[min(1, len(alike) - 1)]
        return
    calls = list(by_request.values())
    for step in _spread(max(map(len, calls))):
        one, two = calls[step % len(calls)], calls[(step + 1) % len(calls)]
        # A request that has ended takes part with its last call.
        yield one[min(step, len(one) - 1)], two[min(step, len(two) - 1)]


def _spread(steps: int) -> Sequence[int]:
    """Return at most `MOST_POSITIONS` positions, with the first and the last one."""
    if steps <= MOST_POSITIONS:
        return range(steps)
    return [(steps - 1) * index // (MOST_POSITIONS - 1) for index in range(MOST_POSITIONS)]


def _sizes(max_batch_size: int) -> Iterator[int]:
    """Yield 3, because networks may count in thirds, then 4, 8, … and the largest batch size."""
    if max_batch_size > 3:
        yield 3
    size = 4
    while size < max_batch_size:
        yield size
        size *= 2
    if max_batch_size > 2:
        yield max_batch_size
