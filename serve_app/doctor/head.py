"""Asks a Ray cluster for its versions: a process of its own, for importing Ray takes seconds.

`python -m serve_app.doctor.head HOST:PORT`, the address of its global control store. Prints what
Ray itself compares when a node joins: ``{"ray_version": ..., "python_version": ...}``.
"""

import json
import sys

from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

if __name__ == "__main__":
    [address] = sys.argv[1:]
    metadata = get_cluster_metadata(GcsClient(address=address))
    print(json.dumps({name: metadata[name] for name in ("ray_version", "python_version")}))  # noqa: T201  # its answer to who started it
