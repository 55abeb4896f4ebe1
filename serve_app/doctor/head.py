"""Reads the versions of a Ray cluster, in a process of its own: importing Ray takes seconds.

`python -m serve_app.doctor.head HOST:PORT`, the address of its global control store. It prints the
versions that Ray compares when a node joins: ``{"ray_version": ..., "python_version": ...}``.
"""

import json
import sys

from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

if __name__ == "__main__":
    [address] = sys.argv[1:]
    metadata = get_cluster_metadata(GcsClient(address=address))
    print(json.dumps({name: metadata[name] for name in ("ray_version", "python_version")}))  # noqa: T201  # the parent reads it
