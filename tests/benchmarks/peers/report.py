"""The table of a comparison, and the verdict about each target."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.benchmarks.aims import Aim
from tests.benchmarks.peers.load import LOADS
from tests.benchmarks.peers.servers import OURS, PEERS

ALONE, ALIKE, MIXED = (load.name for load in LOADS)

COMPARED = ("images_per_s", "p50_s", "p95_s")
"""Columns of a row of which ratios are taken."""

CORES = ("cores", "busiest_cores", "others_cores", "programs_cores")

METRICS = (*COMPARED, "p95_over_p50", "mean_batch_size", *CORES)

LEAST_PSNR_DB = 40.0
"""Least ratio between two servers' images of one request; bytes that differ by 1 have 48 dB."""


@dataclass(frozen=True)
class Row:
    """One load on one server in one round."""

    round: int
    load: str
    server: str
    images_per_s: float
    answers_per_s: float
    p50_s: float
    p95_s: float
    answers: int
    wrong: int
    mean_batch_size: float | None
    """Images in a denoiser call of ours; None for a peer."""
    cores: float
    """CPU time of all processes of the server over the time of the load."""
    busiest_cores: float
    """The same of its busiest process, which generates."""
    others_cores: float
    """The same of the idle servers together."""
    programs_cores: float
    """The same of all other programs. Near the machine's cores, the row is worth little."""

    @property
    def p95_over_p50(self) -> float:
        return self.p95_s / self.p50_s


@dataclass(frozen=True)
class Span:
    """A median over the rounds, with the least and the greatest value."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Span":
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    def show(self, bounds: bool = True) -> str:
        found = f"{self.median:.2f}"
        is_one = not bounds or self.least == self.greatest
        return found if is_one else f"{found} ({self.least:.2f}..{self.greatest:.2f})"


@dataclass(frozen=True)
class Summary:
    """All rounds of one load on one server."""

    load: str
    server: str
    spans: dict[str, Span]
    """By the names of `METRICS`."""
    ratios: dict[str, dict[str, Span]]
    """Ratios to each peer of the same round, by peer and by the names of `COMPARED`."""
    wrong: int


def of(rows: Sequence[Row], load: str, server: str) -> dict[int, Row]:
    """Return the rows of a load on a server, by round."""
    return {row.round: row for row in rows if (row.load, row.server) == (load, server)}


def value(row: Row, metric: str) -> float:
    found: float = getattr(row, metric)
    return found


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Return medians over the rounds, for each load and each server, peers first."""
    loads = dict.fromkeys(row.load for row in rows)
    servers = dict.fromkeys([*PEERS, *(row.server for row in rows)])
    return [
        summary(rows, load, server)
        for load in loads
        for server in servers
        if of(rows, load, server)
    ]


def summary(rows: Sequence[Row], load: str, server: str) -> Summary:
    own = of(rows, load, server)
    others = {peer: of(rows, load, peer) for peer in PEERS}
    return Summary(
        load,
        server,
        spans={
            metric: Span.of(value(row, metric) for row in own.values())
            for metric in METRICS
            if all(getattr(row, metric) is not None for row in own.values())
        },
        ratios={
            peer: {
                metric: Span.of(
                    value(row, metric) / value(other[one], metric) for one, row in own.items()
                )
                for metric in COMPARED
            }
            for peer, other in others.items()
            if other
        },
        wrong=sum(row.wrong for row in own.values()),
    )


def show(found: Sequence[Summary]) -> str:
    """Format the table: medians over the rounds, with the range in brackets."""
    titles = ["load", "server", "images/s", "p50 s", "p95 s", "p95/p50"]
    titles += [f"{metric} x {peer}" for peer in PEERS for metric in ("img/s", "p50", "p95")]
    lines = [[*titles, "batch", "cores", "idle", "programs", "wrong"]]
    for one in found:
        ratios = [
            one.ratios[peer][metric].show(bounds=False) if peer in one.ratios else ""
            for peer in PEERS
            for metric in COMPARED
        ]
        spans = [one.spans[metric].show() for metric in METRICS[:4]]
        details = [
            one.spans[metric].show(bounds=False) if metric in one.spans else ""
            for metric in ("mean_batch_size", "cores", "others_cores", "programs_cores")
        ]
        lines.append([one.load, one.server, *spans, *ratios, *details, str(one.wrong)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def aims(rows: Sequence[Row], psnr_db: float) -> list[Aim]:
    """Return the verdict about each target of ours.

    Each ratio is the median over the rounds, to the named peer, or to the better one of a round.
    """
    batch, lock = ["batch"], ["lock"]

    def ratio(load: str, metric: str, peers: Sequence[str]) -> float | None:
        better: Callable[[Iterable[float]], float] = max if metric == "images_per_s" else min
        ours = of(rows, load, OURS)
        others = [of(rows, load, peer) for peer in peers]
        if not ours or not all(others):
            return None
        return statistics.median(
            value(row, metric) / better(value(other[one], metric) for other in others)
            for one, row in ours.items()
        )

    def aim(load: str, metric: str, peers: Sequence[str], bound: float) -> Aim:
        found = ratio(load, metric, peers)
        is_least = metric == "images_per_s"
        met = found is not None and (found >= bound if is_least else found <= bound)
        name = peers[0] if len(peers) == 1 else "the better peer"
        words = "at least" if is_least else "at most"
        shown = {"images_per_s": "images/s", "p50_s": "p50", "p95_s": "p95"}[metric]
        return Aim(f"{load}: {shown} {words} {bound:g} x {name}", found, met)

    wrong = sum(row.wrong for row in rows)
    return [
        aim(ALONE, "images_per_s", lock, 0.97),
        aim(ALIKE, "images_per_s", batch, 0.95),
        aim(ALIKE, "p95_s", batch, 1.1),
        aim(MIXED, "images_per_s", PEERS, 1.3),
        aim(MIXED, "p50_s", PEERS, 0.3),
        aim(MIXED, "p95_s", PEERS, 1.2),
        Aim("answers without the requested image: none", wrong, wrong == 0),
        Aim(f"same images: PSNR at least {LEAST_PSNR_DB:g} dB", psnr_db, psnr_db >= LEAST_PSNR_DB),
    ]
