"""The engine on a GPU, with full-size networks in bfloat16 and random weights."""

import gc
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from serve_app.config.models import EngineConfig, ModelConfig
from serve_app.engine.device import memory_meter
from serve_app.engine.engine import Engine
from serve_app.engine.model.pipeline import LoadedPipeline
from serve_app.engine.startup.comparison import largest_difference, psnr_db
from serve_app.errors import NotFinite
from serve_app.protocol.events import Completed, Event, Failed, Progress
from serve_app.protocol.params import GenerationParams
from tests.conftest import FIFO
from tests.engine.startup.starts import NEW, reported_reuse
from tests.full_size import MODELS
from tests.tiny_pipelines import FAMILIES
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DEVICE = torch.device("cuda")

APART_DB = 10.0
"""Least distance in decibels: an image is so much nearer to itself than to one of another seed.

In bfloat16 the choice of kernels moves pixels visibly, so images have no tolerance of their own.
"""

FLAT_BYTES = 2**20
"""Limit for growth: less than the latents of the requests in between."""

Full = tuple[str, DiffusionPipeline]
"""Name and pipeline of a model."""

only_sd15 = pytest.mark.parametrize("full", ["sd15"], indirect=True)


@pytest.fixture(scope="module", params=list(MODELS))
def full(request: pytest.FixtureRequest) -> Iterator[Full]:
    yield request.param, MODELS[request.param](DEVICE, torch.bfloat16)
    gc.collect()
    torch.cuda.empty_cache()


def load(full: Full, side: int) -> tuple[LoadedPipeline, ModelConfig]:
    """Return a pipeline for an engine; its certification generates squares of this side."""
    name, pipeline = full
    model = ModelConfig.model_validate(
        {"id": name, "device": DEVICE.type, "default_size_px": (side, side)}
    )
    return LoadedPipeline(pipeline, model), model


def four_requests(side: int) -> list[GenerationParams]:
    """Return requests that differ in everything except the size."""
    prompts = ["a red circle", "two stars on black", "a small cross", "a ring and a square"]
    return [
        GenerationParams(
            prompt,
            seed,
            width=side,
            height=side,
            num_inference_steps=4 + seed,
            guidance_scale=3.0 + seed,
        )
        for seed, prompt in enumerate(prompts)
    ]


def generate(engine: Engine, requests: Sequence[GenerationParams]) -> list[Tensor]:
    """Generate all requests at once; raise unless each completes."""
    images = []
    for events in [engine.stream(params) for params in requests]:
        *_, last = events
        assert isinstance(last, Completed), last
        images.append(last.result.pixels.cpu())
    return images


@pytest.mark.parametrize("side", [512, 1024])
def test_four_requests_together_give_the_images_of_separate_ones(
    full: Full, side: int, report: Callable[[str], None]
) -> None:
    pipeline, model = load(full, side)
    requests = four_requests(side)
    separate = [pipeline.generate(params)[0].cpu() for params in requests]
    with Engine(pipeline, model, FIFO) as engine:
        assert engine.info.sharing == "batched", engine.info.sharing_note
        together = generate(engine, requests)
        batch = engine.stats().mean_batch_size
    difference = largest_difference(separate, together)
    worst = min(psnr_db(*pair) for pair in zip(separate, together, strict=True))
    others = max(psnr_db(*pair) for pair in pairwise(separate))
    deviation = engine.certificate.deviation
    assert deviation is not None
    report(
        f"{torch.cuda.get_device_name()}, {model.id} at {side}x{side}: {batch:.1f} requests per "
        f"call, PSNR {worst:.1f} dB and largest difference {difference:.2g} to separate ones; "
        f"neighbours {deviation.neighbours:.1e}, alone or merged {deviation.batching:.1e}"
    )
    assert batch > 1.5
    assert worst > others + APART_DB


@only_sd15
def test_a_seed_generates_the_same_image_in_any_batch(full: Full) -> None:
    pipeline, model = load(full, 512)
    first, *others = four_requests(512)
    with Engine(pipeline, model, FIFO) as engine:
        [once] = generate(engine, [first])
        [again] = generate(engine, [first])
        batched, *_ = generate(engine, [first, *others])
        [other] = generate(engine, [replace(first, seed=99)])
    assert torch.equal(once, again)
    assert psnr_db(once, batched) > psnr_db(once, other) + APART_DB


@only_sd15
def test_an_image_that_is_not_finite_fails_and_no_other(full: Full) -> None:
    """The engine counts it later, because it does not wait for the device."""
    pipeline, model = load(full, 512)
    decodings = 0

    def spoil_second(_: nn.Module, args: object, output: Tensor) -> Tensor:
        nonlocal decodings
        decodings += 1
        return output * math.inf if decodings == 2 else output

    with Engine(pipeline, model, FIFO) as engine:
        hook = pipeline.stock.vae.decoder.conv_out.register_forward_hook(spoil_second)
        try:
            streams = [engine.stream(params) for params in four_requests(512)]
            ends = [list(events)[-1] for events in streams]
        finally:
            hook.remove()
    failed = [end.error for end in ends if isinstance(end, Failed)]
    assert [type(error) for error in failed] == [NotFinite]
    for end in ends:
        if isinstance(end, Completed):
            assert end.result.pixels.isfinite().all()
    what = [entry.what for entry in engine.stats().log]
    assert (what.count("completed"), what.count("failed")) == (3, 1)


