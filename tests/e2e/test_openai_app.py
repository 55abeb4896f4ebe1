"""An application that a program builds and runs, on the Ray cluster of the shared server."""

from collections.abc import Iterator

import httpx
import pytest
from ray import serve

from tests.e2e.conftest import Server
from tests.serve_process import connected
from tests.waiting import wait_until
from tools.docs.blocks import ROOT, read_page

pytestmark = pytest.mark.serve

PAGE = "docs/guide/several-models.md"


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    """Run the program of the page, and yield the URL of its application."""
    [program] = [block for block in read_page(PAGE).blocks if block.language == "python"]
    with connected(server.ray_address), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            exec(compile(program.text, program.place, "exec"), {})
            yield f"{server.url}/several"
        finally:
            serve.delete("several")


def states(url: str) -> dict[str, str]:
    listed = httpx.get(f"{url}/v1/models", timeout=20).json()["data"]
    return {one["id"]: one["state"] for one in listed}


def test_serve_run_serves_the_models_with_the_options_of_their_deployments(url: str) -> None:
    def settled() -> bool:
        return states(url) == {"demo": "running", "demo-quick": "at_zero"}

    wait_until(settled, deadline_s=150, every_s=0.5, what="one model that runs, and one at zero")
    deployments = serve.status().applications["several"].deployments
    assert deployments.keys() == {"Gateway", "Generator-demo", "Generator-demo-quick"}
    image = {"prompt": "a red circle on blue", "seed": 1}
    for asked, steps in (({"model": "dall-e-3"}, 8), ({"num_inference_steps": 4}, 4)):
        answer = httpx.post(f"{url}/v1/images/generations", json=image | asked, timeout=480)
        assert answer.status_code == 200, answer.text
        assert answer.json()["timings"]["denoiser_calls"] == steps
    assert states(url) == {"demo": "running", "demo-quick": "running"}
