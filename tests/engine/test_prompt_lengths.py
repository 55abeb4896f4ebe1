"""Requests with prompts of different lengths share calls, and get the images that they get alone.

Qwen-Image passes embeddings as long as the prompt, Z-Image lists of them, ERNIE-Image also lengths.
Bria FIBO has a mask over text and image that no padding at the end can fit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from serve_app.config.models import ModelConfig
from serve_app.config.speed import SpeedConfig
from serve_app.engine.batching.padding import SHORTEST_BUCKET
from serve_app.engine.engine import Engine
from serve_app.engine.metrics import EngineMetrics
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference
from serve_app.metrics.registry import ENGINE
from serve_app.protocol.params import GenerationParams
from tests.conftest import FIFO
from tests.engine.engines import together
from tests.engine.startup.test_merging import certificate_of
from tests.more_pipelines import CERTIFIED, z_image
from tests.spoilt_pipelines import spoil
from tests.tiny_ernie import ernie_image
from tests.tiny_pipelines import CALL_KWARGS, FAMILIES, qwen_image

ROUNDING = 1e-5

JOINED: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any]]] = {
    "qwen-image": (qwen_image, {}),
    "z-image": (z_image, CERTIFIED["z-image"][1]),
    "ernie-image": (ernie_image, {"use_pe": False}),
}

PROMPTS = (
    "a red circle",
    "a green star on a white background and a pink cross on the left of it",
    "blue",
    "two yellow rings and a small cyan ring on a purple background",
    "a white square on a green background",
    "a black cross",
)


def requests_for(prompts: Sequence[str], guidance: float) -> list[GenerationParams]:
    return [
        GenerationParams(prompt, seed, "a ring" if guidance > 1 else None, 64, 32, 4, guidance)
        for seed, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module", params=JOINED)
def pipeline(request: pytest.FixtureRequest) -> LoadedPipeline:
    name: str = request.param
    build, call_kwargs = JOINED[name]
    model = ModelConfig(id=name, device="cpu", default_size_px=(64, 32), call_kwargs=call_kwargs)
    return LoadedPipeline(build(), model)


@pytest.fixture(scope="module")
def engine(pipeline: LoadedPipeline) -> Iterator[Engine]:
    model = ModelConfig(id=pipeline.class_name, device="cpu")
    with Engine(pipeline, model, FIFO, metrics=EngineMetrics(pipeline.class_name)) as engine:
        yield engine


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_mixed_lengths_share_calls_as_equal_ones_do(
    pipeline: LoadedPipeline, engine: Engine, guidance: float, report: Callable[[str], None]
) -> None:
    assert engine.info.sharing == "batched"
    assert not engine.info.sharing_note
    requests = requests_for(PROMPTS, guidance)
    mixed, batch = together(engine, requests)
    _, equal_batch = together(engine, requests_for(PROMPTS[:1] * len(PROMPTS), guidance))
    alone = [pipeline.generate(params)[0] for params in requests]
    difference = largest_difference(alone, mixed)
    report(
        f"{pipeline.class_name}, guidance {guidance}: mean batch {batch:.2f} for mixed prompt "
        f"lengths, {equal_batch:.2f} for equal ones; largest difference from alone {difference:.1e}"
    )
    assert batch >= 0.9 * equal_batch > 1.5
    assert difference <= ROUNDING


def test_each_task_joins_prompts(pipeline: LoadedPipeline, engine: Engine) -> None:
    if "image-to-image" not in engine.info.tasks:
        pytest.skip(f"{pipeline.class_name} is text-to-image only")
    image = Image.linear_gradient("L").convert("RGB")
    requests = [
        replace(params, image=image, strength=0.8) for params in requests_for(PROMPTS[:3], 4.0)
    ]
    images, batch = together(engine, requests)
    alone = [pipeline.generate(params)[0] for params in requests]
    assert largest_difference(alone, images) <= ROUNDING
    assert batch > 1.5


def test_no_limit_is_reported(engine: Engine) -> None:
    assert _limited(engine.info.pipeline) == 0


def _limited(model: str) -> float | None:
    return ENGINE.get_sample_value("diffusion_serve_sharing_limited", {"model": model})


def test_a_family_that_cannot_be_padded_says_so() -> None:
    build, call_kwargs, _ = CERTIFIED["bria-fibo"]
    model = ModelConfig(id="m", device="cpu", default_size_px=(32, 32), call_kwargs=call_kwargs)
    pipeline = LoadedPipeline(build(), model)
    requests = [
        replace(params, width=32, height=32)
        for params in requests_for(PROMPTS[:2] + PROMPTS[:2], 4.0)
    ]
    with Engine(pipeline, model, FIFO, metrics=EngineMetrics("limited")) as engine:
        assert engine.info.sharing == "batched"
        assert engine.info.sharing_note.startswith("only prompts of the same length share calls")
        images, batch = together(engine, requests)
    assert _limited("limited") == 1
    assert 1 < batch <= 2
    alone = [pipeline.generate(params)[0] for params in requests]
    assert largest_difference(alone, images) <= ROUNDING


def test_a_family_with_prompts_of_fixed_length_needs_no_padding() -> None:
    certificate = certificate_of(FAMILIES["flux"](), CALL_KWARGS["flux"], 2)
    assert not certificate.note
    assert not any(spec.joins_prompts for spec in certificate.specs.values())


def test_a_compiled_denoiser_gets_the_shapes_of_its_warm_up() -> None:
    """Prompts are padded to the first or the second bucket, and batches to powers of two."""
    shapes: list[tuple[int, ...]] = []

    def record(own: Callable[..., Any], arguments: dict[str, Any], _: int) -> Any:
        shapes.append(tuple(arguments["encoder_hidden_states"].shape[:2]))
        return own(**arguments)

    model = ModelConfig(
        id="m", device="cpu", default_size_px=(64, 32), speed=SpeedConfig(compile=True)
    )
    pipeline = LoadedPipeline(spoil(qwen_image(), record), model)  # without the compiler
    long = " ".join(["red"] * (SHORTEST_BUCKET + 20))
    requests = requests_for((*PROMPTS[:5], long, f"{long} blue"), 4.0)
    with Engine(pipeline, model, FIFO) as engine:
        warm = set(shapes)
        shapes.clear()
        images, batch = together(engine, requests)
    assert set(shapes) <= warm
    assert {tokens for _, tokens in shapes} == {SHORTEST_BUCKET, 2 * SHORTEST_BUCKET}
    assert batch > 1.5
    alone = [pipeline.generate(params)[0] for params in requests]
    assert largest_difference(alone, images) <= ROUNDING


def _without_mask(own: Callable[..., Any], arguments: dict[str, Any], _: int) -> Any:
    """Let the padding be read as if it were text."""
    return own(**arguments | {"encoder_hidden_states_mask": None})


def _by_longest(own: Callable[..., Any], arguments: dict[str, Any], _: int) -> Any:
    """Let each row depend on the longest prompt of the batch."""
    (rows,) = own(**arguments)
    longest = max(text.shape[0] for text in arguments["cap_feats"])
    return ([row * (1 + 1e-2 * longest) for row in rows],)


def _by_neighbours(own: Callable[..., Any], arguments: dict[str, Any], _: int) -> Any:
    """Mix a little of other rows into each row, only among prompts of different lengths."""
    (rows,) = own(**arguments)
    mixed = len({text.shape[0] for text in arguments["cap_feats"]}) > 2  # one is negative
    mean = torch.stack(rows).mean(0)
    return ([row + 1e-5 * mean for row in rows] if mixed else rows,)


@pytest.mark.parametrize(
    ("build", "call_kwargs", "fault", "reason"),
    [
        (qwen_image, {}, _without_mask, "a merged call differs from a single one"),
        (z_image, CERTIFIED["z-image"][1], _by_longest, "a merged call differs from a single one"),
        (z_image, CERTIFIED["z-image"][1], _by_neighbours, "a row depends on its neighbours"),
    ],
)
def test_a_network_that_padding_changes_is_not_padded(
    build: Callable[[], DiffusionPipeline], call_kwargs: dict[str, Any], fault: Any, reason: str
) -> None:
    """Each generates images alone and at equal lengths, so only mixed lengths show the fault."""
    certificate = certificate_of(spoil(build(), fault), call_kwargs, 4)
    assert certificate.sharing == "batched"
    assert certificate.note.startswith("only prompts of the same length share calls: " + reason)
    assert not any(spec.joins_prompts for spec in certificate.specs.values())
