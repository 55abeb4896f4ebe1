"""The OpenAPI description is true: schemathesis sends valid and invalid requests."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serve_process import demo_config, free_port, serving_config

pytestmark = pytest.mark.serve

CASES = int(os.environ.get("SCHEMATHESIS_CASES", "500"))
"""Least number of requests."""


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[str]:
    """A server whose limits allow only requests of a few milliseconds."""
    config = demo_config(free_port())
    arguments = config["applications"][0]["args"]
    arguments["model"]["default_steps"] = 2
    arguments["engine"]["limits"] = {"max_steps": 4, "max_pixels": 4096, "max_images": 2}
    arguments["gateway"] = {"sdapi": True, "storage": {"url": f"file://{tmp_path}/images"}}
    with serving_config(config) as url:
        yield url


@pytest.mark.timeout(1_800)
def test_the_description_is_true(small_server: str, report: Callable[[str], None]) -> None:
    sent = seed = 0
    while sent < CASES:
        seed += 1
        done = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"),
                *("--config-file", Path(__file__).with_name("schemathesis.toml")),
                *("run", f"{small_server}/openapi.json", "--seed", str(seed)),
                *("--phases", "examples,coverage,fuzzing", "--max-examples", "150"),
            ],
            env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.e2e.schemathesis_hooks"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]
        found = re.search(r"(\d+) generated", done.stdout)
        assert found is not None, done.stdout
        sent += int(found[1])
    report(f"schemathesis: {sent} cases, all answered as described")
