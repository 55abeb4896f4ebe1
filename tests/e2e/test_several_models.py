"""Several models in one application, on a real Ray cluster: one of them cannot be loaded."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.config.source import DEMO_MODEL_DIR
from tests.broken_model import broken_folder
from tests.lora import save_adapters
from tests.serve_process import demo_config, free_port, serving_config
from tests.waiting import wait_until

pytestmark = pytest.mark.serve

FEW_STEPS = 4
SMALL = {"prompt": "a red circle on a blue background", "seed": 1}


def several(port: int, broken: Path, loras: Path) -> dict[str, Any]:
    config = demo_config(port)
    [application] = config["applications"]
    application["args"] = {
        "models": [
            {"id": "demo", "default_steps": 20, "lora_source": str(loras)},
            {"id": "quick", "path": str(DEMO_MODEL_DIR), "default_steps": FEW_STEPS},
            {"id": "org/broken", "path": str(broken)},
        ],
        "engine": application["args"]["engine"],
        "gateway": {"model_aliases": {"dall-e-*": "quick"}},
    }
    names = ("Generator-demo", "Generator-quick", "Generator-org-broken")
    application["deployments"] = [
        {"name": name, "ray_actor_options": {"num_gpus": 0, "num_cpus": 0.2}} for name in names
    ] + [{"name": "Gateway", "ray_actor_options": {"num_cpus": 0.1}}]
    quick = application["deployments"][1]
    quick["autoscaling_config"] = {"min_replicas": 0, "max_replicas": 1}
    return config


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    broken = broken_folder(tmp_path_factory.mktemp("models") / "broken")
    loras = tmp_path_factory.mktemp("loras")
    save_adapters(loras / "styles", ["ink", "oil"])
    (loras / "damaged.safetensors").write_bytes(b"nothing")
    with serving_config(several(free_port(), broken, loras)) as url:
        yield url


def listed(url: str) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = httpx.get(f"{url}/v1/models", timeout=20).json()["data"]
    return models


def states(url: str) -> dict[str, str]:
    return {one["id"]: one["state"] for one in listed(url)}


def default_steps(url: str) -> dict[str, int | None]:
    return {one["id"]: one.get("default_steps") for one in listed(url)}


def generate(url: str, **fields: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=SMALL | fields, timeout=480)


def test_each_request_reaches_its_model_and_a_broken_one_harms_none(url: str) -> None:
    # Ready although one model cannot be loaded, and another one has no replica.
    wait_until(
        lambda: states(url) == {"demo": "running", "quick": "at_zero", "org/broken": "failed"},
        deadline_s=180, every_s=0.5, what="the states of the models",
    )  # fmt: skip
    # The list does not wait long for a description, so a busy replica's may be missing at first.
    wait_until(
        lambda: default_steps(url) == {"demo": 20, "quick": None, "org/broken": None},
        deadline_s=30, every_s=0.5, what="the description of the model that runs",
    )  # fmt: skip

    broken = generate(url, model="org/broken")
    assert broken.status_code == 503
    assert "could not be started" in broken.json()["error"]["message"]

    # A request starts the model at zero, waits for it, and gets its image.
    quick = generate(url, model="dall-e-3", num_inference_steps=None)
    assert quick.status_code == 200, quick.text
    assert quick.json()["timings"]["denoiser_calls"] == FEW_STEPS
    first = generate(url)
    assert first.status_code == 200, first.text
    assert first.json()["timings"]["denoiser_calls"] == 20
    image, other = (base64.b64decode(one.json()["data"][0]["b64_json"]) for one in (first, quick))
    assert image != other
    assert generate(url, model="demo").json()["data"][0] == first.json()["data"][0]
    same = generate(url, model="quick", num_inference_steps=20)
    assert same.json()["data"][0] == first.json()["data"][0], "it is the same model"

    assert states(url) == {"demo": "running", "quick": "running", "org/broken": "failed"}
    assert httpx.get(f"{url}/ready", timeout=20).status_code == 200
    unknown = generate(url, model="other")
    assert unknown.status_code == 404
    assert "'demo', 'quick', 'org/broken'" in unknown.json()["error"]["message"]

    metrics = httpx.get(f"{url}/metrics", timeout=20).text
    for model, deployment, running in (
        ("demo", "Generator-demo", 1), ("quick", "Generator-quick", 1),
        ("org/broken", "Generator-org-broken", 0),
    ):  # fmt: skip
        assert f'diffusion_serve_replicas{{model="{model}",state="running"}} {running}.0' in metrics
        assert (
            f'diffusion_serve_scraped_replicas{{answer="answered",deployment="{deployment}",'
            f'model="{model}"}} {running}.0'
        ) in metrics


def test_adapters_are_loaded_when_a_request_names_them(url: str) -> None:
    wait_until(
        lambda: states(url)["demo"] == "running", deadline_s=180, every_s=0.5, what="the model"
    )

    def adapters() -> dict[str, int]:
        response = httpx.get(f"{url}/v1/loras", params={"model": "demo"}, timeout=60)
        assert response.status_code == 200, response.text
        return {one["id"]: one["replicas"] for one in response.json()["data"]}

    assert adapters() == {"damaged": 0, "styles/ink": 0, "styles/oil": 0}
    images = {}
    for name in ("styles/ink", "styles/oil", "styles/ink", None):
        response = generate(url, num_inference_steps=6, lora=name)
        assert response.status_code == 200, response.text
        [image] = response.json()["data"]
        assert images.setdefault(name, image) == image
    assert len({image["b64_json"] for image in images.values()}) == 3
    assert adapters() == {"damaged": 0, "styles/ink": 1, "styles/oil": 1}

    for name, status, code in (
        ("styles/none", 404, "lora_not_found"),
        ("../styles/ink", 404, "lora_not_found"),
        ("damaged", 400, "invalid_lora"),
        ("damaged", 400, "invalid_lora"),
    ):
        response = generate(url, lora=name)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert response.json()["error"]["param"] == "lora"
    metrics = httpx.get(f"{url}/metrics", timeout=20).text
    for name, count in (
        ('loads_total{model="demo",replica="[^"]+",result="loaded"}', 2),
        ('loads_total{model="demo",replica="[^"]+",result="invalid"}', 1),
        ('hits_total{model="demo",replica="[^"]+"}', 1),
    ):
        assert re.search(f"^diffusion_serve_lora_{name} {count}.0$", metrics, re.M), name
