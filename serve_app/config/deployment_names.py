"""The names of the deployments of an application, by which a Serve config sets their scaling."""

import re
from collections.abc import Sequence

GATEWAY = "Gateway"
"""Name of the gateway's deployment."""

GENERATOR = "Generator"
"""Name of the deployment of the only model, and the start of the names of several."""


def generator_names(ids: Sequence[str]) -> tuple[str, ...]:
    """Return the name of each model's deployment, in the order of ``ids``.

    One model has `GENERATOR`. Each of several has ``Generator-<id>``, where ``-`` stands for
    characters that are no letter, digit, dot, hyphen or underscore, such as the slash of a
    repository.
    """
    if len(ids) == 1:
        return (GENERATOR,)
    return tuple(f"{GENERATOR}-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}" for name in ids)
