"""Arrivals to replay: read from a file or drawn, with a mix of kinds of requests."""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from serve_app.engine.scheduling.cost import Size
from serve_app.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    size: Size
    """(width, height) in pixels."""
    steps: int

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]}/{self.steps}"


Mix = dict[Kind, float]
"""Kinds with their shares, in any unit."""

MOST_ARRIVALS = 20_000_000
"""Largest number of arrivals that fits into the memory of a laptop."""


@dataclass(frozen=True)
class Trace:
    """Arrival times in seconds from the start, in order, with the kind of each request."""

    at_s: Sequence[float]
    kinds: Sequence[Kind]

    @property
    def duration_s(self) -> float:
        return self.at_s[-1] if self.at_s else 0.0


def parse_mix(text: str) -> Mix:
    """Parse a mix, ``512x512/20:15,1024x1024/25:85``: sizes, steps, and shares in any unit.

    Raises:
        ConfigError: naming the wrong entry.
    """
    mix: Mix = {}
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})/(\d{1,4}):(\d+(?:\.\d+)?)\s*", entry)
        if match is None or not all(int(number) for number in match.groups()[:3]):
            raise ConfigError(
                f"the mix has {entry.strip()!r}; write WIDTHxHEIGHT/STEPS:SHARE, such as "
                "512x512/20:15, with commas in between."
            )
        kind = Kind((int(match[1]), int(match[2])), int(match[3]))
        mix[kind] = mix.get(kind, 0.0) + float(match[4])
    if not sum(mix.values()) > 0:
        raise ConfigError("the shares of the mix add up to 0.")
    return mix


def drawn(at_s: Sequence[float], mix: Mix, mix_at_end: Mix | None, seed: int) -> Trace:
    """Draw a kind for each arrival from the mix, which drifts to ``mix_at_end``."""
    rng = Random(seed)
    if mix_at_end is None:
        return Trace(at_s, rng.choices(list(mix), list(mix.values()), k=len(at_s)))
    kinds = list(dict.fromkeys([*mix, *mix_at_end]))
    start, end = _shares(mix), _shares(mix_at_end)
    duration_s = at_s[-1] if at_s else 0.0
    chosen = []
    for at in at_s:
        share = at / duration_s if duration_s else 0.0
        weights = [
            (1 - share) * start.get(kind, 0.0) + share * end.get(kind, 0.0) for kind in kinds
        ]
        chosen += rng.choices(kinds, weights)
    return Trace(at_s, chosen)


def poisson(rate: float, duration_s: float, seed: int) -> list[float]:
    """Draw arrivals at a steady rate, in requests per second."""
    rng = Random(seed)
    at_s: list[float] = []
    now = rng.expovariate(rate)
    while now < duration_s:
        at_s.append(now)
        now += rng.expovariate(rate)
    return at_s


def read_arrivals(
    path: Path, stretch: float, share: float = 1.0, seed: int = 1
) -> tuple[list[float], list[Kind] | None]:
    """Read arrival times, and kinds where the file has them.

    The file is a CSV with the columns ``at_s``, ``size`` (WIDTHxHEIGHT) and ``steps``; or one with
    ``hour`` and ``invocations``, as of Azure Functions, spread at random over each hour; or it has
    one time per line in milliseconds, as DiffServe's traces. A ``share`` of all is drawn. Times are
    multiplied by ``stretch``.

    Raises:
        ConfigError: naming the wrong line.
    """
    rng = Random(seed)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    lines = text.splitlines()
    entries: list[tuple[float, Kind | None]] = []
    if lines and "invocations" in lines[0]:
        entries = [(at, None) for at in _by_the_hour(lines, path, share, rng)]
        share = 1.0
    elif lines and "at_s" in lines[0]:
        reader = csv.DictReader(lines)
        missing = {"at_s", "size", "steps"} - set(reader.fieldnames or ())
        if missing:
            raise ConfigError(f"{path}: there is no column {', '.join(sorted(missing))}.")
        for number, row in enumerate(reader, 2):
            size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", row["size"] or "")
            steps = row["steps"] or ""
            if size is None or not steps.isdecimal() or not int(steps):
                raise ConfigError(
                    f"{path}, line {number}: size must be WIDTHxHEIGHT and steps a number."
                )
            kind = Kind((int(size[1]), int(size[2])), int(steps))
            entries.append((_number(row["at_s"], "time from the start", path, number), kind))
    else:
        for number, line in enumerate(lines, 1):
            if line.strip():
                at_ms = _number(line, "time from the start", path, number)
                entries.append((at_ms / 1_000, None))
    if share < 1:
        entries = [entry for entry in entries if rng.random() < share]
    if not entries:
        raise ConfigError(f"{path}: there is no arrival in it.")
    entries.sort(key=lambda entry: entry[0])
    at_s = [at * stretch for at, _ in entries]
    kinds = [kind for _, kind in entries if kind is not None]
    return at_s, kinds or None


def _by_the_hour(lines: Sequence[str], path: Path, share: float, rng: Random) -> Iterator[float]:
    """Draw arrivals in seconds from counts by the hour."""
    reader = csv.DictReader(lines)
    if "hour" not in (reader.fieldnames or ()):
        raise ConfigError(f"{path}: there is no column hour.")
    counts = [
        (
            _number(row["hour"], "hour from the start", path, number),
            _number(row["invocations"], "count", path, number),
        )
        for number, row in enumerate(reader, 2)
    ]
    whole = sum(invocations for _, invocations in counts)
    if whole * share > MOST_ARRIVALS:
        raise ConfigError(
            f"{path} has {whole:,.0f} arrivals; at most {MOST_ARRIVALS:,} are replayed. Take the "
            "share that your cluster would get with --share, such as --share 0.001."
        )
    for hour, invocations in counts:
        for _ in range(math.floor(invocations * share + rng.random())):
            yield 3_600 * (hour + rng.random())


def _number(text: str | None, what: str, path: Path, number: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{path}, line {number}: {text!r} is no {what}.")
    return value


def _shares(mix: Mix) -> Mix:
    whole = sum(mix.values())
    return {kind: share / whole for kind, share in mix.items()}
