"""A start offers the noise schedulers that keep to the model's noise levels, in each task."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.batching.rendezvous import Rendezvous
from serve_app.engine.engine import Engine
from serve_app.engine.model.noise_schedulers import NOISE_SCHEDULERS
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.noise_scheduler_trials import SchedulerTrials, try_noise_schedulers
from serve_app.errors import InvalidRequest
from serve_app.protocol.events import Completed
from serve_app.protocol.fitting import fitted
from serve_app.protocol.params import GenerationParams, Task
from tests.conftest import FIFO
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES

pytestmark = pytest.mark.slow

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Betas of Stable Diffusion."""

JSON = STABLE_DIFFUSION | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""Keys that the config file of a real SDXL has, whatever its class."""

ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}

IMAGE_TASKS: set[Task] = {"image-to-image", "inpainting"}


def config(family: str) -> ModelConfig:
    return ModelConfig(
        id=family,
        device="cpu",
        default_size_px=(64, 32),
        default_steps=8,
        call_kwargs=CALL_KWARGS.get(family, {}),
    )


def build(family: str, own: Any = None) -> DiffusionPipeline:
    """Return a tiny pipeline, perhaps with another noise scheduler as its own."""
    pipeline = FAMILIES[family]()
    if own is not None:
        pipeline.register_modules(scheduler=own)
    return pipeline


def trials(family: str, own: Any = None) -> SchedulerTrials:
    pipeline = LoadedPipeline(build(family, own), config(family))
    rendezvous = Rendezvous(pipeline.sites)
    try:
        with torch.no_grad():
            return try_noise_schedulers(pipeline, rendezvous, pipeline.tasks)
    finally:
        rendezvous.close()


def from_json(kind: Any, **keys: Any) -> Any:
    """Return a noise scheduler as it is read from a config file."""
    return kind.from_config(JSON | keys)


def request(name: str | None, task: Task, steps: int = 8, **options: Any) -> GenerationParams:
    params = GenerationParams(
        "a red circle on a blue background", 3, width=64, height=32, num_inference_steps=steps
    )
    params = replace(params, noise_scheduler=name, **options)
    if task == "text-to-image":
        return params
    image = Image.radial_gradient("L").convert("RGB")
    mask = Image.linear_gradient("L") if task == "inpainting" else None
    return replace(params, image=image, mask_image=mask, strength=0.6)


def by_hand(stock: DiffusionPipeline, params: GenerationParams) -> torch.Tensor:
    """Generate with stock diffusers, as its documentation shows."""
    name = params.noise_scheduler or ""
    spacing = {"use_karras_sigmas": True} if name.endswith("_karras") else {}
    stock.register_modules(
        scheduler=NOISE_SCHEDULERS[name].from_config(stock.scheduler.config, **spacing)
    )
    arguments: dict[str, Any] = {
        "width": params.width,
        "height": params.height,
        "num_inference_steps": params.num_inference_steps,
        "output_type": "pt",
        "generator": torch.Generator("cpu").manual_seed(params.seed),
    }
    if params.image is not None:
        size = (64, 32)
        arguments |= {"image": fitted(params.image, "RGB", size), "strength": params.strength}
        stock = diffusers.AutoPipelineForImage2Image.from_pipe(stock)
        if params.mask_image is not None:
            stock = diffusers.AutoPipelineForInpainting.from_pipe(stock)
            arguments["mask_image"] = fitted(params.mask_image, "L", size)
        else:  # it takes the size of the image
            del arguments["width"], arguments["height"]
    stock.set_progress_bar_config(disable=True)
    pixels: torch.Tensor = stock(prompt=params.prompt, **arguments).images[0]
    return pixels


@pytest.fixture(scope="module")
def sdxl() -> Iterator[Engine]:
    """A tiny SDXL whose noise scheduler has the keys of the real config file."""
    own = from_json(diffusers.EulerDiscreteScheduler, timestep_spacing="leading")
    model = config("sdxl")
    with Engine(LoadedPipeline(build("sdxl", own), model), model, FIFO) as engine:
        yield engine


def test_a_real_config_offers_all_but_the_faulty(sdxl: Engine) -> None:
    assert sdxl.info.noise_schedulers == tuple(NOISE_SCHEDULERS)
    faults = sdxl.info.unavailable_noise_schedulers
    assert {name: set(reasons) for name, reasons in faults.items()} == {"pndm": IMAGE_TASKS}


@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_offered_noise_schedulers_generate_what_stock_diffusers_does(
    sdxl: Engine, task: Task
) -> None:
    """Requests with all of them run together; some call the denoiser twice a step."""
    own = from_json(diffusers.EulerDiscreteScheduler, timestep_spacing="leading")
    requests = [
        request(name, task)
        for name in sdxl.info.noise_schedulers
        if task not in sdxl.info.unavailable_noise_schedulers.get(name, {})
    ]
    assert len(requests) == (10 if task == "text-to-image" else 9)
    streams = [sdxl.stream(params) for params in requests]
    for params, stream in zip(requests, streams, strict=True):
        *_, last = stream
        assert isinstance(last, Completed), last
        right = by_hand(build("sdxl", own), params)
        assert float((torch.as_tensor(last.result.pixels) - right).abs().max()) <= 1e-5
    assert sdxl.stats().mean_batch_size > 2


def test_a_noise_scheduler_is_rejected_in_the_tasks_that_it_spoils(sdxl: Engine) -> None:
    sdxl.generate(request("pndm", "text-to-image"))
    for task in IMAGE_TASKS:
        with pytest.raises(InvalidRequest) as raised:
            sdxl.generate(request("pndm", task))
        assert raised.value.param == "scheduler"
        message = str(raised.value)
        assert f"does not support the scheduler 'pndm' for {task}: it starts at timestep" in message
        assert message.endswith(
            "use one of ddim, ddpm, euler, euler_a, heun, dpm++, unipc, euler_karras, dpm++_karras."
        )


def test_stock_pndm_adds_far_too_much_noise_to_an_image(demo_pipeline: LoadedPipeline) -> None:
    """The fault is real: a weak edit of the trained model loses its image."""
    drawn = demo_pipeline.generate(GenerationParams("a red circle on blue", 1, None, 64, 64, 20))[0]
    image = Image.fromarray((drawn * 255).round().byte().permute(1, 2, 0).numpy())

    def distance(name: str) -> float:
        params = GenerationParams("a red circle on blue", 1, None, 64, 64, 20)
        params = replace(params, noise_scheduler=name, image=image, strength=0.25)
        return float((demo_pipeline.generate(params)[0] - drawn).abs().mean())

    assert distance("pndm") > 3 * distance("euler")


def test_a_model_of_flow_offers_only_those_of_flow(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = config("sana")
    with Engine(LoadedPipeline(build("sana"), model), model) as engine:
        assert engine.info.noise_schedulers == ("dpm++", "unipc")
        assert set(engine.info.fewest_steps) == {"dpm++", "unipc"}
        faults = engine.info.unavailable_noise_schedulers
        without_flow = {"ddim", "ddpm", "pndm", "euler", "euler_a", "heun", "euler_karras"}
        assert set(faults) == {*without_flow, "dpm++_karras"}
        for name, reasons in faults.items():
            if name in without_flow:
                assert "prediction_type given as flow_prediction" in reasons["text-to-image"]
            with pytest.raises(InvalidRequest, match=r"use one of dpm\+\+, unipc"):
                engine.submit(request(name, "text-to-image"), lambda _: None)
            lines = [
                line for line in caplog.messages if f"scheduler {name} is not offered:" in line
            ]
            assert len(lines) == 1
        for name in engine.info.noise_schedulers:
            assert torch.isfinite(engine.generate(request(name, "text-to-image")).pixels).all()


def test_noise_schedulers_must_keep_zero_snr() -> None:
    own = from_json(diffusers.DDIMScheduler, **ZERO_SNR)
    faults = trials("stable-diffusion", own).faults
    assert set(faults) == {"pndm", "heun", "euler_karras", "dpm++_karras"}
    for name in ("pndm", "heun"):
        assert set(faults[name]) == {"text-to-image", *IMAGE_TASKS}
        reasons = set(faults[name].values())
        assert reasons == {"it does not keep the model's rescale_betas_zero_snr"}
    for name in ("euler_karras", "dpm++_karras"):  # most steps have nearly nothing but noise
        assert set(faults[name]) == IMAGE_TASKS
        assert all("not near 600" in reason for reason in faults[name].values())


def test_the_demo_model_has_zero_snr(demo_engine: Engine) -> None:
    assert demo_engine.info.noise_schedulers == tuple(
        name for name in NOISE_SCHEDULERS if name not in {"pndm", "heun"}
    )


def test_noise_schedulers_must_keep_betas_that_are_a_default_of_the_models_class() -> None:
    """diffusers drops keys that the config file leaves out, and classes differ in their default."""
    faults = trials("pixart-sigma").faults
    assert faults["heun"] == {"text-to-image": "it does not keep the model's beta_start, beta_end"}


def test_noise_schedulers_must_not_clip_latents() -> None:
    faults = trials("pixart-sigma").faults
    clips = "it cuts latents off (clip_sample), which the model's own does not"
    assert faults["ddim"] == faults["ddpm"] == {"text-to-image": clips}
    own = diffusers.DPMSolverMultistepScheduler.from_config({"clip_sample": False})
    assert set(trials("pixart-sigma", own).faults) == {"heun"}


def test_a_model_whose_own_clips_keeps_those_that_clip() -> None:
    own = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    faults = trials("sdxl", own).faults
    assert set(faults) == {"pndm"}
    assert set(faults["pndm"]) == IMAGE_TASKS


def test_values_that_are_not_finite_are_found() -> None:
    """With zero SNR, epsilon says nothing of the image at the last timestep."""
    own = from_json(
        diffusers.EulerDiscreteScheduler,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    faults = trials("stable-diffusion", own).faults
    assert faults["ddim"]["text-to-image"] == "it gives values that are not finite"
    assert "euler" not in faults


def test_a_network_whose_values_are_not_finite_is_found() -> None:
    """A fault of the real denoiser: it has values for whole timesteps only."""
    own = from_json(diffusers.DPMSolverMultistepScheduler)
    pipeline = LoadedPipeline(build("sdxl", own), config("sdxl"))

    def spoil(_: Any, args: tuple[Any, ...], output: tuple[torch.Tensor]) -> Any:
        return (output[0] * torch.nan,) if args[1].is_floating_point() else output

    pipeline.denoisers["unet"].register_forward_hook(spoil)
    rendezvous = Rendezvous(pipeline.sites)
    with torch.no_grad():
        faults = try_noise_schedulers(pipeline, rendezvous, ("text-to-image",)).faults
    assert set(faults) == {"euler", "euler_a", "heun", "euler_karras"}
    for reasons in faults.values():
        assert reasons == {"text-to-image": "it gives values that are not finite"}


def test_a_result_that_a_lack_of_memory_decided_is_not_kept(tmp_path: Path) -> None:
    own = from_json(diffusers.DPMSolverMultistepScheduler)
    pipeline = LoadedPipeline(build("sdxl", own), config("sdxl"))

    def spoil(_: Any, args: tuple[Any, ...]) -> None:
        if args[1].is_floating_point():
            raise torch.OutOfMemoryError("CUDA out of memory")

    path = tmp_path / "profile.json"
    pipeline.denoisers["unet"].register_forward_pre_hook(spoil)
    with Engine(pipeline, config("sdxl"), EngineConfig(profile_path=str(path))) as engine:
        faults = engine.info.unavailable_noise_schedulers
        assert faults["euler"]["text-to-image"] == "OutOfMemoryError: CUDA out of memory"
        assert "dpm++" in engine.info.noise_schedulers
    assert not path.exists()


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (diffusers.EulerDiscreteScheduler, {}),
        (diffusers.DPMSolverMultistepScheduler, {}),
        (diffusers.UniPCMultistepScheduler, {}),
        (diffusers.HeunDiscreteScheduler, {}),
        (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
    ],
)
def test_no_right_noise_scheduler_is_rejected(
    kind: Any, more: dict[str, Any], karras: bool
) -> None:
    own = from_json(kind, use_karras_sigmas=karras, **more)
    faults = trials("sdxl", own).faults
    assert {name: set(reasons) for name, reasons in faults.items()} == {"pndm": IMAGE_TASKS}


def test_a_model_that_predicts_the_image_offers_those_that_read_it() -> None:
    own = from_json(diffusers.DPMSolverSinglestepScheduler, prediction_type="sample")
    faults = trials("sdxl", own).faults
    assert set(faults) == {"pndm", "euler_a"}
    for reasons in faults.values():
        assert "sample" in reasons["text-to-image"] or "prediction" in reasons["text-to-image"]


def test_a_model_that_follows_another_rule_offers_none() -> None:
    """Timesteps of a continuous Euler are logarithms of sigmas, and the others' are not."""
    own = from_json(
        diffusers.EulerDiscreteScheduler,
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        prediction_type="v_prediction",
    )
    found = trials("sdxl", own)
    assert found.offered(tuple(NOISE_SCHEDULERS), ("text-to-image",)) == ()
    assert "default" not in found.faults
    assert found.faults["ddim"]["text-to-image"].startswith(
        "the model's own noise scheduler follows another rule: at timestep 1 the latents have"
    )


