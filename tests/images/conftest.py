"""The Dockerfile and what it leaves out, read once."""

from pathlib import Path

import pytest

from tests.images.dockerfile import Dockerfile, Ignored

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def dockerfile() -> Dockerfile:
    return Dockerfile((ROOT / "images" / "Dockerfile").read_text())


@pytest.fixture(scope="session")
def ignored() -> Ignored:
    return Ignored((ROOT / "images" / "Dockerfile.dockerignore").read_text())
