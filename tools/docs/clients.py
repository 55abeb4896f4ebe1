"""Tables of the calls of real clients, rendered from what ``tests.clients`` wrote."""

from tools.docs.markdown import table
from tools.docs.results import results

RUN = "run"
"""How the calls of clients with a program are made."""


def clients_table() -> str:
    """Compare the calls of the clients that have a program, by client."""
    rows = [row for row in _rows() if row["how"] == RUN]
    names = list(dict.fromkeys(row["client"] for row in rows))
    calls = list(dict.fromkeys(row["call"] for row in rows))
    cells = {(row["client"], row["call"]): row["outcome"] for row in rows}
    lines = [[call, *(cells.get((name, call), "—") for name in names)] for call in calls]
    return table(["call", *names], lines)


def front_ends_table() -> str:
    """List the calls of the other clients, and how they were made."""
    rows = [row for row in _rows() if row["how"] != RUN]
    lines = [[row["client"], row["call"], row["outcome"], row["how"]] for row in rows]
    return table(["client", "call", "result", "how"], lines)


def client_errors_table() -> str:
    """List the messages of the calls that are clear errors, as OpenAI's Python client has them."""
    rows = [row for row in _rows() if row["error"] and row["client"] == "openai-python"]
    lines = [[row["call"], row["error"].partition(" - ")[2]] for row in rows]
    return table(["call", "message"], lines)


def client_versions() -> str:
    """Name the clients with their versions."""
    found = {row["client"]: row["version"] for row in _rows() if row["version"]}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _rows() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = results("clients")["rows"]
    return rows
