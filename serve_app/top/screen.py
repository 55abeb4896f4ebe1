"""Draws a snapshot: totals, problems, and one line for each replica."""

from collections.abc import Iterator

from prometheus_client.metrics import MetricWrapperBase
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from serve_app.config.deployment_names import GATEWAY
from serve_app.metrics.application import REPLICAS, SCRAPED, TARGET_REPLICAS
from serve_app.metrics.engine import (
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
    IMAGES,
    OUT_OF_MEMORY,
    REJECTIONS,
    SHARING,
    STALL,
    STEPS,
)
from serve_app.metrics.gateway import (
    GATEWAY_INFO,
    OPEN_REQUESTS,
    REQUEST,
    REQUEST_PART,
    REQUESTS,
    WAITING_FOR_REPLICA,
    WAITS_S,
)
from serve_app.metrics.labels import UNSERVED
from serve_app.top.series import PROCESS_MEMORY, sample_name
from serve_app.top.server import Server
from serve_app.top.snapshot import WINDOW_S, Snapshot

UNKNOWN = "-"

WIDE = 110
"""Terminal width, in columns, from which the node of each replica is displayed, and its model
if there are several."""


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
    """Format a quantile. Above the last bucket bound, only the bound is known."""
    return f"over {WAITS_S[-1]:g} s" if seconds == WAITS_S[-1] else _duration(seconds)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"


def _rates(snapshot: Snapshot, label: str, metric: MetricWrapperBase) -> str:
    """Format the rate of each label value, most frequent first."""
    if not snapshot.seconds:
        return UNKNOWN
    found = sorted(snapshot.rose.by(label, metric).items(), key=lambda item: (-item[1], item[0]))
    return (
        ", ".join(f"{_number(n / snapshot.seconds)}/s {what}" for what, n in found if n) or "none"
    )


def _models(snapshot: Snapshot) -> list[str]:
    return list(snapshot.now.by("model", TARGET_REPLICAS))


def _replicas(snapshot: Snapshot) -> str:
    """Format the replicas; with several models, a line for each."""
    models = _models(snapshot)
    lines = [_replicas_of(snapshot, model) for model in models]
    if len(models) > 1:
        lines = [f"{model}: {line}" for model, line in zip(models, lines, strict=True)]
    return "\n".join(lines)


def _replicas_of(snapshot: Snapshot, model: str) -> str:
    states = snapshot.now.by("state", REPLICAS, model=model)
    words = [f"{states.pop('running', 0.0):.0f} running"]
    words += [f"{count:.0f} {state}" for state, count in states.items() if count]
    target = snapshot.now.total(TARGET_REPLICAS, model=model)
    text = f"{', '.join(words)}; target {_count(target)}"
    if waiting := snapshot.now.total(WAITING_FOR_REPLICA, model=model):
        text += f"; {waiting:.0f} requests wait for a replica to start"
    starts = snapshot.now.by("replica", COLD_START, model=model)
    if starts:
        longest = max(starts, key=lambda replica: (starts[replica], replica))
        phases = snapshot.now.by("phase", COLD_START, replica=longest)
        slowest = max(phases, key=lambda phase: phases[phase])
        text += f"; cold start {_duration(starts[longest])}, most of it {slowest}"
    return text


def _waits(snapshot: Snapshot) -> str:
    def quantiles(metric: MetricWrapperBase, /, **labels: str) -> str:
        half, most = (_wait(snapshot.rose.quantile(q, metric, **labels)) for q in (0.5, 0.95))
        return f"p50 {half}, p95 {most}"

    return f"queue {quantiles(REQUEST_PART, part='queue')}; total {quantiles(REQUEST)}"


def _requests(snapshot: Snapshot) -> str:
    text, still = _rates(snapshot, "outcome", REQUESTS), snapshot.now.total(OPEN_REQUESTS)
    return text if still is None else f"{text}; {still:.0f} open"


