"""The Serve configs inside overlays, deployed through REST, as KubeRay does."""

import base64
import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.doctor.selectors import NO_GATEWAY
from tests.cluster.manifests import render
from tests.e2e.cluster import start_cluster
from tests.serve_process import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

OVERLAYS = Path(__file__).parents[2] / "cluster/overlays"


def test_the_embedded_config_serves_an_image() -> None:
    config = render(OVERLAYS / "local").serve
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


@pytest.mark.nightly
def test_a_request_starts_a_node_of_the_kind_that_its_model_needs() -> None:
    """The models are copies of the demo, and the nodes have the labels of the worker groups."""
    manifests = render(OVERLAYS / "several-models")
    groups = {one["groupName"]: one.get("labels", {}) for one in manifests.worker_groups}
    with_gpu = {name: it for name, it in groups.items() if it.items() >= NO_GATEWAY.items()}
    assert len(with_gpu) == len(groups) - 1 == 2
    config = manifests.serve | {"proxy_location": "HeadOnly"}  # all nodes have one address
    port = config["http_options"]["port"] = free_port()
    [application] = config["applications"]
    for entry in application["args"]["models"]:
        entry |= {"path": str(DEMO_MODEL_DIR), "device": "cpu", "dtype": "float32"}
        entry |= {"variant": None, "default_size_px": [64, 64]}
    with start_cluster(nodes=2, groups=with_gpu) as cluster:
        cluster.deploy(config)
        # The default model last: a request without a known model must not start it.
        for model, size in (("z-image-turbo", "large"), ("sdxl", "small")):

            def answered(model: str = model) -> bool:
                assert cluster.snapshot().status != "DEPLOY_FAILED", cluster.logs("serve/contr*")
                try:
                    answer = httpx.post(
                        f"http://127.0.0.1:{port}/v1/images/generations",
                        json={"model": model, "prompt": "a red circle", "seed": 1},
                        timeout=320,
                    )
                except httpx.TransportError:
                    return False
                assert answer.status_code in (200, 404, 503), answer.text  # no route, no gateway
                return answer.status_code == 200

            wait_until(answered, deadline_s=360, every_s=0.5, what=f"an image of {model}")
            [labels] = cluster.labels_below(f"Generator-{model}")
            assert labels["diffusion-serve/gpu"] == size
