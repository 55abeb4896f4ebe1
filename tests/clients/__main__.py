"""Make the calls of real clients to the demo: ``python -m tests.clients --output FILE``.

Each client runs in an environment of its own below ``--folder``, where its packages are installed
once. Node.js with npm, Chromium and a package index are needed, and 9 GB of disk for Open WebUI.
Calls that fail are made again with other settings of the gateway. The last error of a call that
never works is the server's answer to it, which must be a 4xx.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.clients import environments
from tests.clients.client import PROGRAMS, Client, Outcomes, node
from tests.clients.open_webui import OpenWebui
from tests.clients.replayed import replayed_clients
from tests.docs.images import FOLDER as IMAGES
from tests.docs.images import save
from tests.serve_process import ROOT, demo_config, free_port, serving_config

ALIASES = {"gpt-*": "demo", "dall-e-*": "demo"}


def settings(folder: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Return settings of the gateway, by the outcome of calls that work with them first.

    Beside them is a part of the names of the calls that they can help.
    """
    aliases = {"model_aliases": ALIASES}
    links = {"url": Path(folder).as_uri(), "default_for": ["*"]}
    return {
        "works": ({}, ""),
        "works with `sdapi`": ({"sdapi": True}, "2img"),
        "works with aliases": (aliases, ""),
        "works with storage": (aliases | {"storage": links}, "URL"),
    }


NAMES = ("openai-python", "openai-node", "Vercel AI SDK", "LiteLLM", "LangChain", "Open WebUI")
"""Clients that run, in the order of the tables. Those whose requests are sent again follow."""

CLEAR_ERROR = "clear error"
FAILS = "fails"


def clients_in(folder: Path, names: Sequence[str]) -> list[Client]:
    """Return the clients, or those with these names, and install what they need."""
    wanted = set(names or NAMES)
    found: list[Client] = []
    if "openai-python" in wanted:
        found.append(environments.openai_python(folder / "openai-python"))
    if wanted & {"openai-node", "Vercel AI SDK"}:
        assert node(), "Node.js with npm is needed"
        environments.node_packages(folder / "node")
        both = (environments.openai_node(folder / "node"), environments.vercel(folder / "node"))
        found += [client for client in both if client.name in wanted]
    if wanted & {"LiteLLM", "LangChain"}:
        requirements = ("--requirement", str(PROGRAMS / "requirements.txt"))
        python = environments.python_packages(folder / "python", *requirements)
        made = (environments.litellm, environments.langchain)
        both = tuple(make(folder / "calls", python) for make in made)
        found += [client for client in both if client.name in wanted]
    if "Open WebUI" in wanted:
        python = environments.python_packages(folder / "open-webui", environments.OPEN_WEBUI)
        found.append(OpenWebui(python, IMAGES, save))
    return [*found, *(one for one in replayed_clients() if not names or one.name in wanted)]


def made(clients: Sequence[Client], folder: str) -> list[dict[str, str]]:
    """Make the calls of the clients, and return a row for each. The folder stores images."""
    outcomes: dict[str, dict[str, str]] = {client.name: {} for client in clients}
    errors: dict[str, Outcomes] = {client.name: {} for client in clients}
    for outcome, (gateway, part) in settings(folder).items():
        left = {
            client: [call for call in errors[client.name] if part in call] for client in clients
        }
        if outcomes[clients[-1].name] and not any(left.values()):
            continue
        config = demo_config(free_port())
        config["applications"][0]["args"]["gateway"] = gateway
        with serving_config(config) as url:
            for client, calls in left.items():
                if outcomes[client.name] and not calls:
                    continue
                for call, found in client.make(url, calls).items():
                    print(f"{outcome}, {client.name}, {call}: {found}", flush=True)
                    if "images" in found:
                        outcomes[client.name][call] = outcome
                        errors[client.name].pop(call, None)
                    else:
                        outcomes[client.name].setdefault(call, "")
                        errors[client.name][call] = found
    rows = []
    for client in clients:
        version = client.version()
        for call, outcome in outcomes[client.name].items():
            error = errors[client.name].get(call)
            if error is not None:
                refused = error["status"] is not None and 400 <= error["status"] < 500
                outcome = CLEAR_ERROR if refused else FAILS
            rows.append(
                {
                    "client": client.name,
                    "version": version,
                    "how": client.how,
                    "call": call,
                    "outcome": outcome,
                    "error": "" if error is None else error["message"],
                }
            )
    return rows


def main(
    output: Annotated[Path | None, typer.Option(help="Write the outcomes to this file.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the environments.")] = ROOT
    / "build"
    / "clients",
    client: Annotated[list[str] | None, typer.Option(help="Only this client.")] = None,
) -> None:
    """Make the calls of real clients to the demo."""
    clients = clients_in(folder.resolve(), client or ())
    with tempfile.TemporaryDirectory() as stored:
        rows = made(clients, stored)
    if output is not None:
        names = {one.name for one in clients}
        earlier = json.loads(output.read_text())["rows"] if output.exists() else []
        kept = [row for row in earlier if row["client"] not in names] if client else []
        order = [*NAMES, *sorted(one.name for one in replayed_clients())]
        ordered = sorted(kept + rows, key=lambda row: order.index(row["client"]))
        content = {"command": f"python -m tests.clients --output {output}", "rows": ordered}
        output.write_text(json.dumps(content, indent=1) + "\n")
    failed = [row for row in rows if row["outcome"] == FAILS]
    if failed:
        raise SystemExit(f"failed: {json.dumps(failed, indent=1)}")


if __name__ == "__main__":
    typer.run(main)
