"""Overload on a clock and a device of their own: admission, promises, and clients that obey."""

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
from serve_app.engine.scheduling.policies import OnTime, QueueEntry, Yielding
from serve_app.errors import Overloaded
from serve_app.gateway.retry_reservations import RetryReservations
from serve_app.protocol.params import RequestContext

LIMIT_S = 30.0

KINDS: dict[Size, tuple[int, float, float]] = {
    (512, 512): (20, 0.15, 0.010),
    (768, 768): (20, 0.25, 0.020),
    (1024, 1024): (25, 0.45, 0.035),
    (1536, 1536): (35, 0.15, 0.080),
}
"""vLLM-Omni's mix: steps, share, seconds of a call alone."""


@dataclass(eq=False)
class Sent:
    """A request and what became of it; ``deadline_s`` counts from its last sending."""

    name: bytes
    size: Size
    sent_at: float
    deadline_s: float | None
    is_retry: bool = False
    told_s: float | None = None
    refusals: int = 0
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
    """One engine as `Engine` does it, and one gateway; steps take what they take, give or take."""

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
        self.demand = LoadTracker()
        self._reservations = RetryReservations(lambda: self.now)
        self._inside: dict[int, Sent] = {}
        self._predicted: dict[int, tuple[float, float]] = {}
        self._numbers = itertools.count()

    def solo_s(self, size: Size) -> float:
        steps = KINDS[size][0]
        decode_s = self.cost.predict_decode(size)
        return self.cost.predict_encode(size) + self.cost.predict_steps(size, steps) + decode_s

    def send(self, sent: Sent) -> float | None:
        """``None``, or the seconds after which to come again."""
        sent.is_retry = self._reservations.redeem(sent.name)
        within_s = min(LIMIT_S, sent.deadline_s or LIMIT_S)
        reserved_s = 0.0 if sent.is_retry else self._reservations.due_within_s(within_s)
        solo_s = self.solo_s(sent.size)
        wanted_s = sent.deadline_s or 3 * solo_s
        sent.entry = entry = QueueEntry(next(self._numbers), self.now + wanted_s, solo_s, sent.size)
        can_be_late = {other for other in self._inside.values() if other.entry.late}
        queued_work_s = sum(other.entry.remaining_s for other in self._inside.values())
        queued_work_s /= self.demand.throughput()
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
        refusal = decide_admission(queued_work_s, LIMIT_S, context, own, estimates)
        if refusal is not None:
            self._policy.drop(entry)
            del self._inside[entry.request]
            work_s = solo_s / self.demand.throughput()
            error = Overloaded("full.", None, max(1.0, refusal.excess_s), work_s)
            return self._reservations.reserve(sent.name, error, sent.is_retry).retry_after_s
        self.demand.accepted(self.now, solo_s, False)
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
        """One call, or nothing until then."""
        chosen = self._policy.choose(
            self.now, lambda entry, within_s: self.cost.cap(entry.key, 1.0, within_s)
        )
        if not chosen:
            self.now = until
            return
        size = self._inside[chosen[0].request].size
        noise = self._rng.uniform(1 - self._noise, 1 + self._noise)
        call_s = self.cost.predict_call(size, len(chosen)) * noise
        self.demand.called(len(chosen) * self.cost.predict_call(size), call_s)
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
                self.demand.update_remaining(self.now, before_s, entry.remaining_s, False)
                self._policy.park(entry)
                continue
            self.now += self.cost.predict_decode(size)
            self.demand.ended(self.now, before_s, False)
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
    """Poisson arrivals, each refused one comes back as told, until all of them are done."""
    server = Server(gain, noise, seed)
    rng = Random(seed)
    mean_s = sum(share * server.solo_s(size) for size, (_, share, _) in KINDS.items())
    at = 0.0
    coming: list[tuple[float, int, Sent]] = []
    everybody = []
    for number in itertools.count():
        at += rng.expovariate(load / mean_s)
        if at > seconds:
            break
        [size] = rng.choices(list(KINDS), [share for _, share, _ in KINDS.values()])
        deadline_s = 3 * server.solo_s(size) if deadlines else None
        everybody.append(Sent(b"%d" % number, size, at, deadline_s))
        coming.append((at, number, everybody[-1]))
    heapq.heapify(coming)
    while coming or not server.idle:
        while coming and coming[0][0] <= server.now:
            at, number, sent = heapq.heappop(coming)
            sent.sent_at = at
            told_s = server.send(sent)
            if told_s is None:
                continue
            sent.refusals += 1
            sent.told_s = sent.told_s or told_s
            if rng.random() < polite and sent.refusals < 2:
                heapq.heappush(coming, (server.now + told_s, number, sent))
        server.step(coming[0][0] if coming else server.now)
    return server, everybody


def goodput(everybody: list[Sent], seconds: float = 120.0) -> float:
    """Pictures a second."""
    return sum(one.in_time and (one.done_at or 0.0) <= seconds for one in everybody) / seconds


def told(everybody: list[Sent]) -> list[Sent]:
    return [one for one in everybody if one.told_s is not None]


def test_goodput_stays_at_its_peak_and_promises_are_kept(report: Callable[[str], None]) -> None:
    peak = max(goodput(overload(load, seed=2)[1]) for load in (0.9, 1.0, 1.1))
    _, everybody = overload(3.0, seed=2)
    refused = told(everybody)
    kept = sum(one.done_at is not None for one in refused) / len(refused)
    in_time = sum(one.in_time for one in refused) / len(refused)
    ratios = sorted(one.took_s / (one.deadline_s or 1.0) for one in everybody)
    report(
        f"simulated, three times overloaded: goodput {goodput(everybody) / peak:.0%} of its peak, "
        f"{len(refused) / len(everybody):.0%} refused, of those who came again {kept:.0%} were "
        f"taken in and {in_time:.0%} in time"
    )
    assert goodput(everybody) > 0.9 * peak
    assert kept == 1.0
    assert in_time > 0.8
    assert ratios[int(0.95 * len(ratios))] < 1.2
    assert ratios[-1] < 6


def test_without_deadlines_the_backlog_is_bounded_and_promises_are_kept() -> None:
    _, everybody = overload(3.0, deadlines=False)
    assert all(one.done_at is not None for one in everybody)
    assert len(told(everybody)) > len(everybody) / 2


@pytest.mark.parametrize("polite", [0.0, 0.3])
def test_those_who_do_not_come_again_take_no_place_from_the_others(polite: float) -> None:
    """And do not make the wait longer for ever."""
    server, everybody = overload(3.0, seconds=300.0, polite=polite)
    work_s = sum(server.solo_s(one.size) for one in everybody if one.in_time)
    assert work_s / server.now > 0.75
    waits_s = [one.told_s or 0.0 for one in told(everybody)]
    assert max(waits_s) < 300 * polite + 60
    came_again = [one for one in told(everybody) if one.done_at is not None]
    assert len(came_again) == pytest.approx(polite * len(waits_s), rel=0.3)


def test_no_one_is_refused_while_there_is_time() -> None:
    _, everybody = overload(0.3)
    assert len(told(everybody)) <= 0.05 * len(everybody)
    assert sum(one.in_time for one in everybody) >= 0.97 * len(everybody)