def _slo(snapshot: Snapshot) -> str:
    """Format the share in time, as the alerts count it: rejected and failed requests are late."""
    generated = snapshot.rose.by("outcome", DEADLINES)
    ended = snapshot.rose.by("outcome", REQUESTS, priority="interactive")
    tried = sum(generated.values()) + sum(ended.get(outcome, 0.0) for outcome in UNSERVED)
    if not tried:
        return UNKNOWN
    return f"{_share(generated.get('met', 0.0) / tried)} of {tried:.0f} attempts in time"


def _generated(snapshot: Snapshot) -> str:
    images, steps = snapshot.rate(IMAGES), snapshot.rate(STEPS)
    return UNKNOWN if images is None else f"{_number(images)} images/s, {_number(steps)} steps/s"


def _arriving(snapshot: Snapshot) -> str:
    work = snapshot.now.total(ARRIVING)
    if work is None:
        return UNKNOWN
    return f"work for {_number(work)} replicas without batching"


def _cancelled(snapshot: Snapshot) -> str:
    rate, freed = snapshot.rate(CANCELLATION, "_count"), snapshot.rose.quantile(0.95, CANCELLATION)
    if not rate:
        return UNKNOWN if rate is None else "none"
    return f"{_number(rate)}/s, slots free within {_duration(freed)} (p95)"


def _problems(snapshot: Snapshot) -> Iterator[str]:
    """Yield the problems that an operator should know."""
    for labels, value in snapshot.now.where(SHARING):
        if value and labels.get(sample_name(SHARING), "batched") != "batched":
            replica = labels.get("replica", UNKNOWN)
            mode = labels[sample_name(SHARING)]
            yield f"{replica} does not batch: its requests are {mode}"
    if snapshot.seconds >= WINDOW_S:
        for replica in _answering(snapshot):
            if _is_stuck(snapshot, replica):
                yield (
                    f"{replica} has requests and made no denoiser call for {snapshot.seconds:.0f} s"
                )
    if seconds := snapshot.rose.total(STALL, "_sum"):
        yield f"engines had requests and made no network call for {_duration(seconds)} in total"
    if count := snapshot.rose.total(OUT_OF_MEMORY):
        yield f"network calls that ran out of device memory: {count:.0f}"


def _answering(snapshot: Snapshot) -> list[str]:
    """Return the replicas that report, those of one model after the other."""
    found = (labels for labels, _ in snapshot.now.where(ENGINE_INFO))
    named = sorted((labels.get("model", UNKNOWN), labels["replica"]) for labels in found)
    return [replica for _, replica in named]


def _is_stuck(snapshot: Snapshot, replica: str) -> bool:
    waiting = snapshot.now.total(ENGINE_REQUESTS, replica=replica)
    return bool(waiting and snapshot.seconds and not snapshot.rose.total(STEPS, replica=replica))


def _sizes(snapshot: Snapshot, replica: str) -> Text:
    """Format the image sizes in progress, most steps first."""
    if _is_stuck(snapshot, replica):
        return Text("no step", "bold red")
    steps = snapshot.rose.by("size", STEPS, replica=replica)
    sizes = sorted((size for size in steps if steps[size]), key=lambda size: -steps[size])
    if not sizes and not snapshot.now.total(ENGINE_REQUESTS, replica=replica):
        return Text("idle", "dim")
    return Text(" ".join(sizes) or UNKNOWN)


def _memory(snapshot: Snapshot, replica: str) -> str:
    """Format the used memory of the GPU, by any process; without a GPU, that of this process."""
    memory = snapshot.now.by("kind", DEVICE_MEMORY, replica=replica)
    if "total" in memory and "free" in memory:
        return f"{(memory['total'] - memory['free']) / 2**30:.0f}/{memory['total'] / 2**30:.0f} GiB"
    resident = snapshot.now.total(PROCESS_MEMORY, replica=replica)
    return UNKNOWN if resident is None else f"{resident / 2**30:.1f} GiB"


HEADS = ("QUEUED", "PARKED", "RUNNING", "BATCH", "BACKLOG", "STEPS/S", "BUSY", "MEMORY")


