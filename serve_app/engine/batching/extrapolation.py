"""Answers to denoiser calls without the denoiser: extrapolation from a request's earlier outputs.

Along a trajectory, the outputs of a denoiser bend slowly with the timestep. So some calls need not
be made: a line through the last two outputs is close enough. Every call that is made shows how far
off a line was, and from that follows how far off the next one would be. A step whose predicted
error exceeds a threshold makes its calls.

That one rule is safe for all noise schedulers. One that adds noise at each step, or that returns to
an earlier timestep, shows large errors or no line, and its calls are made.

Pure arithmetic with tensors: no pipeline, no queue, no clock.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.batching.axis import map_tensors, tensors
from serve_app.engine.batching.rendezvous import Call
from serve_app.engine.batching.transfers import Reading

MOST_IN_A_ROW = 3
"""Most steps without a call between two steps with calls."""

Place = tuple[str, int]
"""A site, and the number of the call among those of the site in one step."""


class History:
    """The last outputs at one place of a step, and the line through them.

    Holds two copies of the output, and the arguments that do not change from step to step.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[float, Any]] = []  # with their timesteps, the last one at the end
        # Errors of lines, per product of distances: of the last call, and of the one before.
        self._bends: deque[Reading] = deque(maxlen=2)
        self._arguments = 0  # tensors among the arguments
        self._constant: dict[int, Tensor] = {}  # those that were the same object in each call

    def add(self, timestep: float, call: Call, output: Any) -> None:
        """Add the output of a call that was made. The history begins anew if the call is unlike."""
        arguments = dict(enumerate(_tensors_of(call)))
        if len(self._outputs) == 1:  # the first call could not tell which ones are constant
            same = {i: one for i, one in self._constant.items() if arguments.get(i) is one}
            self._constant = same
        if not self._outputs or not self._is_like(arguments) or self._reshaped(output):
            self._outputs = [(timestep, output)]
            self._bends.clear()
            self._arguments, self._constant = len(arguments), arguments
            return
        if area := self._area(timestep):
            self._bends.append(Reading(_difference(self.at(timestep), output) / area))
        else:
            self._bends.clear()
        self._outputs = [self._outputs[-1], (timestep, output)]

    def _reshaped(self, output: Any) -> bool:
        return _shapes(output) != _shapes(self._outputs[-1][1])

    def _is_like(self, arguments: Mapping[int, Tensor]) -> bool:
        """Return whether a call has the meaning of those before.

        Pipelines may leave out guidance in some steps. Then another call is at this place: one with
        another prompt.
        """
        constant = self._constant.items()
        return len(arguments) == self._arguments and all(arguments[i] is one for i, one in constant)

    def _area(self, timestep: float) -> float:
        """Return the product of the distances to the last two timesteps, with which errors grow.

        It is 0 without a line: there is none to timesteps that do not go on in one direction.
        """
        if len(self._outputs) < 2:
            return 0.0
        (before, _), (last, _) = self._outputs
        goes_on = (timestep - last) * (last - before) > 0
        return (timestep - last) * (timestep - before) if goes_on else 0.0

    @property
    def _is_known(self) -> bool:
        return len(self._bends) == 2

    def error_at(self, timestep: float) -> float:
        """Predict the relative error of an answer at ``timestep``; infinite while unknown.

        It follows from the call before the last one. The device may be about to run the last one,
        and would have nothing to do after it while the host waits for its output.
        """
        area = self._area(timestep)
        if not area or not self._is_known:
            return math.inf
        error = self._bends[0].value() * area
        return math.inf if math.isnan(error) else error

    def answers(self, call: Call) -> bool:
        """Return whether `at` may answer this call."""
        return self._is_known and self._is_like(dict(enumerate(_tensors_of(call))))

    def at(self, timestep: float) -> Any:
        """Return the output at ``timestep``, on the line through the last two."""
        (before, older), (last, newer) = self._outputs
        weight = (timestep - last) / (last - before)
        ends = zip(tensors(older), tensors(newer), strict=True)
        return map_tensors(lambda _: _on_line(*next(ends), weight), newer)

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs that it holds."""
        return sum(tensor.nbytes for _, output in self._outputs for tensor in tensors(output))


class Extrapolator:
    """Answers some denoiser calls of one request. Used inside its job.

    A place is the number of a call of one site in its step: guidance may have a call of its own.
    The calls of a step are answered together, if they are like those of the steps before. The first
    four steps and the last one make their calls.

    Attributes:
        answered: calls that were answered without the denoiser.
    """

    answered: int

    def __init__(self, most_error: float, sites: Collection[str]) -> None:
        """Answer calls of ``sites`` with a predicted relative error of at most ``most_error``."""
        self.answered = 0
        self._most_error = most_error
        self._sites = sites
        self._histories: dict[Place, History] = defaultdict(History)
        self._step = _Step()
        self._last_places: list[Place] = []
        self._in_a_row = 0
        self._index = -1  # of the last timestep
        self._timestep: float | None = None  # of this step; unknown in the first and the last one

    def answer(self, call: Call, make: Callable[[Call], Any]) -> Any:
        """Return the output of ``call``: from ``make``, or extrapolated."""
        if call.site not in self._sites:
            return make(call)
        step = self._step
        if not step.places:
            step.extrapolates = self._may_extrapolate()
        place = call.site, sum(site == call.site for site, _ in step.places)
        step.places.append(place)
        history = self._histories[place]
        if step.extrapolates and self._timestep is not None and history.answers(call):
            self.answered += 1
            step.answered = True
            return history.at(self._timestep)
        output = make(call)
        # A copy: a share of a batch would keep the whole batch, and pipelines may write into it.
        step.made.append((place, call, map_tensors(Tensor.clone, output)))
        return output

    def _may_extrapolate(self) -> bool:
        timestep = self._timestep
        if timestep is None or self._in_a_row >= MOST_IN_A_ROW:
            return False
        histories = [self._histories[place] for place in self._last_places]
        return all(one.error_at(timestep) <= self._most_error for one in histories)

    def stepped(self, timestep: float, timesteps: Sequence[float]) -> None:
        """Note that the noise scheduler has made the step at ``timestep``, one of ``timesteps``."""
        step, self._step = self._step, _Step()
        if not step.places:
            return  # a copy of the noise scheduler has made the same step for other latents
        for place, call, output in step.made:
            self._histories[place].add(timestep, call, output)
        self._last_places = step.places
        self._in_a_row = self._in_a_row + 1 if step.answered else 0
        following = range(self._index + 1, len(timesteps))
        index = next((i for i in following if timesteps[i] == timestep), None)
        self._timestep = None
        if index is not None:
            self._index = index
            if index + 2 < len(timesteps):
                self._timestep = timesteps[index + 1]

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs that it holds: two for each call of a step, and no more."""
        made = sum(one.nbytes for _, _, output in self._step.made for one in tensors(output))
        return made + sum(history.nbytes for history in self._histories.values())


@dataclass
class _Step:
    """The calls since the last step of the noise scheduler."""

    places: list[Place] = field(default_factory=list)
    made: list[tuple[Place, Call, Any]] = field(default_factory=list)
    extrapolates: bool = False
    answered: bool = False


def _tensors_of(call: Call) -> Iterator[Tensor]:
    return tensors((call.args, call.kwargs))


def _shapes(output: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors(output)]


def _on_line(older: Tensor, newer: Tensor, weight: float) -> Tensor:
    if not newer.is_floating_point():
        return newer
    # In 32 bits: the difference of two outputs in 16 bits has few digits.
    last = newer.float()
    return (last + weight * (last - older.float())).to(newer.dtype)


def _difference(one: Any, two: Any) -> Tensor:
    """Return the norm of the difference, as a share of the norm of ``two``; stays on the device."""
    pairs = [(a.float(), b.float()) for a, b in zip(tensors(one), tensors(two), strict=True)]
    apart = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return (apart / torch.stack([b.square().sum() for _, b in pairs]).sum()).sqrt()
