"""An overloaded server, used through OpenAI's client."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serve_process import demo_config, free_port, serving_config

pytestmark = pytest.mark.serve

LIMIT_S = 1.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    config = demo_config(free_port())
    engine = config["applications"][0]["args"]["engine"]
    engine["max_backlog_s"] = LIMIT_S
    with serving_config(config) as url:
        yield url


def client_of(url: str, retries: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries)


def test_a_rejected_request_that_retries_at_the_returned_time_is_admitted(
    url: str, report: Callable[[str], None]
) -> None:
    """New requests of other clients keep coming meanwhile.

    A machine that becomes slower after a prediction makes a client wait again, but not for long.
    """
    seeds = itertools.count()
    enough = threading.Event()

    def body() -> Any:
        return {"num_inference_steps": 40, "seed": next(seeds)}

    def crowd() -> list[str | None]:
        codes = []
        with client_of(url, retries=0) as client:
            while not enough.is_set():
                try:
                    client.images.generate(prompt="x", extra_body=body())
                except openai.RateLimitError as error:
                    codes.append(error.code)
                    enough.wait(2.0)
        return codes

    with ThreadPoolExecutor(4) as pool, client_of(url, retries=3) as polite:
        others = [pool.submit(crowd) for _ in range(4)]
        try:
            retries: list[int] = []
            # The client waits by itself, and raises the error of its last try.
            while retries.count(1) < 2 and len(retries) < 60:
                try:
                    answer = polite.images.with_raw_response.generate(prompt="x", extra_body=body())
                    retries.append(answer.retries_taken)
                except openai.RateLimitError:  # a machine that has just become much slower
                    retries.append(1 + polite.max_retries)
        finally:
            enough.set()
        rejected = [code for one in others for code in one.result()]
    report(
        f"with {LIMIT_S:g} s of work at most: {len(rejected)} other requests were rejected, and "
        f"{len(retries) - retries.count(0)} of {len(retries)} of a polite client, of which "
        f"{retries.count(1)} were admitted at the second try"
    )
    assert retries.count(1) >= 2
    assert set(rejected) == {"overloaded"}


def test_an_infeasible_deadline_is_a_bad_request(url: str) -> None:
    with client_of(url, 0) as client:
        body: Any = {"num_inference_steps": 100, "deadline_s": 0.01}
        with pytest.raises(openai.BadRequestError, match="deadline_s") as caught:
            client.images.generate(prompt="x", extra_body=body)
        assert caught.value.param == "deadline_s"
        assert client.images.generate(prompt="x", extra_body={"deadline_s": 60}).data
