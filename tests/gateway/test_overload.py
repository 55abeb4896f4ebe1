"""Overload on a simulated clock and device: admission, retry reservations, and client retries."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from serve_app.engine.admission import Deadline, DeadlineEstimate, decide_admission
from serve_app.engine.scheduling.cost import CostModel, Measurement, Size
from serve_app.engine.scheduling.forecast import Forecast, Work
from serve_app.engine.scheduling.load import LoadTracker
from serve_app.engine.scheduling.on_time import OnTime
from serve_app.engine.scheduling.policies import Yielding
from serve_app.engine.scheduling.queue import QueueEntry
from serve_app.errors import Overloaded
from serve_app.gateway.retry_reservations import RetryReservations
from serve_app.protocol.params import RequestContext
from tests.engine.scheduling.simulated_device import MeasuredCosts

LIMIT_S = 30.0

KINDS: dict[Size, tuple[int, float, float]] = {
    (512, 512): (20, 0.15, 0.010),
    (768, 768): (20, 0.25, 0.020),
    (1024, 1024): (25, 0.45, 0.035),
    (1536, 1536): (35, 0.15, 0.080),
}
"""vLLM-Omni's mix by size: steps, share of requests, seconds of a call for one image."""


@dataclass(eq=False)
class Sent:
    """A request and its outcome; ``deadline_s`` counts from its last sending."""

    name: bytes
    size: Size
    sent_at: float
    deadline_s: float | None
    is_retry: bool = False
    retry_after_s: float | None = None
    """Retry time of its first rejection."""
    rejections: int = 0
    done_at: float | None = None
    calls: int = 0
    entry: QueueEntry = field(default_factory=lambda: QueueEntry(0, 0.0, 0.0))

    @property
    def in_time(self) -> bool:
        if self.done_at is None:
            return False
        return self.deadline_s is None or self.took_s <= self.deadline_s

    @property
    def took_s(self) -> float:
        assert self.done_at is not None
        return self.done_at - self.sent_at


class Server:
    """One engine, which admits and schedules like `Engine`, and one gateway.

    Calls take their predicted time, with noise.
    """

    def __init__(self, gain: float, noise: float, seed: int) -> None:
        self.now = 0.0
        self._rng = Random(seed)
        self._noise = noise
        self.cost = CostModel(max_batch_size=16)
        for size, (_, _, call_s) in KINDS.items():
            # A batch of many takes 1 / gain of what its requests take one by one.
            calls = {n: call_s * (1 - 1 / gain + n / gain) for n in (1, 2, 4, 8, 16)}
            self.cost.measured(size, Measurement(calls, encode_s=0.01, decode_s=2 * call_s))
        self._policy = Yielding(OnTime())
        self._forecast = Forecast(self.cost)
        self.load = LoadTracker()
        self._reservations = RetryReservations(lambda: self.now)
        self._inside: dict[int, Sent] = {}
        self._predicted: dict[int, tuple[float, float]] = {}
        self._numbers = itertools.count()

    def solo_s(self, size: Size) -> float:
        steps = KINDS[size][0]
        decode_s = self.cost.predict_decode(size)
        return self.cost.predict_encode(size) + self.cost.predict_steps(size, steps) + decode_s

    def send(self, sent: Sent) -> float | None:
        """Submit a request; return ``None``, or the retry time if it is rejected."""
        sent.is_retry = self._reservations.redeem(sent.name)
        within_s = min(LIMIT_S, sent.deadline_s or LIMIT_S)
        reserved_s = 0.0 if sent.is_retry else self._reservations.due_within_s(within_s)
        solo_s = self.solo_s(sent.size)
        wanted_s = sent.deadline_s or 3 * solo_s
        sent.entry = entry = QueueEntry(
            next(self._numbers),
            self.now + wanted_s,
            solo_s,
            sent.size,
            named=sent.deadline_s is not None,
            arrived_at=self.now,
        )
        can_be_late = {other for other in self._inside.values() if other.entry.late}
        queued_work_s = sum(other.entry.remaining_s for other in self._inside.values())
        queued_work_s /= self.load.throughput()
        sent.calls = KINDS[sent.size][0]
        self._inside[entry.request] = sent
        self._policy.add(entry)
        order = [self._inside[other.request] for other in self._policy.order(self.now)]
        finish_s = self._forecast.predict_all_s([self._work(other) for other in order])
        index = order.index(sent)
        estimates = [
            DeadlineEstimate(finish, other.entry.deadline_at - self.now)
            for other, finish in zip(order[index:], finish_s[index:], strict=True)
            if other.deadline_s is not None and other not in can_be_late
        ]
        own = None
        if sent.deadline_s is not None:
            own = Deadline(sent.deadline_s, solo_s, estimates.pop(0))
        context = RequestContext(is_retry=sent.is_retry, reserved_s=reserved_s)
        rejection = decide_admission(queued_work_s, LIMIT_S, context, own, estimates)
        if rejection is not None:
            self._policy.drop(entry)
            del self._inside[entry.request]
            work_s = solo_s / self.load.throughput()
            error = Overloaded("full.", None, max(1.0, rejection.excess_s), work_s)
            return self._reservations.reserve(sent.name, error, sent.is_retry).retry_after_s
        self.load.accepted(self.now, solo_s, False)
        self._predicted[entry.request] = (self.now, finish_s[index])
        entry.step_s = self.cost.predict_call(sent.size)
        self._policy.park(entry)
        return None

    def _work(self, sent: Sent) -> Work:
        fresh = sent.calls == KINDS[sent.size][0]
        encode_s = self.cost.predict_encode(sent.size) if fresh else 0.0
        decode_s = self.cost.predict_decode(sent.size)
        return Work(sent.size, sent.size, 1.0, sent.calls, encode_s, decode_s)

    def step(self, until: float) -> None:
        """Run one denoiser call, or wait until then if there is none."""
        chosen = self._policy.choose(self.now, MeasuredCosts(self.cost))
        if not chosen:
            self.now = until
            return
        size = self._inside[chosen[0].request].size
        noise = self._rng.uniform(1 - self._noise, 1 + self._noise)
        call_s = self.cost.predict_call(size, len(chosen)) * noise
        self.load.called(len(chosen) * self.cost.predict_call(size), call_s)
        self.now += call_s
        for entry in chosen:
            sent = self._inside[entry.request]
            if sent.calls == KINDS[size][0]:
                self.now += self.cost.predict_encode(size)
            sent.calls -= 1
            before_s = entry.remaining_s
            if sent.calls:
                steps_s = self.cost.predict_steps(size, sent.calls)
                entry.remaining_s = steps_s + self.cost.predict_decode(size)
                self.load.update_remaining(self.now, before_s, entry.remaining_s, False)
                self._policy.park(entry)
                continue
            self.now += self.cost.predict_decode(size)
            self.load.ended(self.now, before_s, False)
            self._policy.drop(entry)
            del self._inside[entry.request]
            sent.done_at = self.now
            at, predicted_s = self._predicted.pop(entry.request)
            self._forecast.observe(predicted_s, self.now - at)

    @property
    def idle(self) -> bool:
        return not self._inside


