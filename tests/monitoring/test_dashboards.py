"""A served demo under load, watched by a real Prometheus: every panel shows something, and no alert
has anything to say."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import pytest

from monitoring.dashboards import DASHBOARDS
from monitoring.draw import Window, curves, draw, filled_in
from monitoring.replicas_and_gpus import SCALING
from monitoring.rules import alerts, rules
from tests.monitoring.load import MixedLoad, demo_of_two
from tests.monitoring.prometheus import SCRAPE_EVERY_S, Prometheus, start_prometheus
from tests.monitoring.series import FOREIGN, series_of
from tests.serve_process import free_port, start_serve
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

LOAD_S = 15.0
"""Least duration of the load."""

KINDS = {"200", "400", "429", "hung up"}
"""Outcomes that must occur: generated, invalid, rejected, and a client that went away."""


@dataclass(frozen=True)
class Watched:
    """A Prometheus that has scraped all outcomes and a second replica, and continues."""

    prometheus: Prometheus
    window: Window


@pytest.fixture(scope="module")
def watched(report: Callable[[str], None]) -> Iterator[Watched]:
    started_at, started_s = monotonic(), time.time()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    running = start_serve(demo_of_two(port))
    try:
        running.wait_until_ready(url)
        with start_prometheus(url, running) as prometheus:
            loaded_at = monotonic()
            with MixedLoad(url) as load:
                wait_until(
                    lambda: (
                        monotonic() > loaded_at + LOAD_S
                        and load.outcomes.keys() >= KINDS
                        and prometheus.value('diffusion_serve_replicas{state="running"}') == 2
                        and prometheus.value("model:diffusion_serve_missed:rate5m > 0")
                    ),
                    deadline_s=90,
                    every_s=0.5,
                    what="all kinds of answers, a rejection that the rules see, a second replica",
                )
                report(f"watched for {monotonic() - started_at:.0f} s: {dict(load.outcomes)}")
                window = Window(started_s, time.time(), SCRAPE_EVERY_S, 10 * SCRAPE_EVERY_S)
                yield Watched(prometheus, window)
    finally:
        running.stop()


def test_every_query_has_data(watched: Watched) -> None:
    exported = set(watched.prometheus.get("label/__name__/values"))
    assert exported.isdisjoint(FOREIGN), "these are exported here after all"
    unknown, empty = [], []
    queries = [(one.name, query) for one in DASHBOARDS for query in one.queries]
    for where, query in queries:
        found = curves(watched.prometheus.url, query, watched.window)
        names = series_of(filled_in(query.expr, watched.window))
        assert names, f"{where}: {query.expr}"
        if foreign := names & FOREIGN.keys():
            assert not found
            names -= foreign
        elif not found:
            empty.append(f"{where}: {query.expr}")
        unknown += [f"{where}: {name}" for name in names - exported]
    for group in rules()["groups"]:
        for rule in group["rules"]:
            names = series_of(rule["expr"]) - FOREIGN.keys()
            unknown += [f"{group['name']}: {name}" for name in names - exported]
    assert not unknown
    assert not empty


def test_a_client_that_hangs_up_is_no_failure(watched: Watched) -> None:
    counted = watched.prometheus.get("query", query="diffusion_serve_requests_total > 0")["result"]
    outcomes = {series["metric"]["outcome"] for series in counted}
    assert {"cancelled", "overloaded"} <= outcomes
    assert not {"internal_error", "generation_failed"} & outcomes


def test_alerts_are_evaluated_and_do_not_fire(watched: Watched) -> None:
    groups = watched.prometheus.get("rules", type="alert")["groups"]
    evaluated = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert evaluated.keys() == alerts().keys()
    assert {
        name: rule["lastError"] for name, rule in evaluated.items() if rule["health"] != "ok"
    } == {}
    fired = watched.prometheus.get(
        "query_range",
        query='ALERTS{alertstate="firing"}',
        start=watched.window.start_s,
        end=watched.window.end_s,
        step=SCRAPE_EVERY_S,
    )
    assert fired["result"] == []
    # No alert is pending all the time either: under this load there is a moment without any.
    wait_until(
        lambda: not watched.prometheus.get("alerts")["alerts"],
        deadline_s=120,
        every_s=0.5,
        what=f"no alert to be pending; {watched.prometheus.get('alerts')}",
    )


def test_a_dashboard_can_be_drawn(watched: Watched, tmp_path: Path) -> None:
    path = tmp_path / "scaling.png"
    draw(watched.prometheus.url, SCALING, watched.window, path)
    assert path.read_bytes().startswith(b"\x89PNG")