def _row(snapshot: Snapshot, replica: str) -> list[str | Text]:
    of = {"replica": replica}
    states = snapshot.now.by("state", ENGINE_REQUESTS, **of)
    busy = snapshot.rate(DEVICE, **of)  # over 1 when a call that began earlier ends
    return [
        replica,
        _sizes(snapshot, replica),
        *(_count(states.get(state)) for state in ("queued", "parked", "running")),
        _number(snapshot.mean(BATCH_SIZE, **of)),
        _duration(snapshot.now.total(BACKLOG, **of)),
        _number(snapshot.rate(STEPS, **of)),
        _share(None if busy is None else min(busy, 1.0)),
        _memory(snapshot, replica),
    ]


def _silent_generators(snapshot: Snapshot) -> float:
    """Return the number of generator replicas, of all models, that did not report."""
    everyone = snapshot.now.total(SCRAPED, answer="silent") or 0.0
    return everyone - (snapshot.now.total(SCRAPED, deployment=GATEWAY, answer="silent") or 0.0)


def _table(snapshot: Snapshot, width: int, lines: int | None) -> Table:
    """Build the table of replicas, with at most ``lines`` lines below the column names."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("REPLICA", no_wrap=True)
    table.add_column("SIZES", no_wrap=True, overflow="ellipsis", min_width=8)
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    wide = width >= WIDE
    several = len(_models(snapshot)) > 1
    if wide and several:
        table.add_column("MODEL", no_wrap=True, overflow="ellipsis")
    if wide:
        table.add_column("NODE", no_wrap=True, overflow="ellipsis")
    others = [
        Text(f"{count:.0f} {of['state']}" + f" of {of['model']}" * several, "yellow")
        for of, count in snapshot.now.where(REPLICAS)
        if count and of["state"] not in ("running", "stopped")
    ]
    if silent := _silent_generators(snapshot):
        others.append(Text(f"{silent:.0f} silent", "bold red"))
    replicas = _answering(snapshot)
    shown = len(replicas)
    if lines is not None and shown + len(others) > lines:
        shown = max(lines - len(others) - 1, 0)
        others.insert(0, Text(f"{len(replicas) - shown} more"))
    for replica in replicas[:shown]:
        [where, *_] = (labels for labels, _ in snapshot.now.where(ENGINE_INFO, replica=replica))
        model = [where.get("model", UNKNOWN)] if wide and several else []
        place = [" ".join(where.get(it, "") for it in ("node", "device", "gpu"))] if wide else []
        table.add_row(*_row(snapshot, replica), *model, *place)
    for other in others:
        table.add_row(other)
    return table


def frame(
    server: Server,
    snapshot: Snapshot,
    clock: str,
    console: Console,
    height: int | None = None,
    notice: str = "",
) -> RenderableType:
    """Build one frame. ``clock``: time of the data; ``height``: available lines, or None."""
    versions = {
        **snapshot.now.by("version", GATEWAY_INFO),
        **snapshot.now.by("version", ENGINE_INFO),
    }
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(", ".join(_models(snapshot)), "bold")
    title.append(f" at {server.url}  {' '.join(sorted(versions))}  {clock}  ")
    title.append(f"last {snapshot.seconds:.0f} s" if snapshot.seconds else "measuring", "dim")
    parts = Table.grid(padding=(0, 2, 0, 0))
    parts.add_column(style="bold", no_wrap=True)
    for name, text in (
        ("Replicas", _replicas(snapshot)),
        ("Arriving", _arriving(snapshot)),
        ("Requests", _requests(snapshot)),
        ("Generated", _generated(snapshot)),
        ("Wait", _waits(snapshot)),
        ("SLO", _slo(snapshot)),
        ("Rejected", _rates(snapshot, "reason", REJECTIONS)),
        ("Cancelled", _cancelled(snapshot)),
    ):
        parts.add_row(name, text)
    for problem in _problems(snapshot):
        parts.add_row(Text("Problem", "red"), problem)
    above_title = [Text(notice, "bold red")] if notice else []
    above = Group(*above_title, title, "", parts, "")
    lines = None if height is None else height - len(console.render_lines(above)) - 1
    return Group(above, _table(snapshot, console.width, lines))
