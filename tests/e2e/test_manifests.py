"""The Serve config inside the overlay ``local``, deployed through REST, as KubeRay does."""

import base64
import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.cluster.manifests import render
from tests.e2e.cluster import start_cluster
from tests.serve_process import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

LOCAL = Path(__file__).parents[2] / "cluster/overlays/local"


def test_the_embedded_config_serves_an_image() -> None:
    config = render(LOCAL).serve
    port = config["http_options"]["port"] = free_port()
    url = f"http://127.0.0.1:{port}"

    with start_cluster(nodes=0, cpus=2) as cluster:
        cluster.deploy(config)

        def ready() -> bool:
            status = cluster.snapshot().status
            assert status != "DEPLOY_FAILED", cluster.logs("serve/controller*")
            try:
                return httpx.get(f"{url}/ready", timeout=20).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, deadline_s=150, every_s=0.5, what="a replica")
        answer = httpx.post(
            f"{url}/v1/images/generations",
            json={"prompt": "a red circle on a blue background", "seed": 1},
            timeout=240,
        )
        assert answer.status_code == 200, answer.text
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        red, green, blue = Image.open(io.BytesIO(data)).convert("RGB").getpixel((32, 32))
        assert red > 2 * max(green, blue)
