"""The names of the deployments of an application, by which a Serve config sets their scaling."""

import re
from collections.abc import Sequence

GATEWAY = "Gateway"
"""Name of the gateway's deployment."""

GENERATOR = "Generator"
"""Name of the deployment of `model`, and the start of the names of those of `models`."""


def generator_names(ids: Sequence[str]) -> tuple[str, ...]:
    """Return the name of each deployment of `models`, ``Generator-<id>``, in the order of ``ids``.

    A hyphen stands for each character of an id that is no letter, digit, dot, hyphen or underscore,
    such as the slash of a repository.
    """
    return tuple(f"{GENERATOR}-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}" for name in ids)
