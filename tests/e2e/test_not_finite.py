"""An adapter with one NaN, on a real server."""

import math
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_metrics import scrape
from tests.gateway.conftest import error_of
from tests.lora import ADAPTER_FILE, save_adapter, spoil_adapter
from tests.serve_process import demo_config, free_port, serving_config

pytestmark = pytest.mark.serve

BODY = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 3}


def test_an_image_that_is_not_finite_is_a_500_and_counts_as_failed(tmp_path: Path) -> None:
    save_adapter(tmp_path, 1)
    spoil_adapter(tmp_path, math.nan)
    config = demo_config(free_port())
    [application] = config["applications"]
    application["args"]["model"]["loras"] = {"ink": str(tmp_path / ADAPTER_FILE)}
    with serving_config(config) as url, httpx.Client(base_url=url, timeout=480) as client:
        path, bad = "/v1/images/generations", BODY | {"lora": {"ink": 1.0}}
        before = scrape(url)
        response = client.post(path, json=bad | {"n": 2})
        error = error_of(response, 500)
        assert error["code"] == "generation_failed"
        assert "the image is not finite (NaN or infinite), in float32." in error["message"]
        assert "Try without the LoRA adapters: 'ink'." in error["message"]
        assert response.headers["x-should-retry"] == "false"
        streamed = client.post(path, json=bad | {"stream": True})
        assert streamed.status_code == 200
        assert "event: error" in streamed.text
        assert "the image is not finite" in streamed.text
        assert client.post(path, json=BODY).status_code == 200
        after = scrape(url)

    def more(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    assert more("requests_total", outcome="generation_failed") == 2
    assert more("requests_total", outcome="completed") == 1
    assert more("images_total") == 1
