"""OpenAI's own clients do what the table of docs/guide/tried.md says, with the default settings."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.client import Program, node
from tests.clients.environments import node_packages, openai_node, openai_python
from tests.e2e.conftest import Server
from tools.docs.results import results

pytestmark = pytest.mark.serve


def check(client: Program, server: Server) -> None:
    rows = [row for row in results("clients")["rows"] if row["client"] == client.name]
    outcomes = client.make(server.url, ())
    assert outcomes.keys() == {row["call"] for row in rows}
    for row in rows:
        found = outcomes[row["call"]]
        assert ("images" in found) == (row["outcome"] == "works"), found
        if "images" in found:
            assert set(map(tuple, found["images"])) == {(64, 64)}
        else:
            assert 400 <= found["status"] < 500


def test_openais_python_client(server: Server, tmp_path: Path) -> None:
    check(openai_python(tmp_path), server)


@pytest.mark.slow
def test_openais_client_for_node(server: Server, tmp_path: Path) -> None:
    if node() is None:
        reason = "no Node.js with npm is installed (Debian: apt-get install npm)"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    look_up = ["npm", "view", "openai", "version", "--fetch-retries=0", "--fetch-timeout=15000"]
    if subprocess.run(look_up, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("the registry of npm cannot be reached")  # tests need no internet
    node_packages(tmp_path)
    check(openai_node(tmp_path), server)
