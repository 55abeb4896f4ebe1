"""Results of benchmarks, read from the files that they wrote, for pages and for the README."""

import json
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "tests" / "benchmarks" / "results"


@cache
def results(name: str) -> Any:
    """Return the content of ``tests/benchmarks/results/NAME.json``.

    Raises:
        FileNotFoundError: No benchmark has written a file of this name.
    """
    return json.loads((RESULTS / f"{name}.json").read_text())
