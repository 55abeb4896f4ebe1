"""The hook that looks at finished images, against the verdicts of stock diffusers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    IFPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.deepfloyd_if.safety_checker import IFSafetyChecker
from diffusers.pipelines.deprecated.stable_diffusion_safe.pipeline_stable_diffusion_safe import (
    StableDiffusionPipelineSafe,
)
from diffusers.pipelines.deprecated.stable_diffusion_safe.safety_checker import (
    SafeStableDiffusionSafetyChecker,
)
from torch import Tensor

from serve_app.config.gateway import Safety
from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.batching.rendezvous import Job, Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.warmup import startup_fingerprint
from serve_app.errors import ConfigError, ContentPolicyViolation, ModelLoadError
from serve_app.protocol.params import GenerationParams
from serve_app.protocol.safety import SafetyVerdict
from tests.more_pipelines import lcm
from tests.safety_checkers import (
    FLAGS_EVERYTHING,
    FLAGS_NOTHING,
    concept_cosine,
    feature_extractor,
    safety_checker,
    save_with_checker,
    with_checker,
)
from tests.tiny_networks import T5_DIM, draw_weights, t5
from tests.tiny_pipelines import pag, stable_diffusion

MODEL = ModelConfig(id="m", device="cpu", default_size_px=(64, 32))
SEEDS = range(6)


def params(seed: int = 0) -> GenerationParams:
    return GenerationParams("a red circle", seed, width=64, height=32, num_inference_steps=2)


def stock_images(pipeline: StableDiffusionPipeline, seeds: range, kind: str) -> list[Any]:
    return [
        pipeline(
            "a red circle",
            width=64,
            height=32,
            num_inference_steps=2,
            output_type=kind,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in seeds
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verdicts_are_those_of_stock_diffusers_on_the_same_pixels(dtype: torch.dtype) -> None:
    unchecked = stable_diffusion().to(dtype=dtype)
    network = safety_checker(0.0).to(dtype)
    cosines = []
    with torch.no_grad():
        for output in stock_images(unchecked, SEEDS, "pil"):
            inputs = feature_extractor()(output.images[0], return_tensors="pt").pixel_values
            cosines.append(concept_cosine(network, inputs.to(dtype)))
    # Between two images, so that some are flagged and others are not.
    middle = sum(sorted(cosines)[len(cosines) // 2 - 1 : len(cosines) // 2 + 1]) / 2
    stock = with_checker(safety_checker(middle)).to(dtype=dtype)
    expected = [output.nsfw_content_detected[0] for output in stock_images(stock, SEEDS, "pt")]
    assert len(set(expected)) == 2
    pixels = [output.images[0] for output in stock_images(unchecked, SEEDS, "pt")]

    loaded = LoadedPipeline(with_checker(safety_checker(middle)).to(dtype=dtype), MODEL)
    with torch.no_grad():
        for seed, flagged, image in zip(SEEDS, expected, pixels, strict=True):
            ours, verdict = loaded.generate_checked(params(seed))
            assert verdict is not None
            assert verdict.flagged is flagged
            assert torch.equal(ours, image), "the pixels are those without a checker"


@pytest.mark.parametrize("build", [stable_diffusion, pag, lcm])
def test_checkers_of_other_families_are_set_aside_too(build: object) -> None:
    assert callable(build)
    loaded = LoadedPipeline(with_checker(safety_checker(FLAGS_EVERYTHING), build()), MODEL)
    assert all(pipeline.safety_checker is None for pipeline in loaded.pipelines.values())
    with torch.no_grad():
        pixels, verdict = loaded.generate_checked(params())
    assert verdict is not None
    assert verdict.flagged
    assert pixels.max() > 0


class OtherChecker(ModelMixin):
    """A checker of a class of its own, which blackens what it flags."""

    def __init__(self) -> None:
        super().__init__()
        self.checker = safety_checker(FLAGS_EVERYTHING)

    def forward(self, clip_input: Tensor, images: Tensor) -> tuple[Tensor, list[bool]]:
        result: tuple[Tensor, list[bool]] = self.checker(clip_input, images)
        return result


@pytest.mark.parametrize("safety", ["flag", "block"])
def test_a_verdict_of_an_unknown_checker_counts(safety: Safety) -> None:
    """It stays inside the pipeline, whose output has the verdict."""
    loaded = LoadedPipeline(with_checker(OtherChecker()), MODEL, safety)
    with Engine(loaded, MODEL, EngineConfig(max_running=1)) as engine:
        assert engine.info.safety_checker
        if safety == "block":
            with pytest.raises(ContentPolicyViolation, match="flagged the image with seed 7"):
                engine.generate(params(7))
        else:
            result = engine.generate(params(7))
            assert result.safety is not None
            assert result.safety.flagged
            assert "flagged the image with seed 7" in result.warnings[0]


def deepfloyd() -> IFPipeline:
    tokenizer, text_encoder = t5()
    denoiser = UNet2DConditionModel(
        sample_size=32,
        out_channels=6,
        in_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=16,
        encoder_hid_dim=T5_DIM,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        norm_num_groups=2,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="positional",
    )
    checker = IFSafetyChecker(safety_checker(0.0).config)
    return IFPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=denoiser,
        scheduler=DDPMScheduler(variance_type="learned_range"),
        safety_checker=checker,
        feature_extractor=feature_extractor(),
        watermarker=None,
    )


@pytest.mark.parametrize("max_running", [1, 32])
def test_a_checker_that_does_not_run_is_refused(max_running: int) -> None:
    """DeepFloyd's runs for the pixels of Pillow only, and diffusers then returns no verdict."""
    loaded = LoadedPipeline(deepfloyd(), MODEL)
    with pytest.raises(ModelLoadError, match="IFSafetyChecker did not report"):
        Engine(loaded, MODEL, EngineConfig(max_running=max_running))


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated")
def test_images_that_are_no_tensor_are_refused() -> None:
    """Safe Stable Diffusion returns arrays of NumPy."""
    checker = safety_checker(FLAGS_NOTHING, SafeStableDiffusionSafetyChecker)
    parts = stable_diffusion().components
    parts |= {"safety_checker": checker, "feature_extractor": feature_extractor()}
    loaded = LoadedPipeline(StableDiffusionPipelineSafe(**parts), MODEL)
    with pytest.raises(ModelLoadError, match="Safe returns no tensor of images"):
        Engine(loaded, MODEL)


