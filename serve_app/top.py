"""A live view of one deployment in the terminal, from what its ``GET /metrics`` says.

Knows the names in `metrics.py` and nothing else of the server, so that it starts at once and runs
wherever the port can be reached. `read` makes `Figures` of one answer, `increases` what rose
between two, `History` keeps those of the last seconds, `frame` draws them, `watch` goes on so.
"""

import functools
import http.client
import math
import signal
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serve_app.config import API_KEY_VARIABLE
from serve_app.errors import ConfigError, InvalidKey, Unavailable
from serve_app.metrics import (
    ARRIVING,
    BACKLOG,
    BATCH_SIZE,
    CANCELLATION,
    COLD_START,
    DEADLINES,
    DEVICE,
    DEVICE_MEMORY,
    ENGINE_INFO,
    ENGINE_REQUESTS,
    GATEWAY_INFO,
    HELD,
    IMAGES,
    OPEN_REQUESTS,
    OUT_OF_MEMORY,
    REFUSALS,
    REPLICAS,
    REQUEST,
    REQUEST_PART,
    REQUESTS,
    SCRAPED,
    SHARING,
    STALL,
    STEPS,
    TARGET_REPLICAS,
    UNSERVED,
    WAITS_S,
)

WINDOW_S = 10.0
"""Rates and waits are of so long, or of the time between two scrapes if that is longer: within one
second few requests end."""

ANSWER_WITHIN_S = 10.0
"""As long as Prometheus waits."""

ANSWER_BYTES = 64 * 2**20
"""More than a thousand replicas say. A server that goes on and on is none of ours."""

PROCESS_MEMORY = "process_resident_memory_bytes"

# ---- asking --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Where to ask, and as whom."""

    url: str
    """Up to where ``/metrics`` follows."""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, key: str | None) -> "Server":
        """As somebody wrote them. Raises `ConfigError`."""
        # What HTTP cannot send would be in its message about it.
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("the API key holds characters that no key has.")
        return cls(_checked(url), key)

    def ask(self) -> "Figures":
        """What all replicas say now. Raises `Unavailable`, `InvalidKey` or `ConfigError`."""
        headers = {"Accept": "text/plain"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/metrics", headers=headers)
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=ANSWER_WITHIN_S) as response:
                text = response.read(ANSWER_BYTES).decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.reason) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            why = getattr(error, "reason", error)
            why = getattr(why, "strerror", None) or why
            raise Unavailable(f"{self.url} does not answer: {_plain(str(why))}.") from None
        return read(text)

    def _refused(self, status: int, reason: str) -> Exception:
        if status == 401:
            if self.key:
                return InvalidKey(f"{self.url} does not know this API key.")
            return InvalidKey(f"{self.url} asks for an API key: give it in {API_KEY_VARIABLE}.")
        if status == 404:
            return ConfigError(
                f"{self.url} has no /metrics: the application is not there yet, or has a "
                "route_prefix, which belongs to the URL, or it is another server."
            )
        return Unavailable(f"{self.url} answers GET /metrics with {status} {_plain(reason)}.")


