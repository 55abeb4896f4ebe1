"""Which adapters stay in memory, which go, and which requests wait for room."""

from dataclasses import dataclass, field
from typing import cast

import pytest

from serve_app.engine.loras.cache import LoraCache
from serve_app.engine.loras.source import AdapterFile
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.adapters import Adapters, LoadedAdapter
from serve_app.errors import InvalidLora

MIB = 2**20


@dataclass
class Networks:
    """What a pipeline's networks have, in the order in which it was attached."""

    names: list[str] = field(default_factory=list)

    def attach(self, name: str, adapter: LoadedAdapter) -> None:
        self.names.append(name)

    def detach(self, name: str) -> None:
        self.names.remove(name)


class Loras:
    """A cache whose loads end when a test says so."""

    def __init__(self, room: int = 2, mib: int = 100) -> None:
        self.networks = Networks()
        self.loading: list[str] = []
        self.cache = LoraCache(
            cast(Adapters, self.networks),
            lambda file: self.loading.append(file.name),
            room,
            mib * MIB,
            EngineMetrics("cache"),
        )

    def hold(self, request: int, *names: str, mib: int = 1) -> bool:
        """Hold these adapters for a request; return whether it could start now."""
        files = [AdapterFile(name, mib * MIB) for name in names]
        return self.cache.hold(request, files) and self.cache.is_ready(request, files)

    def load(self, mib: int = 1) -> None:
        """End all loads."""
        while self.loading:
            name = self.loading.pop(0)
            self.cache.ended(name, LoadedAdapter(name, (), mib * MIB))


def test_an_adapter_is_loaded_once_for_all_requests() -> None:
    loras = Loras()
    assert not loras.hold(1, "ink")
    assert not loras.hold(2, "ink")
    assert loras.loading == ["ink"]
    loras.load()
    assert loras.hold(1, "ink")
    assert loras.hold(2, "ink")
    assert loras.hold(3, "ink")
    assert loras.networks.names == ["ink"]
    assert loras.loading == []


def test_a_request_without_adapters_needs_nothing() -> None:
    assert Loras().hold(1)


def test_the_adapter_that_was_not_used_for_the_longest_time_makes_room() -> None:
    loras = Loras(room=2)
    for request, name in enumerate(("ink", "oil", "ink")):
        loras.hold(request, name)
        loras.load()
        loras.cache.release(request)
    assert not loras.hold(9, "pen")
    assert loras.networks.names == ["ink"]
    loras.load()
    assert loras.cache.loaded == {"ink", "pen"}


def test_what_a_request_holds_stays_until_it_ends() -> None:
    loras = Loras(room=2)
    loras.hold(1, "ink")
    loras.hold(2, "oil")
    loras.load()
    assert not loras.hold(3, "pen")
    assert loras.networks.names == ["ink", "oil"]
    assert loras.loading == []
    loras.cache.release(2)  # that of the first request leaves, which was used before
    assert not loras.hold(3, "pen")
    loras.cache.release(1)
    assert loras.networks.names == ["oil"]
    assert not loras.hold(3, "pen")
    assert loras.loading == ["pen"]


def test_a_popular_adapter_keeps_no_other_one_out_for_ever() -> None:
    """Each request for it would begin before the last one ends."""
    loras = Loras(room=1)
    loras.hold(0, "ink")
    loras.load()
    assert not loras.hold(100, "pen")
    assert not loras.hold(1, "ink")  # it takes no more requests
    loras.cache.release(0)
    assert not loras.hold(100, "pen")
    loras.load()
    assert loras.hold(100, "pen")
    assert not loras.hold(1, "ink")
    loras.cache.release(100)
    assert not loras.hold(1, "ink")
    assert loras.loading == ["ink"]


def test_room_goes_to_the_first_request_that_needs_some() -> None:
    loras = Loras(room=2)
    for request, name in enumerate(("ink", "oil")):
        loras.hold(request, name)
    loras.load()
    assert not loras.hold(5, "a", "b")  # it needs the room of both
    loras.cache.release(0)
    assert not loras.hold(6, "c")
    loras.cache.release(1)
    assert not loras.hold(6, "c")
    assert loras.loading == []
    assert not loras.hold(5, "a", "b")
    assert loras.loading == ["a", "b"]


def test_a_request_that_goes_away_leaves_its_room_to_the_next() -> None:
    loras = Loras(room=1)
    loras.hold(0, "ink")
    loras.load()
    assert not loras.hold(5, "a")
    before = loras.cache.changes
    loras.cache.release(5)
    assert loras.cache.changes > before
    loras.cache.release(0)
    assert not loras.hold(6, "c")
    assert loras.loading == ["c"]


def test_an_adapter_that_nobody_wants_any_more_may_go_once_it_has_come() -> None:
    loras = Loras(room=1)
    loras.hold(0, "ink")
    loras.cache.release(0)
    assert not loras.hold(1, "oil")
    loras.load()
    assert loras.networks.names == []
    assert not loras.hold(1, "oil")
    assert loras.loading == ["oil"]


def test_low_priority_requests_hold_no_more_than_half_of_the_places() -> None:
    """They may wait for long, and an interactive request must find room meanwhile."""
    loras = Loras(room=4)
    files = [AdapterFile(name, MIB) for name in "abcd"]
    held = [loras.cache.hold(index, [file], low_priority=True) for index, file in enumerate(files)]
    assert held == [True, True, False, False]
    assert loras.cache.hold(9, [AdapterFile("ink", MIB)])
    assert loras.loading == ["a", "b", "ink"]


def test_a_load_that_fails_fails_those_who_wait_for_it() -> None:
    loras = Loras()
    loras.hold(1, "ink")
    loras.hold(2, "ink", "oil")
    loras.hold(3, "oil")
    assert sorted(loras.cache.ended("ink", InvalidLora("it is broken"))) == [1, 2]
    for request in (1, 2):
        loras.cache.release(request)
    loras.loading.remove("ink")
    loras.load()
    assert loras.hold(3, "oil")
    assert not loras.hold(4, "ink")  # it is tried again
    assert loras.loading == ["ink"]


def test_the_memory_is_bounded() -> None:
    loras = Loras(room=10, mib=10)
    for request, name in enumerate(("a", "b", "c")):
        loras.hold(request, name, mib=3)
        loras.load(3)
        loras.cache.release(request)
    assert loras.cache.loaded == {"a", "b", "c"}
    loras.hold(4, "d", mib=6)
    loras.load(6)
    assert loras.cache.loaded == {"c", "d"}


@pytest.mark.parametrize("held", [True, False])
def test_an_adapter_that_is_larger_in_memory_than_its_file_pushes_others_out(held: bool) -> None:
    loras = Loras(room=10, mib=10)
    loras.hold(0, "a", mib=4)
    loras.load(4)
    if not held:
        loras.cache.release(0)
    loras.hold(1, "b", mib=4)
    loras.load(8)
    assert loras.cache.loaded == ({"a", "b"} if held else {"b"})
