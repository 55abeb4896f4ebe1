"""Compare this server with the simplest ones: ``python -m tests.benchmarks.peers``.

The peers are ``lock.py``, one request at a time, and ``batch.py``, whole requests in batches. Ours
is ``serve run`` with configs/demo.yaml. Each is a process of its own with one thread of torch, and
stays up for the whole run. Only one has requests at a time. Each load runs on one server after the
other, once a round, and their order rotates. ``tests/benchmarks/peers/load.py`` defines
what is counted.

The table also has the cores that each server used, that the idle ones used, and that all other
programs used. Where programs and server together need all cores, their shares distort the row.

Before the loads, each server generates the same images, alone and together, which warms it up. They
must be (nearly) the same ones as those of the first server.
"""

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from ray import __version__ as ray_version

from serve_app.engine.startup.comparison import psnr_db
from tests.benchmarks.engine import hardware
from tests.benchmarks.overload import Kind
from tests.benchmarks.peers.load import (
    LOADS,
    Answer,
    Load,
    Request,
    at_once,
    measured,
    run,
    weights,
)
from tests.benchmarks.peers.report import Row, aims, show, summaries
from tests.benchmarks.peers.servers import NAMES, OURS, PEERS, Calls, Server

SOLO = 5
"""Requests of each kind, one after another, before the measurement."""

TOGETHER = 8
"""Requests of each kind at once, before the measurement."""

QUICK = {"seconds": 0.1, "steps": 0.25}
"""Factors of a rehearsal."""


@dataclass
class Reference:
    """The images of the first server, and how close those of the others are."""

    images: dict[tuple[Kind, int], torch.Tensor] = field(default_factory=dict)
    psnr_db: dict[str, float] = field(default_factory=dict)
    """Least ratio of a server's images."""
    solo_s: dict[Kind, float] = field(default_factory=dict)
    """Least time of a request alone, on any server: other programs only add to it."""

    @property
    def least_psnr_db(self) -> float:
        return min(self.psnr_db.values())

    def compare(self, server: str, answer: Answer) -> None:
        image = answer.image()
        if image is None:
            raise AssertionError(f"{server} answered {answer.request}: {answer.response.text:.300}")
        pixels = torch.tensor(image) / 255
        first = self.images.setdefault((answer.request.kind, answer.request.seed), pixels)
        ratio = psnr_db(first, pixels)
        self.psnr_db[server] = min(ratio, self.psnr_db.get(server, ratio))


def warm_up(server: Server, kinds: Sequence[Kind], reference: Reference) -> None:
    """Generate images of all kinds, alone and together, and compare them with the first ones."""
    for kind in kinds:
        for seed in range(SOLO):
            [answer] = asyncio.run(at_once(server.url, [Request(kind, seed)]))
            reference.compare(server.name, answer)
            reference.solo_s[kind] = min(answer.took_s, reference.solo_s.get(kind, answer.took_s))
        if server.name != "lock":
            requests = [Request(kind, seed) for seed in range(TOGETHER)]
            for answer in asyncio.run(at_once(server.url, requests)):
                reference.compare(server.name, answer)


def mean_batch_size(before: Calls | None, after: Calls | None) -> float | None:
    if before is None or after is None or after.number == before.number:
        return None
    return (after.images - before.images) / (after.number - before.number)


def measure(
    number: int, load: Load, server: Server, others: Sequence[Server], solo_s: dict[Kind, float]
) -> Row:
    """Run one load on one server, while the others are idle."""
    calls, cpu_s = server.calls(), server.cpu_s()
    others_s, all_s = idle_cpu_s(others), machine_cpu_s()
    own_s, started_at = time.process_time(), time.perf_counter()
    answers = asyncio.run(run(server.url, load, seed=number))
    took_s, own_s = time.perf_counter() - started_at, time.process_time() - own_s
    others_s, all_s = idle_cpu_s(others) - others_s, machine_cpu_s() - all_s
    used_s = [now_s - cpu_s.get(pid, 0.0) for pid, now_s in server.cpu_s().items()]
    return Row(
        number,
        load.name,
        server.name,
        **asdict(measured(load, answers, weights(load.kinds, solo_s))),
        mean_batch_size=mean_batch_size(calls, server.calls()),
        cores=sum(used_s) / took_s,
        busiest_cores=max(used_s) / took_s,
        others_cores=others_s / took_s,
        programs_cores=max(0.0, all_s - sum(used_s) - others_s - own_s) / took_s,
    )


