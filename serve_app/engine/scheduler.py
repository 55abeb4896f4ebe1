"""The scheduler: all requests of an engine, which one starts, and whose calls run next.

Torch-free, and runs nothing itself. `scheduling.policies` ranks the requests; this module knows
where each one is: waiting, or running and parked at a denoiser, at a stage or for memory.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from serve_app.engine.loras.cache import LoraCache
from serve_app.engine.scheduling.batch_costs import BatchCosts
from serve_app.engine.scheduling.cost import CostModel
from serve_app.engine.scheduling.policies import Yielding
from serve_app.engine.scheduling.queue import QueueEntry, RankedPolicy
from serve_app.engine.stages import StageQueue

if TYPE_CHECKING:  # a request holds tensors
    from serve_app.engine.request import Request


class Scheduler:
    """Only the engine's thread calls its methods; any thread may take the length of its lists."""

    waiting: "deque[Request]"
    """Admitted requests that have not started."""
    running: "list[Request]"
    """Started requests, each parked at one call between two steps of the engine."""
    max_running: int = 1
    """Most requests that run at a time. The engine sets it after the certification."""

    loras: LoraCache | None = None
    """The adapters on demand, without which a request does not start. The engine sets it."""

    def __init__(
        self, policy: RankedPolicy, cost: CostModel, round_cap: Callable[[int], int] | None = None
    ) -> None:
        """``round_cap`` rounds a batch cap down to a size that the denoiser is compiled for."""
        self.waiting = deque()
        self.running = []
        self._by_number: dict[int, Request] = {}
        self._waiting_for_memory: list[Request] = []
        self._stages = StageQueue(cost)
        self._policy = Yielding(policy)
        self._cost = cost
        self._round_cap = round_cap
        self._no_room_at = -1  # the cache's `changes` when there was no room

    # ---- requests that come and go ---------------------------------------------------------------

    @property
    def requests(self) -> "Iterable[Request]":
        """All requests, waiting and running."""
        return self._by_number.values()

    def get(self, number: int) -> "Request | None":
        return self._by_number.get(number)

    def add(self, request: "Request") -> None:
        """Rank the request among the others. It does not wait until `enqueue`."""
        self._by_number[request.number] = request
        self._policy.add(request.entry)

    def withdraw(self, request: "Request") -> None:
        """Undo `add`."""
        self._policy.drop(request.entry)
        del self._by_number[request.number]

    def enqueue(self, request: "Request") -> None:
        self.waiting.append(request)

    def remove(self, request: "Request") -> None:
        """Remove a request that has ended, wherever it was."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._stages.discard(request)
        if request in self._waiting_for_memory:
            self._waiting_for_memory.remove(request)
        if self.loras is not None:
            self.loras.release(request.number)
        self.withdraw(request)

    def order(self, request: "Request", now: float) -> "list[Request]":
        """Return the requests that affect ``request``, itself included, in the order they run.

        Low-priority requests do not affect interactive ones.
        """
        return [
            self._by_number[entry.request]
            for entry in self._policy.order(now)
            if entry.low_priority <= request.entry.low_priority
        ]

    # ---- what starts and runs next ---------------------------------------------------------------

    def start_next(self, now: float) -> "Request | None":
        """Move the next request from waiting to running; ``None`` if none may start."""
        max_running = self.max_running
        if not self.waiting or len(self.running) >= max_running:
            return None
        by_entry = {request.entry: request for request in self.waiting}
        low_priority = sum(request.entry.low_priority for request in self.running)
        if low_priority >= max(1, max_running // 2):
            # Low-priority requests keep their slots for as long as interactive ones need the
            # device, so they may fill only half of the slots.
            by_entry = {entry: one for entry, one in by_entry.items() if not entry.low_priority}
        if self.loras is not None:
            by_entry = self._with_adapters(self.loras, by_entry, now)
        if not by_entry:
            return None
        request = by_entry[self._policy.first(list(by_entry), now)]
        if self.loras is not None:
            self.loras.hold(request.number, request.lora_files)
        self.waiting.remove(request)
        self.running.append(request)
        return request

    def _with_adapters(
        self, loras: LoraCache, by_entry: "dict[QueueEntry, Request]", now: float
    ) -> "dict[QueueEntry, Request]":
        """Return the requests whose adapters are in memory, and begin to load those of the others.

        Requests get room in the order in which they would start, until none is left. Before them
        comes the one that found none the last time.
        """
        others = [
            entry
            for entry, one in by_entry.items()
            if one.lora_files and not loras.holds(one.number)
        ]
        while others and self._no_room_at != loras.changes:
            first = [one for one in others if one.request == loras.next_for_room] or others
            request = by_entry[self._policy.first(first, now)]
            others.remove(request.entry)
            low_priority = request.entry.low_priority
            if not loras.hold(request.number, request.lora_files, low_priority):
                self._no_room_at = loras.changes
        return {
            entry: one
            for entry, one in by_entry.items()
            if loras.is_ready(one.number, one.lora_files)
        }

    @property
    def is_idle(self) -> bool:
        """True if nothing can run: there is no request, or all wait for adapters to be loaded."""
        loras = self.loras
        if self.running or loras is None:
            return not (self.running or self.waiting)
        may_find_room = self._no_room_at != loras.changes
        return not any(
            loras.is_ready(one.number, one.lora_files)
            or (may_find_room and not loras.holds(one.number))
            for one in self.waiting
        )

    def park_at_denoiser(self, request: "Request") -> None:
        """Queue its denoiser call. Its entry's key, remaining work and step time are set."""
        self._policy.park(request.entry)

    def park_at_stage(self, request: "Request") -> None:
        """Queue its call of another module."""
        self._stages.park(request)

    def wait_for_memory(self, request: "Request") -> bool:
        """Keep a request that ran out of memory until another one ends; ``False`` if none will."""
        if len(self.running) - len(self._waiting_for_memory) <= 1:
            return False
        self._waiting_for_memory.append(request)
        return True

    def take_waiting_for_memory(self) -> "list[Request]":
        """Return the requests that waited for memory, which may be tried again."""
        requests, self._waiting_for_memory = self._waiting_for_memory, []
        return requests

    def next_stage(self, now: float) -> "Request | None":
        """Return the request whose stage runs now; ``None`` if a denoiser call is due.

        Low-priority requests run when no interactive one can.
        """
        if not self._stages:  # most calls of the engine's loop: all requests are at a denoiser
            return None
        runnable = [one for one in self.running if one not in self._waiting_for_memory]
        interactive = [request for request in runnable if not request.entry.low_priority]
        return self._stages.take(
            interactive or runnable, lambda entries: self._policy.first(entries, now)
        )

    def next_batch(self, now: float) -> "list[Request]":
        """Return the requests whose parked calls run together in the next denoiser call."""
        batch = [self._by_number[one.request] for one in self._policy.choose(now, self)]
        if batch:
            rows = sum(request.rows for request in batch)
            self._stages.denoiser_called(self._cost.predict_call(batch[0].work, rows))
        return batch

    # ---- costs, for the policy -------------------------------------------------------------------

    def cap(self, entry: QueueEntry, within_s: float = math.inf) -> int:
        """Return how many calls, that of the entry included, fit in a call of this duration."""
        request = self._by_number[entry.request]
        cap = self._cost.cap(request.work, request.rows, within_s)
        return self._round_cap(cap) if self._round_cap else cap

    def batches(self, entry: QueueEntry) -> BatchCosts:
        """Return the costs of calls for 1, 2, 3… requests like this one."""
        request = self._by_number[entry.request]
        costs = self._cost.batches(request.work, request.rows)
        if self._round_cap is None:
            return costs
        return costs.capped(self._round_cap(len(costs.call_s)))
