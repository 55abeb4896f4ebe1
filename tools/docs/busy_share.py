"""The table of the simulated busy shares, from the file of ``tests.benchmarks.busy_share``."""

from typing import Any

from tools.docs.markdown import table
from tools.docs.results import results


def _share(stock: bool, **cell: Any) -> float:
    """Return the share of one simulation."""
    found = [
        one
        for one in results("busy-share")["rows"]
        if one["stock"] == stock and all(one[name] == value for name, value in cell.items())
    ]
    [one] = found
    return float(one["busy_share"])


def busy_share_table() -> str:
    """Show the shares with each noise scheduler: as stock pipelines wait, and with the engine."""
    rows = results("busy-share")["rows"]
    calls_ms = sorted({one["call_ms"] for one in rows})
    batches = sorted({one["batch"] for one in rows})
    lines = []
    for name in dict.fromkeys(one["noise_scheduler"] for one in rows):
        line = [f"`{name}`"]
        for call_ms in calls_ms:
            cell = {"noise_scheduler": name, "call_ms": call_ms}
            line.append(", ".join(f"{_share(True, **cell, batch=one):.0%}" for one in batches))
        mine = [one for one in rows if one["noise_scheduler"] == name and not one["stock"]]
        line.append(f"{min(one['busy_share'] for one in mine):.0%}")
        lines.append(line)
    header = ["noise scheduler", *(f"stock, {call_ms} ms" for call_ms in calls_ms)]
    return table([*header, "engine, at least"], lines)