def idle_cpu_s(servers: Sequence[Server]) -> float:
    return sum(sum(server.cpu_s().values()) for server in servers)


def machine_cpu_s() -> float:
    """Return the CPU time of all programs so far, and that which a host gave to other machines."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def result(rows: Sequence[Row], reference: Reference) -> dict[str, Any]:
    """Return what was measured, for the file."""
    return {
        "rounds": 1 + max(row.round for row in rows),
        "psnr_db": reference.psnr_db,
        "kinds": [asdict(kind) | {"solo_s": reference.solo_s[kind]} for kind in reference.solo_s],
        "rows": [asdict(row) for row in rows],
        "summary": [asdict(one) for one in summaries(rows)],
        "aims": [
            asdict(aim) | {"verdict": aim.verdict} for aim in aims(rows, reference.least_psnr_db)
        ],
    }


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Hold the lock of this file, if there is one, as flock(1) does."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all loads.")] = 3,
    server: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(NAMES)}; may be repeated. Default: the first three."),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option(help="Loads, by their number of clients; may be repeated. Default: all."),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="Change of our config, as engine.KEY=VALUE; may be repeated."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A rehearsal: one short round with fewer steps.")
    ] = False,
    turns: Annotated[
        Path | None,
        typer.Option(help="File to lock during each round, to take turns with other benchmarks."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File for the results, as JSON.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    names = server or [*PEERS, OURS]
    if unknown := set(names) - set(NAMES):
        raise typer.BadParameter(f"{sorted(unknown)} is none of {', '.join(NAMES)}.")
    loads = [load for load in LOADS if not clients or load.clients in clients]
    if not loads:
        choices = ", ".join(str(load.clients) for load in LOADS)
        raise typer.BadParameter(f"no load has {clients} clients; choose among {choices}.")
    if quick:
        rounds, loads = 1, [load.scaled(**QUICK) for load in loads]
    kinds = list(dict.fromkeys(kind for load in loads for kind in load.kinds))
    # Without the files of this machine, which mean nothing on another one.
    options = {"clients": clients or [], "server": server or [], "override": override or []}
    command = f"python -m tests.benchmarks.peers --rounds {rounds}" + " --quick" * quick
    command += "".join(f" --{name} {one}" for name, given in options.items() for one in given)
    context = {
        "command": command,
        "hardware": hardware(torch.device("cpu")) | {"ray": ray_version},
        "load_average_before": list(os.getloadavg()),
        "loads": [asdict(load) for load in loads],
    }
    reference, rows = Reference(), []
    with contextlib.ExitStack() as running:
        servers: list[Server] = []
        for number in range(rounds):
            with turn(turns):
                if not servers:
                    servers = [Server.start(name, override or []) for name in names]
                    for one in servers:
                        running.callback(one.stop)
                    for one in servers:
                        one.wait_until_ready()
                        warm_up(one, kinds, reference)
                        ratio = reference.psnr_db[one.name]
                        typer.echo(f"{one.name} is ready, PSNR {ratio:.1f} dB")
                first = number % len(servers)
                for load, one in itertools.product(loads, servers[first:] + servers[:first]):
                    others = [other for other in servers if other is not one]
                    rows.append(measure(number, load, one, others, reference.solo_s))
                    typer.echo(str(rows[-1]))
            if output is not None:  # after each round, so that an early end loses no other
                output.write_text(json.dumps(context | result(rows, reference), indent=2) + "\n")
    typer.echo(f"\nmedians of {rounds} rounds, least and greatest in brackets")
    typer.echo(show(summaries(rows)))
    for aim in aims(rows, reference.least_psnr_db):
        typer.echo(f"{aim.text}: {aim.verdict}")
    typer.echo("\n".join(f"{name}: {context[name]}" for name in context if name != "loads"))


if __name__ == "__main__":
    typer.run(main)
