"""Parameters of OpenAI's client show in the images of a real model, by the table of the docs."""

from collections.abc import Iterator

import numpy as np
import pytest

from serve_app.config.models import AppConfig
from serve_app.engine.engine import Engine
from tests.conftest import DEMO
from tests.deployments.test_generator import Replica
from tests.gateway.openai_client import Api, png, send, served
from tests.gateway.test_openai_parameters import HONOURED, check
from tools.demo_model.judge import read

FEW_STEPS = {"extra_body": {"num_inference_steps": 4, "seed": 1}}

VALUES = {
    "background": ["opaque"],
    "image": [png()],
    "mask": [png("transparent")],
    "model": ["demo"],
    "moderation": ["auto"],
    "n": [2],
    "output_compression": [],  # the fake backend's images are of one color, so that bytes compare
    "output_format": ["png", "jpeg", "webp"],
    "partial_images": [2],
    "prompt": ["a red circle on a blue background"],
    "quality": ["low", "high"],
    "response_format": ["b64_json"],
    "safety_identifier": ["someone"],
    "size": ["48x32", "auto"],
    "stream": [True],
    "user": ["someone"],
}


@pytest.fixture
def api(demo_engine: Engine) -> Iterator[Api]:
    with served(AppConfig(model=DEMO), Replica(demo_engine)) as found:
        yield found


def test_honoured_values_show_in_the_images_of_a_real_model(api: Api) -> None:
    assert VALUES.keys() == HONOURED.keys()
    for name, values in VALUES.items():
        for value in values:
            stream = name in ("partial_images", "stream")
            few = {} if name == "quality" else FEW_STEPS
            method = "edit" if name in ("image", "mask") else "generate"
            outcome = send(api, method, stream, {name: value, **few})
            check("honoured", name, value, outcome)


def test_the_image_is_that_of_the_prompt_and_compression_loses_some_of_it(api: Api) -> None:
    prompt = "a red circle on a blue background"
    given = {"prompt": prompt, "extra_body": {"seed": 1}}
    [image] = send(api, "generate", False, given).images
    seen = read(np.asarray(image))
    assert (seen.background, [(item.color, item.shape) for item in seen.objects]) == (
        "blue",
        [("red", "circle")],
    )
    exact = np.asarray(image).astype(int)
    losses = []
    for quality in (100, 20):
        lossy = {"output_format": "jpeg", "output_compression": quality}
        [compressed] = send(api, "generate", False, given | lossy).images
        losses.append(np.abs(np.asarray(compressed) - exact).mean())
    assert losses[0] < 1 < losses[1]


def test_hints_change_no_pixel(api: Api) -> None:
    [plain] = send(api, "generate", False, FEW_STEPS).files
    hints = {"style": "vivid", "moderation": "low", "complexity": "high"}
    outcome = send(api, "generate", False, hints | FEW_STEPS)
    assert outcome.files == [plain]
    assert [text.split()[0] for text in outcome.answer.warnings] == sorted(hints)
