"""The adapters on demand that are in memory: which stay, which go, and who needs them.

A request holds its adapters from the time when it could start until it ends. What nobody holds
stays as well, until its place is needed: the one that was not used for the longest time goes first.
If all are held, that one takes no more requests and goes when its last one has ended. So a new
adapter waits for running requests, and never for ever.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.engine.loras.source import AdapterFile
from serve_app.engine.metrics import EngineMetrics
from serve_app.errors import DiffusionServeError

if TYPE_CHECKING:  # they hold tensors
    from serve_app.engine.model.adapters import Adapters, LoadedAdapter


@dataclass(eq=False)
class _Entry:
    """An adapter that is in memory, or on its way."""

    size_bytes: int
    holders: int = 0
    """Requests that hold it."""
    loaded: bool = False
    leaving: bool = False
    """True if it takes no more requests, and goes when its last one has ended."""

    @property
    def removable(self) -> bool:
        return self.loaded and not self.holders


class LoraCache:
    """Used by the engine's thread only."""

    changes: int = 0
    """Counts the events that may make room."""
    next_for_room: int | None = None
    """The request that found no room first: no other one gets room before it."""

    def __init__(
        self,
        adapters: "Adapters",
        load: Callable[[AdapterFile], None],
        max_count: int,
        max_bytes: int,
        metrics: EngineMetrics,
    ) -> None:
        """Set the bounds. ``load`` begins to load a file; its end is reported to `ended`."""
        self._adapters = adapters
        self._load = load
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the last used one at the end
        self._held: dict[int, tuple[str, ...]] = {}

    @property
    def loaded(self) -> frozenset[str]:
        """Names of the adapters in memory. Any thread may read it."""
        return frozenset(name for name, entry in list(self._entries.items()) if entry.loaded)

    # ---- requests --------------------------------------------------------------------------------

    def is_ready(self, request: int, files: Sequence[AdapterFile]) -> bool:
        """Return whether a request could start now."""
        entries = [self._entries.get(file.name) for file in files]
        held = request in self._held
        return all(one is not None and one.loaded and (held or not one.leaving) for one in entries)

    def holds(self, request: int) -> bool:
        """Return whether a request holds its adapters, here or on their way."""
        return request in self._held

    def hold(self, request: int, files: Sequence[AdapterFile], low_priority: bool = False) -> bool:
        """Hold the adapters of a request, and begin to load those that are not here.

        Returns False if there is no room for them yet. Room is made for the first request that
        finds none; others get none before it. Low-priority requests may hold theirs for long, as
        they run when no other request can. So they hold none while half of the places are held.
        """
        if not files or request in self._held:
            return True
        names = tuple(file.name for file in files)
        if low_priority and self._count_held({*names}) > max(self._max_count // 2, len(names)):
            return False
        missing = [file for file in files if file.name not in self._entries]
        if missing and self.next_for_room not in (None, request):
            return False
        leaving = any(one in self._entries and self._entries[one].leaving for one in names)
        if leaving or not self._make_room(missing, names):
            if self.next_for_room is None and not low_priority:
                self.next_for_room = request
            return False
        if self.next_for_room == request:
            self.next_for_room = None
        self._held[request] = names
        for file in missing:
            self._entries[file.name] = _Entry(file.size_bytes)
            self._load(file)
        for name in names:
            entry = self._entries[name]
            entry.holders += 1
            self._entries.move_to_end(name)
        self._metrics.found_loras(len(files) - len(missing))
        return True

    def release(self, request: int) -> None:
        """Let go of the adapters of a request that has ended."""
        if self.next_for_room == request:
            self.next_for_room = None
            self.changes += 1
        for name in self._held.pop(request, ()):
            self.changes += 1
            if (entry := self._entries.get(name)) is not None:
                entry.holders -= 1
                self._remove_if_leaving(name, entry)
        self._keep_to_memory()

    # ---- the end of a load -----------------------------------------------------------------------

    def ended(self, name: str, outcome: "LoadedAdapter | DiffusionServeError") -> list[int]:
        """Take an adapter that was loaded; return the requests that fail, if it was not."""
        self.changes += 1
        entry = self._entries[name]
        if isinstance(outcome, DiffusionServeError):
            del self._entries[name]
            self._report()
            return [request for request, names in self._held.items() if name in names]
        self._adapters.attach(name, outcome)
        entry.loaded, entry.size_bytes = True, outcome.size_bytes
        self._remove_if_leaving(name, entry)
        self._keep_to_memory()
        self._report()
        return []

    def _count_held(self, more: set[str]) -> int:
        """Count the adapters that are held, together with these."""
        return len(more.union(*self._held.values()))

    # ---- room ------------------------------------------------------------------------------------

    def _make_room(self, missing: Sequence[AdapterFile], wanted: Sequence[str]) -> bool:
        """Return whether there is room. If not, make sure that there will be."""
        if not missing:
            return True
        count = len(self._entries) + len(missing) - self._max_count
        size = self._size_bytes + sum(file.size_bytes for file in missing) - self._max_bytes
        others = [(name, entry) for name, entry in self._entries.items() if name not in wanted]
        # First those that leave anyway, then those that can go now, then the others; each in the
        # order of their last uses.
        others.sort(key=lambda one: (not one[1].leaving, not one[1].removable))
        there_is_room = True
        for name, entry in others:
            if count <= 0 and size <= 0:
                break
            count, size = count - 1, size - entry.size_bytes
            if entry.removable:
                self._remove(name)
            else:
                entry.leaving = True
                there_is_room = False
        return there_is_room

    def _keep_to_memory(self) -> None:
        """Remove adapters, if one is larger in memory than its file is."""
        for name, entry in list(self._entries.items()):
            if self._size_bytes <= self._max_bytes:
                return
            if entry.removable:
                self._remove(name)

    def _remove_if_leaving(self, name: str, entry: _Entry) -> None:
        if entry.leaving and entry.removable:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self.changes += 1
        del self._entries[name]
        self._adapters.detach(name)
        self._metrics.evicted_lora()
        self._report()

    @property
    def _size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._entries.values())

    def _report(self) -> None:
        self._metrics.holds_loras(len(self.loaded), self._size_bytes)
