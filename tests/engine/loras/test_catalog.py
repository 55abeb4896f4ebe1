"""What is remembered of a source."""

import gc
import weakref
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from serve_app.engine.loras.catalog import LISTED_S, REMEMBERED_S, LoraCatalog
from serve_app.engine.loras.source import AdapterFile, not_found
from serve_app.errors import InvalidLora, LoraNotFound, LoraSourceAway

MIB = 2**20


class Source:
    """A source that counts the questions."""

    def __init__(self, **files: int) -> None:
        self.files = files
        self.asked: list[str] = []
        self.away = False

    def find(self, name: str) -> AdapterFile:
        self.asked.append(name)
        if self.away:
            raise LoraSourceAway("it does not answer")
        if name not in self.files:
            raise not_found(name)
        return AdapterFile(name, self.files[name])

    def names(self) -> list[str]:
        self.asked.append("names")
        if self.away:
            raise LoraSourceAway("it does not answer")
        return sorted(self.files)

    def fetched(self, file: AdapterFile) -> AbstractContextManager[Path]:
        raise AssertionError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def catalog(source: Source, clock: Clock | None = None, mib: int = 10) -> LoraCatalog:
    return LoraCatalog(source, ("fixed",), mib * MIB, clock or Clock())


def test_only_adapters_on_demand_have_files() -> None:
    source = Source(ink=MIB)
    files = catalog(source).find((("fixed", 1.0), ("ink", 0.5)))
    assert files == (AdapterFile("ink", MIB),)
    assert source.asked == ["ink"]


def test_a_file_is_looked_up_once_in_a_while() -> None:
    source, clock = Source(ink=MIB), Clock()
    known = catalog(source, clock)
    for now, questions in ((0.0, 1), (REMEMBERED_S - 1, 1), (REMEMBERED_S + 1, 2)):
        clock.now = now
        known.find((("ink", 1.0),))
        assert len(source.asked) == questions


def test_an_unknown_name_is_remembered() -> None:
    source, clock = Source(), Clock()
    known = catalog(source, clock)
    for _ in range(3):
        with pytest.raises(LoraNotFound):
            known.find((("ink", 1.0),))
    assert source.asked == ["ink"]
    source.files["ink"] = MIB
    clock.now = REMEMBERED_S
    assert known.find((("ink", 1.0),))


def test_a_file_that_failed_is_remembered() -> None:
    source, clock = Source(ink=MIB), Clock()
    known = catalog(source, clock)
    known.find((("ink", 1.0),))
    known.failed("ink", InvalidLora("it is broken"))
    for _ in range(3):
        with pytest.raises(InvalidLora, match="it is broken"):
            known.find((("ink", 1.0),))
    clock.now = REMEMBERED_S
    assert known.find((("ink", 1.0),))


def test_a_source_that_is_away_is_asked_again() -> None:
    source = Source(ink=MIB)
    known = catalog(source)
    source.away = True
    with pytest.raises(LoraSourceAway):
        known.find((("ink", 1.0),))
    source.away = False
    assert known.find((("ink", 1.0),))


def test_a_file_that_was_there_counts_as_there_while_the_source_is_away() -> None:
    """It may be in memory, and else its load fails."""
    source, clock = Source(ink=MIB), Clock()
    known = catalog(source, clock)
    known.find((("ink", 1.0),))
    source.away, clock.now = True, 2 * REMEMBERED_S
    assert known.find((("ink", 1.0),)) == (AdapterFile("ink", MIB),)


def test_an_error_keeps_nothing_of_the_requests_that_got_it() -> None:
    known = catalog(Source())

    class Params:
        """Something that a request has, such as an image."""

    def ask() -> weakref.ref[Params]:
        params = Params()
        with pytest.raises(LoraNotFound):
            known.find((("ink", 1.0),))
        return weakref.ref(params)

    asked = [ask() for _ in range(3)]
    gc.collect()
    assert [one() for one in asked] == [None] * 3


def test_a_list_that_fails_is_not_tried_again_at_once() -> None:
    source, clock = Source(), Clock()
    known = catalog(source, clock)
    source.away = True
    for now, questions in ((0.0, 1), (LISTED_S - 1, 1), (LISTED_S, 2)):
        clock.now = now
        with pytest.raises(LoraSourceAway):
            known.names()
        assert len(source.asked) == questions


def test_adapters_that_are_too_large_together_are_rejected() -> None:
    known = catalog(Source(a=6 * MIB, b=4 * MIB, c=5 * MIB))
    assert known.find((("a", 1.0), ("b", 1.0)))
    with pytest.raises(InvalidLora, match="room for 10 MiB"):
        known.find((("a", 1.0), ("c", 1.0)))


def test_the_list_is_used_again_for_a_while() -> None:
    source, clock = Source(ink=MIB), Clock()
    known = catalog(source, clock)
    for now, names in ((0.0, ["ink"]), (LISTED_S - 1, ["ink"]), (LISTED_S, ["ink", "oil"])):
        clock.now = now
        assert known.names() == names
        source.files["oil"] = MIB
