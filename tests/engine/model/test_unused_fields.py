"""Fields of a request that change nothing in the image get a warning, and no others do."""

from dataclasses import replace

import pytest
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline

from serve_app.config.models import ModelConfig
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.protocol.params import GenerationParams
from tests.tiny_networks import CLIP_DIM, draw_weights, unet
from tests.tiny_pipelines import (
    CALL_KWARGS,
    FAMILIES,
    HEIGHT_PX,
    WIDTH_PX,
    stable_diffusion,
)

PARAMS = GenerationParams(
    "a red circle on a blue background",
    1,
    width=WIDTH_PX,
    height=HEIGHT_PX,
    num_inference_steps=2,
)
NEGATIVES = ("a black square at the top left", "a small cyan ring on the right")


def loaded(pipeline: DiffusionPipeline, name: str = "", **config: object) -> LoadedPipeline:
    return LoadedPipeline(
        pipeline,
        ModelConfig(
            id=name or "m",
            device="cpu",
            default_size_px=(WIDTH_PX, HEIGHT_PX),
            call_kwargs=CALL_KWARGS.get(name, {}),
            **config,  # type: ignore[arg-type]
        ),
    )


def changes(pipeline: LoadedPipeline, params: GenerationParams) -> bool:
    """Return whether another negative prompt makes another image."""
    one, two = (pipeline.generate(replace(params, negative_prompt=text)) for text in NEGATIVES)
    return not one.equal(two)


def warnings(pipeline: LoadedPipeline, params: GenerationParams) -> tuple[str, ...]:
    return pipeline.read_prompt(params)[1]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> LoadedPipeline:
    return loaded(FAMILIES[request.param](), request.param)


@pytest.mark.parametrize("guidance", [None, 1.0, 1.1])
def test_a_negative_prompt_without_effect_gets_a_warning(
    family: LoadedPipeline, guidance: float | None
) -> None:
    params = replace(PARAMS, guidance_scale=guidance)
    assert warnings(family, params) == ()
    assert warnings(family, replace(params, negative_prompt="")) == ()
    found = warnings(family, replace(params, negative_prompt=NEGATIVES[0]))
    if changes(family, params):
        assert found == ()
    elif family.takes_negative_prompt:  # else the request is rejected
        [warning] = found
        assert warning.startswith("negative_prompt has no effect")
        assert "guidance_scale" in warning


def test_the_configured_guidance_counts() -> None:
    for default, effect in ((1.0, False), (2.0, True)):
        pipeline = loaded(stable_diffusion(), default_guidance_scale=default)
        params = replace(PARAMS, negative_prompt=NEGATIVES[0])
        assert changes(pipeline, params) == effect
        assert (warnings(pipeline, params) == ()) == effect


def test_a_model_with_the_guidance_as_input_takes_no_negative_prompt() -> None:
    """Latent consistency models do, in the ordinary pipeline, too."""
    parts = stable_diffusion().components
    parts |= {
        "unet": unet(CLIP_DIM, time_cond_proj_dim=8),
        "scheduler": LCMScheduler(beta_schedule="scaled_linear", steps_offset=1),
    }
    stock = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    draw_weights(stock)
    pipeline = loaded(stock)
    assert not changes(pipeline, replace(PARAMS, guidance_scale=7.5))
    assert not pipeline.takes_negative_prompt


def test_a_pipeline_without_guidance_gets_a_warning() -> None:
    class Unguided(StableDiffusionPipeline):
        def __call__(self, prompt, generator, height, width, num_inference_steps, output_type):  # type: ignore[no-untyped-def, override]
            raise NotImplementedError

    pipeline = loaded(Unguided(**stable_diffusion().components, requires_safety_checker=False))
    assert not pipeline.takes_negative_prompt
    assert warnings(pipeline, PARAMS) == ()
    [warning] = warnings(pipeline, replace(PARAMS, guidance_scale=3.0))
    assert warning == "guidance_scale has no effect: Unguided has none."
