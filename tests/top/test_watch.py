"""The loop that scrapes and draws, with a scripted server."""

import io
import itertools

import pytest
from rich.console import Console

from serve_app.errors import ConfigError, Unavailable
from serve_app.top.series import Series, parse
from serve_app.top.server import Server
from serve_app.top.watch import watch
from tests.top.scrapes import AFTER, BEFORE


class Scripted(Server):
    """A server with scripted scrapes, errors among them. After the last one the user stops."""

    def __init__(self, answers: tuple[str | BaseException, ...]) -> None:
        super().__init__("http://server")
        object.__setattr__(self, "answers", itertools.chain(answers, [KeyboardInterrupt()]))

    def scrape(self) -> Series:
        answer = next(vars(self)["answers"])
        if isinstance(answer, BaseException):
            raise answer
        return parse(answer)


def watched(*answers: str | BaseException, once: bool = False, model: str | None = None) -> str:
    """Return everything that is drawn, as text."""
    console = Console(file=io.StringIO(), width=120)
    try:
        watch(Scripted(answers), console, 0.0, once, model)
    except KeyboardInterrupt:
        assert not once
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_scrape_draws_a_frame() -> None:
    text = watched(BEFORE, AFTER, AFTER)
    assert text.count("http://server") == 3


def test_an_error_keeps_the_last_frame_and_is_shown_until_the_server_answers() -> None:
    text = watched(BEFORE, Unavailable("the server does not answer."), AFTER)
    assert text.count("http://server") == 3
    assert text.count("does not answer") == text.count("Retrying") == 1


def test_an_error_before_the_first_frame_is_raised() -> None:
    with pytest.raises(Unavailable):
        watched(Unavailable("the server does not answer."))


def test_an_unknown_model_is_an_error_at_once_and_a_notice_later() -> None:
    with pytest.raises(ConfigError, match="no model 'x'"):
        watched(AFTER, model="x")
    gone = AFTER.replace('model="demo"', 'model="x"')
    assert watched(AFTER, gone, model="demo").count("has no model 'demo': it has 'x'.") == 1


def test_once_draws_one_frame() -> None:
    assert watched(BEFORE, AFTER, once=True).count("http://server") == 1
