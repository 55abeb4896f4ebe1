import logging
from collections.abc import Iterator

import pytest

from serve_app.serve_log import MAX_VARIANTS, REPEATED_AFTER_S, WithoutRepeats


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.tracebacks = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.tracebacks += record.exc_info is not None


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Collect the output of the logger ``theirs``."""
    handler, theirs = Kept(), logging.getLogger("theirs")
    theirs.addHandler(handler)
    theirs.propagate = False
    yield handler
    theirs.removeHandler(handler)


def test_a_repeated_warning_is_passed_once_with_its_count(kept: Kept) -> None:
    now = 100.0
    ours = logging.Logger("ours", logging.INFO)
    ours.addHandler(WithoutRepeats(logging.getLogger("theirs"), clock=lambda: now))

    def warn(of: str) -> None:
        ours.warning("no answer: %r", of)

    for _ in range(5):
        warn("x")
    warn("y")
    now += REPEATED_AFTER_S
    warn("x")
    warn("x")
    assert kept.messages == [
        "no answer: 'x'",
        "no answer: 'y'",
        "no answer: 'x' (4 more like it before)",
    ]


def test_some_variants_of_a_warning_pass_and_the_others_are_counted(kept: Kept) -> None:
    now = 100.0
    ours = logging.Logger("ours", logging.INFO)
    ours.addHandler(WithoutRepeats(logging.getLogger("theirs"), clock=lambda: now))

    def fail(number: int) -> None:
        try:
            raise RuntimeError(f"image {number}")
        except RuntimeError:
            ours.exception("request %d failed", number)

    for number in range(1_000):
        fail(number)
    ours.error("request %d failed", 7)  # the same text at another place
    assert kept.messages == [
        *(f"request {number} failed" for number in range(MAX_VARIANTS - 1)),
        f"request {MAX_VARIANTS - 1} failed (more like it are left out for 30 s)",
        "request 7 failed",
    ]
    assert kept.tracebacks == MAX_VARIANTS
    now += REPEATED_AFTER_S
    fail(1_000)
    assert kept.messages[-1] == f"request 1000 failed ({1_000 - MAX_VARIANTS} more like it before)"


def test_other_levels_always_pass(kept: Kept) -> None:
    """The line of each request is an example."""
    ours = logging.Logger("ours", logging.INFO)
    ours.addHandler(WithoutRepeats(logging.getLogger("theirs")))
    for number in range(1_000):
        ours.info("request %d completed", number % 2)
    assert len(kept.messages) == 1_000


def test_memory_is_bounded(kept: Kept) -> None:
    ours = logging.Logger("ours", logging.INFO)
    ours.addHandler(WithoutRepeats(logging.getLogger("theirs")))
    for number in [*range(1_000), 999, 0]:
        ours.error(f"request {number} failed")  # each a line of its own
    # The last line is still known; the first one is forgotten, and comes again.
    assert len(kept.messages) == 1_001
    assert kept.messages[-1] == "request 0 failed"
