"""Parameters of tests of which a few run for each change, and all of them each night."""

from collections.abc import Container, Iterable

import pytest
from _pytest.mark import ParameterSet


def nightly_but(each_change: Container[str], names: Iterable[str]) -> list[ParameterSet]:
    """Return names as parameters, with the marker ``nightly`` for all but those of each change."""
    return [
        pytest.param(name, marks=() if name in each_change else pytest.mark.nightly)
        for name in names
    ]