def _checked(url: str) -> str:
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of a port or a bracket
        right = False
    if not right or "@" in url or "?" in url or "#" in url or not url.isprintable() or " " in url:
        raise ConfigError("the URL must look like http://127.0.0.1:8000, and hold no user or key.")
    return url.rstrip("/").removesuffix("/metrics").rstrip("/")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _plain(text: str) -> str:
    """Nothing that a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


# ---- figures -------------------------------------------------------------------------------------

Labels = frozenset[tuple[str, str]]


@functools.cache
def _name(metric: MetricWrapperBase, part: str = "") -> str:
    """Of its samples; ``part`` of a histogram: ``_sum``, ``_count`` or ``_bucket``."""
    [family] = metric.describe()
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, part)


class Figures:
    """Values of series. What is not a number, as of an engine that is gone, is not there."""

    def __init__(self, series: Mapping[str, Mapping[Labels, float]]) -> None:
        """By the name of the sample, and then by its labels."""
        self.series = series

    def where(
        self, metric: MetricWrapperBase | str, part: str = "", /, **labels: str
    ) -> Iterator[tuple[dict[str, str], float]]:
        """Those with these labels."""
        name = metric if isinstance(metric, str) else _name(metric, part)
        for key, value in self.series.get(name, {}).items():
            if labels.items() <= key:
                yield dict(key), value

    def total(
        self, metric: MetricWrapperBase | str, part: str = "", /, **labels: str
    ) -> float | None:
        """Their sum; none if there are none."""
        values = [value for _, value in self.where(metric, part, **labels)]
        return math.fsum(values) if values else None

    def by(
        self, label: str, metric: MetricWrapperBase | str, part: str = "", /, **labels: str
    ) -> dict[str, float]:
        """Their sums for each value of a label."""
        sums: dict[str, float] = {}
        for found, value in self.where(metric, part, **labels):
            sums[found.get(label, "")] = sums.get(found.get(label, ""), 0.0) + value
        return sums

    def quantile(self, q: float, metric: MetricWrapperBase, /, **labels: str) -> float | None:
        """Of all histograms with these labels together; none if nothing was observed."""
        buckets = self.by("le", metric, "_bucket", **labels)
        return histogram_quantile(q, ((float(le), count) for le, count in buckets.items()))


def histogram_quantile(q: float, buckets: Iterable[tuple[float, float]]) -> float | None:
    """As PromQL's function of that name has it, of ``(upper bound, cumulative count)``.

    Within a bucket everything is spread evenly; what lies beyond the last finite bound is there.
    """
    bounds: list[float] = []
    counts: list[float] = []
    for bound, count in sorted(buckets):
        bounds.append(bound)
        counts.append(max(count, counts[-1] if counts else 0.0))
    if len(bounds) < 2 or bounds[-1] != math.inf or counts[-1] <= 0:
        return None
    rank = q * counts[-1]
    at = next(index for index, count in enumerate(counts) if count >= rank)
    if at == len(bounds) - 1:
        return bounds[-2]
    if at == 0 and bounds[0] <= 0:
        return bounds[0]
    start, below = (bounds[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    inside = counts[at] - below
    return start + (bounds[at] - start) * (rank - below) / inside if inside else None


WANTED = ("diffusion_serve_", PROCESS_MEMORY)
"""How the lines begin that are read."""


def read(text: str) -> Figures:
    """Of an answer in Prometheus' text format. Raises `ConfigError` if it is of something else."""
    lines = [line for line in text.split("\n") if line.startswith(WANTED)]
    series: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                float(sample.labels.get("le", "0"))
                if math.isfinite(sample.value):
                    labels = frozenset((name, _plain(it)) for name, it in sample.labels.items())
                    series.setdefault(sample.name, {})[labels] = float(sample.value)
    except (ValueError, IndexError, OverflowError) as error:
        why = _plain(str(error)[:200])
        raise ConfigError(f"/metrics is not in Prometheus' format: {why}") from None
    figures = Figures(series)
    if figures.total(TARGET_REPLICAS) is None:
        raise ConfigError("/metrics has no figures of diffusion-serve: it is another server's.")
    return figures


# ---- what rose -----------------------------------------------------------------------------------

CUMULATIVE = ("_total", "_bucket", "_count", "_sum")


def increases(before: Figures, now: Figures) -> Figures:
    """How far every cumulative series rose from one answer to the next.

    A replica that did not answer before counts from now on; one whose counters fell began anew, and
    all of it counts from 0, as does a series that its replica did not have.
    """
    known: set[str | None] = set()
    anew: set[str | None] = set()
    for name, values in before.series.items():
        for labels, value in values.items():
            replica = dict(labels).get("replica")
            known.add(replica)
            if name.endswith(CUMULATIVE) and now.series.get(name, {}).get(labels, value) < value:
                anew.add(replica)
    rose: dict[str, dict[Labels, float]] = {}
    for name, values in now.series.items():
        if not name.endswith(CUMULATIVE):
            continue
        earlier = before.series.get(name, {})
        for labels, value in values.items():
            replica = dict(labels).get("replica")
            if replica in known:
                since = 0.0 if replica in anew else earlier.get(labels, 0.0)
                rose.setdefault(name, {})[labels] = value - since
    return Figures(rose)