def overload(
    load: float,
    seconds: float = 120.0,
    deadlines: bool = True,
    polite: float = 1.0,
    gain: float = 1.6,
    noise: float = 0.15,
    seed: int = 1,
) -> tuple[Server, list[Sent]]:
    """Simulate Poisson arrivals until all requests are done.

    ``polite``: share of the rejected requests that return after their retry time.
    """
    server = Server(gain, noise, seed)
    rng = Random(seed)
    mean_s = sum(share * server.solo_s(size) for size, (_, share, _) in KINDS.items())
    at = 0.0
    coming: list[tuple[float, int, Sent]] = []
    requests = []
    for number in itertools.count():
        at += rng.expovariate(load / mean_s)
        if at > seconds:
            break
        [size] = rng.choices(list(KINDS), [share for _, share, _ in KINDS.values()])
        deadline_s = 3 * server.solo_s(size) if deadlines else None
        requests.append(Sent(b"%d" % number, size, at, deadline_s))
        coming.append((at, number, requests[-1]))
    heapq.heapify(coming)
    while coming or not server.idle:
        while coming and coming[0][0] <= server.now:
            at, number, sent = heapq.heappop(coming)
            sent.sent_at = at
            retry_after_s = server.send(sent)
            if retry_after_s is None:
                continue
            sent.rejections += 1
            sent.retry_after_s = sent.retry_after_s or retry_after_s
            if rng.random() < polite and sent.rejections < 2:
                heapq.heappush(coming, (server.now + retry_after_s, number, sent))
        server.step(coming[0][0] if coming else server.now)
    return server, requests


def goodput(requests: list[Sent], seconds: float = 120.0) -> float:
    """Return the images that were done in time, per second."""
    return sum(one.in_time and (one.done_at or 0.0) <= seconds for one in requests) / seconds


def rejected(requests: list[Sent]) -> list[Sent]:
    return [one for one in requests if one.rejections]


def test_goodput_stays_at_its_peak_and_retries_find_room(report: Callable[[str], None]) -> None:
    peak = max(goodput(overload(load, seed=2)[1]) for load in (0.9, 1.0, 1.1))
    _, requests = overload(3.0, seed=2)
    retried = rejected(requests)
    kept = sum(one.done_at is not None for one in retried) / len(retried)
    in_time = sum(one.in_time for one in retried) / len(retried)
    ratios = sorted(one.took_s / (one.deadline_s or 1.0) for one in requests)
    report(
        f"simulated, three times overloaded: goodput {goodput(requests) / peak:.0%} of its peak, "
        f"{len(retried) / len(requests):.0%} rejected; of the retries, {kept:.0%} were admitted "
        f"and {in_time:.0%} done in time"
    )
    assert goodput(requests) > 0.9 * peak
    assert kept == 1.0
    assert in_time > 0.8
    assert ratios[int(0.95 * len(ratios))] < 1.2
    assert ratios[-1] < 6


def test_without_deadlines_the_backlog_is_bounded_and_retries_find_room() -> None:
    _, requests = overload(3.0, deadlines=False)
    assert all(one.done_at is not None for one in requests)
    assert len(rejected(requests)) > len(requests) / 2


@pytest.mark.parametrize("polite", [0.0, 0.3])
def test_clients_that_do_not_return_cost_the_others_no_capacity(polite: float) -> None:
    """Their reservations do not lengthen the retry times without bound either."""
    server, requests = overload(3.0, seconds=300.0, polite=polite)
    work_s = sum(server.solo_s(one.size) for one in requests if one.in_time)
    assert work_s / server.now > 0.75
    waits_s = [one.retry_after_s or 0.0 for one in rejected(requests)]
    assert max(waits_s) < 300 * polite + 60
    returned = [one for one in rejected(requests) if one.done_at is not None]
    assert len(returned) == pytest.approx(polite * len(waits_s), rel=0.3)


def test_hardly_any_request_is_rejected_while_there_is_capacity() -> None:
    _, requests = overload(0.3)
    assert len(rejected(requests)) <= 0.05 * len(requests)
    assert sum(one.in_time for one in requests) >= 0.97 * len(requests)
