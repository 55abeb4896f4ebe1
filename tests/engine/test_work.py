"""Costs of requests with input images are learned apart from those without."""

from dataclasses import replace

import pytest
from PIL import Image

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.request import work_of
from serve_app.protocol.params import GenerationParams
from tests.edit_pipelines import EDITS

SIZE = WIDTH, HEIGHT = 64, 32
TEXT = GenerationParams(
    "a red circle", 1, width=WIDTH, height=HEIGHT, num_inference_steps=4, guidance_scale=3.0
)
IMAGE = Image.linear_gradient("L").convert("RGB").resize(SIZE)

pytestmark = pytest.mark.usefixtures("reused_starts")


def test_whole_input_images_count_as_the_image_does() -> None:
    assert work_of(TEXT) == (64, 32)
    assert work_of(replace(TEXT, image=IMAGE)) == (64, 64)
    assert work_of(replace(TEXT, image=IMAGE, more_images=(IMAGE, IMAGE))) == (64, 128)
    assert work_of(replace(TEXT, image=IMAGE, strength=0.5)) == (64, 32)


def engine_of(name: str) -> Engine:
    build, call_kwargs, _ = EDITS[name]
    config = ModelConfig(
        id=name, path=".", device="cpu", default_size_px=SIZE, call_kwargs=call_kwargs
    )
    engine = EngineConfig(warmup_sizes_px=(SIZE,), max_batch_size=2)
    return Engine(LoadedPipeline(build(), config), config, engine)


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
def test_edits_teach_nothing_of_requests_from_text() -> None:
    with engine_of("flux-kontext") as engine:
        text_s, two_texts_s = (engine.cost.predict_call(SIZE, rows) for rows in (1, 2))
        # Not measured at the start: as expensive as two images.
        assert engine.cost.predict_call((64, 64)) == two_texts_s
        for _ in range(4):
            engine.generate(replace(TEXT, image=IMAGE))
        assert engine.cost.predict_call(SIZE) == text_s
        assert engine.cost.predict_call((64, 64)) != two_texts_s


def test_the_start_measures_a_model_that_needs_an_image_with_one() -> None:
    with engine_of("instruct-pix2pix") as engine:
        assert set(engine.cost.caps) == {(64, 64)}