def added(several: Iterable[Figures]) -> Figures:
    """Series by series."""
    sums: dict[str, dict[Labels, float]] = {}
    for figures in several:
        for name, values in figures.series.items():
            sum_of = sums.setdefault(name, {})
            for labels, value in values.items():
                sum_of[labels] = sum_of.get(labels, 0.0) + value
    return Figures(sums)


@dataclass(frozen=True)
class View:
    """What is drawn: the last answer, and what rose in the seconds before it."""

    now: Figures
    rose: Figures
    seconds: float
    """0 after the first answer."""

    def rate(self, metric: MetricWrapperBase, part: str = "", /, **labels: str) -> float | None:
        """A second; none as long as nobody can know."""
        if not self.seconds:
            return None
        return (self.rose.total(metric, part, **labels) or 0.0) / self.seconds

    def mean(self, metric: MetricWrapperBase, /, **labels: str) -> float | None:
        """Of what a histogram observed."""
        count = self.rose.total(metric, "_count", **labels)
        return (self.rose.total(metric, "_sum", **labels) or 0.0) / count if count else None


class History:
    """The answers of the last seconds."""

    def __init__(self) -> None:
        self._last: tuple[float, Figures] | None = None
        self._rises: deque[tuple[float, Figures]] = deque()

    def add(self, at_s: float, figures: Figures) -> View:
        """``at_s``: of a clock that does not jump."""
        if self._last is not None:
            before_s, before = self._last
            self._rises.append((at_s - before_s, increases(before, figures)))
        self._last = at_s, figures
        seconds = sum(took_s for took_s, _ in self._rises)
        while self._rises and seconds - self._rises[0][0] >= WINDOW_S:
            seconds -= self._rises.popleft()[0]
        return View(figures, added(rise for _, rise in self._rises), seconds)

    def forget(self) -> None:
        """There is a gap: rates across it would be of the gap."""
        self._last = None
        self._rises.clear()


# ---- drawing -------------------------------------------------------------------------------------

UNKNOWN = "-"

WIDE = 110
"""Columns of a terminal in which it is said where a replica runs."""


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value < 1:
        return f"{value:.2g}" if value < 0.01 else f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return f"{_number(seconds)} s"


def _wait(seconds: float | None) -> str:
    """A quantile: beyond the last bound of the buckets, nobody knows by how much."""
    return f"over {WAITS_S[-1]:g} s" if seconds == WAITS_S[-1] else _duration(seconds)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"