def test_pixels_for_pillow_only_are_refused() -> None:
    """Without a checker, DeepFloyd's tensors are from -1 to 1, and would become wrong colors."""
    pipeline = deepfloyd()
    pipeline.safety_checker = None
    draw_weights(pipeline)
    loaded = LoadedPipeline(pipeline, MODEL)
    with pytest.raises(ModelLoadError, match="IFPipeline returns pixels from -1 to 1"):
        Engine(loaded, MODEL)


def test_a_request_yields_while_its_image_is_checked(tmp_path: Path) -> None:
    """Other requests wait for one call of the checker at most."""
    loaded = LoadedPipeline.load(save_with_checker(tmp_path, FLAGS_EVERYTHING))
    rendezvous = Rendezvous(loaded.sites)
    sites = []
    try:
        with torch.no_grad():
            job = Job(lambda: loaded.generate_checked(params()))
            job.start()
            while job.call is not None:
                sites.append(job.call.site)
                job.resume(rendezvous.forward(job.call))
        assert job.error is None
    finally:
        rendezvous.close()
    assert sites.count("safety_checker") == 1
    assert sites[-1] == "safety_checker"
    assert job.result[1] is not None


def test_start_up_does_not_see_the_checker(tmp_path: Path) -> None:
    """Nothing of a certificate depends on it, so no change of it invalidates one."""
    model = save_with_checker(tmp_path, FLAGS_NOTHING)
    modes: tuple[Safety, ...] = ("flag", "block", "off")
    loaded = [LoadedPipeline.load(model, safety) for safety in modes]
    safety_checker(FLAGS_EVERYTHING).save_pretrained(tmp_path / "safety_checker")
    loaded.append(LoadedPipeline.load(model))
    with torch.no_grad():
        verdicts = [pipeline.generate_checked(params())[1] for pipeline in loaded]
    assert verdicts == [SafetyVerdict(False), SafetyVerdict(False), None, SafetyVerdict(True)]
    fingerprints = [startup_fingerprint(pipeline, EngineConfig()) for pipeline in loaded]
    assert all(one == fingerprints[0] for one in fingerprints)


def test_an_image_that_is_not_finite_gets_no_verdict() -> None:
    pipeline = with_checker(safety_checker(FLAGS_EVERYTHING))
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(torch.nan)
        pixels, verdict = LoadedPipeline(pipeline, MODEL, "block").generate_checked(params())
    assert pixels.isnan().all()
    assert verdict is None


def test_off_drops_the_checker(tmp_path: Path) -> None:
    loaded = LoadedPipeline.load(save_with_checker(tmp_path, FLAGS_EVERYTHING), "off")
    assert not loaded.safety.is_checked
    assert "safety_checker" not in loaded.sites
    with torch.no_grad():
        assert loaded.generate_checked(params())[1] is None


def test_blocking_without_a_checker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'m' has no safety checker, .*'flag' or 'off'"):
        LoadedPipeline(stable_diffusion(), MODEL, "block")
    assert not LoadedPipeline(stable_diffusion(), MODEL).safety.is_checked


LOAD = """
import sys
from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.protocol.params import GenerationParams
model = ModelConfig(id="m", path=sys.argv[1], device="cpu", default_size_px=(64, 32))
with Engine.load(model, EngineConfig(max_running=1)) as engine:
    print(engine.generate(GenerationParams("a", 1, num_inference_steps=1)).safety)
"""


@pytest.mark.parametrize("checked", [True, False])
def test_diffusers_remarks_on_checkers_are_left_out(tmp_path: Path, checked: bool) -> None:
    checker = safety_checker(FLAGS_EVERYTHING) if checked else None
    with_checker(checker).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=480,
        check=True,
    )
    assert done.stdout.strip() == ("SafetyVerdict(flagged=True)" if checked else "None")
    assert "safety checker" not in done.stderr
    assert "NSFW" not in done.stderr