@only_sd15
def test_ended_requests_release_their_memory(full: Full, report: Callable[[str], None]) -> None:
    """Covers completed requests and requests that are cancelled after a step."""
    side = 256
    pipeline, model = load(full, side)
    requests = [replace(params, num_inference_steps=2) for params in four_requests(side)]

    ends: Counter[type[Event]] = Counter()

    def submit(engine: Engine, params: GenerationParams, cancels: bool) -> None:
        number: list[int] = []

        def on_event(event: Event) -> None:
            if cancels and isinstance(event, Progress) and number:
                engine.cancel(number[0])
            if isinstance(event, Completed | Failed):
                ends[type(event)] += 1

        number.append(engine.submit(params, on_event))

    def generate_eight(engine: Engine) -> None:
        expected = ends.total() + 8
        for index, params in enumerate(requests * 2):
            submit(engine, params, cancels=index % 3 == 0)
        wait_until(lambda: ends.total() == expected)

    def allocated_after(engine: Engine, rounds: int) -> int:
        for _ in range(rounds):
            generate_eight(engine)
        gc.collect()
        return torch.cuda.memory_allocated()

    with Engine(pipeline, model, FIFO) as engine:
        early = allocated_after(engine, rounds=8)
        late = allocated_after(engine, rounds=32)
    assert ends[Completed] >= 200
    assert ends[Failed] > 0
    report(
        f"{torch.cuda.get_device_name()}, {model.id}: {(late - early) / 2**10:.0f} KiB more on the "
        f"device after {ends[Completed]} finished and {ends[Failed]} cancelled requests"
    )
    assert late - early < FLAT_BYTES


@only_sd15
def test_fewer_requests_run_at_a_time_if_memory_runs_out(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    side = 1024
    pipeline, model = load(full, side)
    requests = [
        GenerationParams("a red circle", seed, width=side, height=side, num_inference_steps=2)
        for seed in range(32)
    ]
    config = EngineConfig(scheduling="fifo", max_batch_size=len(requests), warmup_sizes_px=())

    def peak_bytes(engine: Engine, requests: Sequence[GenerationParams]) -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        generate(engine, requests)
        return torch.cuda.max_memory_allocated() - before

    with Engine(pipeline, model, config) as engine:
        one, all_of_them = peak_bytes(engine, requests[:1]), peak_bytes(engine, requests)
        assert all_of_them > 1.5 * one, "a large batch needs too little memory for this test"
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        rest = torch.empty(free - (one + all_of_them) // 2, dtype=torch.uint8, device=DEVICE)
        with caplog.at_level(logging.WARNING):
            images = generate(engine, requests)
        del rest
        torch.cuda.empty_cache()
    assert "OutOfMemoryError" in caplog.text
    separate = [pipeline.generate(params)[0].cpu() for params in requests[:4]]
    worst = min(psnr_db(*pair) for pair in zip(separate, images[:4], strict=True))
    assert worst > max(psnr_db(*pair) for pair in pairwise(separate)) + APART_DB


def test_the_meter_sees_the_memory_of_a_call_and_counts_it_as_available_again() -> None:
    meter = memory_meter(DEVICE)
    assert meter is not None
    taken_bytes = 64 * 2**20

    def call() -> int:
        return torch.empty(taken_bytes, dtype=torch.uint8, device=DEVICE).numel()

    call()  # torch keeps the memory from now on
    before = meter.available()
    assert meter.measure(call) == (taken_bytes, taken_bytes)
    assert meter.available() >= before - taken_bytes // 2  # other processes may use a little


def test_weights_read_to_the_gpu_equal_weights_moved_there(tmp_path: Path) -> None:
    FAMILIES["sdxl"]().save_pretrained(tmp_path)
    model = ModelConfig(id="m", path=str(tmp_path), device="cuda", dtype="float32")
    read = LoadedPipeline.load(model)
    moved = LoadedPipeline(FAMILIES["sdxl"]().to(DEVICE), model)
    params = GenerationParams("a cat", 1, width=64, height=32, num_inference_steps=2)
    assert torch.equal(read.generate(params), moved.generate(params))
    for name, network in read.stock.components.items():
        if isinstance(network, torch.nn.Module):
            other = moved.stock.components[name].state_dict()
            for key, weights in network.state_dict().items():
                assert weights.device.type == "cuda"
                assert torch.equal(weights, other[key])


def test_the_profile_of_a_start_on_the_gpu_is_reused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FAMILIES["sdxl"]().save_pretrained(tmp_path / "model")
    model = ModelConfig(id="m", path=str(tmp_path / "model"), device="cuda")
    config = EngineConfig(profile_path=str(tmp_path / "profile.json"), max_batch_size=4)
    caplog.set_level(logging.INFO)
    for reuse in (NEW, "certification reused"):
        with Engine.load(model, config):
            assert reported_reuse(caplog.messages).startswith(reuse)
