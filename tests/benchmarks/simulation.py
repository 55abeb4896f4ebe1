"""One engine in simulated time, step by step: the costs of a device, and loads for it."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from serve_app.engine.scheduling.batch_costs import BatchCosts
from serve_app.engine.scheduling.cost import CostModel, Measurement, Size
from serve_app.engine.scheduling.queue import Policy, QueueEntry

MAX_RUNNING = 32
SLO_SCALE = 3.0

PAUSE_S = 0.012
"""Time from an answer to the next request of the same client."""


@dataclass(frozen=True)
class Kind:
    """Requests of one size and step count."""

    size: Size
    steps: int
    share: float


@dataclass(frozen=True)
class Arrival:
    at_s: float
    kind: Kind
    client: int = 0


@dataclass(frozen=True)
class Done:
    """A request that is done."""

    kind: Kind
    latency_s: float
    solo_s: float

    @property
    def in_time(self) -> bool:
        return self.latency_s <= SLO_SCALE * self.solo_s


@dataclass
class Run:
    """What became of a load."""

    done: list[Done] = field(default_factory=list)
    window: int = 0
    """Requests that were done when the last one was sent."""
    window_s: float = 0.0
    """The time until then."""
    took_s: float = 0.0
    calls: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Device:
    """Costs of calls, by size."""

    cost: CostModel

    @classmethod
    def of(cls, sizes: dict[Size, Measurement], between_s: float, most: int = 16) -> "Device":
        cost = CostModel(most)
        for size, measurement in sizes.items():
            cost.measured(size, measurement)
            cost.caps[size] = most
            cost.between_s[size] = between_s
        return cls(cost)

    def call_s(self, kind: Kind, count: int) -> float:
        return self.cost.batches(kind.size).call_s[count - 1]

    def encode_s(self, kind: Kind) -> float:
        return self.cost.predict_encode(kind.size)

    def decode_s(self, kind: Kind) -> float:
        return self.cost.predict_decode(kind.size)

    def solo_s(self, kind: Kind) -> float:
        return self.encode_s(kind) + kind.steps * self.call_s(kind, 1) + self.decode_s(kind)

    def capacity(self, kinds: Sequence[Kind]) -> float:
        """Return the images per second of the kinds, one request at a time."""
        return 1 / sum(kind.share * self.solo_s(kind) for kind in kinds)


class Load:
    """Arrivals that do not wait for answers, or clients that do."""

    def __init__(self, arrivals: Sequence[Arrival], clients: int = 0) -> None:
        """With ``clients``, each sends the next of ``arrivals`` once it has its answer."""
        self._later = list(reversed(arrivals))
        self._coming: list[tuple[float, int, Arrival]] = []
        self._order = itertools.count()
        for _ in range(clients or len(arrivals)):
            self._push(self._later.pop())

    def _push(self, arrival: Arrival) -> None:
        heapq.heappush(self._coming, (arrival.at_s, next(self._order), arrival))

    @property
    def next_at(self) -> float:
        return self._coming[0][0] if self._coming else math.inf

    def until(self, now: float) -> Iterator[Arrival]:
        while self._coming and self._coming[0][0] <= now:
            yield heapq.heappop(self._coming)[2]

    def answered(self, now: float) -> None:
        if self._later:
            self._push(Arrival(now + PAUSE_S, self._later.pop().kind))

    @property
    def all_sent(self) -> bool:
        return not (self._later or self._coming)


def poisson(kinds: Sequence[Kind], rate: float, count: int, seed: int) -> list[Arrival]:
    """Draw arrivals at ``rate`` per second."""
    rng, at_s, arrivals = Random(seed), 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        [kind] = rng.choices(kinds, [kind.share for kind in kinds])
        arrivals.append(Arrival(at_s, kind))
    return arrivals


@dataclass
class _Request:
    arrival: Arrival
    entry: QueueEntry
    steps_left: int


class Engine:
    """A policy on a device, as the real engine uses it: running and waiting requests."""

    def __init__(self, device: Device, policy: Policy) -> None:
        self._device = device
        self._policy = policy
        self._here: dict[int, _Request] = {}
        self._waiting: list[_Request] = []
        self.now = 0.0

    def cap(self, entry: QueueEntry, within_s: float = math.inf) -> int:
        return self.batches(entry).within(within_s)

    def batches(self, entry: QueueEntry) -> BatchCosts:
        return self._device.cost.batches(self._here[entry.request].arrival.kind.size)

    def run(self, load: Load) -> Run:
        """Run until every request is done."""
        result, numbers = Run(), itertools.count()
        while self._here or load.next_at < math.inf:
            if not self._here:
                self.now = max(self.now, load.next_at)
            for arrival in load.until(self.now):
                self._arrive(next(numbers), arrival)
            if load.all_sent and not result.window:
                result.window, result.window_s = len(result.done), self.now
            for request in self._step(result):
                kind = request.arrival.kind
                latency_s = self.now - request.arrival.at_s
                result.done.append(Done(kind, latency_s, self._device.solo_s(kind)))
                load.answered(self.now)
        result.took_s = self.now
        return result

    def _arrive(self, number: int, arrival: Arrival) -> None:
        solo_s = self._device.solo_s(arrival.kind)
        due_at = arrival.at_s + SLO_SCALE * solo_s
        entry = QueueEntry(number, due_at, solo_s, arrived_at=arrival.at_s)
        self._here[number] = _Request(arrival, entry, arrival.kind.steps)
        self._policy.add(entry)
        self._waiting.append(self._here[number])

    def _start(self) -> None:
        while self._waiting and len(self._here) - len(self._waiting) < MAX_RUNNING:
            by_entry = {request.entry: request for request in self._waiting}
            request = by_entry[self._policy.first(list(by_entry), self.now)]
            self._waiting.remove(request)
            self.now += self._device.encode_s(request.arrival.kind)
            self._park(request)

    def _park(self, request: _Request) -> None:
        entry, kind = request.entry, request.arrival.kind
        entry.key, entry.step_s = kind.size, self._device.call_s(kind, 1)
        entry.remaining_s = request.steps_left * entry.step_s + self._device.decode_s(kind)
        self._policy.park(entry)

    def _step(self, result: Run) -> Iterator[_Request]:
        """Run one call; yield each request that it finishes, once its image is decoded."""
        self._start()
        batch = [self._here[entry.request] for entry in self._policy.choose(self.now, self)]
        self.now += self._device.call_s(batch[0].arrival.kind, len(batch))
        result.calls += 1
        result.rows += len(batch)
        for request in batch:
            request.steps_left -= 1
            if request.steps_left:
                self._park(request)
                continue
            self.now += self._device.decode_s(request.arrival.kind)
            self._policy.drop(request.entry)
            del self._here[request.entry.request]
            yield request


def whole_batches(device: Device, load: Load, most: int) -> Run:
    """Serve whole requests: the oldest, with others of its kind, up to ``most``."""
    result, now = Run(), 0.0
    waiting: list[Arrival] = []
    while waiting or load.next_at < math.inf:
        if not waiting:
            now = max(now, load.next_at)
        waiting += load.until(now)
        if load.all_sent and not result.window:
            result.window, result.window_s = len(result.done), now
        kind = waiting[0].kind
        batch = [arrival for arrival in waiting if arrival.kind is kind][:most]
        waiting = [arrival for arrival in waiting if arrival not in batch]
        call_s = device.cost.predict_call(kind.size, len(batch)) + device.cost.predict_between(
            kind.size
        )
        now += device.encode_s(kind) + kind.steps * call_s + len(batch) * device.decode_s(kind)
        for arrival in batch:
            result.done.append(Done(kind, now - arrival.at_s, device.solo_s(kind)))
            load.answered(now)
    result.took_s = now
    return result


Serve = Callable[[Device, Load], Run]