def _rates(view: View, label: str, metric: MetricWrapperBase) -> str:
    """Of each value that was there, the most frequent first."""
    if not view.seconds:
        return UNKNOWN
    found = sorted(view.rose.by(label, metric).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{_number(n / view.seconds)}/s {what}" for what, n in found if n) or "none"


def _replicas(view: View) -> str:
    states = view.now.by("state", REPLICAS)
    words = [f"{states.pop('running', 0.0):.0f} running"]
    words += [f"{count:.0f} {state}" for state, count in states.items() if count]
    text = f"{', '.join(words)}; {_count(view.now.total(TARGET_REPLICAS))} wanted"
    starts = view.now.by("replica", COLD_START)
    if starts:
        longest = max(starts, key=lambda replica: (starts[replica], replica))
        phases = view.now.by("phase", COLD_START, replica=longest)
        slowest = max(phases, key=lambda phase: phases[phase])
        text += f"; cold start {_duration(starts[longest])}, most of it {slowest}"
    return text


def _waits(view: View) -> str:
    def quantiles(metric: MetricWrapperBase, /, **labels: str) -> str:
        half, most = (_wait(view.rose.quantile(q, metric, **labels)) for q in (0.5, 0.95))
        return f"p50 {half}, p95 {most}"

    held = view.now.total(HELD) or 0
    return (
        f"in queue {quantiles(REQUEST_PART, part='queue')}; in all {quantiles(REQUEST)}"
        + f"; {held:.0f} held for a replica to start" * (held > 0)
    )


def _requests(view: View) -> str:
    text, still = _rates(view, "outcome", REQUESTS), view.now.total(OPEN_REQUESTS)
    return text if still is None else f"{text}; {still:.0f} open"


def _slo(view: View) -> str:
    """As the alerts count it: who asks in vain does not get it in time either."""
    painted = view.rose.by("outcome", DEADLINES)
    ended = view.rose.by("outcome", REQUESTS, priority="interactive")
    asked = sum(painted.values()) + sum(ended.get(outcome, 0.0) for outcome in UNSERVED)
    if not asked:
        return UNKNOWN
    return f"{_share(painted.get('met', 0.0) / asked)} of {asked:.0f} asked for, in time"


def _painted(view: View) -> str:
    pictures, steps = view.rate(IMAGES), view.rate(STEPS)
    return (
        UNKNOWN if pictures is None else f"{_number(pictures)} pictures/s, {_number(steps)} steps/s"
    )


def _arriving(view: View) -> str:
    work = view.now.total(ARRIVING)
    if work is None:
        return UNKNOWN
    return f"work for {_number(work)} replicas, if no request shared a batch"


def _cancelled(view: View) -> str:
    rate, freed = view.rate(CANCELLATION, "_count"), view.rose.quantile(0.95, CANCELLATION)
    if not rate:
        return UNKNOWN if rate is None else "none"
    return f"{_number(rate)}/s, places free within {_duration(freed)} (p95)"


def _troubles(view: View) -> Iterator[str]:
    """What somebody on call should know of, if it is there."""
    for labels, value in view.now.where(SHARING):
        if value and labels.get(_name(SHARING), "batched") != "batched":
            replica = labels.get("replica", UNKNOWN)
            yield f"{replica} does not batch: its requests are {labels[_name(SHARING)]}"
    if view.seconds >= WINDOW_S:
        for replica in _answering(view):
            if _is_stuck(view, replica):
                yield f"{replica} has requests, and made no step in {view.seconds:.0f} s"
    if seconds := view.rose.total(STALL, "_sum"):
        yield f"engines stood still for {_duration(seconds)} between two calls"
    if count := view.rose.total(OUT_OF_MEMORY):
        yield f"calls that ran out of device memory: {count:.0f}"


def _answering(view: View) -> list[str]:
    return sorted(view.now.by("replica", ENGINE_INFO))


def _is_stuck(view: View, replica: str) -> bool:
    waiting = view.now.total(ENGINE_REQUESTS, replica=replica)
    return bool(waiting and view.seconds and not view.rose.total(STEPS, replica=replica))


def _painting(view: View, replica: str) -> Text:
    """The sizes, the one with most steps first."""
    if _is_stuck(view, replica):
        return Text("no step", "bold red")
    steps = view.rose.by("size", STEPS, replica=replica)
    sizes = sorted((size for size in steps if steps[size]), key=lambda size: -steps[size])
    if not sizes and not view.now.total(ENGINE_REQUESTS, replica=replica):
        return Text("idle", "dim")
    return Text(" ".join(sizes) or UNKNOWN)


def _memory(view: View, replica: str) -> str:
    """Of the GPU, whoever uses it; without one, of the process."""
    held = view.now.by("kind", DEVICE_MEMORY, replica=replica)
    if "total" in held and "free" in held:
        return f"{(held['total'] - held['free']) / 2**30:.0f}/{held['total'] / 2**30:.0f} GiB"
    resident = view.now.total(PROCESS_MEMORY, replica=replica)
    return UNKNOWN if resident is None else f"{resident / 2**30:.1f} GiB"


HEADS = ("QUEUED", "PARKED", "RUNNING", "BATCH", "BACKLOG", "STEPS/S", "BUSY", "MEMORY")


def _row(view: View, replica: str) -> list[str | Text]:
    of = {"replica": replica}
    states = view.now.by("state", ENGINE_REQUESTS, **of)
    busy = view.rate(DEVICE, **of)  # over 1 where a call ends that began earlier
    return [
        replica,
        _painting(view, replica),
        *(_count(states.get(state)) for state in ("queued", "parked", "running")),
        _number(view.mean(BATCH_SIZE, **of)),
        _duration(view.now.total(BACKLOG, **of)),
        _number(view.rate(STEPS, **of)),
        _share(None if busy is None else min(busy, 1.0)),
        _memory(view, replica),
    ]


def _table(view: View, width: int, lines: int | None) -> Table:
    """``lines``: there is room for, below the heads."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("REPLICA", no_wrap=True)
    table.add_column("PAINTS", no_wrap=True, overflow="ellipsis", min_width=8)
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    wide = width >= WIDE
    if wide:
        table.add_column("ON", no_wrap=True, overflow="ellipsis")
    others = [
        Text(f"{count:.0f} {state}", "yellow")
        for state, count in view.now.by("state", REPLICAS).items()
        if count and state not in ("running", "stopped")
    ]
    if silent := view.now.total(SCRAPED, deployment="Generator", answer="silent"):
        others.append(Text(f"{silent:.0f} silent", "bold red"))
    replicas = _answering(view)
    shown = len(replicas)
    if lines is not None and shown + len(others) > lines:
        shown = max(lines - len(others) - 1, 0)
        others.insert(0, Text(f"{len(replicas) - shown} more"))
    for replica in replicas[:shown]:
        [where, *_] = (labels for labels, _ in view.now.where(ENGINE_INFO, replica=replica))
        place = " ".join(where.get(label, "") for label in ("node", "device", "gpu"))
        table.add_row(*_row(view, replica), *([place] if wide else []))
    for other in others:
        table.add_row(other)
    return table


def frame(
    server: Server,
    view: View,
    clock: str,
    console: Console,
    height: int | None = None,
    notice: str = "",
) -> RenderableType:
    """``clock``: when it was so; ``height``: the lines that there are, if they are few."""
    versions = {**view.now.by("version", GATEWAY_INFO), **view.now.by("version", ENGINE_INFO)}
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(", ".join(view.now.by("model", TARGET_REPLICAS)), "bold")
    title.append(f" at {server.url}  {' '.join(sorted(versions))}  {clock}  ")
    title.append(f"last {view.seconds:.0f} s" if view.seconds else "measuring", "dim")
    parts = Table.grid(padding=(0, 2, 0, 0))
    parts.add_column(style="bold", no_wrap=True)
    for name, said in (
        ("Replicas", _replicas(view)),
        ("Arriving", _arriving(view)),
        ("Requests", _requests(view)),
        ("Painted", _painted(view)),
        ("Wait", _waits(view)),
        ("SLO", _slo(view)),
        ("Refused", _rates(view, "reason", REFUSALS)),
        ("Cancelled", _cancelled(view)),
    ):
        parts.add_row(name, said)
    for trouble in _troubles(view):
        parts.add_row(Text("Trouble", "red"), trouble)
    told = [Text(notice, "bold red")] if notice else []
    above = Group(*told, title, "", parts, "")
    lines = None if height is None else height - len(console.render_lines(above)) - 1
    return Group(above, _table(view, console.width, lines))


# ---- watching ------------------------------------------------------------------------------------


def watch(server: Server, console: Console, every_s: float, once: bool) -> None:
    """Until Ctrl-C. Raises what `Server.ask` does, but goes on after the first frame."""
    history = History()
    view, clock = history.add(time.monotonic(), server.ask()), _clock()
    if once:
        time.sleep(every_s)
        view = history.add(time.monotonic(), server.ask())
        console.print(frame(server, view, _clock(), console))
        return
    notice = ""
    with _shown(console) as show:
        while True:
            height = console.height if console.is_alt_screen else None
            show(frame(server, view, clock, console, height, notice))
            time.sleep(every_s)
            try:
                view, clock = history.add(time.monotonic(), server.ask()), _clock()
                notice = ""
            except (Unavailable, InvalidKey, ConfigError) as error:
                history.forget()
                notice = f"{_clock()}: {error} What is below was so at {clock}. Asking on."


def _clock() -> str:
    return time.strftime("%H:%M:%S")


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """One over the other in a terminal; else one below the other, as text."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda drawn: console.print(drawn, "")
        return
    # Who is told to end by `kill` leaves the terminal as it was, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda drawn: live.update(drawn, refresh=True)