def test_the_models_own_is_tried_as_well(caplog: pytest.LogCaptureFixture) -> None:
    own = from_json(diffusers.PNDMScheduler)
    model = config("sdxl")
    # Its fewest steps are too many for a certification.
    alone = EngineConfig(max_running=1)
    with Engine(LoadedPipeline(build("sdxl", own), model), model, alone) as engine:
        assert set(engine.info.unavailable_noise_schedulers["default"]) == IMAGE_TASKS
        engine.generate(request(None, "text-to-image"))
        for task in IMAGE_TASKS:
            with pytest.raises(InvalidRequest, match=f"'default' for {task}: .*use one of ddim,"):
                engine.generate(request(None, task))
            engine.generate(request("euler", task))
    for task in IMAGE_TASKS:
        assert f"requests for {task} must choose a scheduler" in caplog.text


def test_a_noise_scheduler_that_cannot_be_made_is_not_offered() -> None:
    own = diffusers.DDPMScheduler(beta_schedule="sigmoid", clip_sample=False, steps_offset=1)
    model = config("stable-diffusion")
    with Engine(LoadedPipeline(build("stable-diffusion", own), model), model) as engine:
        assert "ddpm" in engine.info.noise_schedulers
        assert "euler" not in engine.info.noise_schedulers
        reason = engine.info.unavailable_noise_schedulers["euler"]["text-to-image"]
    assert reason.startswith("NotImplementedError: sigmoid is not implemented for")


def test_trials_run_without_batching() -> None:
    model = config("sana")
    alone = EngineConfig(max_running=1)
    with Engine(LoadedPipeline(build("sana"), model), model, alone) as engine:
        assert engine.info.noise_schedulers == ("dpm++", "unipc")
