import logging
from collections.abc import Iterator

import pytest

from serve_app.serve_log import REPEATED_AFTER_S, WithoutRepeats


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What comes out of the logger ``theirs``."""
    handler, theirs = Kept(), logging.getLogger("theirs")
    theirs.addHandler(handler)
    theirs.propagate = False
    yield handler
    theirs.removeHandler(handler)


def test_the_same_warning_comes_once_and_says_how_often_it_was(kept: Kept) -> None:
    now = 100.0
    ours = logging.Logger("ours", logging.INFO)
    ours.addHandler(WithoutRepeats(logging.getLogger("theirs"), clock=lambda: now))
    for _ in range(5):
        ours.warning("no answer: %r", "x")
    ours.warning("no answer: %r", "y")
    for _ in range(3):
        ours.info("a request")
    now += REPEATED_AFTER_S
    ours.warning("no answer: %r", "x")
    ours.warning("no answer: %r", "x")
    assert kept.messages == [
        "no answer: 'x'",
        "no answer: 'y'",
        *["a request"] * 3,
        "no answer: 'x' (4 times more before)",
    ]


def test_what_it_remembers_has_an_end(kept: Kept) -> None:
    ours = logging.Logger("ours", logging.INFO)
    handler = WithoutRepeats(logging.getLogger("theirs"))
    ours.addHandler(handler)
    for number in range(1_000):
        ours.error("request %d failed", number)
    assert len(kept.messages) == 1_000
    assert len(handler._said) < 300
