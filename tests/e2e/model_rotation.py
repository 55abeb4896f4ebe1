"""Three models that take turns on two fake GPU nodes, and a fourth one that cannot be loaded.

Each model has no replica without work, and at most one. So a model whose GPU is needed must give it
up by itself: Ray Serve takes none away.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from serve_app.config.deployment_names import generator_names
from serve_app.config.models import ModelEntry
from serve_app.config.source import DEMO_MODEL_DIR
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.protocol.params import GenerationParams
from tests.broken_model import broken_folder
from tests.e2e.cluster import Replicas, Snapshot, Watch, start_cluster
from tests.edit_pipelines import KLEIN, flux_2_klein
from tests.serve_process import free_port, scaled_demo
from tests.tiny_pipelines import HEIGHT_PX, WIDTH_PX, sdxl

NODES = 2
"""Most nodes, with one GPU each."""

DEMO, SDXL, EDIT, BROKEN = "demo", "tiny-sdxl", "tiny-edit", "broken"
MODELS = (DEMO, SDXL, EDIT)
DEPLOYMENTS = dict(zip((*MODELS, BROKEN), generator_names((*MODELS, BROKEN)), strict=True))
"""Names of the deployments, by model."""

PROMPT = "a red circle on a blue background"
EDIT_SIZE_PX = 128, 64

Phase = Literal["none", "waiting", "starting", "running"]
"""No replica, or one that waits for a node with a free GPU, starts, or can generate."""

Pixels = NDArray[np.uint8]
"""``[height, width, 3]``."""


def saved_models(folder: Path) -> list[dict[str, Any]]:
    """Save the tiny models below the folder, and return the entries of ``models``."""
    sdxl().save_pretrained(folder / SDXL, safe_serialization=True)
    flux_2_klein().save_pretrained(folder / EDIT, safe_serialization=True)
    models: list[dict[str, Any]] = [
        {"id": DEMO, "path": str(DEMO_MODEL_DIR), "default_size_px": [64, 64], "default_steps": 20},
        {
            "id": SDXL,
            "path": str(folder / SDXL),
            "default_size_px": [WIDTH_PX, HEIGHT_PX],
            "default_steps": 4,
        },
        {
            "id": EDIT,
            "path": str(folder / EDIT),
            "default_size_px": list(EDIT_SIZE_PX),
            "default_steps": 4,
            "call_kwargs": KLEIN,
        },
        {"id": BROKEN, "path": str(broken_folder(folder / BROKEN))},
    ]
    # The GPUs are not real. A start after the first one finds the profile of the model.
    return [
        model | {"device": "cpu", "engine": {"profile_path": str(folder / f"{model['id']}.json")}}
        for model in models
    ]


def rotation_config(
    port: int, models: Sequence[dict[str, Any]], hold_s: float, max_hold_s: float
) -> dict[str, Any]:
    """Return a config of the models, each with 0 to 1 replicas on one GPU.

    An idle model keeps its GPU for ``hold_s`` at least; a request waits ``max_hold_s`` at most.
    """
    config = scaled_demo(port, (0, 1), {"num_gpus": 1, "num_cpus": 1}, {"hold_s": hold_s})
    # All nodes have the address of this machine, where one proxy takes the port.
    config["proxy_location"] = "HeadOnly"
    [application] = config["applications"]
    application["args"] = {
        "models": list(models),
        "gateway": {"max_hold_s": max_hold_s},
    }
    [generator] = application["deployments"]
    application["deployments"] = [generator | {"name": name} for name in DEPLOYMENTS.values()]
    return config


def ring() -> Image.Image:
    """Draw the image to edit."""
    image = Image.new("RGB", EDIT_SIZE_PX, "grey")
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), outline="red", width=8)
    return image


def alone(model: Mapping[str, Any], seed: int) -> Pixels:
    """Return the image that the stock pipeline generates without a server."""
    config = ModelEntry(**model).model
    assert config.default_size_px is not None
    width, height = config.default_size_px
    params = GenerationParams(
        PROMPT,
        seed,
        width=width,
        height=height,
        num_inference_steps=config.default_steps,
        image=ring() if config.id == EDIT else None,
    )
    [image] = LoadedPipeline.load(config).generate(params)
    return (255 * image).round().byte().permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Answer:
    """The image of one request."""

    model: str
    seed: int
    sent_at: float
    """`monotonic` time."""
    ended_at: float
    pixels: Pixels


def send(url: str, model: str, seed: int) -> httpx.Response:
    """Request an image; an edit if the model is the one that edits."""
    fields = {"model": model, "prompt": PROMPT, "seed": seed}
    if model != EDIT:
        return httpx.post(f"{url}/v1/images/generations", json=fields, timeout=480)
    file = io.BytesIO()
    ring().save(file, "png")
    files = {"image": ("ring.png", file.getvalue())}
    return httpx.post(f"{url}/v1/images/edits", data=fields, files=files, timeout=480)


def generate(url: str, model: str, seed: int) -> Answer:
    """Generate an image. Any response but 200 fails the test."""
    sent_at = monotonic()
    response = send(url, model, seed)
    ended_at = monotonic()
    assert response.status_code == 200, f"{model}: {response.text}"
    data = base64.b64decode(response.json()["data"][0]["b64_json"])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return Answer(model, seed, sent_at, ended_at, pixels)


@dataclass(frozen=True)
class Rotation:
    """All that happened on the cluster."""

    models: Sequence[dict[str, Any]]
    """The entries of ``models``."""
    answers: Sequence[Answer]
    """In the order in which they were sent."""
    broken: httpx.Response
    """Response of the model that cannot be loaded."""
    states: Mapping[str, str]
    """States of the models at the end, by name."""
    snapshots: Sequence[tuple[float, Snapshot]]
    """Pairs of `monotonic` time and snapshot, from the first request on."""


def rotate(folder: Path, turns: int, hold_s: float, max_hold_s: float) -> Rotation:
    """Request the first two models at once, then the broken one, then ``turns`` times all in turn.

    A turn begins with the model that has no GPU. Each of its requests is sent when the one before
    is answered. The broken model waits for a GPU, too.
    """
    models, port = saved_models(folder), free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        start_cluster(NODES) as cluster,
        ThreadPoolExecutor(len(DEPLOYMENTS)) as pool,
        Watch(cluster) as watch,
    ):
        cluster.deploy(rotation_config(port, models, hold_s, max_hold_s))
        watch.wait(lambda seen: seen.status == "RUNNING", 120, "the gateway")
        begun = len(watch.snapshots) - 1
        first = [pool.submit(generate, url, model, 0) for model in (DEMO, SDXL)]
        answers = [request.result() for request in first]
        broken = pool.submit(send, url, BROKEN, 0)
        for turn in range(turns):
            answers += [generate(url, model, turn + 1) for model in (EDIT, DEMO, SDXL)]
        watch.wait(lambda seen: phase(seen, SDXL) == "running", 30, "the last model")
        failed = broken.result()
        listed = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    states = {model["id"]: model["state"] for model in listed}
    return Rotation(models, answers, failed, states, watch.snapshots[begun:])


def phase(seen: Snapshot, model: str) -> Phase:
    """Return how far the only replica of a model is."""
    replicas: Replicas = seen.generators[DEPLOYMENTS[model]]
    phases: tuple[Phase, ...] = ("running", "starting", "waiting")
    return next((one for one in phases if getattr(replicas, one)), "none")


def seconds(rotation: Rotation, answer: Answer, wanted: Phase) -> float:
    """Return how long the answer's model was in a phase while the request was open."""
    found = 0.0
    times = [*(at for at, _ in rotation.snapshots[1:]), answer.ended_at]
    for (at, seen), until in zip(rotation.snapshots, times, strict=True):
        if phase(seen, answer.model) == wanted:
            found += max(0.0, min(until, answer.ended_at) - max(at, answer.sent_at))
    return found
