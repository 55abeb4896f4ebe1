"""AUTOMATIC1111's API through Serve: a client's body, a mask, progress and an interrupt."""

import base64
import io
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve

from serve_app.config.environment import KEYS_VARIABLE
from serve_app.engine.stats import EngineStats
from serve_app.gateway.auth import digest
from tests.gateway.sdapi.clients import IMAGE_TO_IMAGE, SILLYTAVERN
from tests.serve_process import connected, demo_config, free_port, start_serve
from tests.waiting import wait_until
from tools.demo_model.judge import read
from tools.docs.blocks import read_page

pytestmark = pytest.mark.serve

KEYS = f"- {{name: tavern, sha256: {digest('sk-tavern')}}}"
SIDE_PX = 64


@dataclass(frozen=True)
class Served:
    """The application with this API, and its generator."""

    url: str
    client: httpx.Client
    generator: Any

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.client.post(path, json=body)

    def progress(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get("/progress").json()
        return answer

    def stats(self) -> EngineStats:
        stats: EngineStats = self.generator.stats.remote().result(timeout_s=20)
        return stats


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    config = demo_config(free_port())
    config["applications"][0]["args"]["gateway"] = {"sdapi": True}
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    running = start_serve(config, {KEYS_VARIABLE: KEYS})
    try:
        running.wait_until_ready(url)
        base = f"{url}/sdapi/v1"
        with (
            connected(running.ray_address),
            httpx.Client(base_url=base, auth=("user", "sk-tavern"), timeout=480) as client,
        ):
            generator = serve.get_deployment_handle("Generator", "diffusion-serve")
            yield Served(url, client, generator)
    finally:
        running.stop()


def _images(response: httpx.Response) -> tuple[list[Image.Image], dict[str, Any]]:
    assert response.status_code == 200, response.text
    answer = response.json()
    encoded = answer["images"]
    files: list[Image.Image] = [Image.open(io.BytesIO(base64.b64decode(data))) for data in encoded]
    info: dict[str, Any] = json.loads(answer["info"])
    assert [file.info["parameters"] for file in files] == info["infotexts"]
    return files, info


def _b64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_sillytavern_connects_and_gets_the_image_of_its_prompt(served: Served) -> None:
    assert served.client.get("/options").json()["sd_model_checkpoint"] == "demo"
    assert served.post("/options", {"sd_model_checkpoint": "demo"}).status_code == 200
    offered = [item["name"] for item in served.client.get("/samplers").json()]
    assert offered[0] == "Automatic"
    for sampler in offered:
        body = SILLYTAVERN | {
            "prompt": "a red circle on a blue background",
            "negative_prompt": "",
            "sampler_name": sampler,
            "steps": 20,
            "cfg_scale": 4,
        }
        [image], info = _images(served.post("/txt2img", body))
        assert (info["seed"], info["width"], info["sampler_name"]) == (7, SIDE_PX, sampler)
        seen = read(np.asarray(image.convert("RGB")))
        found = [(item.color, item.shape) for item in seen.objects]
        assert (seen.background, found) == ("blue", [("red", "circle")]), sampler


def test_the_white_part_of_a_mask_changes_and_the_rest_stays(served: Served) -> None:
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), "green")
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (32, 0, 64, 64))
    body = IMAGE_TO_IMAGE | {
        "prompt": "a red circle on a blue background",
        "init_images": [_b64(image)],
        "mask": f"data:image/png;base64,{_b64(mask)}",
        "denoising_strength": 1.0,
    }
    [edited], info = _images(served.post("/img2img", body))
    difference = np.abs(np.asarray(edited, int) - np.asarray(image, int)).max(axis=2)
    assert difference[:, :28].max() == 0
    assert difference[:, 36:].mean() > 20
    assert info["denoising_strength"] == 1.0
    inverted = body | {"inpainting_mask_invert": 1}
    [other], _ = _images(served.post("/img2img", inverted))
    difference = np.abs(np.asarray(other, int) - np.asarray(image, int)).max(axis=2)
    assert difference[:, 36:].max() == 0
    assert difference[:, :28].mean() > 20


def test_progress_moves_and_an_interrupt_frees_the_slot_within_a_step(served: Served) -> None:
    assert served.progress()["state"]["job_count"] == 0
    before = len(served.stats().log)
    body = SILLYTAVERN | {"steps": 200, "width": 96, "height": 96}
    seen: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, "/txt2img", body)

        def moved() -> bool:
            found = served.progress()
            assert not answer.done()
            if found["state"]["job_count"]:
                seen.append(found["progress"])
                assert found["state"]["sampling_steps"] == 200
            return len(set(seen)) >= 4

        # The request is registered before its parameters are.
        wait_until(lambda: served.progress()["state"]["sampling_steps"], what="the request")
        wait_until(moved, what="the progress to move", every_s=0.0)
        assert served.post("/interrupt", {}).json() == {}
        response = answer.result(timeout=240)
    assert response.status_code == 499, response.text
    assert "interrupt" in response.json()["detail"]
    assert seen == sorted(seen)
    assert 0 <= seen[0] < seen[-1] < 1
    wait_until(lambda: served.stats().running == 0, what="the slot to be free")
    entries = {entry.what: entry.denoiser_call for entry in served.stats().log[before:]}
    assert entries["cancelled"] - entries["cancel_requested"] <= 1
    assert "completed" not in entries
    assert served.progress()["progress"] == served.progress()["state"]["job_count"] == 0


def test_the_example_of_the_page_runs(served: Served, tmp_path: Path) -> None:
    [example] = [
        block for block in read_page("docs/guide/sdapi.md").blocks if block.language == "sh"
    ]
    command = example.text.replace(
        "localhost:8000", f"user:sk-tavern@{served.url.removeprefix('http://')}"
    )
    done = subprocess.run(
        ["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a red circle on a blue background\nSteps: 20, ")
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (SIDE_PX, SIDE_PX)
